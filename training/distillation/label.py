"""Stage 2: what the teacher says and thinks about every cached utterance.

    python -m training.distillation.label --teacher TEACHER.nemo --cache CACHE

Writes ``logits.npy`` (float16 log-probs ``(frames, 29)``, 20 ms each), ``hidden.npy`` (float16 activations
of two of the teacher's layers on their first principal components), ``components.npz`` (that projection) and
the teacher's greedy text and confidence into ``labels.json``. The teacher's weights are used here and nowhere
else. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from training.distillation.batches import normalise_features, pad_features
from training.distillation.dataset import ALPHABET, BLANK_ID, VOCABULARY_SIZE, decode_ids
from training.distillation.quartznet import channels_last
from training.errors import CheckpointError, in_one_line
from training.files import written_whole
from training.nemo import read_nemo

HIDDEN_BLOCKS = (-3, -1)
"""Last residual block (acoustic, smooth in time) and the layer before the decoder (near the characters)."""
COMPONENTS = 128
"""Principal components kept per layer."""
SAVE_EVERY = 100
"""Batches between two states that an interrupted run can go on from."""


class Components(NamedTuple):
    """Principal components of a layer's activations, those of the largest variance first."""

    mean: Tensor
    """(D,)"""
    basis: Tensor
    """(D, components), the projection."""
    std: Tensor
    """(components,)"""


def principal_components(samples: Tensor, count: int) -> Components:
    """The ``count`` first of samples (N, D)."""
    mean = samples.mean(dim=0)
    covariance = torch.cov((samples - mean).t())
    values, vectors = torch.linalg.eigh(covariance)
    order = values.argsort(descending=True)[:count]
    return Components(mean, vectors[:, order], values[order].clamp(min=0).sqrt())


def greedy(log_probs: npt.NDArray[np.float32]) -> tuple[str, float]:
    """Best-path text of (frames, vocabulary) log-probs and the mean log-probability of that path."""
    best = log_probs.argmax(axis=1)
    keep = (best != BLANK_ID) & np.concatenate([[True], best[1:] != best[:-1]])
    return " ".join(decode_ids(best[keep].tolist()).split()), float(log_probs.max(axis=1).mean())


def length_batches(frames: list[int], budget: int) -> list[list[int]]:
    """Indices in batches of similar length whose padded frames stay within ``budget``."""
    batches: list[list[int]] = []
    for index in sorted(range(len(frames)), key=lambda position: -frames[position]):
        if batches and frames[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class Labeller:
    """Runs the teacher over cached features."""

    def __init__(self, teacher: Path, cache: Path) -> None:
        self.cache = cache
        self.index: list[dict[str, Any]] = json.loads((cache / "index.json").read_text(encoding="utf-8"))
        self.mel = np.load(cache / "mel.npy", mmap_mode="r")
        found = read_nemo(teacher)
        if found.vocabulary != tuple(ALPHABET):
            raise CheckpointError(f"{teacher}: its characters are not those of the student: {ALPHABET!r}")
        self.network = channels_last(found.model).eval()

    def run(self, batch: list[int]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Log-probs (B,T,V), activations per layer (B,T,C) and lengths (B,) of utterances ``batch``."""
        rows = [self.index[index] for index in batch]
        features, lengths = pad_features(
            [self.mel[row["mel_start"] : row["mel_start"] + row["mel_frames"]] for row in rows]
        )
        with torch.inference_mode():
            output = self.network(normalise_features(features, lengths), lengths, HIDDEN_BLOCKS)
        return output.log_probs, output.hidden, output.lengths

    def fit_components(self, batches: list[list[int]]) -> list[Components]:
        """Principal components per layer from a seeded sample of batches."""
        kept: list[list[Tensor]] = [[] for _ in HIDDEN_BLOCKS]
        for position in np.random.default_rng(0).choice(len(batches), min(12, len(batches)), replace=False):
            _, hidden, lengths = self.run(batches[int(position)])
            for layer, values in zip(kept, hidden, strict=True):
                layer.extend(values[item, : int(lengths[item])].float() for item in range(len(lengths)))
        return [principal_components(torch.cat(layer), COMPONENTS) for layer in kept]


def store_components(path: Path, components: Sequence[Components]) -> None:
    """Write those of each layer (.npz)."""
    arrays = {
        f"{name}{layer}": value.numpy()
        for layer, parts in enumerate(components)
        for name, value in parts._asdict().items()
    }
    np.savez(path, **arrays)


def stored_components(path: Path) -> list[Components]:
    """The reverse of :func:`store_components`."""
    with np.load(path) as stored:
        return [
            Components(*(torch.from_numpy(stored[f"{name}{layer}"]) for name in Components._fields))
            for layer in range(len(HIDDEN_BLOCKS))
        ]


def label(teacher: Path, cache: Path, budget_s: float) -> None:
    """Fill the cache with the teacher's answers; see the module."""
    labeller = Labeller(teacher, cache)
    index = labeller.index
    counts = [(row["mel_frames"] - 1) // 2 + 1 for row in index]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    batches = length_batches([row["mel_frames"] for row in index], int(budget_s * 100))
    order = np.random.default_rng(1).permutation(len(batches))
    components_path, progress_path = cache / "components.npz", cache / "labels.progress.json"
    resumed = progress_path.exists() and components_path.exists()
    labels: dict[str, tuple[str, float]] = {}
    if resumed:
        labels = json.loads(progress_path.read_text(encoding="utf-8"))["labels"]
    else:
        store_components(components_path, labeller.fit_components(batches))
    components = stored_components(components_path)
    logits, hidden_out = (
        np.lib.format.open_memmap(
            cache / f"{name}.npy", mode="r+" if resumed else "w+", dtype=np.float16, shape=(sum(counts), size)
        )
        for name, size in (("logits", VOCABULARY_SIZE), ("hidden", COMPONENTS * len(HIDDEN_BLOCKS)))
    )
    # What is labelled counts, not how many batches were: a resumed run may make batches of another length.
    open_batches = [left for place in order if (left := [i for i in batches[place] if str(i) not in labels])]
    progress = tqdm(total=len(open_batches), desc="teacher", unit="batch", mininterval=2)
    for position, batch in enumerate(open_batches, start=1):
        log_probs, hidden, lengths = labeller.run(batch)
        projected = torch.cat(
            [
                (values.float() - parts.mean) @ parts.basis
                for values, parts in zip(hidden, components, strict=True)
            ],
            dim=-1,
        )
        for item, utterance in enumerate(batch):
            count, start = int(lengths[item]), starts[utterance]
            logits[start : start + count] = log_probs[item, :count].numpy()
            hidden_out[start : start + count] = projected[item, :count].numpy()
            labels[str(utterance)] = greedy(log_probs[item, :count].numpy())
        progress.update()
        if position % SAVE_EVERY == 0 or position == len(open_batches):
            with written_whole(progress_path) as partial:
                partial.write_text(json.dumps({"labels": labels}), encoding="utf-8")
    progress.close()
    for array in (logits, hidden_out):
        array.flush()
    rows = []
    for utterance, (start, count) in enumerate(zip(starts.tolist(), counts, strict=False)):
        text, confidence = labels[str(utterance)]
        rows.append({"label_start": start, "label_frames": count, "text": text, "confidence": confidence})
    (cache / "labels.json").write_text(json.dumps(rows), encoding="utf-8")


@in_one_line("label")
def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--batch-s", type=float, default=80.0, help="padded audio-seconds per batch")
    arguments = parser.parse_args()
    if not (arguments.cache / "labels.json").exists():
        label(arguments.teacher, arguments.cache, arguments.batch_s)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
