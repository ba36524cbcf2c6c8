"""Weights and what it takes to use them, in one safetensors file: no pickle, nothing is executed on loading.

The file's metadata holds one JSON text under "checkpoint": the network's configuration, the front end's, the
vocabulary, and whatever the training run wants to remember.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import safetensors
import torch
from safetensors.torch import load_file, save_file

from api.vocabulary import Vocabulary
from training.errors import CheckpointError
from training.files import written_whole
from training.frontend import FrontendConfig, LogMel
from training.recipes.quartznet_ctc.model import QuartzNet, QuartzNetConfig
from training.torch_inference import Forward

if TYPE_CHECKING:
    from training.conformer import ConformerCtc
    from training.recipes.whisper_ctc.model import WhisperCtc

FORMAT = 1
CONFORMER, WHISPER = "conformer", "whisper"
"""The one key of such a network's entry; a QuartzNet's entry is its configuration."""


Network: TypeAlias = "QuartzNet | ConformerCtc | WhisperCtc"


@dataclass(frozen=True)
class Checkpoint:
    """A network with its front end and vocabulary."""

    model: Network
    frontend: FrontendConfig
    vocabulary: Vocabulary
    """The blank's id and every token, as in a bundle's vocab.txt."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Plain values: hours seen, validation error rates, git commit."""

    def forward(self) -> Forward:
        """The network on waveforms."""
        model = self.model.eval()
        if isinstance(model, QuartzNet):
            frontend = LogMel(self.frontend)
            return lambda *batch: model(*frontend(*batch))
        return model


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `path` (.safetensors) whole or not at all."""
    vocabulary = checkpoint.vocabulary
    header = {
        "format": FORMAT,
        "model": _described(checkpoint.model),
        "frontend": asdict(checkpoint.frontend),
        "vocabulary": {
            "tokens": list(vocabulary.tokens),
            "blank_id": vocabulary.blank_id,
            "kind": vocabulary.kind,
            "special_ids": sorted(vocabulary.special_ids),
        },
        "meta": dict(checkpoint.meta),
    }
    weights = {
        name: value.detach().cpu().contiguous() for name, value in checkpoint.model.state_dict().items()
    }
    with written_whole(path, sum(value.nbytes for value in weights.values())) as partial:
        save_file(weights, partial, metadata={"checkpoint": json.dumps(header, ensure_ascii=False)})


def load_checkpoint(path: Path) -> Checkpoint:
    """The network in evaluation mode, on the CPU. Raises CheckpointError naming what is wrong."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
        weights = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    try:
        header = json.loads(metadata["checkpoint"])
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, expected {FORMAT}")
        entry = header["vocabulary"]
        vocabulary = Vocabulary(
            tuple(entry["tokens"]), entry["blank_id"], entry["kind"], frozenset(entry["special_ids"])
        )
        frontend = FrontendConfig(**header["frontend"])
        model = _built(header["model"], frontend, len(vocabulary))
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(model.eval(), frontend, vocabulary, header["meta"])


def _described(model: Network) -> dict[str, Any]:
    if isinstance(model, QuartzNet):
        return model.config.to_dict()
    from training.recipes.whisper_ctc.model import WhisperCtc

    return {WHISPER if isinstance(model, WhisperCtc) else CONFORMER: asdict(model.config)}


def _built(entry: dict[str, Any], frontend: FrontendConfig, outputs: int) -> Network:
    """The reverse of `_described`. Raises ValueError."""
    if CONFORMER in entry:
        # transformers takes seconds to load, which no QuartzNet needs
        from training.conformer import ConformerConfig, ConformerCtc

        return ConformerCtc(ConformerConfig(**entry[CONFORMER]), outputs, frontend)
    if WHISPER in entry:
        from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc

        return WhisperCtc(EncoderConfig(**entry[WHISPER]), outputs)
    config = QuartzNetConfig.from_dict(entry)
    if config.vocabulary_size != outputs:
        raise ValueError(f"the head has {config.vocabulary_size} outputs for {outputs} tokens")
    return QuartzNet(config)


def average_weights(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Mean of each weight over several checkpoints of one network (Izmailov et al. 2018)."""
    if not paths:
        raise CheckpointError("no checkpoint to average")
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, value in load_checkpoint(path).model.state_dict().items():
            total[name] = total[name] + value.double() if name in total else value.double()
    first = load_checkpoint(paths[0]).model.state_dict()
    return {name: (value / len(paths)).to(first[name].dtype) for name, value in total.items()}
