"""A frozen Whisper or PhoWhisper encoder with a CTC head, on true lengths or on 30 padded seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from pydantic import Field
from torch import Tensor, nn

from training.config import Section
from training.errors import CheckpointError
from training.recipes.whisper_ctc.export import export_graph
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc, head_shape
from training.restricted_pickle import load_state_dict
from training.stages.recipe import Facts, Recipe, Waveforms
from training.tokenizer import ByteLevelCodec, load_tokenizer
from training.transformer_quantize import candidates
from training.vocabulary import TokenCodec


class WhisperCtcSettings(Section):
    """The `model` section."""

    base: str = Field(
        default="vinai/PhoWhisper-tiny",
        description="Whisper checkpoint with tokenizer: a folder, or its hub name.",
    )
    revision: str | None = Field(default=None, description="Commit of the hub checkpoint.")
    checkpoint: Path | None = Field(
        default=None,
        description="A published Lightning checkpoint (`encoder.*`, `ctc_head.*`) to start from.",
    )
    head_width: int | None = Field(
        default=None, ge=1, description="Hidden width of the head; default: encoder's."
    )
    frozen_encoder: bool = Field(default=True, description="Only the head learns.")
    length: Literal["true", "fixed30"] = Field(
        default="true", description="Run on the audio's own length, or on 30 padded seconds as Whisper does."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1)


class WhisperCtcRecipe(Recipe):
    """A Whisper encoder with a CTC head `Linear-GELU-LayerNorm-Linear`, from recordings to a bundle."""

    name = "whisper_ctc"
    settings_type = WhisperCtcSettings
    settings: WhisperCtcSettings

    def _published(self) -> dict[str, Tensor] | None:
        return load_state_dict(self.settings.checkpoint) if self.settings.checkpoint else None

    def codec(self) -> ByteLevelCodec:
        """The checkpoint's tokenizer; the blank is its pad token, the outputs are those of `ctc_head.3`."""
        tokenizer = load_tokenizer(self.settings.base, self.settings.revision)
        published = self._published()
        return ByteLevelCodec(tokenizer, head_shape(_checked(published))[1] if published else None)

    def facts(self) -> Facts:
        """20 ms per frame, 30 s of positions."""
        return Facts(frame_stride_s=0.02, max_window_s=30.0, min_samples=400, longest_s=30.0)

    def network(self, codec: TokenCodec) -> nn.Module:
        """The base's encoder with a new head, or encoder and head of a published checkpoint."""
        config, encoder = self._base()
        published = self._published()
        hidden, outputs = self.settings.head_width, len(codec.vocabulary)
        if published is not None:
            hidden, outputs = head_shape(_checked(published))
        network = WhisperCtc(
            config,
            outputs,
            hidden=hidden,
            fixed=self.settings.length == "fixed30",
            dropout=self.settings.dropout,
            augment=self.config.augment.features if self.config.augment else None,
        )
        state = published if published is not None else {f"encoder.{name}": v for name, v in encoder.items()}
        fill(network, state, partly=published is None)
        network.encoder.requires_grad_(not self.settings.frozen_encoder)
        return network

    def _base(self) -> tuple[EncoderConfig, dict[str, Tensor]]:
        from transformers import WhisperConfig, WhisperModel

        source, revision = self.settings.base, self.settings.revision or "main"
        try:
            if self.settings.checkpoint is not None:
                loaded: Any = WhisperConfig.from_pretrained(source, revision=revision)
                return EncoderConfig.from_transformers(loaded), {}
            model = WhisperModel.from_pretrained(source, revision=revision, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{source}: no Whisper checkpoint there: {str(error).splitlines()[0]}"
            ) from error
        return EncoderConfig.from_transformers(model.config), model.encoder.state_dict()

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """Front end, encoder and head in one graph."""
        if not isinstance(network, WhisperCtc):
            raise TypeError(f"expected WhisperCtc, got {type(network).__name__}")
        return export_graph(network)

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Dynamic and static INT8 on the matrix products."""
        yield from candidates(graph, out, calibration)


def _checked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in ("ctc_head.0.weight", "ctc_head.2.weight", "ctc_head.3.weight", "encoder.conv1.weight"):
        if name not in state:
            raise CheckpointError(f"{name} is missing; the checkpoint has {sorted(state)[:3]} and more")
    return state


def fill(network: WhisperCtc, state: dict[str, Tensor], *, partly: bool) -> None:
    """Put tensors into their places; `partly` allows the head to be missing. Raises CheckpointError."""
    wanted = network.state_dict()
    for name, value in state.items():
        if name.startswith(("encoder.", "ctc_head.")) and name not in wanted:
            raise CheckpointError(f"{name}: this network has no such tensor")
        if name in wanted and wanted[name].shape != value.shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(wanted[name].shape)}"
            raise CheckpointError(f"{name} has shape {shapes}")
    missing = [name for name in wanted if name not in state and not (partly and name.startswith("ctc_head."))]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing ({len(missing)} in all)")
    network.load_state_dict(
        {name: value.float() for name, value in state.items() if name in wanted}, strict=False
    )
