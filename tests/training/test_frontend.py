"""The matrix form of the log-mel front end against PyTorch's own STFT; padding changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.networks import chirps
from training.frontend import FrontendConfig, LogMel, mel_filters


def reference_log_mel(waveform: torch.Tensor, config: FrontendConfig) -> torch.Tensor:
    """(features, frames) by the textbook: pre-emphasis, torch.stft in float64, mel, logarithm."""
    signal = waveform.double()
    signal = torch.cat([signal[:1], signal[1:] - config.preemphasis * signal[:-1]])
    window = torch.hann_window(2 * config.hop_samples, periodic=False, dtype=torch.float64)
    spectrum = torch.stft(
        signal,
        config.fft_samples,
        config.hop_samples,
        2 * config.hop_samples,
        window,
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    energies = torch.tensor(mel_filters(config)) @ spectrum.abs().square()
    return torch.log(energies + config.log_guard)


@pytest.mark.parametrize("samples", [16_000, 16_001, 16_159, 12_345])
def test_log_mel_is_that_of_the_stft(samples: int) -> None:
    clip = torch.from_numpy(chirps(1)[0])
    waveform = torch.nn.functional.pad(clip, (0, 32_000 - len(clip)))[:samples]
    frontend = LogMel()
    values, lengths = frontend.log_mel(waveform[None], torch.tensor([samples]))
    expected = reference_log_mel(waveform, frontend.config)
    assert lengths.tolist() == [expected.shape[1]]
    torch.testing.assert_close(values[0].T.double(), expected, atol=1e-3, rtol=0)


def test_features_have_mean_zero_and_deviation_one() -> None:
    clip = torch.from_numpy(chirps(1)[0])
    features, lengths = LogMel()(clip[None], torch.tensor([len(clip)]))
    assert features.shape == (1, 64, int(lengths[0]))
    torch.testing.assert_close(features.mean(dim=2), torch.zeros(1, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std(dim=2), torch.ones(1, 64), atol=1e-3, rtol=0)


def test_a_padded_batch_gives_what_each_item_gives() -> None:
    clips = [torch.from_numpy(clip) for clip in chirps(4)]
    frontend = LogMel()
    lengths = torch.tensor([len(clip) for clip in clips])
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=0.7)
    features, frames = frontend(padded, lengths)
    for index, clip in enumerate(clips):
        alone, own = frontend(clip[None], lengths[index : index + 1])
        assert int(frames[index]) == int(own[0])
        torch.testing.assert_close(features[index, :, : own[0]], alone[0, :, : own[0]], atol=1e-5, rtol=0)
        assert not features[index, :, own[0] :].any(), "frames beyond the item must be zero"


def test_digital_silence_becomes_zeros() -> None:
    """A constant feature has no deviation; rounding must not be blown up into a signal."""
    features, _ = LogMel()(torch.zeros(1, 16_000), torch.tensor([16_000]))
    assert features.abs().max() < 1e-3


def test_a_single_sample_is_one_frame() -> None:
    features, lengths = LogMel()(torch.full((1, 1), 0.5), torch.tensor([1]))
    assert lengths.tolist() == [1]
    assert torch.isfinite(features).all()


def test_mel_filters_have_equal_areas_and_slaney_edges() -> None:
    config = FrontendConfig()
    filters = mel_filters(config)
    assert filters.shape == (64, 257)
    assert (filters[:, 0] == 0).all()
    assert (filters[:, -1] == 0).all(), "the exported graph leaves the last bin out"
    centres_hz = filters.argmax(axis=1) * 16_000 / 512
    assert (centres_hz[1:] >= centres_hz[:-1]).all()
    step_hz = 16_000 / 512
    wide = filters[40:].sum(axis=1) * step_hz
    assert all(math.isclose(area, 1.0, rel_tol=0.05) for area in wide)
