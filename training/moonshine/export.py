"""Moonshine -> one graph: convolutions of samples, encoder, greedy search, frames."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx
from onnx import TensorProto

from training.four_bits import DOMAIN
from training.graph import GraphBuilder
from training.moonshine.model import (
    HOP,
    KERNELS,
    MAX_WINDOW_S,
    SAMPLE_RATE_HZ,
    STRIDES,
    THETA,
    DecoderLayer,
    EncoderLayer,
    Moonshine,
    MoonshineEncoder,
    Shape,
)
from training.recipes.whisper_seq2seq.placing import add_frames, add_places
from training.recipes.whisper_seq2seq.searching import add_row_of, add_search
from training.transformer import Attention
from training.transformer_graph import (
    add_convolution,
    add_feed_forward,
    add_gelu,
    add_heads,
    add_key_bias,
    add_layer_norm,
    add_linear,
    add_own_frames,
    array,
)

LONGEST = int(1.1 * MAX_WINDOW_S * SAMPLE_RATE_HZ / HOP)
"""Positions that are known, of audio and of tokens."""


def export_graph(model: Moonshine, *, company: bool = False) -> onnx.ModelProto:
    """The bundle's float32 graph; `company`: as for Whisper."""
    graph = GraphBuilder()
    one, two = graph.ints("one", [1]), graph.ints("two", [2])
    turns = _add_turns(graph, model.shape)
    hidden, counts, bias = _add_encoder(graph, model.encoder, turns)
    up = graph.add("Add", [counts, one], "frames.up")
    frames = graph.add("Div", [up, two], "frames")
    limit = graph.add("Div", [frames, two], "frames.limit")
    heard = [
        _add_heard(
            graph, f"decoder.layers.{index}.encoder_attn", cast(DecoderLayer, layer).encoder_attn, hidden
        )
        for index, layer in enumerate(model.decoder.layers)
    ]
    search = add_search(graph, _Speaker(model, turns), heard, bias, limit, company=company)
    add_frames(graph, search, add_places(graph, search, counts, frames), frames)
    return graph.build("moonshine", model.shape.vocabulary)


def _add_turns(graph: GraphBuilder, shape: Shape) -> tuple[str, str]:
    """Cosines and sines of positions (LONGEST, turned / 2), which ONNX Runtime computes as it loads."""
    bounds = [graph.doubles(f"turns.{value:g}", value) for value in (0.0, float(LONGEST), 1.0)]
    counted = graph.add("Range", bounds, "turns.range")
    counted = graph.add("Unsqueeze", [counted, graph.ints("one", [1])], "turns.counted")
    rates = graph.doubles("turns.rates", THETA ** (-np.arange(0, shape.turned, 2) / shape.turned))
    angles = graph.add("Mul", [counted, rates], "turns.angles")
    waves = (graph.add(kind, [angles], f"turns.{kind.lower()}") for kind in ("Cos", "Sin"))
    cosines, sines = (graph.add("Cast", [wave], f"{wave}_float", to=TensorProto.FLOAT) for wave in waves)
    return cosines, sines


def _add_turned(
    graph: GraphBuilder, name: str, values: str, start: str, turns: tuple[str, str], shape: Shape
) -> str:
    """Queries or keys (batch, n, width), the first of which stands at `start` (1,)."""
    return graph.add(
        "RotaryEmbedding",
        [values, start, *turns],
        f"{name}.turned",
        domain=DOMAIN,
        interleaved=1,
        num_heads=shape.heads,
        rotary_embedding_dim=shape.turned,
    )


def _add_heard(graph: GraphBuilder, name: str, attention: Attention, audio: str) -> tuple[str, str]:
    """Keys and values of the audio, (batch, heads, frames, width / heads)."""
    keys, values = (
        add_heads(
            graph, f"{name}.{side}", add_linear(graph, f"{name}.{side}", audio, module), attention.heads
        )
        for side, module in (("k_proj", attention.k_proj), ("v_proj", attention.v_proj))
    )
    return keys, values


