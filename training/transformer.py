"""Pre-norm Transformer layers with the shapes that Whisper and XLSR wav2vec2 share.

Source: Vaswani et al. 2017; layer normalisation before each sublayer as in Xiong et al. 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.masks import frame_mask


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError where the heads do not share the width evenly."""
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"width {width} is not a multiple of {heads} heads")


class Attention(nn.Module):
    """Multi-head attention of (batch, frames, width) on itself or on another sequence."""

    def __init__(self, width: int, heads: int, key_bias: bool = True, *, bias: bool = True) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=key_bias and bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        values: Tensor,
        bias: Tensor | None,
        memory: Tensor | None = None,
        turn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend; `bias` is added to the scores, 0 where a key counts and very negative where not.

        Args:
            values: (batch, queries, width).
            bias: broadcast against (batch, heads, queries, keys), or None.
            memory: (batch, keys, width), default `values`.
            turn: tells queries and keys (batch, heads, n, width / heads) where they stand.
        """
        source = values if memory is None else memory
        query, key = self._split(self.q_proj(values)), self._split(self.k_proj(source))
        if turn is not None:
            query, key = turn(query), turn(key)
        # The fused form keeps no scores for the backward pass: at 30 s they are most of a layer's memory.
        mixed = functional.scaled_dot_product_attention(
            query, key, self._split(self.v_proj(source)), None if bias is None else bias.to(query.dtype)
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def shares(self, values: Tensor, bias: Tensor | None, memory: Tensor) -> Tensor:
        """How much each query takes of each key, (batch, heads, queries, keys)."""
        query, key = self._split(self.q_proj(values)), self._split(self.k_proj(memory))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        found: Tensor = (scores if bias is None else scores + bias).softmax(dim=-1)
        return found

    def _split(self, values: Tensor) -> Tensor:
        """(batch, frames, width) -> (batch, heads, frames, width per head)."""
        batch, frames, width = values.shape
        return values.reshape(batch, frames, self.heads, width // self.heads).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each on a normalised copy, each added to its input."""

    def __init__(
        self, width: int, heads: int, inner: int, *, key_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, key_bias)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, frames, width), bias of the scores -> the same shape."""
        values = values + self.dropout(self.self_attn(self.self_attn_layer_norm(values), bias))
        inner = functional.gelu(self.fc1(self.final_layer_norm(values)))
        out: Tensor = values + self.dropout(self.fc2(inner))
        return out


def key_bias(lengths: Tensor, frames: int) -> Tensor:
    """(batch, 1, 1, frames) float32: 0 on an item's own frames, -1e9 beyond."""
    return torch.where(frame_mask(lengths, frames), 0.0, -1e9)[:, None, None, :]
