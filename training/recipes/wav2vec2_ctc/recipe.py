"""Fine-tune a wav2vec2 of the XLSR kind on characters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from pydantic import Field
from torch import Tensor, nn

from training.config import Section
from training.errors import CheckpointError
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
    frozen_features: bool = Field(
        default=True, description="The convolutional feature encoder does not learn."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)
    mask_share: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the frames masked while training."
    )
    max_window_s: float = Field(default=30.0, gt=0, description="Longest window the service gives at once.")


class Wav2Vec2Recipe(Recipe):
    """wav2vec2-large-xlsr-53 and its like with a CTC head, from recordings to a bundle."""

    name = "wav2vec2_ctc"
    settings_type = Wav2Vec2Settings
    settings: Wav2Vec2Settings

    def facts(self) -> Facts:
        """Every variant has the same convolutions: 20 ms per frame, 25 ms for the first."""
        config = Wav2Vec2Config()
        return Facts(
            config.stride_samples / 16_000, self.settings.max_window_s, min_samples=config.min_samples
        )

    def network(self, codec: TokenCodec) -> nn.Module:
        """The pre-trained network with a new head."""
        from transformers import Wav2Vec2Model

        source, revision = self.settings.base, self.settings.revision or "main"
        try:
            model = Wav2Vec2Model.from_pretrained(source, revision=revision, dtype=torch.float32)
        except (OSError, ValueError) as error:
            problem = str(error).splitlines()[0]
            raise CheckpointError(f"{source}: no wav2vec2 checkpoint there: {problem}") from error
        network = Wav2Vec2Ctc(
            Wav2Vec2Config.from_transformers(model.config),
            len(codec.vocabulary),
            dropout=self.settings.dropout,
            mask_share=self.settings.mask_share,
        )
        fill(network, from_published(model.state_dict()))
        if self.settings.frozen_features:
            network.features.requires_grad_(False)
        return network

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """Normalisation, feature encoder, Transformer and head in one graph."""
        if not isinstance(network, Wav2Vec2Ctc):
            raise TypeError(f"expected Wav2Vec2Ctc, got {type(network).__name__}")
        return export_graph(network)

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Dynamic and static INT8 on the matrix products, the feature encoder's included."""
        yield from candidates(graph, out, calibration)


def fill(network: Wav2Vec2Ctc, state: dict[str, Tensor]) -> None:
    """Put pre-trained tensors into their places; the head stays new. Raises CheckpointError."""
    wanted = network.state_dict()
    for name, value in state.items():
        if name not in wanted or (wanted[name].shape != value.shape and not name.startswith("head.")):
            expected = tuple(wanted[name].shape) if name in wanted else None
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
    missing = [
        name for name in wanted if name not in state and not name.startswith("head.") and name != "masked"
    ]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing ({len(missing)} in all)")
    body = {name: value for name, value in state.items() if not name.startswith("head.")}
    network.load_state_dict(body, strict=False)
