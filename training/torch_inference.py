"""Run networks in PyTorch as training/inference.py runs graphs, to set one beside the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.inference import LogProbs, Waveform

Forward = Callable[[Tensor, Tensor], Sequence[Any]]
"""Waveforms (batch, samples), lengths (batch,) -> log-probs (batch, frames, vocabulary), frames (batch,)."""


def run_torch(forward: Forward, waveforms: Sequence[Waveform]) -> list[LogProbs]:
    """Log-probabilities of a batch of waveforms (samples,), each cut to its own frames, float32."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = pad_sequence([torch.from_numpy(waveform) for waveform in waveforms], batch_first=True)
    with torch.inference_mode():
        log_probs, counts, *_ = forward(padded, lengths)
    return [row[:count].float().numpy() for row, count in zip(log_probs, counts.tolist(), strict=True)]
