"""Conformer-CTC (training/conformer.py) as an ONNX graph that takes a waveform.

Distances between frames enter as a table per layer, what its projection makes of the sinusoids: a third of an
attention's products less than computing it at every call, for a megabyte or so per layer. A network of a few
megabytes that ships with the service computes them instead (`tables=False`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import onnx
from torch import nn

from training.conformer import ConformerCtc
from training.export import folded
from training.graph import GraphBuilder
from training.graph_frontend import FRAME_MULTIPLE, add_frontend
from training.transformer_graph import (
    add_frames,
    add_heads,
    add_key_bias,
    add_layer_norm,
    add_linear,
    add_mixed,
    add_own_frames,
    array,
)

Untyped = Any
"""A module of `transformers`, which has no types."""
MAX_WINDOW_S = 20.0
"""About as long as the longest recordings that NeMo trains on; longer ones fail in the graph."""


def export_graph(model: ConformerCtc, *, tables: bool = True) -> onnx.ModelProto:
    """The whole graph of a network in evaluation mode, float32; tables end at `MAX_WINDOW_S`."""
    graph, encoder = GraphBuilder(), model.network.encoder
    features, counts = add_frontend(graph, model.frontend.config)
    values, counts = _add_subsampling(graph, model, features, counts)
    own = add_own_frames(graph, "own", values, counts)
    bias = add_key_bias(graph, "bias", own)
    distances: _Distances = (_Tables if tables else _Computed)(graph, model, values)
    for index, layer in enumerate(encoder.layers):
        values = _add_layer(graph, f"layers.{index}", layer, values, own, bias, distances)
    logits = add_linear(graph, "head", values, model.network.ctc_head)
    if model.config.upsample > 1:
        shape = graph.ints("head.shape", [0, -1, model.outputs])
        logits = graph.add("Reshape", [logits, shape], "head.upsampled")
        factor = graph.ints("head.upsample", [model.config.upsample])
        counts = graph.add("Mul", [counts, factor], "head.lengths")
    graph.add("LogSoftmax", [logits], "log_probs", axis=-1)
    graph.add("Identity", [counts], "frame_lengths")
    return graph.build("conformer_ctc", model.outputs)


def _add_subsampling(graph: GraphBuilder, model: ConformerCtc, features: str, counts: str) -> tuple[str, str]:
    """(batch, features, frames), counts -> (batch, frames', width), counts'."""
    encoder, one = model.network.encoder, graph.ints("one", [1])
    turned = graph.add("Transpose", [features], "subsampling.turned", perm=[0, 2, 1])
    values = graph.add("Unsqueeze", [turned, one], "subsampling.input")
    for index, layer in enumerate(encoder.subsampling.layers):
        name = f"subsampling.{index}"
        if isinstance(layer, nn.ReLU):
            values = graph.add("Relu", [values], name)
            continue
        stride, padding = layer.stride[0], layer.padding[0]
        inputs = [values, graph.weights(f"{name}.weight", array(layer.weight))]
        inputs.append(graph.weights(f"{name}.bias", array(layer.bias)))
        convolved = graph.add(
            "Conv",
            inputs,
            f"{name}.conv",
            kernel_shape=list(layer.kernel_size),
            strides=[stride, stride],
            pads=[padding] * 4,
            group=layer.groups,
        )
        if stride > 1:
            less = graph.add("Sub", [counts, one], f"{name}.less")
            steps = graph.add("Div", [less, graph.ints(f"step_{stride}", [stride])], f"{name}.steps")
            counts = graph.add("Add", [steps, one], f"{name}.counts")
        values = _add_masked(graph, name, convolved, counts)
    joined = graph.add("Transpose", [values], "subsampling.joined", perm=[0, 2, 1, 3])
    flat = graph.add("Reshape", [joined, graph.ints("subsampling.shape", [0, 0, -1])], "subsampling.flat")
    linear = encoder.subsampling.linear
    out = add_linear(graph, "subsampling.out", flat, linear)
    scale = math.sqrt(model.config.width) if model.config.scale_input else 1.0
    if scale != 1.0:
        out = graph.add("Mul", [out, graph.floats("subsampling.scale", scale)], "subsampling.scaled")
    return out, counts


def _add_masked(graph: GraphBuilder, name: str, values: str, counts: str) -> str:
    """Zeros beyond each item's frames of (batch, channels, frames, features)."""
    shape = graph.add("Shape", [values], f"{name}.shape")
    frames = graph.add("Gather", [shape, graph.ints("two", [2])], f"{name}.frames", axis=0)
    column = graph.add("Unsqueeze", [counts, graph.ints("axes_1_2", [1, 2])], f"{name}.column")
    mask = graph.mask(frames, column, f"{name}.row")
    mask = graph.add("Unsqueeze", [mask, graph.ints("axis_last", [-1])], f"{name}.mask")
    return graph.add("Mul", [values, mask], name)


class _Distances(ABC):
    """What an attention makes of the distances between a batch's frames."""

    def __init__(self, graph: GraphBuilder, model: ConformerCtc, values: str) -> None:
        self.graph = graph
        self.frames = add_frames(graph, "distances.frames", values)

    @abstractmethod
    def keys(self, name: str, attention: Untyped, heads: int) -> str:
        """(heads, width / heads, 2 * frames - 1): keys by distance, the largest first."""


class _Tables(_Distances):
    """Tables of projected distances, cut to the frames that a batch has."""

    def __init__(self, graph: GraphBuilder, model: ConformerCtc, values: str) -> None:
        super().__init__(graph, model, values)
        frames = math.ceil(MAX_WINDOW_S / model.frontend.config.hop_s) + 1 + FRAME_MULTIPLE
        most = math.ceil(frames / model.config.subsampling_factor)
        self.sinusoids = model.positions(most)
        limit = graph.ints("distances.limit", [most])
        self.start = graph.add("Sub", [limit, self.frames], "distances.start")
        end = graph.add("Add", [limit, self.frames], "distances.end")
        self.end = graph.add("Sub", [end, graph.ints("one", [1])], "distances.stop")

    def keys(self, name: str, attention: Untyped, heads: int) -> str:
        """A slice of the layer's table."""
        projected = array(attention.relative_k_proj(self.sinusoids))
        split = projected.reshape(len(projected), heads, -1).transpose(1, 2, 0)
        table = self.graph.weights(f"{name}.table", split)
        axes = self.graph.ints("two", [2])
        return self.graph.add("Slice", [table, self.start, self.end, axes], f"{name}.distances")


class _Computed(_Distances):
    """Sinusoids of a batch's distances, projected in every layer."""

    def __init__(self, graph: GraphBuilder, model: ConformerCtc, values: str) -> None:
        super().__init__(graph, model, values)
        zero, one = graph.ints("zero", [0]), graph.ints("one", [1])
        ends = {
            "last": graph.add("Sub", [self.frames, one], "distances.from"),
            "end": graph.add("Neg", [self.frames], "distances.to"),
            "step": graph.ints("minus_one", [-1]),
        }
        span = [graph.add("Squeeze", [value, zero], f"distances.{name}") for name, value in ends.items()]
        steps = graph.add(
            "Cast",
            [graph.add("Range", span, "distances.range")],
            "distances.steps",
            to=onnx.TensorProto.FLOAT,
        )
        column = graph.add("Unsqueeze", [steps, one], "distances.column")
        frequencies = array(model.network.encoder.encode_positions.inv_freq)[None]
        angles = graph.add("Mul", [column, graph.weights("frequencies", frequencies)], "distances.angles")
        last_axis = graph.ints("axis_last", [-1])
        waves = [
            graph.add(
                "Unsqueeze", [graph.add(wave, [angles], f"distances.{wave}"), last_axis], f"distances.{wave}s"
            )
            for wave in ("Sin", "Cos")
        ]
        pairs = graph.add("Concat", waves, "distances.pairs", axis=2)
        self.sinusoids = graph.add("Reshape", [pairs, graph.ints("rows", [0, -1])], "distances.sinusoids")

    def keys(self, name: str, attention: Untyped, heads: int) -> str:
        """The projection of the sinusoids."""
        projected = add_linear(
            self.graph, f"{name}.relative_k_proj", self.sinusoids, attention.relative_k_proj
        )
        shape = self.graph.ints(f"distances_{heads}", [0, heads, -1])
        split = self.graph.add("Reshape", [projected, shape], f"{name}.relative")
        return self.graph.add("Transpose", [split], f"{name}.distances", perm=[1, 2, 0])


def _add_layer(
    graph: GraphBuilder, name: str, layer: Untyped, values: str, own: str, bias: str, distances: _Distances
) -> str:
    """Half a feed-forward, attention, convolution, half a feed-forward; (batch, frames, width) throughout."""
    values = _add_half_feed_forward(graph, f"{name}.feed_forward1", layer, "feed_forward1", values)
    normal = add_layer_norm(graph, f"{name}.norm_self_att", values, layer.norm_self_att)
    mixed = _add_attention(graph, f"{name}.self_attn", layer.self_attn, normal, bias, distances)
    values = graph.add("Add", [values, mixed], f"{name}.attended")
    normal = add_layer_norm(graph, f"{name}.norm_conv", values, layer.norm_conv)
    convolved = _add_convolution(graph, f"{name}.conv", layer.conv, normal, own)
    values = graph.add("Add", [values, convolved], f"{name}.convolved")
    values = _add_half_feed_forward(graph, f"{name}.feed_forward2", layer, "feed_forward2", values)
    return add_layer_norm(graph, f"{name}.norm_out", values, layer.norm_out)


def _add_half_feed_forward(graph: GraphBuilder, name: str, layer: Untyped, part: str, values: str) -> str:
    """Linear, SiLU, Linear, of which half is added; the half is folded into the weights."""
    module = getattr(layer, part)
    normal = add_layer_norm(graph, f"{name}.norm", values, getattr(layer, f"norm_{part}"))
    inner = _add_silu(graph, f"{name}.silu", add_linear(graph, f"{name}.linear1", normal, module.linear1))
    half = add_linear(graph, f"{name}.linear2", inner, module.linear2, scale=0.5)
    return graph.add("Add", [values, half], f"{name}.sum")


def _add_silu(graph: GraphBuilder, name: str, values: str) -> str:
    """values * sigmoid(values) (Ramachandran et al. 2017, with beta 1)."""
    return graph.add("Mul", [values, graph.add("Sigmoid", [values], f"{name}.gate")], name)


def _add_attention(
    graph: GraphBuilder, name: str, module: Untyped, values: str, bias: str, distances: _Distances
) -> str:
    """Attention by content and by distance (Dai et al. 2019, equation of appendix B)."""
    heads = module.config.num_attention_heads
    width = module.config.hidden_size
    scale = 1.0 / math.sqrt(width // heads)
    keys = add_heads(
        graph, f"{name}.k", add_linear(graph, f"{name}.k_proj", values, module.k_proj), heads, keys=True
    )
    memory = add_heads(graph, f"{name}.v", add_linear(graph, f"{name}.v_proj", values, module.v_proj), heads)
    query = add_linear(graph, f"{name}.q_proj", values, module.q_proj, scale)
    query = add_heads(graph, f"{name}.q", query, heads)
    by_content = graph.add(
        "Add", [query, graph.weights(f"{name}.bias_u", array(module.bias_u)[:, None] * scale)], f"{name}.qu"
    )
    by_distance = graph.add(
        "Add", [query, graph.weights(f"{name}.bias_v", array(module.bias_v)[:, None] * scale)], f"{name}.qv"
    )
    content = graph.add("MatMul", [by_content, keys], f"{name}.content")
    distance = graph.add("MatMul", [by_distance, distances.keys(name, module, heads)], f"{name}.distance")
    distance = _add_shifted(graph, f"{name}.shifted", distance, heads, distances.frames)
    scores = graph.add("Add", [content, distance], f"{name}.scores")
    scores = graph.add("Add", [scores, bias], f"{name}.biased")
    shares = graph.add("Softmax", [scores], f"{name}.shares", axis=-1)
    mixed = add_mixed(graph, name, shares, memory, width)
    return add_linear(graph, f"{name}.o_proj", mixed, module.o_proj)


def _add_shifted(graph: GraphBuilder, name: str, scores: str, heads: int, frames: str) -> str:
    """(batch, heads, frames, 2 * frames - 1) by distance -> (batch, heads, frames, frames) by key.

    A column of zeros in front makes rows of 2 * frames; read as rows of `frames` without the first, and
    again as rows of 2 * frames - 1, row i begins i places later (appendix B of Dai et al. 2019).
    """
    zero, one = graph.ints("zero", [0]), graph.ints("one", [1])
    front = graph.ints("shift.pads", [0, 0, 0, 1, 0, 0, 0, 0])
    padded = graph.add("Pad", [scores, front], f"{name}.padded")
    keep, rest = graph.ints("shift.keep", [0, heads]), graph.ints("minus_one", [-1])
    narrow_shape = graph.add("Concat", [keep, rest, frames], f"{name}.narrow_shape", axis=0)
    narrow = graph.add("Reshape", [padded, narrow_shape], f"{name}.narrow")
    far = graph.ints("far", [2**31 - 1])
    dropped = graph.add("Slice", [narrow, one, far, graph.ints("two", [2])], f"{name}.dropped")
    wide_shape = graph.add("Concat", [keep, frames, rest], f"{name}.wide_shape", axis=0)
    wide = graph.add("Reshape", [dropped, wide_shape], f"{name}.wide")
    return graph.add("Slice", [wide, zero, frames, graph.ints("three", [3])], name)


def _add_convolution(graph: GraphBuilder, name: str, module: Untyped, values: str, own: str) -> str:
    """Gated pointwise, depthwise over own frames, SiLU, pointwise; the normalisation is folded in."""
    first, last = graph.ints("zero", [0]), graph.ints("axis_last", [-1])
    channels = module.depthwise_conv.in_channels
    both = add_linear(graph, f"{name}.pointwise_conv1", values, module.pointwise_conv1)
    middle, far = graph.ints(f"channels_{channels}", [channels]), graph.ints("far", [2**31 - 1])
    content = graph.add("Slice", [both, first, middle, last], f"{name}.content")
    gate = graph.add("Slice", [both, middle, far, last], f"{name}.gate_input")
    gated = graph.add("Mul", [content, graph.add("Sigmoid", [gate], f"{name}.gate")], f"{name}.gated")
    masked = graph.add("Mul", [gated, own], f"{name}.masked")
    turned = graph.add("Transpose", [masked], f"{name}.turned", perm=[0, 2, 1])
    high = graph.add("Unsqueeze", [turned, graph.ints("two", [2])], f"{name}.high")
    weight, bias = folded(module.depthwise_conv, module.norm)
    kernel, padding = module.depthwise_conv.kernel_size[0], module.padding
    inputs = [high, graph.weights(f"{name}.depthwise.weight", array(weight)[:, :, None])]
    if bias is not None:
        inputs.append(graph.weights(f"{name}.depthwise.bias", array(bias)))
    depthwise = graph.add(
        "Conv",
        inputs,
        f"{name}.depthwise",
        kernel_shape=[1, kernel],
        pads=[0, padding, 0, padding],
        group=channels,
    )
    flat = graph.add("Squeeze", [depthwise, graph.ints("two", [2])], f"{name}.flat")
    back = graph.add("Transpose", [_add_silu(graph, f"{name}.silu", flat)], f"{name}.back", perm=[0, 2, 1])
    return add_linear(graph, f"{name}.pointwise_conv2", back, module.pointwise_conv2)
