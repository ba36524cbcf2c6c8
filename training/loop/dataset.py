"""Rows of a manifest as padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.augment.waveform import WaveformAugment
from training.data.audio import Samples, load_waveform
from training.data.manifest import Utterance
from training.data.sampler import DurationBatchSampler
from training.loop.settings import TrainingSettings


class Batch(TypedDict):
    """What a step works on."""

    waveform: Tensor
    """(batch, samples) float32, zero beyond each item."""
    lengths: Tensor
    """(batch,) int64, samples that count."""
    targets: Tensor
    """(batch, tokens) int64, -100 beyond each item."""
    target_lengths: Tensor
    """(batch,) int64."""
    texts: list[str]
    """Normalised transcripts."""


@dataclass(frozen=True)
class Example:
    """One utterance, ready."""

    samples: Samples
    ids: list[int]
    text: str


class UtteranceDataset(Dataset[Example]):
    """Decodes and augments on access; the recordings are not kept in memory.

    `padded_s`: what the network pads each of them to by itself.
    """

    def __init__(
        self,
        rows: Sequence[Utterance],
        encode: Callable[[str], list[int]],
        sample_rate_hz: int = 16_000,
        augment: WaveformAugment | None = None,
        padded_s: float | None = None,
    ) -> None:
        self.rows = rows
        self.encode = encode
        self.sample_rate_hz = sample_rate_hz
        self.augment = augment
        self.padded_s = padded_s

    def longest_s(self, row: Utterance) -> float:
        """Seconds at most that the network works on for a row."""
        if self.padded_s is not None:
            return self.padded_s
        duration_s = row.duration_s or 0.0
        return self.augment.longest_of(duration_s) if self.augment is not None else duration_s

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        samples = load_waveform(row.audio, self.sample_rate_hz, row.offset_s, row.duration_s)
        if self.augment is not None:
            seed = int(torch.randint(0, 2**62, ()).item())
            samples = self.augment(samples, np.random.default_rng(seed))
        return Example(samples, self.encode(row.text), row.text)


def collate(examples: Sequence[Example]) -> Batch:
    """Pad to the longest."""
    longest = max(len(example.samples) for example in examples)
    waveform = np.zeros((len(examples), longest), np.float32)
    targets = np.full((len(examples), max(1, max(len(example.ids) for example in examples))), -100, np.int64)
    for row, example in enumerate(examples):
        waveform[row, : len(example.samples)] = example.samples
        targets[row, : len(example.ids)] = example.ids
    return Batch(
        waveform=torch.from_numpy(waveform),
        lengths=torch.tensor([len(example.samples) for example in examples]),
        targets=torch.from_numpy(targets),
        target_lengths=torch.tensor([len(example.ids) for example in examples]),
        texts=[example.text for example in examples],
    )


def make_loader(
    dataset: UtteranceDataset, settings: TrainingSettings, *, training: bool
) -> DataLoader[Example]:
    """Batches by total seconds; shuffled and augmented for training, in a fixed order otherwise."""
    sampler = DurationBatchSampler(
        [dataset.longest_s(row) for row in dataset.rows],
        settings.max_batch_s,
        max_items=settings.max_items,
        shuffle=training,
        seed=settings.seed,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        multiprocessing_context="spawn" if settings.workers > 0 else None,
    )
