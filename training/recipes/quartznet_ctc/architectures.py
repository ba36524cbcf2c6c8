"""Named networks for configurations: QuartzNet BxR and Citrinet."""

from __future__ import annotations

from dataclasses import replace

from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNetConfig

CITRINET_KERNELS = (
    (11, 13, 15, 17, 19, 21),
    (13, 15, 17, 19, 21, 23, 25),
    (25, 27, 29, 31, 33, 35, 37, 39),
)
"""Kernel widths of the three mega-blocks, each of which halves the frame rate (Majumdar et al. 2021)."""


def citrinet(
    vocabulary_size: int,
    *,
    channels: int = 256,
    repeat: int = 5,
    tail_channels: int = 640,
    dropout: float = 0.0,
    upsample: int = 1,
    features: int = 80,
    blocks: int | None = None,
) -> QuartzNetConfig:
    """A Citrinet with `channels`; `blocks` per mega-block at most makes it smaller.

    One frame lasts 80 ms divided by `upsample`: 1 suits word pieces, characters need 4.
    """
    gated = BlockConfig(channels, dropout=dropout, squeeze_excitation=True)
    body = [replace(gated, kernel=5)]
    for kernels in CITRINET_KERNELS:
        for index, kernel in enumerate(kernels[:blocks]):
            stride = 2 if index == 0 else 1
            body.append(
                replace(gated, repeat=repeat, kernel=kernel, stride=stride, stride_last=True, residual=True)
            )
    body.append(replace(gated, filters=tail_channels, kernel=41))
    return QuartzNetConfig(vocabulary_size, tuple(body), features=features, upsample=upsample)
