"""Cached utterances with their labels -> augmented training batches for the small network.

Everything random is drawn from a generator seeded by (seed, step). A quarter of what is heard is several
utterances in a row, for the service's windows are up to 30 s long and recordings of speech corpora are not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.compression.label import LIKELY, Label, likely_tokens, read_labels
from training.compression.vocabulary import CutVocabulary
from training.distillation import augment
from training.distillation.augment import AugmentConfig
from training.distillation.batches import pad_features
from training.distillation.dataset import VALIDATION_FRACTION, split_rows
from training.distillation.examples import FEATURE_FRAMES_PER_S, Epochs, plan_epoch, utterances
from training.distillation.whisper import WhisperCorpus, cached_log_mel
from training.errors import EmptyManifestError
from training.masks import frame_mask
from training.recipes.whisper_ctc.frontend import HOP, WhisperLogMel

MAX_FRAMES = 2990
AUGMENTATION = AugmentConfig(
    max_band_change=0.1,
    noise_probability=0.2,
    min_babble_snr_db=9.0,
    time_masks_per_s=0.25,
    max_time_mask_frames=20,
    band_masks=1,
    max_gain_db=8.0,
    lone_noise=0.3,
)
JOINED_SHARE = 0.25
MOST_JOINED = 5
QUIET_FRAMES = 70
"""The longest pause before, between and after utterances."""
LEAST_CERTAINTY = -0.5
"""Mean log-probability per token: text that nobody wrote down and the large network doubts is left out."""
IGNORED = -100


@dataclass(frozen=True)
class Sound:
    """What one worker hears."""

    features: Tensor
    """(batch, frames, bands), normalised; (batch, samples) for a network that hears samples."""
    lengths: Tensor
    """(batch,) of these."""
    per_s: int = field(default=FEATURE_FRAMES_PER_S, kw_only=True)
    """Of these."""

    @property
    def audio_s(self) -> float:
        """Of all items, without what pads them."""
        return float(self.lengths.sum()) / self.per_s


@dataclass(frozen=True)
class Batch(Sound):
    """What one worker hears and is to write."""

    tokens: Tensor
    """(batch, prompt + n): prompt and text."""
    wanted: Tensor
    """(batch, n + 1): text and end, IGNORED beyond."""
    likely: Tensor
    """(batch, n + 1, LIKELY) tokens of the large network, and"""
    probabilities: Tensor
    """theirs; all zero where it has no say."""


@dataclass(frozen=True)
class _Written:
    tokens: tuple[int, ...]
    likely: np.ndarray
    probabilities: np.ndarray


class LabelledCorpus:
    """The cache and the labels, opened for reading."""

    cut_name = "vocabulary.json"
    """Of the file with the kept tokens, beside the labels and beside what learned from them."""

    def __init__(self, cache: Path, labels: Path, validation_fraction: float = VALIDATION_FRACTION) -> None:
        index = json.loads((cache / "index.json").read_text(encoding="utf-8"))
        self.rows = utterances(index)
        self.spans = [(row["pcm_start"], row["pcm_samples"]) for row in index]
        self.pcm = np.memmap(cache / "pcm.i16", np.int16, mode="r")
        self.cut = self.read_cut(labels)
        self.tokenizer = self.cut.tokenizer()
        self.labels = {label.index: label for label in read_labels(labels)}
        self.likely = likely_tokens(labels)
        self.frontend = WhisperLogMel()
        train, self.validation = split_rows(self.rows, validation_fraction)
        self.sounds = [index for index in train if self.frames(index) <= MAX_FRAMES]
        self.train = [index for index in self.sounds if self._learned(index)]

    def read_cut(self, labels: Path) -> CutVocabulary:
        """The kept tokens."""
        return CutVocabulary.load(labels / self.cut_name)

    def _learned(self, index: int) -> bool:
        label = self.labels.get(index)
        if label is None or not label.tokens:
            return False
        return bool(self.rows[index].text) or label.certainty >= LEAST_CERTAINTY

    def frames(self, index: int) -> int:
        """Feature frames of an utterance."""
        samples: int = self.spans[index][1]
        return samples // HOP + 1

    def features(self, index: int) -> Tensor:
        """Natural logarithms of the energies, (frames, bands) float32."""
        return cached_log_mel(self.frontend, self.pcm, *self.spans[index])

    def targets(self, label: Label, *, last: bool) -> tuple[np.ndarray, np.ndarray]:
        """Likely tokens and their probabilities, with the end where it is the `last` of a row of them."""
        count = len(label.tokens) + last
        found = self.likely[label.likely : label.likely + count]
        probabilities = found["probability"].astype(np.float32)
        if label.understood:
            total = probabilities.sum(axis=1, keepdims=True)
            shares = np.divide(probabilities, total, out=np.zeros_like(probabilities), where=total > 0)
            return found["token"].astype(np.int64), shares
        return np.zeros((count, LIKELY), np.int64), np.zeros((count, LIKELY), np.float32)


def padded(items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Natural logarithms (frames, bands) -> features as the network wants them, and lengths."""
    features, lengths = pad_features([item.numpy() for item in items])
    return WhisperCorpus.normalise(features, lengths), lengths


