"""SpecAugment (Park et al. 2019): random bands of frequency and stretches of time are set to one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Number and largest width of the masks; 0 masks switch one kind off.

    A run's configuration is checked for the bounds.
    """

    frequency_masks: Annotated[int, Field(ge=0, le=100)] = 2
    frequency_width: Annotated[int, Field(ge=0)] = 15
    time_masks: Annotated[int, Field(ge=0, le=100)] = 4
    time_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest width of a time mask as a share of the item's own frames."""


class SpecAugment(nn.Module):
    """Masks features in training mode and does nothing otherwise."""

    def __init__(self, config: SpecAugmentConfig | None = None, fill: float = 0.0) -> None:
        super().__init__()
        self.config = config or SpecAugmentConfig()
        self.fill = fill

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """(batch, features, frames) float, (batch,) int64 frames that count -> the same shape, masked."""
        if not self.training:
            return features
        batch, bands, frames = features.shape
        device = features.device
        hidden = torch.zeros(batch, bands, frames, dtype=torch.bool, device=device)
        band = torch.arange(bands, device=device)[None, :]
        for _ in range(self.config.frequency_masks):
            width = torch.randint(0, min(self.config.frequency_width, bands) + 1, (batch, 1), device=device)
            start = (torch.rand(batch, 1, device=device) * (bands - width + 1)).long()
            hidden |= ((band >= start) & (band < start + width))[:, :, None]
        frame = torch.arange(frames, device=device)[None, :]
        own = lengths[:, None].to(features.dtype)
        for _ in range(self.config.time_masks):
            width = (torch.rand(batch, 1, device=device) * (own * self.config.time_share + 1)).long()
            start = (torch.rand(batch, 1, device=device) * (own - width + 1).clamp(min=1)).long()
            hidden |= ((frame >= start) & (frame < start + width))[:, None, :]
        return features.masked_fill(hidden, self.fill)
