"""QuartzNet and Citrinet of a NeMo archive. `python -m training.convert nemo` makes a bundle of one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training.frontend import FrontendConfig
from training.nemo_archive import (
    QUARTZNET,
    NemoArchive,
    NemoError,
    check_filters,
    frontend_of,
    read_archive,
    section,
    vocabulary_of,
)
from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNet, QuartzNetConfig


@dataclass(frozen=True)
class NemoModel:
    """A network in evaluation mode with what it takes to use it."""

    model: QuartzNet
    frontend: FrontendConfig
    vocabulary: tuple[str, ...]
    """Characters in the order of the outputs, without the blank, which is the last output."""

    @property
    def blank_id(self) -> int:
        """NeMo's CTC blank comes after the vocabulary."""
        return len(self.vocabulary)


def read_nemo(archive: Path) -> NemoModel:
    """Load `archive`. Raises NemoError on anything unknown, FileNotFoundError where there is no file."""
    return quartznet_of(read_archive(archive))


def quartznet_of(archive: NemoArchive) -> NemoModel:
    """The network of an archive that is open. Raises NemoError."""
    if archive.encoder != QUARTZNET:
        raise NemoError(f"{archive.name}: encoder._target_: {archive.encoder}, expected {QUARTZNET}")
    vocabulary = vocabulary_of(archive.config)
    model_config = archive.configured(lambda config: _model_config(config, len(vocabulary) + 1))
    frontend = archive.configured(frontend_of)
    check_filters(archive.state, frontend)
    model = QuartzNet(model_config)
    model.load_state_dict(_rename(archive.state, model))
    return NemoModel(model.eval(), frontend, vocabulary)


def _single(value: Any, name: str) -> int:
    values = list(value) if isinstance(value, Sequence) else [value]
    if len(values) != 1:
        raise NemoError(f"{name}: {value!r}, expected one number")
    return int(values[0])


def _block(entry: Mapping[str, Any], index: int) -> BlockConfig:
    where = f"encoder.jasper[{index}]"
    kernel = _single(entry["kernel"], f"{where}.kernel")
    factor = float(entry.get("kernel_size_factor", 1.0))
    if factor != 1.0:
        kernel = int(kernel * factor)
        kernel += 1 - kernel % 2
    if entry.get("residual_dense") or entry.get("heads", -1) not in (-1, None):
        raise NemoError(f"{where}: dense residuals and heads are not known")
    if entry.get("residual_mode", "add") not in ("add", "stride_add"):
        raise NemoError(f"{where}.residual_mode: {entry['residual_mode']!r}, only sums are known")
    if entry.get("se") and entry.get("se_context_size", -1) != -1:
        raise NemoError(f"{where}.se_context_size: only the global context (-1) is known")
    return BlockConfig(
        filters=int(entry["filters"]),
        repeat=int(entry.get("repeat", 1)),
        kernel=kernel,
        stride=_single(entry.get("stride", 1), f"{where}.stride"),
        dilation=_single(entry.get("dilation", 1), f"{where}.dilation"),
        dropout=float(entry.get("dropout", 0.0)),
        residual=bool(entry.get("residual", False)),
        separable=bool(entry.get("separable", False)),
        squeeze_excitation=bool(entry.get("se", False)),
        squeeze_reduction=int(entry.get("se_reduction_ratio", 8)),
        stride_last=bool(entry.get("stride_last", False)),
    )


def _model_config(config: Mapping[str, Any], outputs: int) -> QuartzNetConfig:
    encoder = section(config, "encoder")
    if encoder.get("activation", "relu") != "relu":
        raise NemoError(f"encoder.activation: {encoder['activation']!r}, only 'relu' is known")
    entries = encoder.get("jasper")
    if not isinstance(entries, Sequence) or not entries:
        raise NemoError("encoder.jasper: expected a list of blocks")
    blocks = tuple(_block(entry, index) for index, entry in enumerate(entries))
    return QuartzNetConfig(outputs, blocks, features=int(encoder.get("feat_in", 64)))


_LAYER = re.compile(r"^encoder\.encoder\.(\d+)\.mconv\.(\d+)\.(.+)$")
_RESIDUAL = re.compile(r"^encoder\.encoder\.(\d+)\.res\.0\.([01])\.(.+)$")


def _rename(state: Mapping[str, Tensor], model: QuartzNet) -> dict[str, Tensor]:
    """NeMo numbers a block's modules in one list; ours have names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("preprocessor."):
            continue
        if name.startswith("decoder.decoder_layers.0."):
            renamed["head." + name.rsplit(".", 1)[1]] = value
        elif match := _RESIDUAL.match(name):
            block, part, rest = int(match[1]), int(match[2]), match[3]
            module = "norm." + rest if part else "pointwise." + rest.removeprefix("conv.")
            renamed[f"blocks.{block}.residual.{module}"] = value
        elif match := _LAYER.match(name):
            renamed[_layer_name(int(match[1]), int(match[2]), match[3], model)] = value
        else:
            raise NemoError(f"model_weights.ckpt: unknown tensor {name}")
    expected = model.state_dict()
    if missing := sorted(set(expected) - set(renamed)):
        raise NemoError(f"model_weights.ckpt: {missing[0]} is missing ({len(missing)} in all)")
    for name, value in renamed.items():
        if name not in expected or expected[name].shape != value.shape:
            wanted = tuple(expected[name].shape) if name in expected else None
            raise NemoError(f"model_weights.ckpt: {name} has shape {tuple(value.shape)}, expected {wanted}")
    return {name: value.to(expected[name].dtype) for name, value in renamed.items()}


def _layer_name(block: int, position: int, rest: str, model: QuartzNet) -> str:
    """Per repeat: convolutions, norm, and between repeats activation and dropout, which hold no weights."""
    if block >= len(model.config.blocks):
        raise NemoError(f"model_weights.ckpt: block {block} is not in the configuration")
    config = model.config.blocks[block]
    parts = ["depthwise", "pointwise", "norm"] if config.separable else ["pointwise", "norm"]
    repeat, part = divmod(position, len(parts) + 2)
    if rest.startswith("fc."):
        return f"blocks.{block}.squeeze." + {"0": "reduce", "2": "expand"}[rest[3]] + ".weight"
    if repeat >= config.repeat or part >= len(parts):
        raise NemoError(f"model_weights.ckpt: encoder.encoder.{block}.mconv.{position} has no place")
    return f"blocks.{block}.layers.{repeat}.{parts[part]}." + rest.removeprefix("conv.")
