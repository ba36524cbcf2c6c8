"""Augmentation keeps its promises: length, ratio, bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from training.augment.spectrogram import SpecAugment, SpecAugmentConfig
from training.augment.waveform import (
    WaveformAugment,
    WaveformAugmentConfig,
    change_speed,
    coloured_noise,
    mix_noise,
    reverberate,
    room_response,
)
from training.errors import ConfigError

RATE_HZ = 16_000


def speech() -> np.ndarray:
    time_s = np.arange(2 * RATE_HZ) / RATE_HZ
    return (0.2 * np.sin(2 * np.pi * 440 * time_s) * (1 + np.sin(2 * np.pi * 3 * time_s))).astype(np.float32)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_speed_changes_length_and_pitch(factor: float) -> None:
    changed = change_speed(speech(), factor, RATE_HZ)
    assert abs(len(changed) - 2 * RATE_HZ / factor) <= 2
    peak_hz = np.abs(np.fft.rfft(changed)).argmax() * RATE_HZ / len(changed)
    assert abs(peak_hz - 440 * factor) < 5


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 25.0])
def test_noise_has_the_ratio(snr_db: float) -> None:
    samples, noise = speech(), coloured_noise(9_999, 1.0, np.random.default_rng(0))
    noisy = mix_noise(samples, noise, snr_db)
    scale = np.dot(noisy, samples) / np.dot(samples, samples)
    rest = noisy / scale - samples
    found = 10 * np.log10(np.mean(samples**2) / np.mean(rest**2))
    assert abs(found - snr_db) < 0.5
    assert np.abs(noisy).max() <= 1.0


def test_noise_colour() -> None:
    spectrum = np.abs(np.fft.rfft(coloured_noise(2**16, 2.0, np.random.default_rng(0)))) ** 2
    low, high = spectrum[10:100].mean(), spectrum[1000:10_000].mean()
    assert low / high > 1_000


def test_silence_stays_silence() -> None:
    silence = np.zeros(100, np.float32)
    assert np.array_equal(mix_noise(silence, np.ones(10, np.float32), 10.0), silence)
    assert np.array_equal(reverberate(silence, np.ones(10, np.float32)), silence)


def test_reverberation_keeps_length_and_power() -> None:
    samples = speech()
    wet = reverberate(samples, room_response(0.4, RATE_HZ, np.random.default_rng(0)))
    assert wet.shape == samples.shape
    assert not np.allclose(wet, samples, atol=1e-3)
    assert np.mean(wet**2) == pytest.approx(np.mean(samples**2), rel=0.05)


def test_same_seed_same_result_and_off_is_off() -> None:
    augment = WaveformAugment(WaveformAugmentConfig(), RATE_HZ)
    first, second = (augment(speech(), np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first, second)
    off = WaveformAugmentConfig(speeds=(), noise_probability=0.0, reverberation_probability=0.0)
    assert np.array_equal(WaveformAugment(off, RATE_HZ)(speech(), np.random.default_rng(7)), speech())


def test_nothing_becomes_longer_than_allowed() -> None:
    slow = WaveformAugmentConfig(speeds=(0.5,), noise_probability=0.0, reverberation_probability=0.0)
    samples, random = speech(), np.random.default_rng(0)
    duration_s = len(samples) / RATE_HZ
    assert len(WaveformAugment(slow, RATE_HZ, 2 * duration_s)(samples, random)) == 2 * len(samples)
    assert len(WaveformAugment(slow, RATE_HZ, 1.9 * duration_s)(samples, random)) == len(samples)


@pytest.mark.parametrize(
    ("duration_s", "longest_s", "expected_s"),
    [(27.0, 30.0, 30.0), (29.5, 30.0, 29.5), (29.5, None, 29.5 / 0.9), (31.0, 30.0, 31.0)],
)
def test_it_says_how_long_things_may_become(
    duration_s: float, longest_s: float | None, expected_s: float
) -> None:
    augment = WaveformAugment(WaveformAugmentConfig(), RATE_HZ, longest_s)
    assert augment.longest_of(duration_s) == pytest.approx(expected_s)


def test_noise_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recordings"):
        WaveformAugment(WaveformAugmentConfig(noise_folder=tmp_path), RATE_HZ)
    soundfile.write(tmp_path / "hum.wav", speech()[:8_000], RATE_HZ)
    config = WaveformAugmentConfig(
        speeds=(), noise_probability=1.0, reverberation_probability=0.0, noise_folder=tmp_path
    )
    assert not np.array_equal(WaveformAugment(config, RATE_HZ)(speech(), np.random.default_rng(0)), speech())


def test_spec_augment_masks_own_frames_in_training_only() -> None:
    torch.manual_seed(0)
    augment = SpecAugment(
        SpecAugmentConfig(frequency_masks=1, frequency_width=8, time_masks=2, time_share=0.3)
    )
    features, lengths = torch.ones(4, 40, 100), torch.tensor([100, 60, 30, 10])
    masked = augment.train()(features, lengths)
    assert masked.shape == features.shape
    share = 1 - masked.mean(dim=(1, 2))
    assert (share > 0).any()
    assert (share < 0.9).all()
    hidden_rows = (masked[:, :, 90:] == 0).all(dim=1)
    assert not hidden_rows[1:].any(), "time masks stay within an item's own frames"
    assert torch.equal(augment.eval()(features, lengths), features)
