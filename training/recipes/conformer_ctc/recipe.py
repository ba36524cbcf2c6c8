"""Fine-tune the encoder of a NeMo Conformer or FastConformer on characters, or train one from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
from pydantic import Field, model_validator
from torch import nn

from training.config import Section
from training.conformer import ConformerConfig, ConformerCtc
from training.conformer_graph import MAX_WINDOW_S, export_graph
from training.errors import CheckpointError, ConfigError
from training.export import MIN_SAMPLES
from training.frontend import FrontendConfig
from training.nemo_archive import NemoError, read_archive
from training.nemo_conformer import conformer_of
from training.pretrained import fill, read_weights
from training.stages.recipe import Facts, Recipe, Waveforms
from training.transformer_quantize import candidates
from training.vocabulary import TokenCodec

WINDOW_SAMPLES = 400
"""NeMo's 25 ms."""


class ConformerSettings(Section):
    """The `model` section."""

    transfer_from: Path | None = Field(
        default=None, description="A .nemo archive whose encoder to start from, with a new head."
    )
    shape: ConformerConfig = Field(
        default=ConformerConfig(upsample=4),
        description="Of the network; that of the archive of transfer_from, but for `upsample`.",
    )
    checkpoint: Path | None = Field(
        default=None, description="Another run's weights.safetensors of this `shape` to start from."
    )
    frozen_encoder: bool = Field(default=False, description="Only the new head learns.")
    frozen_norms: bool = Field(
        default=False, description="Batch normalisations keep their statistics: for batches of a few seconds."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_start(self) -> ConformerSettings:
        if self.transfer_from is not None and self.checkpoint is not None:
            raise ValueError("transfer_from and checkpoint: give one to start from")
        return self


class ConformerRecipe(Recipe):
    """Conformer and FastConformer with a CTC head, from recordings to a bundle."""

    name = "conformer_ctc"
    settings_type = ConformerSettings
    settings: ConformerSettings

    def facts(self) -> Facts:
        """Stride of the network in the front end's hops; the graph hears no more than its window."""
        stride_s = FrontendConfig().hop_s * self.settings.shape.stride
        return Facts(stride_s, MAX_WINDOW_S, min_samples=MIN_SAMPLES, longest_s=MAX_WINDOW_S)

    def network(self, codec: TokenCodec) -> nn.Module:
        """The archive's encoder with a new head, another run's network, or a new one."""
        settings = self.settings
        if settings.transfer_from is None:
            network = self._made(
                FrontendConfig(features=settings.shape.features, window_samples=WINDOW_SAMPLES), codec
            )
            if settings.checkpoint is not None:
                fill(network, read_weights(settings.checkpoint))
            return network
        found = self._archive(settings.transfer_from)
        network = self._made(found.frontend.config, codec)
        fill(network.network, found.network.state_dict(), new=("ctc_head.",))
        if settings.frozen_encoder:
            network.network.encoder.requires_grad_(False)
        return network

    def _archive(self, path: Path) -> ConformerCtc:
        """Raises CheckpointError, or ConfigError where the archive is not of the shape that is stated."""
        try:
            found = conformer_of(read_archive(path)).model
        except (NemoError, FileNotFoundError) as error:
            raise CheckpointError(f"model.transfer_from: {error}") from error
        shape = replace(found.config, upsample=self.settings.shape.upsample)
        if shape != self.settings.shape:
            field = next(
                name for name, value in vars(shape).items() if value != getattr(self.settings.shape, name)
            )
            raise ConfigError(
                f"model.shape.{field}: {getattr(self.settings.shape, field)!r}, the archive has "
                f"{getattr(shape, field)!r}"
            )
        self.check_rate(found.frontend.config.sample_rate_hz)
        return found

    def _made(self, frontend: FrontendConfig, codec: TokenCodec) -> ConformerCtc:
        return ConformerCtc(
            self.settings.shape,
            len(codec.vocabulary),
            frontend,
            dropout=self.settings.dropout,
            augment=self.config.augment.features if self.config.augment else None,
            frozen_norms=self.settings.frozen_norms,
        )

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """Front end, subsampling, layers and head in one graph."""
        if not isinstance(network, ConformerCtc):
            raise TypeError(f"expected ConformerCtc, got {type(network).__name__}")
        return export_graph(network)

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Dynamic and static INT8 on the matrix products."""
        yield from candidates(graph, out, calibration)
