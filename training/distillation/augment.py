"""Augmentation of cached log-mel features and of the teacher's targets that belong to them.

Speed and vocal-tract length are stretched by linear interpolation over time and mel bands (Jaitly and Hinton
2013 for the latter); noise is added as power in the log domain; SpecAugment (Park et al. 2019) masks the
normalised features. Where the normalisation removes gain and fixed equalisers, they need no augmentation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LN_10 = math.log(10.0)
LONE_NOISE_LEVELS = (-18.0, -2.0)
"""Natural logarithms of a band's energy; speech at a usual level has -12 to 2."""


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths; a probability of zero turns a part off."""

    warp_probability: float = 0.8
    max_speed_change: float = 0.12
    max_band_change: float = 0.12
    noise_probability: float = 0.4
    babble_share: float = 0.5
    min_snr_db: float = 6.0
    min_babble_snr_db: float = 8.0
    max_snr_db: float = 30.0
    band_masks: int = 2
    max_band_mask: int = 10
    time_masks_per_s: float = 0.5
    max_time_mask_frames: int = 24
    max_gain_db: float = 0.0
    """Either way, for a student that hears loudness."""
    lone_noise: float = 0.0
    """Share of the batches that get an item of noise alone, which says nothing."""


def sample_positions(count: int, scale: float, limit: int) -> tuple[Tensor, Tensor]:
    """Left neighbours (int64) and weights of the right ones for ``count`` values read at ``i * scale``."""
    positions = (torch.arange(count, dtype=torch.float32) * scale).clamp_(0.0, max(limit - 1, 0))
    left = positions.floor().clamp_(0, max(limit - 2, 0))
    return left.long(), positions - left


def stretch_time(values: Tensor, count: int, scale: float) -> Tensor:
    """Rows of ``values`` (frames, D) read at ``i * scale`` for ``i < count``: (count, D)."""
    if len(values) == 1:
        return values.expand(count, -1).clone()
    left, weight = sample_positions(count, scale, len(values))
    return torch.lerp(values.index_select(0, left), values.index_select(0, left + 1), weight[:, None])


def stretch_bands(values: Tensor, scale: float) -> Tensor:
    """Mel bands of (frames, bands) read at ``band * scale``; a shorter or longer vocal tract."""
    left, weight = sample_positions(values.shape[1], scale, values.shape[1])
    return torch.lerp(values.index_select(1, left), values.index_select(1, left + 1), weight[None])


def coloured_noise(frames: int, bands: int, generator: np.random.Generator) -> Tensor:
    """Log-mel of a stationary noise with a random smooth spectrum and slow swells, (frames, bands)."""
    anchors = np.cumsum(generator.normal(0.0, 0.9, 6))
    spectrum = np.interp(np.linspace(0, 5, bands), np.arange(6), anchors)
    points = max(2, frames // 60)
    swell = np.interp(
        np.linspace(0, points - 1, frames), np.arange(points), generator.normal(0.0, 0.5, points)
    )
    # A band's power over one frame is roughly exponential around its mean, less so for wide upper bands.
    flutter = generator.standard_normal((frames, bands), dtype=np.float32) * np.linspace(0.8, 0.35, bands)
    level = spectrum - spectrum.mean()
    return torch.from_numpy((level[None] + swell[:, None] + flutter).astype(np.float32))


def lone_noise(frames: int, bands: int, generator: np.random.Generator) -> Tensor:
    """Log-mel of noise where nobody speaks, anything from faint to loud, (frames, bands)."""
    level = float(generator.uniform(*LONE_NOISE_LEVELS))
    return coloured_noise(frames, bands, generator) + level


def add_noise(speech: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Log-mel power sum of speech and noise (frames, bands) at a signal-to-noise ratio over the clip."""
    speech_level = torch.logsumexp(speech.flatten(), 0)
    noise_level = torch.logsumexp(noise.flatten(), 0)
    gain = speech_level - noise_level - snr_db * (np.log(10.0) / 10.0)
    return torch.logaddexp(speech, noise + gain)


def warped(mel: Tensor, config: AugmentConfig, generator: np.random.Generator) -> tuple[Tensor, float | None]:
    """Now and then another speed and vocal tract; with the speed, where there is another."""
    if generator.random() >= config.warp_probability:
        return mel, None
    speed = float(np.exp(generator.uniform(-1, 1) * config.max_speed_change))
    mel = stretch_time(mel, max(8, round(len(mel) / speed)), speed)
    return stretch_bands(mel, 1.0 + float(generator.uniform(-1, 1)) * config.max_band_change), speed


def with_noise(
    mel: Tensor, config: AugmentConfig, other: Callable[[], Tensor], generator: np.random.Generator
) -> Tensor:
    """Now and then with noise, or with what an `other` says."""
    if generator.random() >= config.noise_probability:
        return mel
    snr_db = float(generator.uniform(config.min_snr_db, config.max_snr_db))
    if generator.random() < config.babble_share:
        noise = fit_length(other(), len(mel), generator)
        return add_noise(mel, noise, max(snr_db, config.min_babble_snr_db))
    return add_noise(mel, coloured_noise(len(mel), mel.shape[1], generator), snr_db)


def with_gain(mel: Tensor, config: AugmentConfig, generator: np.random.Generator) -> Tensor:
    """Louder or fainter."""
    return mel + float(generator.uniform(-1, 1)) * config.max_gain_db * LN_10 / 10.0


def fit_length(values: Tensor, frames: int, generator: np.random.Generator) -> Tensor:
    """A piece of ``values`` of exactly ``frames`` rows, repeated when too short."""
    if len(values) < frames:
        values = values.repeat((frames + len(values) - 1) // len(values), 1)
    start = int(generator.integers(0, len(values) - frames + 1))
    return values[start : start + frames]


def spec_augment(
    features: Tensor, lengths: Tensor, config: AugmentConfig, generator: np.random.Generator
) -> None:
    """Zeroes random bands and stretches of time of normalised features (B,T,F) in place."""
    for item, length in zip(features, lengths.tolist(), strict=True):
        for _ in range(config.band_masks):
            width = int(generator.integers(0, config.max_band_mask + 1))
            start = int(generator.integers(0, item.shape[1] - width + 1))
            item[:, start : start + width] = 0.0
        for _ in range(int(generator.poisson(config.time_masks_per_s * length / 100.0))):
            width = min(int(generator.integers(1, config.max_time_mask_frames + 1)), length // 4)
            start = int(generator.integers(0, length - width + 1))
            item[start : start + width] = 0.0
