"""Fine-tune a wav2vec2 of the XLSR kind on characters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from pydantic import Field, model_validator
from torch import nn

from training.config import Section
from training.pretrained import fill, model_from_hub, read_weights
from training.recipes.wav2vec2_ctc.export import export_graph
from training.recipes.wav2vec2_ctc.model import Wav2Vec2Config, Wav2Vec2Ctc, from_published
from training.stages.recipe import Facts, Recipe, Waveforms
from training.transformer_quantize import candidates
from training.vocabulary import TokenCodec


class Wav2Vec2Settings(Section):
    """The `model` section."""

    base: str = Field(
        default="facebook/wav2vec2-large-xlsr-53",
        description="Pre-trained checkpoint: a folder, or its hub name.",
    )
    revision: str | None = Field(default=None, description="Commit of the hub checkpoint.")
    shape: Wav2Vec2Config | None = Field(
        default=None,
        description="Start from random weights of this shape instead of `base`; all of them learn.",
    )
    checkpoint: Path | None = Field(
        default=None, description="Another run's weights.safetensors of this `shape` to start from."
    )
    frozen_features: bool = Field(
        default=True, description="The convolutional feature encoder does not learn."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)
    mask_share: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the frames masked while training."
    )
    max_window_s: float = Field(default=30.0, ge=1, description="Longest window the service gives at once.")

    @model_validator(mode="after")
    def _of_a_shape(self) -> Wav2Vec2Settings:
        if self.checkpoint is not None and self.shape is None:
            raise ValueError("checkpoint needs the shape it has; published checkpoints are a base")
        return self


class Wav2Vec2Recipe(Recipe):
    """wav2vec2-large-xlsr-53 and its like with a CTC head, from recordings to a bundle."""

    name = "wav2vec2_ctc"
    settings_type = Wav2Vec2Settings
    settings: Wav2Vec2Settings

    @property
    def _convolved(self) -> Wav2Vec2Config:
        """A shape with the right convolutions: every published variant has the same."""
        return self.settings.shape or Wav2Vec2Config()

    def facts(self) -> Facts:
        """20 ms per frame, 25 ms for the first."""
        config = self._convolved
        return Facts(
            config.stride_samples / 16_000, self.settings.max_window_s, min_samples=config.min_samples
        )

    def room(self, samples: int) -> int:
        """Without padding, the last frame needs all of its samples."""
        return max(0, self._convolved.frames(samples))

    def network(self, codec: TokenCodec) -> nn.Module:
        """The pre-trained network with a new head, or a new network."""
        if self.settings.shape is not None:
            network = self._made(self.settings.shape, codec)
            if self.settings.checkpoint is not None:
                fill(network, read_weights(self.settings.checkpoint))
            return network
        from transformers import Wav2Vec2Model

        # HuBERT (Hsu et al. 2021) is the same network, taught otherwise
        model = model_from_hub(
            Wav2Vec2Model, self.settings.base, self.settings.revision, "wav2vec2", "hubert"
        )
        network = self._made(Wav2Vec2Config.from_transformers(model.config), codec)
        fill(network, from_published(model.state_dict()), new=("head.",), optional=("masked",))
        if self.settings.frozen_features:
            network.features.requires_grad_(False)
        return network

    def _made(self, config: Wav2Vec2Config, codec: TokenCodec) -> Wav2Vec2Ctc:
        return Wav2Vec2Ctc(
            config,
            len(codec.vocabulary),
            dropout=self.settings.dropout,
            mask_share=self.settings.mask_share,
        )

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """Normalisation, feature encoder, Transformer and head in one graph."""
        if not isinstance(network, Wav2Vec2Ctc):
            raise TypeError(f"expected Wav2Vec2Ctc, got {type(network).__name__}")
        return export_graph(network)

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Dynamic and static INT8 on the matrix products, the feature encoder's included."""
        yield from candidates(graph, out, calibration)
