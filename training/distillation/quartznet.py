"""Runs a :class:`QuartzNet` in bfloat16 and channels-last on a CPU, several times faster than ``nn.Conv1d``.

:class:`FastQuartzNet` owns no weights: it reads those of the wrapped model, so checkpoints and export see the
ordinary network. Activations are ``(batch, frames, channels)``; a pointwise convolution is then one matrix
product over all frames, and the depthwise convolutions and the normalisation are the kernels of
``kernels.cpp``. Batch statistics are taken over valid frames only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.distillation.kernels import kernels, load
from training.recipes.quartznet_ctc.model import Block, ConvNorm, CtcOutput, QuartzNet, convolved_length


class Recorded(torch.autograd.Function):
    """A function whose gradient is our own."""

    @classmethod
    def call(cls, *inputs: Any) -> Tensor:
        """The function, with its gradient recorded; ``inputs`` as in its ``forward``."""
        return cast(Tensor, cls.apply(*inputs))  # type: ignore[no-untyped-call]


class _Depthwise(Recorded):
    """Depthwise convolution at stride 1 with "same" padding; x (B,T,C) bfloat16, weight (C,1,K) float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        taps = weight[:, 0].t().contiguous()
        ctx.save_for_backward(x, taps)
        return cast(Tensor, kernels().depthwise(x, taps, taps.shape[0] // 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        x, taps = ctx.saved_tensors
        size = taps.shape[0]
        gradient = gradients[0].contiguous()
        of_weight = (
            kernels().depthwise_weight_gradient(x, gradient, size, size // 2).t()[:, None].contiguous()
        )
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = kernels().depthwise(gradient, taps.flip(0).contiguous(), size - 1 - size // 2)
        return of_x, of_weight


class _NormRelu(Recorded):
    """``relu(norm(z) [+ norm(r)])`` with batch statistics over valid frames; zeros on padded frames.

    Batch normalisation and its gradient: Ioffe and Szegedy 2015. ``statistics`` hold mean and variance of z
    (and r) as float32 ``(2, C)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        lengths: Tensor,
        eps: float,
        z: Tensor,
        gamma: Tensor,
        beta: Tensor,
        statistics: Tensor,
        *second: Tensor,
    ) -> Tensor:
        inverse = torch.rsqrt(statistics[1] + eps)
        scale = gamma * inverse
        shift = beta - scale * statistics[0]
        r = scale2 = None
        if second:
            r, gamma2, beta2, statistics2 = second
            inverse2 = torch.rsqrt(statistics2[1] + eps)
            scale2 = gamma2 * inverse2
            shift = shift + beta2 - scale2 * statistics2[0]
            ctx.second = (gamma2, inverse2, statistics2[0])
        y = kernels().affine_relu(z, scale, shift, r, scale2, lengths, True)
        ctx.first = (gamma, inverse, statistics[0])
        ctx.has_second = bool(second)
        ctx.save_for_backward(y, z, lengths, *second[:1])
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, z, lengths, *rest = ctx.saved_tensors
        dy = gradients[0].contiguous()
        r = rest[0] if ctx.has_second else None
        count = float(lengths.sum())
        sums = kernels().gradient_sums(dy, y, z, r, lengths)
        beta_gradient = sums[0]

        def solve(parts: tuple[Tensor, Tensor, Tensor], product: Tensor) -> tuple[Tensor, Tensor]:
            gamma, inverse, mean = parts
            of_gamma = inverse * (product - mean * beta_gradient)
            p = gamma * inverse
            q = -p * inverse * of_gamma / count
            return torch.stack([p, q, -p * beta_gradient / count - q * mean]), of_gamma

        coefficients, of_gamma = solve(ctx.first, sums[1])
        if r is None:
            (of_z,) = kernels().gradient_apply(dy, y, z, coefficients, None, None, lengths)
            return None, None, of_z, of_gamma, beta_gradient, None
        coefficients2, of_gamma2 = solve(ctx.second, sums[2])
        of_z, of_r = kernels().gradient_apply(dy, y, z, coefficients, r, coefficients2, lengths)
        return None, None, of_z, of_gamma, beta_gradient, None, of_r, of_gamma2, beta_gradient, None


def _statistics(z: Tensor, lengths: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Mean and variance per channel, (2, C) float32; in training of the batch, and the running ones move."""
    running_mean, running_variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    if not norm.training:
        return torch.stack([running_mean, running_variance])
    with torch.no_grad():
        count = float(lengths.sum())
        mean, square = kernels().moments(z, lengths) / count
        variance = (square - mean * mean).clamp_(min=0.0)
        follow(norm, mean, variance * (count / max(1.0, count - 1.0)))
        return torch.stack([mean, variance])


@torch.no_grad()
def follow(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards a batch's, each (C,)."""
    momentum = norm.momentum if norm.momentum is not None else 0.1
    cast(Tensor, norm.running_mean).lerp_(mean, momentum)
    cast(Tensor, norm.running_var).lerp_(variance, momentum)


def _full_convolution(x: Tensor, convolution: nn.Conv1d) -> Tensor:
    """Strided full convolution as one matrix product over unfolded frames; x (B,T,C) -> (B,T',C')."""
    size, stride = convolution.kernel_size[0], convolution.stride[0]
    if size > 1:
        x = functional.pad(x, (0, 0, size // 2, size // 2)).unfold(1, size, stride).flatten(2)
    elif stride > 1:
        x = x[:, ::stride]
    return functional.linear(x.contiguous(), convolution.weight.flatten(1).to(x.dtype))


def depthwise(x: Tensor, convolution: nn.Conv1d) -> Tensor:
    """Depthwise convolution without its bias; x (B,T,C) bfloat16 -> (B,T',C)."""
    dilation, stride = convolution.dilation[0], convolution.stride[0]
    if stride == 1 and x.shape[-1] % 32 == 0:
        if dilation == 1:
            return _Depthwise.call(x.contiguous(), convolution.weight)
        frames = x.shape[1]  # each residue of the frame number modulo the dilation is a sequence of its own
        x = functional.pad(x, (0, 0, 0, -frames % dilation))
        phases = [
            _Depthwise.call(x[:, phase::dilation].contiguous(), convolution.weight)
            for phase in range(dilation)
        ]
        return torch.stack(phases, dim=2).flatten(1, 2)[:, :frames].contiguous()
    out = functional.conv1d(
        x.float().mT,
        convolution.weight,
        None,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        x.shape[-1],
    )
    return out.mT.contiguous().to(x.dtype)


def upsampled(values: Tensor, factor: int) -> Tensor:
    """Frames that hold ``factor`` finer ones side by side, (B,T,factor*D) -> (B,T*factor,D)."""
    batch, frames, width = values.shape
    return values.reshape(batch, frames * factor, width // factor)


class PlainQuartzNet(nn.Module):
    """:class:`FastQuartzNet`'s interface over the ordinary network, for CPUs without the kernels."""

    def __init__(self, model: QuartzNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, lengths: Tensor, hidden_blocks: tuple[int, ...] = ()) -> CtcOutput:
        """As :meth:`FastQuartzNet.forward`, in float32."""
        output = self.model(features.mT, lengths, hidden_blocks)
        return CtcOutput(output.log_probs, output.lengths, [hidden.mT for hidden in output.hidden])


def channels_last(model: QuartzNet) -> FastQuartzNet | PlainQuartzNet:
    """The fastest way to run ``model`` here; the choice follows the machine and the model's shape."""
    return PlainQuartzNet(model) if load() is None else FastQuartzNet(model)


class FastQuartzNet(nn.Module):
    """The same function as ``QuartzNet.forward``, with hidden activations as (batch, frames, channels)."""

    def __init__(self, model: QuartzNet) -> None:
        super().__init__()
        kernels()
        for block in model.config.blocks:
            if block.filters % 32 or block.dropout or block.squeeze_excitation:
                raise ValueError("the fast path wants filters in multiples of 32, no dropout, no squeeze")
        self.model = model

    def _layer(self, x: Tensor, lengths: Tensor, layer: ConvNorm) -> tuple[Tensor, Tensor]:
        """Convolutions of one repeat, before its norm: (B,T,C) -> (B,T',C'), lengths."""
        if layer.depthwise is not None:
            x = functional.linear(
                depthwise(x, layer.depthwise), layer.pointwise.weight[:, :, 0].to(torch.bfloat16)
            )
        else:
            x = _full_convolution(x, layer.pointwise)
        return x, convolved_length(lengths, layer.kernel, layer.stride, layer.dilation)

    def block(self, x: Tensor, lengths: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """One block of the network alone: bfloat16 (B,T,C), (B,) -> (B,T',C'), (B,)."""
        start = x
        for index, module in enumerate(block.layers):
            layer = cast(ConvNorm, module)
            z, lengths = self._layer(x, lengths, layer)
            second: tuple[Tensor, ...] = ()
            if block.residual is not None and index == len(block.layers) - 1:
                r = _full_convolution(start, block.residual.pointwise)
                norm = block.residual.norm
                second = (r, norm.weight, norm.bias, _statistics(r, lengths, norm))
            statistics = _statistics(z, lengths, layer.norm)
            x = _NormRelu.call(
                lengths, layer.norm.eps, z, layer.norm.weight, layer.norm.bias, statistics, *second
            )
        return x, lengths

    def forward(self, features: Tensor, lengths: Tensor, hidden_blocks: tuple[int, ...] = ()) -> CtcOutput:
        """Features (batch, frames, features), zero beyond lengths -> log-probs and hidden activations."""
        x = features.to(torch.bfloat16)
        wanted = {index % len(self.model.blocks) for index in hidden_blocks}
        hidden: list[Tensor] = []
        for index, block in enumerate(self.model.blocks):
            x, lengths = self.block(x, lengths, cast(Block, block))
            if index in wanted:
                hidden.append(x)
        head = self.model.head
        weight, bias = head.weight[:, :, 0].to(x.dtype), cast(Tensor, head.bias).to(x.dtype)
        logits = functional.linear(x, weight, bias).float()
        factor = self.model.config.upsample
        log_probs = functional.log_softmax(upsampled(logits, factor), dim=-1)
        return CtcOutput(log_probs, lengths * factor, hidden)
