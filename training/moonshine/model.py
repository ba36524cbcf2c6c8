"""Moonshine's network (Jeffries et al. 2024): samples in, text out, at the clip's own length.

Three convolutions over samples instead of a spectrogram, pre-norm layers whose queries and keys are turned by
their positions (Su et al. 2021), and a decoder with gated feed-forwards (Shazeer 2020). How text becomes
frames is Whisper's way (:mod:`training.recipes.whisper_seq2seq.model`). Names of tensors are those of this
repository's layers; :func:`from_transformers` renames published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.masks import frame_mask
from training.recipes.whisper_seq2seq.model import Prompt, Seq2Seq
from training.transformer import Attention, check_heads, key_bias

SAMPLE_RATE_HZ = 16_000
HOP = 384
"""Samples per frame of the encoder: strides of 64, 3 and 2."""
FRAME_STRIDE_S = 2 * HOP / SAMPLE_RATE_HZ
"""Of the frames over which the tokens are spread; at most every second holds one."""
MIN_SAMPLES = 895
"""Of which the convolutions make a frame."""
MAX_WINDOW_S = 30.0
"""It was taught on clips of 4 to 30 s."""
KERNELS, STRIDES = (127, 7, 3), (64, 3, 2)
EPSILON = 1e-5
THETA = 10_000.0
RENAMED = (
    ("mlp.", ""),
    (".o_proj.", ".out_proj."),
    (".final_layernorm.", ".final_layer_norm."),
    (".input_layernorm.", ".self_attn_layer_norm."),
    ("decoder.norm.", "decoder.layer_norm."),
)
"""Parts of names that `transformers` gives, and ours."""
Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a network; the defaults are those of moonshine-tiny."""

    vocabulary: int = 32_768
    width: int = 288
    heads: int = 8
    encoder_inner: tuple[int, ...] = (1_152,) * 6
    """Neurons of the feed-forward of each layer."""
    decoder_inner: tuple[int, ...] = (1_152,) * 6
    turned: int = 32
    """Of a head's queries and keys, how many know their position."""
    positions: int = 194
    """Tokens, the first one among them, that a text may have."""

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads)

    @classmethod
    def from_transformers(cls, config: Any) -> Shape:
        """From a `transformers.MoonshineConfig`. Raises ValueError for what has another form."""
        heads = {config.encoder_num_attention_heads, config.decoder_num_attention_heads}
        kept = {config.encoder_num_key_value_heads, config.decoder_num_key_value_heads}
        if len(heads | kept) != 1 or config.attention_bias:
            raise ValueError("heads of several sizes or with biases are not known of any Moonshine")
        rope = config.rope_parameters
        if rope.get("rope_type", "default") != "default" or rope["rope_theta"] != THETA:
            raise ValueError(f"positions {rope} are not known of any Moonshine")
        forms = (config.encoder_hidden_act, config.decoder_hidden_act, config.tie_word_embeddings)
        if forms != ("gelu", "silu", True):
            raise ValueError(f"activations and tied outputs {forms} are not known of any Moonshine")
        count = heads.pop()
        return cls(
            vocabulary=config.vocab_size,
            width=config.hidden_size,
            heads=count,
            encoder_inner=(config.intermediate_size,) * config.encoder_num_hidden_layers,
            decoder_inner=(config.intermediate_size,) * config.decoder_num_hidden_layers,
            turned=int(config.hidden_size // count * rope.get("partial_rotary_factor", 1.0)),
            positions=config.max_position_embeddings,
        )

    def followers(self, layer: int) -> list[int]:
        """Heads of a decoder's layer whose attention is taken to follow the speech: the upper half's."""
        return list(range(self.heads)) if layer >= len(self.decoder_inner) // 2 else []


def angles(positions: Tensor, turned: int) -> Tensor:
    """(n,) -> (n, turned / 2) float64: position times a rate that falls from 1 to about 1 / 10,000."""
    rates = THETA ** (-torch.arange(0, turned, 2, device=positions.device).double() / turned)
    return positions[:, None].double() * rates


def turn_by(found: Tensor) -> Turn:
    """Turns each pair of neighbours in (batch, heads, n, size) by its angle; `found`: of :func:`angles`."""
    cosines, sines = found.cos().float(), found.sin().float()
    count = 2 * found.shape[1]

    def turn(values: Tensor) -> Tensor:
        first, second = values[..., 0:count:2].float(), values[..., 1:count:2].float()
        pairs = (first * cosines - second * sines, second * cosines + first * sines)
        turned = torch.stack(pairs, dim=-1).flatten(-2).to(values.dtype)
        return torch.cat([turned, values[..., count:]], dim=-1)

    return turn


def frames_of(samples: Tensor) -> Tensor:
    """Frames that the convolutions make of so many samples."""
    for kernel, stride in zip(KERNELS, STRIDES, strict=True):
        samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
    return samples


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each on a normalised copy, each added to its input."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        width = shape.width
        self.self_attn = Attention(width, shape.heads, bias=False)
        self.self_attn_layer_norm = nn.LayerNorm(width, bias=False)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width, bias=False)

    def forward(self, values: Tensor, bias: Tensor | None, turn: Turn) -> Tensor:
        """(batch, frames, width), bias of the scores -> the same shape."""
        values = values + self.self_attn(self.self_attn_layer_norm(values), bias, turn=turn)
        out: Tensor = values + self.fc2(functional.gelu(self.fc1(self.final_layer_norm(values))))
        return out


