"""QuartzNet BxR and Citrinet: stacks of separable 1-D convolutions with a CTC head.

Sources: Kriman et al. 2019, "QuartzNet: Deep automatic speech recognition with 1D time-channel separable
convolutions"; Majumdar et al. 2021, "Citrinet: closing the gap between non-autoregressive and autoregressive
end-to-end models" (squeeze-and-excitation, strided residual). The layout follows NeMo's `jasper` lists, so
that published weights fit (see training/nemo.py).

Every convolution wider than one frame sees zeros beyond an item's length, so a padded batch gives for each
item what the item alone gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.masks import frame_mask


@dataclass(frozen=True)
class BlockConfig:
    """One block: `repeat` convolutions with the same shape, and optionally a residual path around them."""

    filters: int
    repeat: int = 1
    kernel: int = 33
    stride: int = 1
    dilation: int = 1
    dropout: float = 0.0
    residual: bool = False
    separable: bool = True
    squeeze_excitation: bool = False
    squeeze_reduction: int = 8
    stride_last: bool = False
    """The stride belongs to the last of the repeats only, as in Citrinet; otherwise to each."""


@dataclass(frozen=True)
class QuartzNetConfig:
    """What it takes to build the network; `to_dict` and `from_dict` carry it through a checkpoint."""

    vocabulary_size: int
    """Outputs of the head, the blank included."""
    blocks: tuple[BlockConfig, ...]
    features: int = 64
    upsample: int = 1
    """Output frames per frame of the trunk: a trunk of stride 4 with 2 gives a frame every 20 ms."""
    norm_eps: float = 1e-3
    norm_momentum: float = 0.1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "blocks": [asdict(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuartzNetConfig:
        """The reverse of `to_dict`. Raises ValueError on an unknown or a missing field."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"unknown model fields: {sorted(unknown)}")
        try:
            blocks = tuple(BlockConfig(**block) for block in values["blocks"])
            return cls(**{**values, "blocks": blocks})
        except (KeyError, TypeError) as error:
            raise ValueError(f"model config: {error}") from error

    @property
    def stride(self) -> int:
        """Feature frames per output frame."""
        trunk = 1
        for block in self.blocks:
            trunk *= block.stride if block.stride_last else block.stride**block.repeat
        return trunk // self.upsample

    def with_vocabulary(self, size: int) -> QuartzNetConfig:
        """The same trunk with another number of outputs."""
        return replace(self, vocabulary_size=size)


def same_padding(kernel: int, dilation: int) -> int:
    """Zeros on each side that keep the length at stride 1 (kernel odd)."""
    return dilation * (kernel - 1) // 2


