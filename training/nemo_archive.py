"""What is in a NeMo archive (.nemo): configuration, weights, vocabulary, front end. NeMo is not needed.

The archive is a tar with `model_config.yaml` and `model_weights.ckpt`. It is data from outside: members are
read by name and size, the YAML is parsed safely, and of the checkpoint only tensors are unpickled.
"""

from __future__ import annotations

import io
import math
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from training.errors import CheckpointError
from training.frontend import LOG_GUARD, FrontendConfig, mel_filters

MAX_CONFIG_BYTES = 10_000_000
MAX_WEIGHTS_BYTES = 8_000_000_000
QUARTZNET, CONFORMER = "ConvASREncoder", "ConformerEncoder"
"""Classes of encoders that are known; the first holds QuartzNet and Citrinet."""
MEL_PREPROCESSOR = "AudioToMelSpectrogramPreprocessor"

T = TypeVar("T")


class NemoError(CheckpointError):
    """The archive is not one this reader knows; the message says which field and why."""


@dataclass(frozen=True)
class NemoArchive:
    """An archive's two members that matter."""

    name: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]

    @property
    def encoder(self) -> str:
        """Class of the encoder without its module, such as ConformerEncoder."""
        return str(section(self.config, "encoder").get("_target_", QUARTZNET)).rsplit(".", 1)[-1]

    def configured(self, read: Callable[[Mapping[str, Any]], T]) -> T:
        """What `read` makes of the configuration. Raises NemoError naming a field that is missing or odd."""
        try:
            return read(self.config)
        except KeyError as error:
            raise NemoError(f"{self.name}: model_config.yaml: {error} is missing") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise NemoError(f"{self.name}: model_config.yaml: {error}") from error


def read_archive(archive: Path) -> NemoArchive:
    """Read and check both members. Raises NemoError, FileNotFoundError where there is no file."""
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
        # tarfile gives a line for every way that it tried
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise NemoError(f"{archive.name}: not a NeMo archive (tar): {reason}") from error
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
    return NemoArchive(archive.name, config, state)


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the configuration. Raises NemoError where it is missing."""
    found = config.get(name)
    if not isinstance(found, Mapping):
        raise NemoError(f"{name}: missing from model_config.yaml")
    return found


def vocabulary_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Tokens in the order of the CTC head's outputs, without the blank, which comes after them.

    A hybrid model has its CTC head beside a transducer, under `aux_ctc`. Raises NemoError.
    """
    hybrid = "aux_ctc" in config
    where = "aux_ctc.decoder" if hybrid else "decoder"
    decoder = section(section(config, "aux_ctc") if hybrid else config, "decoder")
    if decoder.get("multisoftmax"):
        raise NemoError(f"{where}.multisoftmax: only one softmax over all tokens is known")
    tokens = decoder.get("vocabulary") or config.get("labels")
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise NemoError(f"{where}.vocabulary: expected a list of characters or pieces")
    if any(not isinstance(token, str) for token in tokens):
        raise NemoError(f"{where}.vocabulary: every entry must be a string")
    return tuple(tokens)


def frontend_of(config: Mapping[str, Any]) -> FrontendConfig:
    """The front end of the section `preprocessor`. Raises NemoError for any but NeMo's usual log-mel."""
    given = section(config, "preprocessor")
    rate = int(given.get("sample_rate", 16_000))
    kind = str(given.get("_target_", MEL_PREPROCESSOR)).rsplit(".", 1)[-1]
    if kind != MEL_PREPROCESSOR:
        raise NemoError(f"preprocessor._target_: {kind}, only {MEL_PREPROCESSOR} is known")
    expected = {
        "normalize": "per_feature",
        "window": "hann",
        "frame_splicing": 1,
        "log": True,
        "log_zero_guard_type": "add",
        "log_zero_guard_value": LOG_GUARD,
        "exact_pad": False,
        "mag_power": 2.0,
    }
    for name, value in expected.items():
        if given.get(name, value) != value:
            raise NemoError(f"preprocessor.{name}: {given[name]!r}, only {value!r} is known")
    hop = int(given.get("n_window_stride") or round(rate * float(given.get("window_stride", 0.01))))
    window = int(given.get("n_window_size") or round(rate * float(given.get("window_size", 0.02))))
    if window % 2 or not 2 * hop <= window <= 4 * hop:
        raise NemoError(
            f"preprocessor.window_size: {window} samples, expected an even number of {2 * hop} to {4 * hop}, "
            "two to four hops"
        )
    return FrontendConfig(
        sample_rate_hz=rate,
        hop_samples=hop,
        fft_samples=int(given.get("n_fft") or 2 ** math.ceil(math.log2(window))),
        features=int(given.get("features", 64)),
        preemphasis=float(given.get("preemph", 0.97) or 0.0),
        window_samples=window,
    )


def check_filters(state: Mapping[str, Tensor], frontend: FrontendConfig) -> None:
    """The archive carries its filter bank: ours must be the same."""
    stored = state.get("preprocessor.featurizer.fb")
    if stored is None:
        return
    ours = torch.tensor(mel_filters(frontend), dtype=torch.float32)
    if stored.squeeze(0).shape != ours.shape or (stored.squeeze(0).float() - ours).abs().max() > 1e-4:
        raise NemoError("preprocessor: the archive's mel filters differ from Slaney's with these settings")
