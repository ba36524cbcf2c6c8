"""A frozen Whisper or PhoWhisper encoder with a CTC head, on true lengths or on 30 padded seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx
from pydantic import Field
from torch import Tensor, nn

from training.config import Section
from training.pretrained import config_from_hub, fill, model_from_hub
from training.recipes.whisper_ctc.export import export_graph
from training.recipes.whisper_ctc.model import (
    FRAME_STRIDE_S,
    MAX_WINDOW_S,
    MIN_SAMPLES,
    EncoderConfig,
    WhisperCtc,
    head_shape,
    is_openai,
    read_openai,
    read_published,
)
from training.stages.recipe import Facts, Recipe, Waveforms
from training.tokenizer import ByteLevelCodec, load_tokenizer
from training.transformer_quantize import candidates
from training.vocabulary import TokenCodec


class WhisperCtcSettings(Section):
    """The `model` section."""

    base: str = Field(
        default="vinai/PhoWhisper-tiny",
        description="Whisper checkpoint: a folder with tokenizer, its hub name, or OpenAI's own file (*.pt), "
        "which has no tokenizer: the outputs are then the language's characters.",
    )
    revision: str | None = Field(default=None, description="Commit of the hub checkpoint.")
    shape: EncoderConfig | None = Field(
        default=None,
        description="Start from random weights of this shape instead of `base`. The encoder then learns, "
        "too, and the outputs are the language's characters.",
    )
    checkpoint: Path | None = Field(
        default=None,
        description="A published Lightning checkpoint (`encoder.*`, `ctc_head.*`), or another run's "
        "weights.safetensors, to start from.",
    )
    head_width: int | None = Field(
        default=None, ge=1, description="Hidden width of the head; default: encoder's."
    )
    frozen_encoder: bool = Field(default=True, description="Only the head learns.")
    length: Literal["true", "fixed30"] | None = Field(
        default=None,
        description="Run on the audio's own length, or on 30 padded seconds as Whisper does. Default: padded "
        "where the encoder is frozen, which knows nothing else, on the own length where it learns.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def fixed(self) -> bool:
        """Whether the network runs on 30 padded seconds."""
        if self.length is None:
            return self.frozen_encoder and self.shape is None
        return self.length == "fixed30"


class WhisperCtcRecipe(Recipe):
    """A Whisper encoder with a CTC head `Linear-GELU-LayerNorm-Linear`, from recordings to a bundle."""

    name = "whisper_ctc"
    settings_type = WhisperCtcSettings
    settings: WhisperCtcSettings

    def _published(self) -> dict[str, Tensor] | None:
        return read_published(self.settings.checkpoint) if self.settings.checkpoint else None

    def codec(self) -> TokenCodec:
        """The checkpoint's tokenizer; the blank is its pad token, the outputs are those of `ctc_head.3`.

        Characters where the weights start from random or from a file of OpenAI's.
        """
        if self.settings.shape is not None or is_openai(self.settings.base):
            return super().codec()
        tokenizer = load_tokenizer(self.settings.base, self.settings.revision)
        published = self._published()
        return ByteLevelCodec(tokenizer, head_shape(published)[1] if published else None)

    def facts(self) -> Facts:
        """20 ms per frame, 30 s of positions."""
        padded_s = MAX_WINDOW_S if self.settings.fixed else None
        return Facts(FRAME_STRIDE_S, MAX_WINDOW_S, MIN_SAMPLES, longest_s=MAX_WINDOW_S, padded_s=padded_s)

    def network(self, codec: TokenCodec) -> nn.Module:
        """The base's encoder with a new head, or encoder and head of a published checkpoint."""
        config, encoder = self._base()
        published = self._published()
        network = WhisperCtc(
            config,
            len(codec.vocabulary),
            hidden=head_shape(published)[0] if published is not None else self.settings.head_width,
            fixed=self.settings.fixed,
            dropout=self.settings.dropout,
            augment=self.config.augment.features if self.config.augment else None,
        )
        if published is not None:
            fill(network, published)
        elif encoder is not None:
            fill(network.encoder, encoder)
        else:
            network.encoder.start_from_random()
        network.encoder.requires_grad_(self.settings.shape is not None or not self.settings.frozen_encoder)
        return network

    def _base(self) -> tuple[EncoderConfig, dict[str, Tensor] | None]:
        if self.settings.shape is not None:
            return self.settings.shape, None
        source, revision = self.settings.base, self.settings.revision
        if is_openai(source):
            return read_openai(Path(source))
        from transformers import WhisperConfig, WhisperModel

        if self.settings.checkpoint is not None:
            config = config_from_hub(WhisperConfig, source, revision, "whisper")
            return EncoderConfig.from_transformers(config), None
        model = model_from_hub(WhisperModel, source, revision, "whisper", unused=("decoder.",))
        return EncoderConfig.from_transformers(model.config), model.encoder.state_dict()

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """Front end, encoder and head in one graph."""
        if not isinstance(network, WhisperCtc):
            raise TypeError(f"expected WhisperCtc, got {type(network).__name__}")
        return export_graph(network)

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Dynamic and static INT8 on the matrix products."""
        yield from candidates(graph, out, calibration)
