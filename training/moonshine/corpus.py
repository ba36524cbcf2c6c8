"""Cached utterances with their labels -> batches of samples; see :mod:`training.compression.corpus`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.augment.waveform import (
    WaveformAugment,
    WaveformAugmentConfig,
    coloured_noise,
    mix_noise,
)
from training.compression.corpus import QUIET_FRAMES, BatchMaker, LabelledCorpus, Sound
from training.distillation.examples import FEATURE_FRAMES_PER_S
from training.moonshine.model import MIN_SAMPLES, SAMPLE_RATE_HZ
from training.moonshine.vocabulary import Tokens

SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FEATURE_FRAMES_PER_S
AUGMENTATION = WaveformAugmentConfig(
    speeds=(0.9, 1.0, 1.0, 1.1),
    noise_probability=0.2,
    noise_snr_db=(5.0, 30.0),
    reverberation_probability=0.1,
    reverberation_s=(0.1, 0.4),
)
BABBLE_PROBABILITY = 0.05
BABBLE_SNR_DB = (9.0, 25.0)
MAX_GAIN_DB = 8.0
LONE_NOISE_DBFS = (-70.0, -10.0)


class MoonshineCorpus(LabelledCorpus):
    """One whose features are samples."""

    cut_name = "tokens.json"
    cut: Tokens  # type: ignore[assignment]  # of another tokenizer, with the same methods

    def read_cut(self, labels: Path) -> Tokens:  # type: ignore[override]
        """The kept tokens."""
        return Tokens.load(labels / self.cut_name)

    def features(self, index: int) -> Tensor:
        """Samples of an utterance in [-1, 1], float32."""
        start, count = self.spans[index]
        return torch.from_numpy(self.pcm[start : start + count].astype(np.float32) / 32768.0)


class SampleMaker(BatchMaker):
    """Batches of samples, changed before the network hears them."""

    corpus: MoonshineCorpus
    augment = WaveformAugment(AUGMENTATION, SAMPLE_RATE_HZ)

    def _item(self, indices: list[int], generator: np.random.Generator) -> Tensor:
        """Utterances in a row with pauses: (samples,)."""
        parts: list[Tensor] = []
        for place, index in enumerate(indices):
            clip = torch.from_numpy(self.augment(self.corpus.features(index).numpy(), generator))
            if place == 0 and generator.random() < 0.4:
                parts.append(_quiet(clip, generator))
            parts.append(clip)
            if place < len(indices) - 1 or generator.random() < 0.5:
                parts.append(_quiet(clip, generator))
        whole = torch.cat(parts)
        if generator.random() < BABBLE_PROBABILITY:
            other = self.corpus.features(self.heard[int(generator.integers(len(self.heard)))])
            mixed = mix_noise(whole.numpy(), other.numpy(), float(generator.uniform(*BABBLE_SNR_DB)))
            whole = torch.from_numpy(mixed)
        gain = 10.0 ** (float(generator.uniform(-1.0, 1.0)) * MAX_GAIN_DB / 20.0)
        return torch.mul(whole, min(gain, 1.0 / max(float(whole.abs().max()), 1e-3)))

    def _lone_noise(self, frames: int, generator: np.random.Generator) -> Tensor:
        noise = coloured_noise(frames * SAMPLES_PER_FRAME, float(generator.uniform(0.0, 2.0)), generator)
        return torch.from_numpy(noise * np.float32(10.0 ** (float(generator.uniform(*LONE_NOISE_DBFS)) / 20)))

    def _heard(self, items: list[Tensor], generator: np.random.Generator) -> Sound:
        return Sound(*padded(items), per_s=SAMPLE_RATE_HZ)


def padded(items: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Samples of several clips side by side (batch, samples), and how many each has: MIN_SAMPLES at least."""
    lengths = torch.tensor([max(len(item), MIN_SAMPLES) for item in items])
    waveform = torch.zeros(len(items), int(lengths.max()))
    for row, item in zip(waveform, items, strict=True):
        row[: len(item)] = item
    return waveform, lengths


def _quiet(like: Tensor, generator: np.random.Generator) -> Tensor:
    """A pause as loud as the faintest twentieth of a clip, 50 to 700 ms."""
    count = int(generator.integers(5, QUIET_FRAMES)) * SAMPLES_PER_FRAME
    blocks = like[: len(like) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME].reshape(-1, SAMPLES_PER_FRAME)
    levels = blocks.square().mean(dim=1).sqrt()
    level = float(levels.quantile(0.05)) if len(levels) else 0.0
    noise = generator.standard_normal(count, dtype=np.float32)
    quiet: Tensor = torch.from_numpy(noise) * level
    return quiet
