"""Cached utterances -> augmented training batches with the teacher's targets.

Everything random is drawn from a generator seeded by (seed, step), so a resumed run sees the batches that an
uninterrupted one would have seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from training.distillation import augment
from training.distillation.augment import AugmentConfig
from training.distillation.batches import normalise_features, pad_features
from training.distillation.dataset import (
    BLANK_ID,
    VALIDATION_FRACTION,
    Utterance,
    encode_text,
    split_rows,
)
from training.distillation.loss import dense_labels
from training.errors import EmptyManifestError

FEATURE_FRAMES_PER_S = 100
Row = TypeVar("Row")


@dataclass(frozen=True)
class Batch:
    """Features (B,T,64) normalised, lengths (B,); targets (B, 2 * ceil(T / 4), ...) at 50 per second."""

    features: Tensor
    lengths: Tensor
    teacher: Tensor
    hidden: Tensor
    dense: Tensor
    target_lengths: Tensor
    texts: list[list[int]]
    audio_s: float


def utterances(index: list[dict[str, Any]]) -> list[Utterance]:
    """Rows of a cache's index; those of earlier days have fewer columns."""
    names = Utterance.__dataclass_fields__
    return [Utterance(**{key: row[key] for key in names if key in row}) for row in index]


class Corpus:
    """The cache written by stages 1 and 2, opened for reading."""

    augmentation = AugmentConfig()
    normalise = staticmethod(normalise_features)
    """What a student hears of padded features (B,T,F), lengths (B,)."""

    def __init__(
        self, cache: Path, min_confidence: float, validation_fraction: float = VALIDATION_FRACTION
    ) -> None:
        index: list[dict[str, Any]] = json.loads((cache / "index.json").read_text(encoding="utf-8"))
        labels: list[dict[str, Any]] = json.loads((cache / "labels.json").read_text(encoding="utf-8"))
        self.rows = utterances(index)
        self.train, self.validation = split_rows(self.rows, validation_fraction)
        self.mel_spans = [(row["mel_start"], row["mel_frames"]) for row in index]
        self.pcm_spans = [(row["pcm_start"], row["pcm_samples"]) for row in index]
        self.label_spans = [(row["label_start"], row["label_frames"]) for row in labels]
        self.mel = np.load(cache / "mel.npy", mmap_mode="r")
        self.logits = np.load(cache / "logits.npy", mmap_mode="r")
        self.hidden = np.load(cache / "hidden.npy", mmap_mode="r")
        components = np.load(cache / "components.npz")
        deviations = np.concatenate([components[f"std{layer}"] for layer in range(2)])
        self.hidden_scale = torch.from_numpy(1.0 / np.maximum(deviations, 1e-6)).float()
        self.hidden_weights = torch.from_numpy(deviations).float()
        halves = self.hidden_weights.view(2, -1)
        self.hidden_weights = (halves / halves.sum(dim=1, keepdim=True)).flatten()
        self.texts = [
            encode_text(row.text or (label["text"] if label["confidence"] >= min_confidence else ""))
            for row, label in zip(self.rows, labels, strict=True)
        ]

    def features(self, index: int) -> Tensor:
        """Log-mel before normalisation, (frames, 64) float32."""
        start, count = self.mel_spans[index]
        return torch.from_numpy(self.mel[start : start + count].astype(np.float32))

    def targets(self, index: int) -> tuple[Tensor, Tensor]:
        """Teacher's probabilities (frames, 29) and standardised activations (frames, 256), 50 per second."""
        start, count = self.label_spans[index]
        posteriors = torch.from_numpy(self.logits[start : start + count].astype(np.float32)).exp()
        hidden = torch.from_numpy(self.hidden[start : start + count].astype(np.float32)) * self.hidden_scale
        return posteriors, hidden


def plan_epoch(frames: list[int], budget_frames: int, generator: np.random.Generator) -> list[list[int]]:
    """Shuffled batches of positions with similar lengths; at most ``budget_frames`` padded frames each."""
    noisy = np.asarray(frames) * generator.uniform(0.9, 1.1, len(frames))
    batches: list[list[int]] = []
    longest = 0
    for position in np.argsort(noisy):
        grown = max(longest, frames[position])
        if batches and grown * (len(batches[-1]) + 1) <= budget_frames:
            batches[-1].append(int(position))
            longest = grown
        else:
            batches.append([int(position)])
            longest = frames[position]
    generator.shuffle(batches)
    return batches


