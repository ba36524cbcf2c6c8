"""Greedy search with cached keys and values, for several clips at once, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from training.distillation.kernels import working_dtype
from training.moonshine.model import DecoderLayer, Moonshine, Turn, angles, turn_by
from training.recipes.whisper_seq2seq.model import Repeats, least_repeats
from training.transformer import Attention

Pair = tuple[Tensor, Tensor]
"""Keys and values, (batch, heads, n, width / heads)."""


def greedy(network: Moonshine, waveform: Tensor, lengths: Tensor) -> list[list[int]]:
    """The likeliest tokens of clips (batch, samples), as `Moonshine.generate` finds them, in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=working_dtype() is torch.bfloat16):
        return greedy_of(network, *network.encoder(waveform, lengths))


def greedy_of(network: Moonshine, audio: Tensor, counts: Tensor, bias: Tensor) -> list[list[int]]:
    """The same of what the encoder found."""
    batch, prompt = len(audio), network.prompt
    limits = torch.div(torch.div(counts + 1, 2, rounding_mode="floor"), 2, rounding_mode="floor")
    heard = [_keys_and_values(layer.encoder_attn, audio) for layer in _layers(network)]
    said: list[Pair | None] = [None] * len(heard)
    found: list[list[int]] = [[] for _ in range(batch)]
    going = [True] * batch
    repeats, least = Repeats.none(batch, audio.device), least_repeats(limits)
    tokens = torch.full((batch,), prompt.ids[0])
    for step in range(min(int(limits.max()) + 1, network.most_tokens)):
        logits = _step(network, tokens, step, heard, said, bias) + network.suppress
        tokens = logits.argmax(dim=-1)
        repeats, repeated = repeats.after(tokens, least)
        for item, (token, loop) in enumerate(zip(tokens.tolist(), repeated.tolist(), strict=True)):
            going[item] = going[item] and token != prompt.end and step < int(limits[item])
            if going[item] and loop:
                going[item] = False
                del found[item][len(found[item]) - loop + 1 :]
            elif going[item]:
                found[item].append(token)
        if not any(going):
            break
    return found


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
    network: Moonshine, tokens: Tensor, step: int, heard: list[Pair], said: list[Pair | None], bias: Tensor
) -> Tensor:
    """Tokens (batch,) -> logits (batch, vocabulary) float32 of the next ones; `said` grows."""
    decoder = network.decoder
    values = decoder.rows_of(tokens[:, None])
    turn: Turn = turn_by(angles(torch.tensor([step]), network.shape.turned))
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
