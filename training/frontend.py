"""Log-mel features as NeMo computes them, written as matrix products so that they export to ONNX as such.

Pre-emphasis 0.97, symmetric Hann window, 512-point power spectrum, Slaney mel filters, natural logarithm with
a guard of 2^-24, mean and standard deviation per feature over an item's own frames.

Because the window is symmetric around a frame's centre, the transform of a frame's even and odd halves needs
half the multiplications of the plain one (the power spectrum does not see the shift by half a sample). Beyond
both ends of an item the signal is zero, which is what makes a padded batch equal to each item alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.masks import frame_mask

LOG_GUARD = 2.0**-24
"""Added to an energy before its logarithm."""


@dataclass(frozen=True)
class FrontendConfig:
    """Shape of the features."""

    sample_rate_hz: int = 16_000
    hop_samples: int = 160
    fft_samples: int = 512
    features: int = 64
    preemphasis: float = 0.97
    log_guard: float = LOG_GUARD
    std_guard: float = 1e-5
    window_samples: int = 320
    """Even. QuartzNet's window is two hops, Conformer's two and a half (400 samples)."""

    @property
    def half_window(self) -> int:
        """Samples on each side of a frame's centre."""
        return self.window_samples // 2

    @property
    def hop_s(self) -> float:
        """Seconds from one frame to the next."""
        return self.hop_samples / self.sample_rate_hz


def _hz_to_mel(hz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Slaney's scale (Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above."""
    linear = hz * 3.0 / 200.0
    logarithmic = 15.0 + 27.0 * np.log(np.maximum(hz, 1e-10) / 1000.0) / np.log(6.4)
    return np.where(hz < 1000.0, linear, logarithmic)


def _mel_to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = mel * 200.0 / 3.0
    logarithmic = 1000.0 * np.exp(np.log(6.4) * (mel - 15.0) / 27.0)
    return np.where(mel < 15.0, linear, logarithmic)


def mel_filters(config: FrontendConfig) -> npt.NDArray[np.float64]:
    """Triangular filters of equal area, (features, fft_samples // 2 + 1)."""
    nyquist_hz = config.sample_rate_hz / 2.0
    bins_hz = np.linspace(0.0, nyquist_hz, config.fft_samples // 2 + 1)
    top = float(_hz_to_mel(np.array(nyquist_hz)))
    edges_hz = _mel_to_hz(np.linspace(0.0, top, config.features + 2))
    widths = np.diff(edges_hz)
    distances = edges_hz[:, None] - bins_hz[None, :]
    rising = -distances[:-2] / widths[:-1, None]
    falling = distances[2:] / widths[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    areas: npt.NDArray[np.float64] = 2.0 / (edges_hz[2:] - edges_hz[:-2])
    return triangles * areas[:, None]


def half_bases(config: FrontendConfig) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Windowed cosine and sine bases for the even and the odd half of a frame, each (half_window, bins)."""
    size = config.fft_samples
    half = np.arange(config.half_window) + 0.5
    window = 0.5 + 0.5 * np.cos(2.0 * np.pi * half / (config.window_samples - 1))
    angles = 2.0 * np.pi * half[:, None] * np.arange(size // 2 + 1)[None, :] / size
    return window[:, None] * np.cos(angles), window[:, None] * np.sin(angles)


class LogMel(nn.Module):
    """Waveform in, normalised log-mel out. Holds constants only; nothing to train."""

    cosine: Tensor
    sine: Tensor
    mel: Tensor

    def __init__(self, config: FrontendConfig | None = None) -> None:
        super().__init__()
        self.config = config or FrontendConfig()
        cosine, sine = half_bases(self.config)
        self.register_buffer("cosine", torch.tensor(cosine, dtype=torch.float32), persistent=False)
        self.register_buffer("sine", torch.tensor(sine, dtype=torch.float32), persistent=False)
        mel = torch.tensor(mel_filters(self.config).T.copy(), dtype=torch.float32)
        self.register_buffer("mel", mel, persistent=False)

    def frame_lengths(self, lengths: Tensor) -> Tensor:
        """Frames per item: one per hop, centred, the first on sample 0."""
        return torch.div(lengths, self.config.hop_samples, rounding_mode="floor") + 1

    def windows(self, padded: Tensor, frames: int) -> Tensor:
        """(batch, samples) -> (batch, frames, twice the half window), a hop apart."""
        return padded.unfold(1, 2 * self.config.half_window, self.config.hop_samples)

    def log_mel(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Before normalisation: (batch, samples), (batch,) -> (batch, frames, features), (batch,)."""
        hop, half = self.config.hop_samples, self.config.half_window
        samples = waveform.shape[1]
        frames = samples // hop + 1
        own = frame_mask(lengths, samples)
        delayed = functional.pad(waveform[:, :-1], (1, 0))
        emphasised = (waveform - self.config.preemphasis * delayed) * own.to(waveform.dtype)
        padded = functional.pad(emphasised, (half, (frames - 1) * hop + half - samples))
        windows = self.windows(padded, frames)
        after, before = windows[..., half:], windows[..., :half].flip(-1)
        real = torch.matmul(after + before, self.cosine)
        imaginary = torch.matmul(after - before, self.sine)
        energies = torch.matmul(real * real + imaginary * imaginary, self.mel)
        return torch.log(energies + self.config.log_guard), self.frame_lengths(lengths)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a padded batch.

        Args:
            waveform: (batch, samples) float32 in [-1, 1].
            lengths: (batch,) int64, samples that count; at least 1.

        Returns:
            (batch, features, frames) float32, zero beyond each item, and (batch,) int64 frames that count.
        """
        values, frame_lengths = self.log_mel(waveform, lengths)
        weight = frame_mask(frame_lengths, values.shape[1])[:, :, None].to(values.dtype)
        count = frame_lengths[:, None, None].to(values.dtype)
        centred = values
        for _ in range(2):  # twice: a constant feature (digital silence) must centre to zero, not to noise
            centred = (centred - (centred * weight).sum(dim=1, keepdim=True) / count) * weight
        variance = (centred * centred).sum(dim=1, keepdim=True) / (count - 1.0).clamp(min=1.0)
        normalised = centred / (torch.sqrt(variance) + self.config.std_guard)
        return normalised.transpose(1, 2), frame_lengths