class Epochs(Generic[Row]):
    """Where batch number ``step`` of a run is: epochs are planned in order, for their batch counts differ."""

    def __init__(self, plan: Callable[[np.random.Generator], list[list[Row]]], seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.epoch = -1
        self.batches: list[list[Row]] = []
        self.starts = [0]

    def __call__(self, step: int) -> list[Row]:
        """Call with rising numbers. Raises EmptyManifestError where an epoch has no batch."""
        while step >= self.starts[-1]:
            self.epoch += 1
            self.batches = self.plan(np.random.default_rng([self.seed, 1, self.epoch]))
            if not self.batches:  # no epoch after it would ever reach the step
                raise EmptyManifestError("no utterance is left to learn from")
            self.starts.append(self.starts[-1] + len(self.batches))
        if step < self.starts[-2]:
            raise ValueError("batches are read in order")
        return self.batches[step - self.starts[-2]]


class BatchMaker:
    """Batch number ``step`` of a run, as a pure function of the seed and the step."""

    def __init__(self, corpus: Corpus, batch_s: float, seed: int, config: AugmentConfig | None) -> None:
        """Raises EmptyManifestError where all speakers are held out."""
        if not corpus.train:
            raise EmptyManifestError(
                f"no utterance is left to learn from: all {len(corpus.rows)} of the cache are of speakers "
                "that are held out"
            )
        self.corpus, self.seed, self.config = corpus, seed, config
        self.budget_frames = int(batch_s * FEATURE_FRAMES_PER_S)
        self.frames = [corpus.mel_spans[index][1] for index in corpus.train]
        self.locate = Epochs(self._planned, seed)

    def _planned(self, generator: np.random.Generator) -> list[list[int]]:
        """Row indices of each batch of an epoch."""
        batches = plan_epoch(self.frames, self.budget_frames, generator)
        return [[self.corpus.train[position] for position in batch] for batch in batches]

    def _one(self, index: int, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented log-mel, teacher posteriors and activations of one utterance."""
        mel = self.corpus.features(index)
        posteriors, hidden = self.corpus.targets(index)
        config = self.config
        if config is None:
            return mel, posteriors, hidden
        mel, speed = augment.warped(mel, config, generator)
        if speed is not None:
            label_count = (len(mel) - 1) // 2 + 1
            posteriors = augment.stretch_time(posteriors, label_count, speed)
            hidden = augment.stretch_time(hidden, label_count, speed)
        corpus = self.corpus

        def other() -> Tensor:
            return corpus.features(corpus.train[int(generator.integers(len(corpus.train)))])

        mel = augment.with_noise(mel, config, other, generator)
        if config.max_gain_db:
            mel = augment.with_gain(mel, config, generator)
        return mel, posteriors, hidden

    @staticmethod
    def _noise(
        speech: tuple[Tensor, Tensor, Tensor], generator: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise as long as an utterance, with blanks and mean activations for what the teacher says."""
        mel, posteriors, hidden = speech
        silent = torch.zeros_like(posteriors)
        silent[:, BLANK_ID] = 1.0
        return augment.lone_noise(len(mel), mel.shape[1], generator), silent, torch.zeros_like(hidden)

    def __call__(self, step: int) -> Batch:
        """Batch number ``step``; call with rising numbers."""
        indices = self.locate(step)
        generator = np.random.default_rng([self.seed, 2, step])
        items = [self._one(index, generator) for index in indices]
        texts = [self.corpus.texts[index] for index in indices]
        if self.config is not None and generator.random() < self.config.lone_noise:
            items.append(self._noise(items[0], generator))
            texts.append([])
        features, lengths = pad_features([item[0].numpy() for item in items])
        features = self.corpus.normalise(features, lengths)
        if self.config is not None:
            augment.spec_augment(features, lengths, self.config, generator)
        frames = 2 * ((features.shape[1] - 1) // 4 + 1)
        teacher = torch.zeros(len(items), frames, items[0][1].shape[1])
        teacher[:, :, BLANK_ID] = 1.0
        hidden = torch.zeros(len(items), frames, items[0][2].shape[1])
        dense = torch.full((len(items), frames), BLANK_ID)
        for row, (_, posteriors, activations) in enumerate(items):
            count = len(posteriors)
            teacher[row, :count] = posteriors
            hidden[row, :count] = activations
            dense[row, :count] = torch.from_numpy(dense_labels(posteriors.numpy()))
        target_lengths = torch.tensor([len(item[1]) for item in items])
        audio_s = float(lengths.sum()) / FEATURE_FRAMES_PER_S
        return Batch(features, lengths, teacher, hidden, dense, target_lengths, texts, audio_s)
