"""Trains a :class:`ConformerCtc` in bfloat16 on a CPU.

:class:`FastConformer` owns no weights: it reads those of the wrapped network. Activations are (batch, frames,
channels), so that every convolution that sees one frame is a matrix product; the sums along the layers are
float32. Batch statistics are taken over valid frames only. The depthwise convolutions are those of
``kernels.cpp``, without which torch's run instead.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.conformer import ConformerCtc
from training.distillation.kernels import kernels, load
from training.distillation.quartznet import Recorded, depthwise, follow, upsampled
from training.masks import frame_mask
from training.recipes.quartznet_ctc.model import CtcOutput, convolved_length

Untyped = Any
"""A module of `transformers`, which has no types."""
MISSING = -1e9
"""Added to an attention's scores of frames that an item does not have."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer, or a convolution that sees one frame, in the precision of `x`."""
    matrix = weight.reshape(weight.shape[:2]).to(x.dtype)
    return functional.linear(x, matrix, None if bias is None else bias.to(x.dtype))


def normal(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer normalisation in float32."""
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class _Strided(Recorded):
    """Depthwise 3 x 3 convolution of stride 2; x (B,T,F,C) bfloat16, weight (C,1,3,3) float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        taps = weight.flatten(1).t().contiguous()
        ctx.save_for_backward(x, taps)
        return cast(Tensor, kernels().strided_depthwise(x, taps))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        of_x, of_taps = kernels().strided_depthwise_gradients(gradients[0].contiguous(), x, taps)
        return of_x, of_taps.t().reshape(-1, 1, 3, 3).contiguous()


class FastConformer(nn.Module):
    """Features in, as :meth:`ConformerCtc.forward` gives them to its network, log-probabilities out."""

    def __init__(self, model: ConformerCtc) -> None:
        super().__init__()
        config = model.config
        if config.subsampling != "dw_striding":
            raise ValueError(f"subsampling {config.subsampling!r}: the fast path wants 'dw_striding'")
        if not config.bias:
            raise ValueError("the fast path wants biases")
        if config.width % 32 or config.subsampling_channels % 32:
            raise ValueError("the fast path wants width and subsampling_channels in multiples of 32")
        self.model = model
        self.has_kernels = load() is not None

    def forward(self, features: Tensor, lengths: Tensor, hidden_layers: tuple[int, ...] = ()) -> CtcOutput:
        """Features (batch, frames, features), zero beyond lengths -> log-probs, layers' outputs (B,T,C)."""
        encoder, factor = self.model.network.encoder, self.model.config.upsample
        x, lengths = self._subsampled(features, lengths)
        frames = x.shape[1]
        own = frame_mask(lengths, frames)
        missing = torch.zeros(1, len(x), 1, frames).masked_fill(~own[None, :, None], MISSING)
        distances = self.model.positions(frames).bfloat16()
        hidden: list[Tensor] = []
        for index, layer in enumerate(encoder.layers):
            x = self._fed_forward(x, layer.norm_feed_forward1, layer.feed_forward1)
            x = self._attended(x, layer.norm_self_att, layer.self_attn, distances, missing)
            x = self._convolved(x, layer.norm_conv, layer.conv, own)
            x = self._fed_forward(x, layer.norm_feed_forward2, layer.feed_forward2)
            x = normal(x, layer.norm_out)
            if index in hidden_layers:
                hidden.append(x.bfloat16())
        head = self.model.network.ctc_head
        logits = upsampled(product(x.bfloat16(), head.weight, head.bias).float(), factor)
        return CtcOutput(functional.log_softmax(logits, dim=-1), lengths * factor, hidden)

    def _subsampled(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B,T,F), (B,) -> float32 (B,T',C), (B,)."""
        encoder = self.model.network.encoder
        first, relu, *rest = encoder.subsampling.layers
        lengths = convolved_length(lengths, 3, 2, 1)
        windows = functional.pad(features.bfloat16(), (1, 1, 1, 1)).unfold(1, 3, 2).unfold(2, 3, 2)
        weight = first.weight.reshape(len(first.weight), 9)
        x = relu(self._own(product(windows.flatten(3), weight, first.bias), lengths))
        for strided, pointwise, relu in zip(rest[0::3], rest[1::3], rest[2::3], strict=True):
            lengths = convolved_length(lengths, 3, 2, 1)
            x = product(self._strided(x, strided), pointwise.weight, pointwise.bias)
            x = relu(self._own(x, lengths))
        linear = encoder.subsampling.linear
        out = product(x.transpose(2, 3).flatten(2), linear.weight, linear.bias)
        return out.float() * encoder.input_scale, lengths

    @staticmethod
    def _own(x: Tensor, lengths: Tensor) -> Tensor:
        """(B,T,F,C) with zeros beyond each item's frames."""
        return x * frame_mask(lengths, x.shape[1])[:, :, None, None].to(x.dtype)

    def _strided(self, x: Tensor, convolution: nn.Conv2d) -> Tensor:
        bias = cast(Tensor, convolution.bias).bfloat16()
        if self.has_kernels:
            return _Strided.call(x.contiguous(), convolution.weight) + bias
        weight, channels = convolution.weight.bfloat16(), x.shape[-1]
        out = functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2, padding=1, groups=channels)
        return out.permute(0, 2, 3, 1)

    @staticmethod
    def _fed_forward(x: Tensor, norm: nn.LayerNorm, module: Untyped) -> Tensor:
        first, second = module.linear1, module.linear2
        inner = functional.silu(product(normal(x, norm).bfloat16(), first.weight, first.bias))
        return x + 0.5 * product(inner, second.weight, second.bias).float()

    @staticmethod
    def _attended(
        x: Tensor, norm: nn.LayerNorm, module: Untyped, distances: Tensor, missing: Tensor
    ) -> Tensor:
        batch, frames, width = x.shape
        heads, size = module.bias_u.shape
        parts = (module.q_proj, module.k_proj, module.v_proj)
        weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
        joined = product(normal(x, norm).bfloat16(), weight, bias).view(batch, frames, 3, heads, size)
        query, key, value = joined.permute(2, 3, 0, 1, 4)  # (heads, batch, frames, size)
        by_distance = product(distances, module.relative_k_proj.weight, None).view(-1, heads, size)
        of_content, of_distance = (b.bfloat16()[:, None, None] for b in (module.bias_u, module.bias_v))
        # one product for the whole batch, whose items share the distances
        far = (query + of_distance).reshape(heads, batch * frames, size) @ by_distance.permute(1, 2, 0)
        far = functional.pad(far.view(heads, batch, frames, -1), (1, 0)).view(heads, batch, -1, frames)
        far = far[:, :, 1:].reshape(heads, batch, frames, -1)[..., :frames]
        scores = ((query + of_content) @ key.transpose(2, 3) + far).float() * module.scaling + missing
        mixed = (scores.softmax(dim=-1).bfloat16() @ value).permute(1, 2, 0, 3).reshape(batch, frames, width)
        return x + product(mixed, module.o_proj.weight, module.o_proj.bias).float()

    def _convolved(self, x: Tensor, norm: nn.LayerNorm, module: Untyped, own: Tensor) -> Tensor:
        first, last, over_time = module.pointwise_conv1, module.pointwise_conv2, module.depthwise_conv
        gated = functional.glu(product(normal(x, norm).bfloat16(), first.weight, first.bias), dim=-1)
        gated = gated * own[:, :, None].to(gated.dtype)
        if self.has_kernels:
            out = depthwise(gated, over_time).float() + over_time.bias
        else:
            out = over_time(gated.float().mT).mT
        active = functional.silu(_batch_normal(out, own, module.norm).bfloat16())
        return x + product(active, last.weight, last.bias).float()


def _batch_normal(x: Tensor, own: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Batch normalisation (Ioffe and Szegedy 2015) of float32 (B,T,C) over the frames that count."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    if norm.training:
        frames = x[own]
        mean, variance = frames.mean(dim=0), frames.var(dim=0, unbiased=False)
        follow(norm, mean, variance)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return x * scale + (norm.bias - mean * scale)
