"""The small network, and how it and its teacher run on a CPU, in bfloat16 where the processor has it.

Activations are (batch, frames, width); keys and values of the audio are computed once for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.compression.vocabulary import CutVocabulary
from training.distillation.kernels import working_dtype
from training.distillation.whisper import attended, fast_encoder, keys_and_values, linear, normal
from training.four_bits import SMALL_GROUP, rounded
from training.moonshine.model import Moonshine
from training.recipes.whisper_seq2seq.model import (
    DecoderLayer,
    Prompt,
    Repeats,
    Seq2Seq,
    WhisperSeq2Seq,
    least_repeats,
)

POSITIONS = 224
"""Of tokens, prompt and all: nobody says more in 30 s."""
PRECISE = frozenset(f"encoder.layers.0.self_attn.{name}_proj" for name in ("v", "out"))
"""What the first layer carries from frame to frame: 1 % of the weights, and nearly half of what the encoder
loses by rounding (docs/experiments.md)."""
Heard = list[tuple[Tensor, Tensor]]
"""Keys and values of the audio per layer, (batch, heads, frames, width / heads)."""


def small_network(large: WhisperSeq2Seq, layers: Sequence[int], cut: CutVocabulary) -> WhisperSeq2Seq:
    """A copy on true lengths with these layers of the decoder and these tokens only."""
    positions = min(POSITIONS, large.decoder.config.positions)
    whole = large.decoder.config
    heads = tuple((layers.index(layer), head) for layer, head in whole.alignment_heads if layer in layers)
    config = replace(
        whole,
        vocabulary=len(cut.ids),
        layers=len(layers),
        positions=positions,
        alignment_heads=heads,
    )
    small = WhisperSeq2Seq(large.encoder.config, config, cut.prompt())
    small.encoder.load_state_dict(large.encoder.state_dict())
    decoder = small.decoder
    for ours, index in zip(decoder.layers, layers, strict=True):
        ours.load_state_dict(large.decoder.layers[index].state_dict())
    decoder.layer_norm.load_state_dict(large.decoder.layer_norm.state_dict())
    with torch.no_grad():
        decoder.embed_positions.weight.copy_(large.decoder.embed_positions.weight[:positions])
        decoder.embed_tokens.weight.copy_(large.decoder.embed_tokens.weight[list(cut.ids)])
    return small


def coarse_weights(network: WhisperSeq2Seq | Moonshine) -> set[str]:
    """Names of the weights that are served in four bits: matrices of whole groups of inputs.

    But for a Whisper's PRECISE ones: its groups have 128 weights, where a Moonshine's have 32.
    """
    precise = PRECISE if isinstance(network, WhisperSeq2Seq) else frozenset()
    found = set()
    for name, module in network.named_modules():
        if name in precise:
            continue
        if isinstance(module, nn.Linear | nn.Conv1d) or name.endswith("embed_tokens"):
            weight = cast(Tensor, module.weight)
            if weight[0].numel() % SMALL_GROUP == 0:
                found.add(f"{name}.weight")
    return found


def round_into(target: nn.Module, source: nn.Module, coarse: set[str]) -> None:
    """Give `target` the weights of `source`, those named in `coarse` with the values that are served."""
    with torch.no_grad():
        places = dict(target.named_parameters())
        for name, value in source.named_parameters():
            places[name].copy_(rounded(value) if name in coarse else value)


def listen(network: WhisperSeq2Seq, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised features (batch, frames, bands), zero beyond lengths -> audio states in `working_dtype`.

    Returns (batch, frames / 2, width), lengths (batch,), and what is added to scores of missing frames.
    """
    values, lengths, missing, _ = fast_encoder(network.encoder, features, lengths)
    return normal(values, network.encoder.layer_norm), lengths, missing


def heard(network: WhisperSeq2Seq, audio: Tensor) -> Heard:
    """Keys and values of the audio, for every layer of the decoder."""
    return [keys_and_values(layer.encoder_attn, audio) for layer in decoder_layers(network)]