def _add_encoder(
    graph: GraphBuilder, encoder: MoonshineEncoder, turns: tuple[str, str]
) -> tuple[str, str, str]:
    """Hidden states (batch, frames, width), frames per item (batch,), and the bias of attention on them."""
    values, counts = _add_sound(graph, encoder)
    values = graph.add("Tanh", [values], "encoder.conv1.tanh")
    values = _add_group_norm(graph, encoder, values, counts)
    for number, convolution in enumerate((encoder.conv2, encoder.conv3), 1):
        name = f"encoder.conv{number + 1}"
        values = add_gelu(graph, f"{name}.gelu", add_convolution(graph, name, values, convolution))
        counts = _add_count(graph, f"{name}.counts", counts, number)
    bias = add_key_bias(graph, "encoder.bias", add_own_frames(graph, "encoder.inside", values, counts))
    own = graph.add("Cast", [counts], "encoder.own", to=TensorProto.INT32)
    start = graph.ints("encoder.start", [0])
    for index, module in enumerate(encoder.layers):
        name, layer = f"encoder.layers.{index}", cast(EncoderLayer, module)
        attention = layer.self_attn
        normal = add_layer_norm(graph, f"{name}.self_attn_layer_norm", values, layer.self_attn_layer_norm)
        mixed = _add_attention(
            graph, f"{name}.self_attn", attention, normal, own, start, turns, encoder.shape
        )
        values = graph.add("Add", [values, mixed], f"{name}.attended")
        normal = add_layer_norm(graph, f"{name}.final_layer_norm", values, layer.final_layer_norm)
        values = graph.add("Add", [values, add_feed_forward(graph, name, normal, layer.fc1, layer.fc2)], name)
    return add_layer_norm(graph, "encoder.layer_norm", values, encoder.layer_norm), counts, bias


def _add_attention(
    graph: GraphBuilder,
    name: str,
    attention: Attention,
    values: str,
    own: str,
    start: str,
    turns: tuple[str, str],
    shape: Shape,
) -> str:
    """Attention of all frames (batch, frames, width) on those that are an item's `own`, so many (batch,)."""
    query, key, memory = (
        add_linear(graph, f"{name}.{side}", values, module)
        for side, module in (
            ("q_proj", attention.q_proj),
            ("k_proj", attention.k_proj),
            ("v_proj", attention.v_proj),
        )
    )
    turned = [_add_turned(graph, each, each, start, turns, shape) for each in (query, key)]
    mixed = graph.add(
        "MultiHeadAttention",
        [*turned, memory, "", own],
        f"{name}.mixed",
        domain=DOMAIN,
        num_heads=shape.heads,
        mask_filter_value=-1e9,
    )
    return add_linear(graph, f"{name}.out_proj", mixed, attention.out_proj)


def _add_sound(graph: GraphBuilder, encoder: MoonshineEncoder) -> tuple[str, str]:
    """What the first convolution makes of samples, (batch, frames, width), and frames per item.

    A frame sees 127 samples and the next one begins 64 later, so two blocks of 64 side by side are all that
    it sees and one sample more, whose weight is zero.
    """
    kernel, stride = KERNELS[0], STRIDES[0]
    one, step = graph.ints("one", [1]), graph.ints(f"step_{stride}", [stride])
    zero, far = graph.ints("zero", [0]), graph.ints("far", [2**31 - 1])
    pads = graph.ints("sound.pads", [0, 0, 0, stride - 1])  # what does not fill a block is cut again
    padded = graph.add("Pad", ["waveform", pads], "sound.padded")
    samples = graph.add("Gather", [graph.add("Shape", [padded], "sound.shape"), one], "sound.samples", axis=0)
    blocks = graph.add("Div", [samples, step], "sound.blocks")
    whole = graph.add("Mul", [blocks, step], "sound.whole")
    cut = graph.add("Slice", [padded, zero, whole, one], "sound.cut")
    rows = graph.add("Reshape", [cut, graph.ints("sound.rows_shape", [0, -1, stride])], "sound.rows")
    before = graph.add("Slice", [rows, zero, graph.ints("axis_last", [-1]), one], "sound.before")
    after = graph.add("Slice", [rows, one, far, one], "sound.after")
    both = graph.add("Concat", [before, after], "sound.both", axis=2)
    weight = np.zeros((2 * stride, encoder.shape.width), np.float32)
    weight[:kernel] = array(encoder.conv1.weight)[:, 0].T
    values = graph.add("MatMul", [both, graph.weights("encoder.conv1.weight", weight)], "encoder.conv1")
    return values, _add_count(graph, "encoder.conv1.counts", "lengths", 0)