class DecoderLayer(nn.Module):
    """Attention on earlier tokens, attention on the audio, gated feed-forward."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        width = shape.width
        self.self_attn = Attention(width, shape.heads, bias=False)
        self.self_attn_layer_norm = nn.LayerNorm(width, bias=False)
        self.encoder_attn = Attention(width, shape.heads, bias=False)
        self.encoder_attn_layer_norm = nn.LayerNorm(width, bias=False)
        self.fc1 = nn.Linear(width, 2 * inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width, bias=False)
        self.dropout = nn.Dropout(0.0)

    def said(self, values: Tensor, causal: Tensor, turn: Turn) -> Tensor:
        """With what earlier tokens add: (batch, tokens, width) -> the same."""
        return values + cast(
            Tensor, self.dropout(self.self_attn(self.self_attn_layer_norm(values), causal, turn=turn))
        )

    def forward(
        self, values: Tensor, causal: Tensor, audio: Tensor, audio_bias: Tensor | None, turn: Turn
    ) -> Tensor:
        """(batch, tokens, width) -> the same."""
        values = self.said(values, causal, turn)
        heard = self.encoder_attn(self.encoder_attn_layer_norm(values), audio_bias, audio)
        values = values + self.dropout(heard)
        return values + self.fed(values)

    def fed(self, values: Tensor) -> Tensor:
        """What the feed-forward adds to (batch, tokens, width)."""
        inner, gate = self.fc1(self.final_layer_norm(values)).chunk(2, dim=-1)
        out: Tensor = self.dropout(self.fc2(functional.silu(gate) * inner))
        return out


class MoonshineEncoder(nn.Module):
    """Samples -> states of 24 ms."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.conv1 = nn.Conv1d(1, width, KERNELS[0], STRIDES[0], bias=False)
        self.groupnorm = nn.GroupNorm(1, width, eps=EPSILON)
        self.conv2 = nn.Conv1d(width, 2 * width, KERNELS[1], STRIDES[1])
        self.conv3 = nn.Conv1d(2 * width, width, KERNELS[2], STRIDES[2])
        self.layers = nn.ModuleList(EncoderLayer(shape, inner) for inner in shape.encoder_inner)
        self.layer_norm = nn.LayerNorm(width, bias=False)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, samples), samples of each -> states (batch, frames, width), counts, bias of scores.

        An item in a batch gives what it gives alone: its loudness is its own frames', and no frame hears
        beyond its end.
        """
        values = torch.tanh(self.conv1(waveform[:, None]))
        counts = torch.div(lengths - KERNELS[0], STRIDES[0], rounding_mode="floor") + 1
        values = self._normalised(values.float(), counts)
        values = functional.gelu(self.conv2(values))
        values = functional.gelu(self.conv3(values)).transpose(1, 2)
        counts = frames_of(lengths)
        bias = key_bias(counts, values.shape[1])
        turn = turn_by(angles(torch.arange(values.shape[1], device=values.device), self.shape.turned))
        for layer in self.layers:
            values = layer(values, bias, turn)
        return self.layer_norm(values), counts, bias

    def _normalised(self, values: Tensor, counts: Tensor) -> Tensor:
        """All of (batch, width, frames) in one group, as far as it is an item's own; zeros beyond."""
        own = frame_mask(counts, values.shape[2])[:, None].to(values.dtype)
        number = (counts * values.shape[1])[:, None, None].to(values.dtype)
        mean = (values * own).sum(dim=(1, 2), keepdim=True) / number
        away = (values - mean) * own
        variance = away.square().sum(dim=(1, 2), keepdim=True) / number
        norm = self.groupnorm
        scaled = away * (variance + norm.eps).rsqrt() * norm.weight[:, None] + norm.bias[:, None]
        return scaled * own