class SoundMaker:
    """Sound number ``step`` of a run, as a pure function of the seed and the step, and no word of it."""

    def __init__(self, corpus: LabelledCorpus, batch_s: float, seed: int) -> None:
        """Raises EmptyManifestError where there is nothing to hear."""
        self.corpus, self.seed = corpus, seed
        self.most_tokens = sys.maxsize
        self.heard = corpus.sounds
        self.budget_frames = int(batch_s * FEATURE_FRAMES_PER_S)
        self.locate = Epochs(self._planned, seed)
        self._some()

    def _some(self) -> None:
        """Raises EmptyManifestError, with what became of the cache's utterances."""
        if not self.heard:
            corpus = self.corpus
            raise EmptyManifestError(
                f"no utterance is left to learn from: of {len(corpus.rows)} in the cache "
                f"{len(corpus.sounds)} are of speakers that are not held out and at most "
                f"{MAX_FRAMES / FEATURE_FRAMES_PER_S:g} s long, {len(corpus.train)} of them "
                "with a text that is believed"
            )

    def _planned(self, generator: np.random.Generator) -> list[list[list[int]]]:
        """Utterances of each item of each batch of an epoch."""
        rows = self._joined(generator)
        frames = [sum(self.corpus.frames(index) for index in row) for row in rows]
        batches = plan_epoch(frames, self.budget_frames, generator)
        return [[rows[place] for place in batch] for batch in batches]

    def _joined(self, generator: np.random.Generator) -> list[list[int]]:
        """Every utterance once, alone or in a row with others."""
        rows: list[list[int]] = []
        room = frames = tokens = 0
        for index in generator.permutation(self.heard).tolist():
            count = self._tokens(index)
            needed = int(self.corpus.frames(index) * (1 + AUGMENTATION.max_speed_change)) + 2 * QUIET_FRAMES
            if room > 0 and frames + needed <= MAX_FRAMES and tokens + count < self.most_tokens:
                rows[-1].append(index)
                frames, tokens, room = frames + needed, tokens + count, room - 1
            else:
                rows.append([index])
                several = generator.random() < JOINED_SHARE
                frames, tokens = needed, count
                room = int(generator.integers(1, MOST_JOINED)) if several else 0
        return rows

    def _tokens(self, index: int) -> int:
        """How many an utterance takes of `most_tokens`."""
        return 0

    def _item(self, indices: list[int], generator: np.random.Generator) -> Tensor:
        """Utterances in a row with pauses, now and then warped and noisy: (frames, bands), not normalised."""
        corpus, config = self.corpus, AUGMENTATION
        parts: list[Tensor] = []
        for place, index in enumerate(indices):
            mel, _ = augment.warped(corpus.features(index), config, generator)
            if place == 0 and generator.random() < 0.4:
                parts.append(_quiet(mel, generator))
            parts.append(mel)
            if place < len(indices) - 1 or generator.random() < 0.5:
                parts.append(_quiet(mel, generator))

        def other() -> Tensor:
            return corpus.features(self.heard[int(generator.integers(len(self.heard)))])

        mel = augment.with_noise(torch.cat(parts)[:MAX_FRAMES], config, other, generator)
        return augment.with_gain(mel, config, generator)

    def _drawn(self, step: int) -> tuple[list[list[int]], list[Tensor], np.random.Generator]:
        """Utterances of each item, and how it sounds; the last may be noise of no utterance."""
        rows = self.locate(step)
        generator = np.random.default_rng([self.seed, 2, step])
        items = [self._item(row, generator) for row in rows]
        if generator.random() < AUGMENTATION.lone_noise:
            items.append(self._lone_noise(int(generator.integers(60, 400)), generator))
            rows = [*rows, []]
        return rows, items, generator

    def _lone_noise(self, frames: int, generator: np.random.Generator) -> Tensor:
        """What nobody said, so long."""
        return augment.lone_noise(frames, self.corpus.frontend.bands, generator)

    def _heard(self, items: list[Tensor], generator: np.random.Generator) -> Sound:
        """Items side by side, as the network is given them."""
        return Sound(*padded(items))

    def sound(self, step: int) -> Sound:
        """Sound number ``step``; call with rising numbers."""
        _, items, generator = self._drawn(step)
        return self._heard(items, generator)


