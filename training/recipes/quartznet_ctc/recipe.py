"""QuartzNet and Citrinet on characters, from scratch or with the encoder of a `.nemo` archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import Field
from torch import nn

from training.config import Section
from training.errors import ConfigError
from training.export import export_graph
from training.frontend import FrontendConfig
from training.quantize import static_convolutions
from training.recipes.quartznet_ctc.architectures import citrinet, quartznet
from training.recipes.quartznet_ctc.model import QuartzNet, QuartzNetConfig
from training.recipes.quartznet_ctc.network import QuartzNetCtc, transferred
from training.stages.recipe import Facts, Recipe, Waveforms
from training.vocabulary import TokenCodec


class QuartzNetSettings(Section):
    """The `model` section."""

    architecture: Literal["quartznet", "citrinet"] = "quartznet"
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the architecture: groups, repeat, channels, upsample, ...",
    )
    transfer_from: Path | None = Field(
        default=None,
        description="A .nemo archive whose encoder to start from; `architecture` is then its own.",
    )
    frozen_norms: bool = Field(
        default=True,
        description="With transfer_from: batch norms keep their statistics, as folded archives need.",
    )
    frozen_encoder: bool = Field(
        default=False, description="With transfer_from: only the new decoder learns."
    )
    frame_stride_s: float = Field(
        default=0.02, gt=0, description="With transfer_from: the archive's output stride."
    )
    max_window_s: float = Field(
        default=30.0, ge=1, description="Longest window the service gives the network at once."
    )


class QuartzNetRecipe(Recipe):
    """QuartzNet BxR and Citrinet with a CTC head, from recordings to a bundle."""

    name = "quartznet_ctc"
    settings_type = QuartzNetSettings
    settings: QuartzNetSettings

    def _architecture(self, outputs: int) -> QuartzNetConfig:
        options = dict(self.settings.options)
        for name in ("groups", "stem", "tail"):
            if name in options:
                options[name] = _tuples(options[name])
        try:
            if self.settings.architecture == "citrinet":
                return citrinet(outputs, **options)
            return quartznet(outputs, **options)
        except TypeError as error:
            raise ConfigError(f"model.options: {error}") from error

    def facts(self) -> Facts:
        """Stride of the network in seconds of the front end's hops."""
        hop_s = FrontendConfig().hop_s
        stride_s = self.settings.frame_stride_s
        if self.settings.transfer_from is None:
            config = self._architecture(2)
            stride_s = hop_s * (config.stride if config.stride else 1)
        return Facts(stride_s, self.settings.max_window_s, min_samples=FrontendConfig().hop_samples)

    def network(self, codec: TokenCodec) -> nn.Module:
        """A new network, or the archive's encoder with a new decoder."""
        outputs = len(codec.vocabulary)
        augment = self.config.augment.features if self.config.augment else None
        if self.settings.transfer_from is None:
            model = QuartzNet(self._architecture(outputs))
            return QuartzNetCtc(model, FrontendConfig(features=model.config.features), augment)
        model, frontend = transferred(self.settings.transfer_from, outputs)
        self._as_stated(model, frontend)
        if self.settings.frozen_encoder:
            model.blocks.requires_grad_(False)
        return QuartzNetCtc(model, frontend, augment, frozen_norms=self.settings.frozen_norms)

    def _as_stated(self, model: QuartzNet, frontend: FrontendConfig) -> None:
        """What the bundle will say of stride and rate must be the archive's. Raises ConfigError."""
        facts, stride_s = self.facts(), model.config.stride * frontend.hop_s
        if abs(stride_s - facts.frame_stride_s) > 1e-6:
            raise ConfigError(
                f"model.frame_stride_s: {facts.frame_stride_s:g}, the archive gives a frame every "
                f"{stride_s:g} s"
            )
        self.check_rate(frontend.sample_rate_hz)

    def export(self, network: nn.Module) -> onnx.ModelProto:
        """Node by node, see training/export.py."""
        if not isinstance(network, QuartzNetCtc):
            raise TypeError(f"expected QuartzNetCtc, got {type(network).__name__}")
        return export_graph(network.model, network.frontend.config)

    def quantized(self, graph: Path, out: Path, calibration: Waveforms) -> Iterator[tuple[str, Path]]:
        """Static QDQ, U8S8 per channel, first and last layer in float32; one per way to set the ranges."""
        for method, quantized in static_convolutions(onnx.load(graph), calibration):
            path = out / f"{method.replace(' ', '_')}.onnx"
            onnx.save(quantized, path)
            yield f"static QDQ, ranges: {method}", path


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
