"""Columns of matrices made alike before they are rounded, where that costs nothing and changes no answer.

A group of weights has one scale, and its largest weight sets it: where one input's column is thirty times as
large as the others', those are left with a level or two. What a matrix is given mostly comes out of a layer
normalisation, whose gains can take over what its columns are divided by (Nagel et al. 2019, who make channels
alike across layers; Lin et al. 2023, AWQ). Values of an attention are carried to its output matrix as they
are, so rows of one can take over columns of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.moonshine.model import DecoderLayer as MoonshineDecoderLayer
from training.moonshine.model import EncoderLayer as MoonshineEncoderLayer
from training.moonshine.model import Moonshine
from training.recipes.whisper_seq2seq.model import DecoderLayer, WhisperSeq2Seq
from training.transformer import Attention, EncoderLayer

SHARE = 0.5
"""Of a column's size, as an exponent: 1 would make columns the same and inputs as unlike as those were."""


def sizes(weights: Sequence[Tensor]) -> Tensor:
    """What to divide the columns of matrices (outputs, inputs) by that are given the same: (inputs,).

    The root of their root mean square, 1 on average; columns of zeros count as average ones.
    """
    together = torch.cat([weight.flatten(1) for weight in weights]).square().mean(dim=0).sqrt()
    used = together > 0
    if not used.any():
        return torch.ones_like(together)
    usual = together[used].mean()
    return torch.where(used, together / usual, 1.0) ** SHARE


@torch.no_grad()
def behind_norm(norm: nn.LayerNorm, modules: Sequence[nn.Linear | nn.Embedding]) -> Tensor:
    """Divide the columns of everything that a normalisation's output is given to; returns by what."""
    found = sizes([module.weight for module in modules])
    for module in modules:
        module.weight.div_(found)
    norm.weight.mul_(found)
    if norm.bias is not None:
        norm.bias.mul_(found)
    return found


@torch.no_grad()
def behind_values(attention: Attention) -> None:
    """Divide the columns of an attention's output matrix, and multiply the rows of its values."""
    found = sizes([attention.out_proj.weight])
    attention.out_proj.weight.div_(found)
    attention.v_proj.weight.mul_(found[:, None])
    if attention.v_proj.bias is not None:
        attention.v_proj.bias.mul_(found)


def equalise(network: WhisperSeq2Seq | Moonshine) -> None:
    """All matrices but the convolutions and the second of each feed-forward, in place."""
    encoder, decoder = network.encoder, network.decoder
    listening = []
    for layer in (*encoder.layers, *decoder.layers):
        if not isinstance(layer, EncoderLayer | DecoderLayer | MoonshineEncoderLayer | MoonshineDecoderLayer):
            raise TypeError(f"{type(layer).__name__}: not a layer of a Whisper or a Moonshine")
        own = layer.self_attn
        behind_norm(layer.self_attn_layer_norm, [own.q_proj, own.k_proj, own.v_proj])
        behind_norm(layer.final_layer_norm, [layer.fc1])
        behind_values(own)
        if isinstance(layer, DecoderLayer | MoonshineDecoderLayer):
            behind_norm(layer.encoder_attn_layer_norm, [layer.encoder_attn.q_proj])
            behind_values(layer.encoder_attn)
            listening += [layer.encoder_attn.k_proj, layer.encoder_attn.v_proj]
    behind_norm(encoder.layer_norm, listening)
    found = behind_norm(decoder.layer_norm, [decoder.embed_tokens])
    decoder.embed_scale = found if decoder.embed_scale is None else decoder.embed_scale * found
