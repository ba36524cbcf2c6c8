"""Random changes of a recording that leave its words: speed, noise at a signal-to-noise ratio, a room.

Every function takes float32 samples (samples,) in [-1, 1] and a numpy generator, and returns new samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import soxr
from pydantic import AfterValidator, Field
from scipy.signal import oaconvolve

from training.data.audio import Samples, load_waveform
from training.errors import ConfigError

Probability = Annotated[float, Field(ge=0, le=1)]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"the first of {list(ends)} is the lower end, and above the other")
    return ends


@dataclass(frozen=True)
class WaveformAugmentConfig:
    """How often and how much; probabilities of 0 switch a change off.

    A run's configuration is checked for the bounds.
    """

    speeds: tuple[Annotated[float, Field(ge=0.25, le=4)], ...] = (0.9, 1.0, 1.1)
    """Playback speeds, one drawn per utterance (Ko et al. 2015); pitch changes with them."""
    noise_probability: Probability = 0.5
    noise_snr_db: Annotated[
        tuple[Annotated[float, Field(ge=-50, le=100)], Annotated[float, Field(ge=-50, le=100)]],
        AfterValidator(_rising),
    ] = (5.0, 25.0)
    noise_folder: Path | None = None
    """Folder of noise recordings; without it coloured noise is made up."""
    reverberation_probability: Probability = 0.3
    reverberation_s: Annotated[
        tuple[Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(gt=0, le=10)]],
        AfterValidator(_rising),
    ] = (0.15, 0.6)
    """Range of the time in which the room's echo falls by 60 dB."""


def change_speed(samples: Samples, factor: float, sample_rate_hz: int) -> Samples:
    """Play `factor` times faster; the length is divided by it."""
    if factor == 1.0:
        return samples
    faster: Samples = soxr.resample(samples, sample_rate_hz * factor, sample_rate_hz).astype(np.float32)
    return faster


def mix_noise(samples: Samples, noise: Samples, snr_db: float) -> Samples:
    """Add `noise`, repeated or cut to the same length, at a ratio of mean powers of `snr_db`."""
    noise = np.resize(noise, samples.shape)
    power = float(np.mean(np.square(samples, dtype=np.float64)))
    noise_power = float(np.mean(np.square(noise, dtype=np.float64)))
    if power <= 0.0 or noise_power <= 0.0:
        return samples
    gain = np.sqrt(power / noise_power / 10.0 ** (snr_db / 10.0))
    return _within_range((samples + gain * noise).astype(np.float32))


def coloured_noise(count: int, exponent: float, random: np.random.Generator) -> Samples:
    """Noise whose power falls with frequency to the power of `exponent`: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(random.standard_normal(count))
    scale = np.maximum(np.arange(len(spectrum), dtype=np.float64), 1.0) ** (-exponent / 2.0)
    noise = np.fft.irfft(spectrum * scale, count)
    return (noise / max(float(np.abs(noise).max()), 1e-9)).astype(np.float32)


def room_response(decay_s: float, sample_rate_hz: int, random: np.random.Generator) -> Samples:
    """A made-up room: the direct sound, then noise that decays by 60 dB in `decay_s` (Moorer 1979)."""
    count = max(2, round(decay_s * sample_rate_hz))
    time_s = np.arange(count) / sample_rate_hz
    tail = random.standard_normal(count) * np.exp(-3.0 * np.log(10.0) * time_s / decay_s)
    tail *= random.uniform(0.1, 0.5) / max(float(np.sqrt(np.sum(np.square(tail)))), 1e-9)
    tail[0] = 1.0
    response: Samples = tail.astype(np.float32)
    return response


def reverberate(samples: Samples, response: Samples) -> Samples:
    """Convolve with a room's response; the length and the mean power stay."""
    wet = oaconvolve(samples, response)[: len(samples)].astype(np.float32)
    power, wet_power = float(np.mean(np.square(samples))), float(np.mean(np.square(wet)))
    if wet_power <= 0.0:
        return samples
    return _within_range((wet * np.sqrt(power / wet_power)).astype(np.float32))


def _within_range(samples: Samples) -> Samples:
    peak = float(np.abs(samples).max(initial=0.0))
    return samples if peak <= 1.0 else (samples / peak).astype(np.float32)


class WaveformAugment:
    """Applies the three changes at random; nothing becomes longer than `longest_s` by it.

    Raises ConfigError for a noise folder without recordings.
    """

    def __init__(
        self, config: WaveformAugmentConfig, sample_rate_hz: int, longest_s: float | None = None
    ) -> None:
        self.config = config
        self.longest_s = longest_s or np.inf
        self.sample_rate_hz = sample_rate_hz
        self.noises: Sequence[Path] = ()
        if config.noise_folder is not None:
            suffixes = (".wav", ".flac", ".ogg", ".opus", ".mp3")
            self.noises = sorted(p for p in config.noise_folder.rglob("*") if p.suffix.lower() in suffixes)
            if not self.noises:
                raise ConfigError(f"augment.noise_folder: no recordings in {config.noise_folder}")

    def longest_of(self, duration_s: float) -> float:
        """Seconds at most that a recording of `duration_s` has when it is changed."""
        changed = (duration_s / factor for factor in self.config.speeds)
        return max((s if s <= self.longest_s else duration_s for s in changed), default=duration_s)

    def __call__(self, samples: Samples, random: np.random.Generator) -> Samples:
        """A changed copy."""
        config = self.config
        if config.speeds:
            factor = config.speeds[int(random.integers(len(config.speeds)))]
            if len(samples) / factor <= self.longest_s * self.sample_rate_hz:
                samples = change_speed(samples, factor, self.sample_rate_hz)
        if random.random() < config.reverberation_probability:
            decay_s = random.uniform(*config.reverberation_s)
            samples = reverberate(samples, room_response(decay_s, self.sample_rate_hz, random))
        if random.random() < config.noise_probability:
            samples = mix_noise(
                samples, self._noise(len(samples), random), random.uniform(*config.noise_snr_db)
            )
        return samples

    def _noise(self, count: int, random: np.random.Generator) -> Samples:
        if not self.noises:
            return coloured_noise(count, random.uniform(0.0, 2.0), random)
        noise = load_waveform(self.noises[int(random.integers(len(self.noises)))], self.sample_rate_hz)
        start = int(random.integers(len(noise)))
        return np.roll(noise, -start)
