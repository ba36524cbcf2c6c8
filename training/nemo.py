"""Read a NeMo CTC archive (.nemo) without NeMo. `python -m training.nemo import` makes a bundle of one.

The archive is a tar with `model_config.yaml` and `model_weights.ckpt`. It is data from outside: members are
read by name and size, the YAML is parsed safely, and of the checkpoint only tensors are unpickled.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml
from torch import Tensor

from training.errors import CheckpointError
from training.frontend import FrontendConfig, mel_filters
from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNet, QuartzNetConfig

MAX_CONFIG_BYTES = 10_000_000
MAX_WEIGHTS_BYTES = 8_000_000_000
MEL_PREPROCESSOR = "AudioToMelSpectrogramPreprocessor"


class NemoError(CheckpointError):
    """The archive is not one this reader knows; the message says which field and why."""


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
    config, state = _read_members(archive)
    vocabulary = _vocabulary(config)
    try:
        model_config = _model_config(config, len(vocabulary) + 1)
        frontend = _frontend(config)
    except KeyError as error:
        raise NemoError(f"{archive.name}: model_config.yaml: {error} is missing") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise NemoError(f"{archive.name}: model_config.yaml: {error}") from error
    _check_filters(state, frontend)
    model = QuartzNet(model_config)
    model.load_state_dict(_rename(state, model))
    return NemoModel(model.eval(), frontend, vocabulary)


def _read_members(archive: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found: dict[str, bytes] = {}
    limits = {"model_config.yaml": MAX_CONFIG_BYTES, "model_weights.ckpt": MAX_WEIGHTS_BYTES}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name not in limits or not member.isfile():
                    continue
                if member.size > limits[name]:
                    raise NemoError(f"{archive.name}: {name} has {member.size} bytes, limit {limits[name]}")
                stream = tar.extractfile(member)
                if stream is not None:
                    found[name] = stream.read()
    except FileNotFoundError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise NemoError(f"{archive.name}: not a NeMo archive (tar): {error}") from error
    for name in limits:
        if name not in found:
            raise NemoError(f"{archive.name}: {name} is missing")
    try:
        config = yaml.safe_load(found["model_config.yaml"])
    except yaml.YAMLError as error:
        raise NemoError(f"{archive.name}: model_config.yaml: {error}") from error
    if not isinstance(config, dict):
        raise NemoError(f"{archive.name}: model_config.yaml holds no mapping")
    try:
        state = torch.load(io.BytesIO(found["model_weights.ckpt"]), map_location="cpu", weights_only=True)
    except Exception as error:
        raise NemoError(f"{archive.name}: model_weights.ckpt is not tensors only: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise NemoError(f"{archive.name}: model_weights.ckpt is not a dict of tensors")
    return config, state


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise NemoError(f"{name}: missing from model_config.yaml")
    return section


def _vocabulary(config: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = _section(config, "decoder").get("vocabulary") or config.get("labels")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise NemoError("decoder.vocabulary: expected a list of characters")
    if any(not isinstance(token, str) for token in tokens):
        raise NemoError("decoder.vocabulary: every entry must be a string")
    return tuple(tokens)


def _frontend(config: Mapping[str, Any]) -> FrontendConfig:
    section = _section(config, "preprocessor")
    rate = int(section.get("sample_rate", 16_000))
    kind = str(section.get("_target_", MEL_PREPROCESSOR)).rsplit(".", 1)[-1]
    if kind != MEL_PREPROCESSOR:
        raise NemoError(f"preprocessor._target_: {kind}, only {MEL_PREPROCESSOR} is known")
    expected = {
        "normalize": "per_feature",
        "window": "hann",
        "frame_splicing": 1,
        "log": True,
        "log_zero_guard_type": "add",
        "mag_power": 2.0,
    }
    for name, value in expected.items():
        if section.get(name, value) != value:
            raise NemoError(f"preprocessor.{name}: {section[name]!r}, only {value!r} is known")
    hop = int(section.get("n_window_stride") or round(rate * float(section.get("window_stride", 0.01))))
    window = int(section.get("n_window_size") or round(rate * float(section.get("window_size", 0.02))))
    if window != 2 * hop:
        raise NemoError(f"preprocessor.window_size: {window} samples, only two hops ({2 * hop}) is known")
    return FrontendConfig(
        sample_rate_hz=rate,
        hop_samples=hop,
        fft_samples=int(section.get("n_fft") or 512),
        features=int(section.get("features", 64)),
        preemphasis=float(section.get("preemph", 0.97) or 0.0),
    )


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
    encoder = _section(config, "encoder")
    if encoder.get("activation", "relu") != "relu":
        raise NemoError(f"encoder.activation: {encoder['activation']!r}, only 'relu' is known")
    entries = encoder.get("jasper")
    if not isinstance(entries, Sequence) or not entries:
        raise NemoError("encoder.jasper: expected a list of blocks")
    blocks = tuple(_block(entry, index) for index, entry in enumerate(entries))
    return QuartzNetConfig(outputs, blocks, features=int(encoder.get("feat_in", 64)))


def _check_filters(state: Mapping[str, Tensor], frontend: FrontendConfig) -> None:
    """The archive carries its filter bank: ours must be the same."""
    stored = state.get("preprocessor.featurizer.fb")
    if stored is None:
        return
    ours = torch.tensor(mel_filters(frontend), dtype=torch.float32)
    if stored.squeeze(0).shape != ours.shape or (stored.squeeze(0).float() - ours).abs().max() > 1e-4:
        raise NemoError("preprocessor: the archive's mel filters differ from Slaney's with these settings")


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


if __name__ == "__main__":
    from training.nemo_import import main

    raise SystemExit(main())