def _add_count(graph: GraphBuilder, name: str, counts: str, convolution: int) -> str:
    """Frames (batch,) that a convolution makes of so many."""
    kernel, stride = KERNELS[convolution], STRIDES[convolution]
    room = graph.add("Sub", [counts, graph.ints(f"taps_{kernel}", [kernel])], f"{name}.room")
    steps = graph.add("Div", [room, graph.ints(f"step_{stride}", [stride])], f"{name}.steps")
    return graph.add("Add", [steps, graph.ints("one", [1])], name)


def _add_group_norm(graph: GraphBuilder, encoder: MoonshineEncoder, values: str, counts: str) -> str:
    """See `MoonshineEncoder._normalised`; (batch, frames, width)."""
    name, norm = "encoder.groupnorm", encoder.groupnorm
    own = add_own_frames(graph, f"{name}.own", values, counts)
    width = graph.ints(f"{name}.width", [encoder.shape.width])
    number = graph.add("Mul", [counts, width], f"{name}.count")
    number = graph.add("Cast", [number], f"{name}.count_float", to=TensorProto.FLOAT)
    number = graph.add("Reshape", [number, graph.ints("items_column", [-1, 1, 1])], f"{name}.number")

    def mean(of: str, label: str) -> str:
        axes = graph.ints("axes_1_2", [1, 2])
        total = graph.add("ReduceSum", [of, axes], f"{name}.{label}_sum", keepdims=1)
        return graph.add("Div", [total, number], f"{name}.{label}")

    middle = mean(graph.add("Mul", [values, own], f"{name}.inside"), "mean")
    away = graph.add("Sub", [values, middle], f"{name}.away_all")
    away = graph.add("Mul", [away, own], f"{name}.away")
    variance = mean(graph.add("Mul", [away, away], f"{name}.squares"), "variance")
    steady = graph.add("Add", [variance, graph.floats(f"{name}.epsilon", norm.eps)], f"{name}.steady")
    deviation = graph.add("Sqrt", [steady], f"{name}.deviation")
    scaled = graph.add("Div", [away, deviation], f"{name}.scaled")
    scaled = graph.add(
        "Mul", [scaled, graph.weights(f"{name}.weight", array(norm.weight))], f"{name}.product"
    )
    scaled = graph.add("Add", [scaled, graph.weights(f"{name}.bias", array(norm.bias))], f"{name}.shifted")
    return graph.add("Mul", [scaled, own], name)