class MoonshineDecoder(nn.Module):
    """Tokens so far and audio -> what comes next; the output layer is the embedding's transpose."""

    embed_scale: Tensor | None
    """(width,): what a token's row is multiplied by as an input, see `training.equalise`; None: nothing."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(DecoderLayer(shape, inner) for inner in shape.decoder_inner)
        self.layer_norm = nn.LayerNorm(shape.width, bias=False)
        self.register_buffer("embed_scale", None)

    def forward(
        self, tokens: Tensor, audio: Tensor, audio_bias: Tensor | None, *, last: bool = False
    ) -> Tensor:
        """(batch, tokens) int64, (batch, frames, width) -> logits (batch, tokens, vocabulary).

        With `last` those after the last token only, (batch, 1, vocabulary).
        """
        values = self.states(tokens, audio, audio_bias)
        return functional.linear(values[:, -1:] if last else values, self.embed_tokens.weight)

    def states(self, tokens: Tensor, audio: Tensor, audio_bias: Tensor | None) -> Tensor:
        """What the output layer is given, (batch, tokens, width)."""
        values, causal, turn = self._embedded(tokens)
        for layer in self.layers:
            values = layer(values, causal, audio, audio_bias, turn)
        out: Tensor = self.layer_norm(values)
        return out

    def attention(self, tokens: Tensor, audio: Tensor, audio_bias: Tensor | None) -> Tensor:
        """How much is listened to each audio frame after each token: (batch, tokens, frames).

        The mean over the heads that follow the speech.
        """
        values, causal, turn = self._embedded(tokens)
        found = torch.zeros(*tokens.shape, audio.shape[1], device=tokens.device)
        followers = 0
        for index, module in enumerate(self.layers):
            layer = cast(DecoderLayer, module)
            if heads := self.shape.followers(index):
                said = layer.encoder_attn_layer_norm(layer.said(values, causal, turn))
                found = found + layer.encoder_attn.shares(said, audio_bias, audio)[:, heads].sum(dim=1)
                followers += len(heads)
            values = layer(values, causal, audio, audio_bias, turn)
        return found / followers

    def rows_of(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> what tokens are as inputs, (..., width)."""
        rows = functional.embedding(tokens, self.embed_tokens.weight)
        return rows if self.embed_scale is None else rows * self.embed_scale

    def _embedded(self, tokens: Tensor) -> tuple[Tensor, Tensor, Turn]:
        """What the first layer is given, what is added to scores of later tokens, and positions."""
        count, device = tokens.shape[1], tokens.device
        values = self.rows_of(tokens)
        causal = torch.full((count, count), -1e9, device=device).triu(1)
        return values, causal, turn_by(angles(torch.arange(count, device=device), self.shape.turned))


class Moonshine(Seq2Seq):
    """Encoder and decoder."""

    decoder: MoonshineDecoder

    def __init__(self, shape: Shape, prompt: Prompt) -> None:
        super().__init__(prompt, shape.vocabulary)
        self.shape = shape
        self.encoder = MoonshineEncoder(shape)
        self.decoder = MoonshineDecoder(shape)

    @property
    def most_tokens(self) -> int:
        """Of text that there are positions for."""
        return self.shape.positions - len(self.prompt.ids)

    def listen(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Audio states (batch, frames, width), frames per item, and the bias of attention over them."""
        states: tuple[Tensor, Tensor, Tensor] = self.encoder(waveform, lengths)
        return states

    def audio_of(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Audio states of samples, and the bias of attention over them."""
        hidden, _, bias = self.encoder(waveform, lengths)
        return hidden, bias


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names; the output layer, which is the embedding again, is left out."""
    found = {}
    for name, value in state.items():
        if name == "proj_out.weight":
            continue
        ours = name.removeprefix("model.")
        after_attention = "encoder_attn" if ours.startswith("decoder.") else "final"
        for theirs, new in (*RENAMED, (".post_attention_layernorm.", f".{after_attention}_layer_norm.")):
            ours = ours.replace(theirs, new)
        found[ours] = value
    return found
