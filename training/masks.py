"""Which positions of a padded batch count."""

from __future__ import annotations

import torch
from torch import Tensor


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """(batch, frames) bool, true on an item's own frames (or samples, or tokens); lengths (batch,) int64."""
    return torch.arange(frames, device=lengths.device)[None, :] < lengths[:, None]