class _Speaker:
    """Moonshine's decoder."""

    keys_turned = False

    def __init__(self, model: Moonshine, turns: tuple[str, str]) -> None:
        self.decoder, self.prompt, self.shape, self.turns = model.decoder, model.prompt, model.shape, turns
        self.vocabulary, self.width = model.shape.vocabulary, model.shape.width
        self.layers, self.heads = len(model.decoder.layers), model.shape.heads
        self.positions = model.shape.positions
        self.suppress = array(model.suppress)

    def heads_of(self, layer: int) -> list[int]:
        """Those of one layer whose attention follows the speech."""
        return self.shape.followers(layer)

    def add_step(
        self, graph: GraphBuilder, token: str, index: str, heard: list[tuple[str, str]], bias: str | None
    ) -> tuple[str, list[str]]:
        """See `Speaker`."""
        output = graph.weights("decoder.output", array(self.decoder.embed_tokens.weight).T)
        values = add_row_of(graph, output, token, self.decoder.embed_scale)
        caches: list[str] = []
        for number, layer in enumerate(self.decoder.layers):
            values, grown = self._add_layer(
                graph, number, cast(DecoderLayer, layer), values, index, heard[number], bias
            )
            caches += grown
        values = add_layer_norm(graph, "decoder.layer_norm", values, self.decoder.layer_norm)
        return graph.add("MatMul", [values, output], "step.logits"), caches

    def _add_layer(
        self,
        graph: GraphBuilder,
        number: int,
        layer: DecoderLayer,
        values: str,
        index: str,
        heard: tuple[str, str],
        bias: str | None,
    ) -> tuple[str, list[str]]:
        """(batch, 1, width) -> the same, and the grown caches."""
        name = f"decoder.layers.{number}"
        normal = add_layer_norm(graph, f"{name}.self_attn_layer_norm", values, layer.self_attn_layer_norm)
        mixed, caches = self._add_said(graph, number, layer.self_attn, normal, index)
        values = graph.add("Add", [values, mixed], f"{name}.said")
        normal = add_layer_norm(
            graph, f"{name}.encoder_attn_layer_norm", values, layer.encoder_attn_layer_norm
        )
        mixed = self._add_heard_by(graph, number, layer.encoder_attn, normal, heard, bias)
        values = graph.add("Add", [values, mixed], f"{name}.heard")
        normal = add_layer_norm(graph, f"{name}.final_layer_norm", values, layer.final_layer_norm)
        both = add_linear(graph, f"{name}.fc1", normal, layer.fc1)
        inner, gate = f"{name}.inner", f"{name}.gate"
        graph.several("Split", [both], [inner, gate], axis=-1)
        opened = graph.add("Sigmoid", [gate], f"{name}.opened")
        gated = graph.add("Mul", [gate, opened], f"{name}.silu")
        gated = graph.add("Mul", [gated, inner], f"{name}.gated")
        return graph.add("Add", [values, add_linear(graph, f"{name}.fc2", gated, layer.fc2)], name), caches

    def _add_said(
        self, graph: GraphBuilder, number: int, attention: Attention, values: str, index: str
    ) -> tuple[str, list[str]]:
        """Attention of one token on all so far, and these."""
        name = f"decoder.layers.{number}.self_attn"

        def side(label: str) -> str:
            return add_linear(graph, f"{name}.{label}", values, getattr(attention, label))

        query, key = (
            _add_turned(graph, f"{name}.{label}", side(label), index, self.turns, self.shape)
            for label in ("q_proj", "k_proj")
        )
        earlier = [f"step.cache_{2 * number}", f"step.cache_{2 * number + 1}"]
        grown = [f"{name}.keys", f"{name}.values"]
        graph.several(
            "MultiHeadAttention",
            [query, key, side("v_proj"), "", "", "", *earlier],
            [f"{name}.mixed", *grown],
            domain=DOMAIN,
            num_heads=self.heads,
        )
        return add_linear(graph, f"{name}.out_proj", f"{name}.mixed", attention.out_proj), grown

    def _add_heard_by(
        self,
        graph: GraphBuilder,
        number: int,
        attention: Attention,
        values: str,
        heard: tuple[str, str],
        bias: str | None,
    ) -> str:
        """Attention of one token on the audio."""
        name = f"decoder.layers.{number}.encoder_attn"
        query = add_linear(graph, f"{name}.q_proj", values, attention.q_proj)
        mixed = [f"{name}.mixed"]
        followed = bool(self.heads_of(number))
        graph.several(
            "MultiHeadAttention",
            [query, *heard, "", "", bias or ""],
            [*mixed, "", "", f"{name}.scores"] if followed else mixed,
            domain=DOMAIN,
            num_heads=self.heads,
        )
        if followed:
            graph.add("Softmax", [f"{name}.scores"], f"{name}.shares", axis=-1)
        return add_linear(graph, f"{name}.out_proj", f"{name}.mixed", attention.out_proj)