def convolved_length(length: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    """Frames that a convolution with `same_padding` makes of `length` frames; int64, any shape."""
    grown = length + 2 * same_padding(kernel, dilation) - dilation * (kernel - 1) - 1
    return torch.div(grown, stride, rounding_mode="floor") + 1


def masked(values: Tensor, lengths: Tensor) -> Tensor:
    """(batch, channels, frames) with zeros beyond each item's length."""
    mask = frame_mask(lengths, values.shape[-1])
    return values * mask[:, None, :].to(values.dtype)


class ConvNorm(nn.Module):
    """One repeat: depthwise and pointwise convolution (or one full convolution), then batch normalisation."""

    def __init__(self, inputs: int, block: BlockConfig, stride: int, config: QuartzNetConfig) -> None:
        super().__init__()
        self.kernel, self.stride, self.dilation = block.kernel, stride, block.dilation
        padding = same_padding(block.kernel, block.dilation)
        self.depthwise: nn.Conv1d | None = None
        if block.separable:
            self.depthwise = nn.Conv1d(
                inputs, inputs, block.kernel, stride, padding, block.dilation, groups=inputs, bias=False
            )
            self.pointwise = nn.Conv1d(inputs, block.filters, 1, bias=False)
        else:
            self.pointwise = nn.Conv1d(
                inputs, block.filters, block.kernel, stride, padding, block.dilation, bias=False
            )
        self.norm = nn.BatchNorm1d(block.filters, eps=config.norm_eps, momentum=config.norm_momentum)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, inputs, frames), (batch,) -> (batch, filters, frames'), (batch,)."""
        if self.kernel > 1:
            values = masked(values, lengths)
        if self.depthwise is not None:
            values = self.depthwise(values)
        return self.norm(self.pointwise(values)), convolved_length(
            lengths, self.kernel, self.stride, self.dilation
        )


class SqueezeExcitation(nn.Module):
    """A gate per channel from the mean over an item's own frames (Hu et al. 2018, global context)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, max(1, channels // reduction), bias=False)
        self.expand = nn.Linear(max(1, channels // reduction), channels, bias=False)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """(batch, channels, frames), (batch,) -> the same shape, gated."""
        total = masked(values, lengths).sum(dim=-1)
        mean = total / lengths.clamp(min=1)[:, None].to(values.dtype)
        gate = torch.sigmoid(self.expand(functional.relu(self.reduce(mean))))
        return values * gate[:, :, None]


class Residual(nn.Module):
    """The path around a block: a 1x1 convolution with batch normalisation."""

    def __init__(self, inputs: int, filters: int, stride: int, config: QuartzNetConfig) -> None:
        super().__init__()
        self.pointwise = nn.Conv1d(inputs, filters, 1, stride, bias=False)
        self.norm = nn.BatchNorm1d(filters, eps=config.norm_eps, momentum=config.norm_momentum)

    def forward(self, values: Tensor) -> Tensor:
        """(batch, inputs, frames) -> (batch, filters, frames')."""
        out: Tensor = self.norm(self.pointwise(values))
        return out


class Block(nn.Module):
    """`repeat` ConvNorms with ReLU and dropout between, gate and residual before the last ReLU."""

    def __init__(self, inputs: int, block: BlockConfig, config: QuartzNetConfig) -> None:
        super().__init__()
        strides = [
            block.stride if not block.stride_last or index == block.repeat - 1 else 1
            for index in range(block.repeat)
        ]
        self.layers = nn.ModuleList(
            ConvNorm(inputs if index == 0 else block.filters, block, stride, config)
            for index, stride in enumerate(strides)
        )
        self.squeeze = (
            SqueezeExcitation(block.filters, block.squeeze_reduction) if block.squeeze_excitation else None
        )
        total_stride = 1
        for stride in strides:
            total_stride *= stride
        self.residual = Residual(inputs, block.filters, total_stride, config) if block.residual else None
        self.dropout = nn.Dropout(block.dropout)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, inputs, frames), (batch,) -> (batch, filters, frames'), (batch,)."""
        out = values
        for index, layer in enumerate(self.layers):
            if index:
                out = self.dropout(functional.relu(out))
            out, lengths = layer(out, lengths)
        if self.squeeze is not None:
            out = self.squeeze(out, lengths)
        if self.residual is not None:
            out = out + self.residual(values)
        return self.dropout(functional.relu(out)), lengths


class CtcOutput(NamedTuple):
    """What the network says about a batch."""

    log_probs: Tensor
    """(batch, frames, vocabulary) float, log-softmax over the last axis."""
    lengths: Tensor
    """(batch,) int64, frames that count."""
    hidden: list[Tensor]
    """(batch, channels, frames) per requested block; beyond `lengths` the values mean nothing."""


class QuartzNet(nn.Module):
    """Features in, log-probabilities out; see `QuartzNetConfig`."""

    def __init__(self, config: QuartzNetConfig) -> None:
        super().__init__()
        if config.upsample < 1 or not config.blocks:
            raise ValueError("a model needs at least one block and upsample >= 1")
        self.config = config
        blocks: list[Block] = []
        channels = config.features
        for block in config.blocks:
            blocks.append(Block(channels, block, config))
            channels = block.filters
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv1d(channels, config.upsample * config.vocabulary_size, 1)
        self.apply(_initialise)

    def forward(self, features: Tensor, lengths: Tensor, hidden_blocks: Sequence[int] = ()) -> CtcOutput:
        """Run the network on a padded batch.

        Args:
            features: (batch, features, frames) float.
            lengths: (batch,) int64, frames that count per item.
            hidden_blocks: indices of blocks (negative from the end) whose outputs to return as well,
                in ascending order of the block; -2 is the one before the last.
        """
        wanted = {index % len(self.blocks) for index in hidden_blocks}
        hidden: list[Tensor] = []
        values = features
        for index, block in enumerate(self.blocks):
            values, lengths = block(values, lengths)
            if index in wanted:
                hidden.append(values)
        logits = self.head(values)
        factor, size = self.config.upsample, self.config.vocabulary_size
        if factor > 1:
            batch, _, frames = logits.shape
            logits = logits.reshape(batch, factor, size, frames).permute(0, 3, 1, 2)
            logits = logits.reshape(batch, frames * factor, size)
        else:
            logits = logits.transpose(1, 2)
        return CtcOutput(functional.log_softmax(logits, dim=-1), lengths * factor, hidden)

    def parameter_count(self) -> int:
        """Weights that training moves."""
        return sum(parameter.numel() for parameter in self.parameters())


def _initialise(module: nn.Module) -> None:
    """Glorot's uniform initialisation, as QuartzNet was trained; zero biases."""
    if isinstance(module, nn.Conv1d | nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
