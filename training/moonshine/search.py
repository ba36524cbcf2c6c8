"""Greedy search with cached keys and values, for several clips at once, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from training.compression.network import searched
from training.distillation.kernels import working_dtype
from training.moonshine.model import DecoderLayer, Moonshine, Turn, angles, turn_by
from training.transformer import Attention

Pair = tuple[Tensor, Tensor]
"""Keys and values, (batch, heads, n, width / heads)."""


def greedy(network: Moonshine, waveform: Tensor, lengths: Tensor) -> list[list[int]]:
    """The likeliest tokens of clips (batch, samples), as `Moonshine.generate` finds them, in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=working_dtype() is torch.bfloat16):
        return greedy_of(network, *network.encoder(waveform, lengths))


def greedy_of(network: Moonshine, audio: Tensor, counts: Tensor, bias: Tensor) -> list[list[int]]:
    """The same of what the encoder found."""
    limits = torch.div(torch.div(counts + 1, 2, rounding_mode="floor"), 2, rounding_mode="floor")
    heard = [_keys_and_values(layer.encoder_attn, audio) for layer in _layers(network)]
    said: list[Pair | None] = [None] * len(heard)
    return searched(
        lambda tokens, place: _step(network, tokens, place, heard, said, bias),
        network,
        network.prompt,
        limits.tolist(),
    )


def _layers(network: Moonshine) -> Iterator[DecoderLayer]:
    return (cast(DecoderLayer, layer) for layer in network.decoder.layers)


def _split(attention: Attention, values: Tensor) -> Tensor:
    batch, count, width = values.shape
    return values.reshape(batch, count, attention.heads, width // attention.heads).transpose(1, 2)


def _keys_and_values(attention: Attention, values: Tensor) -> Pair:
    return _split(attention, attention.k_proj(values)), _split(attention, attention.v_proj(values))


def _attended(attention: Attention, query: Tensor, pair: Pair, bias: Tensor | None) -> Tensor:
    keys, values = (each.to(query.dtype) for each in pair)
    mixed = functional.scaled_dot_product_attention(
        query, keys, values, None if bias is None else bias.to(query.dtype)
    )
    out: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return out


def _step(
    network: Moonshine, tokens: Tensor, place: int, heard: list[Pair], said: list[Pair | None], bias: Tensor
) -> Tensor:
    """Tokens (batch, 1) at a place -> logits (batch, vocabulary) float32 of the next ones; `said` grows."""
    decoder = network.decoder
    values = decoder.rows_of(tokens)
    turn: Turn = turn_by(angles(torch.tensor([place]), network.shape.turned))
    for index, layer in enumerate(_layers(network)):
        own, normed = layer.self_attn, layer.self_attn_layer_norm(values)
        query = turn(_split(own, own.q_proj(normed)))
        keys, memory = _keys_and_values(own, normed)
        before, pair = said[index], (turn(keys), memory)
        if before is not None:
            pair = torch.cat([before[0], pair[0]], 2), torch.cat([before[1], pair[1]], 2)
        said[index] = pair
        values = values + _attended(own, query, pair, None)
        other = layer.encoder_attn
        query = _split(other, other.q_proj(layer.encoder_attn_layer_norm(values)))
        values = values + _attended(other, query, heard[index], bias)
        values = values + layer.fed(values)
    states = decoder.layer_norm(values)
    return functional.linear(states, decoder.embed_tokens.weight)[:, 0].float()
