"""Named networks: QuartzNet BxR and Citrinet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNetConfig

CITRINET_KERNELS = (
    (11, 13, 15, 17, 19, 21),
    (13, 15, 17, 19, 21, 23, 25),
    (25, 27, 29, 31, 33, 35, 37, 39),
)
"""Kernel widths of the three mega-blocks, each of which halves the frame rate (Majumdar et al. 2021)."""


def quartznet(
    vocabulary_size: int,
    *,
    groups: Sequence[tuple[int, int]] = ((256, 33), (256, 39), (512, 51), (512, 63), (512, 75)),
    blocks_per_group: int = 3,
    repeat: int = 5,
    stem: tuple[int, int] = (256, 33),
    stem_stride: int = 2,
    tail: tuple[int, int] = (512, 87),
    tail_dilation: int = 2,
    last_filters: int = 1024,
    dropout: float = 0.0,
    squeeze_excitation: bool = False,
    upsample: int = 1,
    features: int = 64,
) -> QuartzNetConfig:
    """A QuartzNet BxR, B = len(groups) * blocks_per_group; the defaults are QuartzNet15x5.

    `groups`, `stem` and `tail` are (filters, kernel width in frames).
    """
    body = tuple(
        BlockConfig(
            filters,
            repeat,
            kernel,
            dropout=dropout,
            residual=True,
            squeeze_excitation=squeeze_excitation,
        )
        for filters, kernel in groups
        for _ in range(blocks_per_group)
    )
    first = BlockConfig(stem[0], 1, stem[1], stride=stem_stride, dropout=dropout)
    wide = BlockConfig(tail[0], 1, tail[1], dilation=tail_dilation, dropout=dropout)
    last = BlockConfig(last_filters, 1, 1, dropout=dropout, separable=False)
    return QuartzNetConfig(vocabulary_size, (first, *body, wide, last), features=features, upsample=upsample)


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
