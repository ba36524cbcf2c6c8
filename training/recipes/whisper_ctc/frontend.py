"""Whisper's log-mel features (Radford et al. 2022) as matrix products, on an item's own length.

400-point transform with a periodic Hann window every 160 samples, centred, mirrored at the start; Slaney mel
filters; log10 with a floor of 1e-10, clipped 8 below an item's maximum, then (x + 4) / 4. Beyond the end the
signal is zero, as it is in Whisper's 30 padded seconds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.frontend import FrontendConfig, mel_filters
from training.masks import frame_mask

HOP = 160
FFT = 400
SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 30 * SAMPLE_RATE_HZ
FLOOR = 1e-10
RANGE = 8.0


def hann() -> npt.NDArray[np.float64]:
    """The periodic window, (400,)."""
    found: npt.NDArray[np.float64] = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(FFT) / FFT)
    return found


def bases() -> npt.NDArray[np.float32]:
    """Windowed cosines and sines side by side, (480, 402): a frame is three hops, the last half used."""
    window = hann()
    angles = 2.0 * np.pi * np.arange(FFT)[:, None] * np.arange(FFT // 2 + 1)[None, :] / FFT
    both = np.concatenate([window[:, None] * np.cos(angles), window[:, None] * np.sin(angles)], axis=1)
    return np.concatenate([both, np.zeros((3 * HOP - FFT, both.shape[1]))]).astype(np.float32)


def filters(bands: int) -> npt.NDArray[np.float32]:
    """(201, bands)."""
    config = FrontendConfig(fft_samples=FFT, hop_samples=HOP, features=bands)
    return mel_filters(config).T.astype(np.float32)


def in_range(log_mel: Tensor) -> Tensor:
    """Features of decadic logarithms (batch, frames, bands): clipped 8 below each item's loudest, scaled."""
    return (torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - RANGE) + 4.0) / 4.0


def own_in_range(log_mel: Tensor, counts: Tensor) -> Tensor:
    """The same of each item's own frames only (batch,); zeros beyond."""
    own = frame_mask(counts, log_mel.shape[1])[:, :, None]
    return in_range(torch.where(own, log_mel, log_mel.new_tensor(np.log10(FLOOR)))) * own


class WhisperLogMel(nn.Module):
    """Waveform in, features out; nothing to train."""

    bases: Tensor
    filters: Tensor

    def __init__(self, bands: int = 80, *, fixed: bool = False) -> None:
        super().__init__()
        self.bands = bands
        self.fixed = fixed
        self.register_buffer("bases", torch.from_numpy(bases()), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters(bands)), persistent=False)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a padded batch.

        Args:
            waveform: (batch, samples) float32 in [-1, 1].
            lengths: (batch,) int64, samples that count.

        Returns:
            (batch, frames, bands) float32 and (batch,) int64, one frame per 10 ms that an item has begun. On
            true lengths the features are zero beyond an item; `fixed` gives 3000 frames of 30 padded seconds.
        """
        log_mel, counts = self.log_mel(waveform, lengths)
        return in_range(log_mel) if self.fixed else own_in_range(log_mel, counts), counts

    def log_mel(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Decadic logarithms of the energies (batch, frames, bands), and frames (batch,); as `forward`."""
        signal = waveform * frame_mask(lengths, waveform.shape[1])
        if self.fixed:
            signal = functional.pad(signal, (0, WINDOW_SAMPLES))[:, :WINDOW_SAMPLES]
        samples = signal.shape[1]
        frames = (samples + HOP - 1) // HOP
        signal = functional.pad(signal, (0, (frames + 2) * HOP - FFT // 2 - samples))
        padded = torch.cat([signal[:, 1 : FFT // 2 + 1].flip(-1), signal], dim=1)
        blocks = padded.reshape(len(padded), frames + 2, HOP)
        stacked = torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], dim=2)
        real, imaginary = torch.matmul(stacked, self.bases).chunk(2, dim=-1)
        energies = torch.matmul(real * real + imaginary * imaginary, self.filters)
        counts = torch.div(lengths + HOP - 1, HOP, rounding_mode="floor").clamp(max=frames)
        return torch.log10(energies.clamp(min=FLOOR)), counts