class BatchMaker(SoundMaker):
    """The same with what is to be written, and with masks: what is missing is to be written all the same."""

    def __init__(
        self, corpus: LabelledCorpus, batch_s: float, seed: int, most_tokens: int, *, masked: bool = True
    ) -> None:
        """`most_tokens`: of text and end in a row; what is longer is not heard. Raises EmptyManifestError."""
        super().__init__(corpus, batch_s, seed)
        self.most_tokens, self.masked = most_tokens, masked
        self.heard = [index for index in corpus.train if self._tokens(index) < most_tokens]
        self._some()

    def _tokens(self, index: int) -> int:
        return len(self.corpus.labels[index].tokens)

    def _heard(self, items: list[Tensor], generator: np.random.Generator) -> Sound:
        heard = super()._heard(items, generator)
        if self.masked:
            _mask(heard.features, heard.lengths, AUGMENTATION, generator)
        return heard

    def _written(self, indices: list[int]) -> _Written:
        """What is to be written for utterances in a row; nothing for none."""
        labels = [self.corpus.labels[index] for index in indices]
        targets = [self.corpus.targets(label, last=label is labels[-1]) for label in labels]
        if not targets:
            targets = [(np.zeros((1, LIKELY), np.int64), np.zeros((1, LIKELY), np.float32))]
        likely, probabilities = (np.concatenate(both) for both in zip(*targets, strict=True))
        return _Written(tuple(token for label in labels for token in label.tokens), likely, probabilities)

    def __call__(self, step: int) -> Batch:
        """Batch number ``step``; call with rising numbers."""
        rows, sounds, generator = self._drawn(step)
        heard = self._heard(sounds, generator)
        items = [self._written(row) for row in rows]
        cut = self.corpus.cut
        start = cut.prompt().ids
        longest = max(len(item.tokens) for item in items)
        tokens = torch.full((len(items), len(start) + longest), cut.end)
        tokens[:, : len(start)] = torch.tensor(start)
        wanted = torch.full((len(items), longest + 1), IGNORED)
        likely = torch.zeros(len(items), longest + 1, LIKELY, dtype=torch.int64)
        probabilities = torch.zeros(len(items), longest + 1, LIKELY)
        for row, item in enumerate(items):
            count = len(item.tokens)
            tokens[row, len(start) : len(start) + count] = torch.tensor(item.tokens, dtype=torch.int64)
            wanted[row, : count + 1] = torch.tensor([*item.tokens, cut.end])
            likely[row, : len(item.likely)] = torch.from_numpy(item.likely)
            probabilities[row, : len(item.likely)] = torch.from_numpy(item.probabilities)
        return Batch(heard.features, heard.lengths, tokens, wanted, likely, probabilities, per_s=heard.per_s)


def _quiet(like: Tensor, generator: np.random.Generator) -> Tensor:
    """A pause with the faintest sound of each band in `like`, (5 to QUIET_FRAMES, bands)."""
    frames = int(generator.integers(5, QUIET_FRAMES))
    flutter = np.abs(generator.standard_normal((frames, like.shape[1]), dtype=np.float32))
    return like.min(dim=0).values + torch.from_numpy(flutter) * 0.7


def _mask(features: Tensor, lengths: Tensor, config: AugmentConfig, generator: np.random.Generator) -> None:
    """SpecAugment in place, with each item's mean: zero stands for silence on Whisper's scale."""
    means = features.sum(dim=(1, 2)) / (lengths * features.shape[2])
    shifted = features - means[:, None, None]
    augment.spec_augment(shifted, lengths, config, generator)
    own = frame_mask(lengths, features.shape[1])[:, :, None]
    features.copy_((shifted + means[:, None, None]) * own)