def decoder_layers(network: WhisperSeq2Seq) -> Iterator[DecoderLayer]:
    """The decoder's layers, as what they are."""
    return (cast(DecoderLayer, layer) for layer in network.decoder.layers)


def decode(
    network: WhisperSeq2Seq,
    tokens: Tensor,
    audio: Heard,
    missing: Tensor,
    caches: list[tuple[Tensor, Tensor] | None] | None = None,
    start: int = 0,
) -> Tensor:
    """(batch, n) tokens from position `start` on -> states before the output layer (batch, n, width).

    `caches` hold keys and values of the tokens before and grow by those of these.
    """
    decoder, count = network.decoder, tokens.shape[1]
    values = (decoder.rows_of(tokens) + decoder.embed_positions.weight[start : start + count]).to(
        working_dtype()
    )
    causal = torch.full((count, start + count), -1e9).triu(start + 1).to(values.dtype)
    for index, layer in enumerate(decoder_layers(network)):
        normed = normal(values, layer.self_attn_layer_norm)
        keys, memory = keys_and_values(layer.self_attn, normed)
        if caches is not None:
            before = caches[index]
            if before is not None:
                keys, memory = torch.cat([before[0], keys], 2), torch.cat([before[1], memory], 2)
            caches[index] = keys, memory
        said = attended(layer.self_attn, normed, keys, memory, causal)
        values = values + layer.dropout(said)
        normed = normal(values, layer.encoder_attn_layer_norm)
        values = values + layer.dropout(attended(layer.encoder_attn, normed, *audio[index], missing))
        inner = functional.gelu(linear(normal(values, layer.final_layer_norm), layer.fc1))
        values = values + layer.dropout(linear(inner, layer.fc2))
    return normal(values, decoder.layer_norm)


def logits(network: WhisperSeq2Seq, states: Tensor) -> Tensor:
    """(..., width) -> (..., vocabulary) float32."""
    return functional.linear(states, network.decoder.embed_tokens.weight.to(states.dtype)).float()


def greedy(
    network: WhisperSeq2Seq, audio: Tensor, missing: Tensor, prompt: Prompt, limits: Sequence[int]
) -> list[list[int]]:
    """The likeliest token again and again, at most `limits` of them per item, and none in a loop."""
    memory = heard(network, audio)
    caches: list[tuple[Tensor, Tensor] | None] = [None] * len(network.decoder.layers)

    def step(tokens: Tensor, position: int) -> Tensor:
        states = decode(network, tokens, memory, missing, caches, position)
        return logits(network, states[:, -1])

    return searched(step, network, prompt, limits)


def searched(
    step: Callable[[Tensor, int], Tensor], network: Seq2Seq, prompt: Prompt, limits: Sequence[int]
) -> list[list[int]]:
    """Texts of greedy search, at most `limits` tokens each; `network` says what may not be said.

    `step` gives logits (batch, vocabulary) after more tokens (batch, n) from a position on: the prompt, then
    one token after the other.
    """
    batch, position = len(limits), 0
    found: list[list[int]] = [[] for _ in range(batch)]
    going = [limit > 0 for limit in limits]
    tokens = torch.tensor([prompt.ids] * batch)
    repeats, least = Repeats.none(batch, tokens.device), least_repeats(torch.tensor(limits))
    for number in range(min(network.most_tokens, max(limits))):
        best = (step(tokens, position) + network.suppress[int(number == 0)]).argmax(dim=-1)
        position += tokens.shape[1]
        repeats, repeated = repeats.after(best, least)
        for item, (token, loop) in enumerate(zip(best.tolist(), repeated.tolist(), strict=True)):
            going[item] = going[item] and token != prompt.end and number < limits[item]
            if going[item] and loop:
                going[item] = False
                del found[item][len(found[item]) - loop + 1 :]
            elif going[item]:
                found[item].append(token)
        if not any(going):
            break
        tokens = best[:, None]
    return found


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropout and gradients, as before afterwards."""
    was = network.training
    network.eval()
    with torch.inference_mode():
        yield
    network.train(was)
