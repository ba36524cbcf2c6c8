"""Padding and normalisation of cached features; shared by the teacher's run and the student's training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.masks import frame_mask

STD_GUARD = 1e-5
"""Added to the standard deviation, as in training/frontend.py."""


def pad_features(items: Sequence[npt.NDArray[np.floating]]) -> tuple[Tensor, Tensor]:
    """(frames, features) arrays -> (batch, frames, features) float32 padded with zeros, and int64 lengths."""
    lengths = torch.tensor([len(item) for item in items], dtype=torch.int64)
    padded = np.zeros((len(items), int(lengths.max()), items[0].shape[1]), np.float32)
    for row, item in zip(padded, items, strict=True):
        row[: len(item)] = item
    return torch.from_numpy(padded), lengths


def normalise_features(values: Tensor, lengths: Tensor) -> Tensor:
    """Zero mean and unit deviation per feature over each item's own frames; zeros beyond (B,T,F)."""
    own = frame_mask(lengths, values.shape[1])[:, :, None]
    count = lengths[:, None, None].to(values.dtype)
    mean = (values * own).sum(dim=1, keepdim=True) / count
    centred = (values - mean) * own
    variance = (centred * centred).sum(dim=1, keepdim=True) / (count - 1.0).clamp(min=1.0)
    return centred / (variance.sqrt() + STD_GUARD)
