"""Wav2Vec2Ctc -> a graph that takes a waveform; the feature encoder's convolutions are matrix products."""

from __future__ import annotations

import onnx

from training.graph import GraphBuilder
from training.recipes.wav2vec2_ctc.model import FeatureEncoderLayer, Wav2Vec2Ctc
from training.transformer import EncoderLayer
from training.transformer_graph import (
    add_convolution,
    add_encoder_layer,
    add_frames,
    add_gelu,
    add_key_bias,
    add_layer_norm,
    add_linear,
    add_own_frames,
    array,
)


def export_graph(model: Wav2Vec2Ctc) -> onnx.ModelProto:
    """The bundle's float32 graph."""
    graph = GraphBuilder()
    values = _add_normalised(graph)
    counts = "lengths"
    for index, layer in enumerate(model.features):
        if not isinstance(layer, FeatureEncoderLayer):
            raise TypeError(f"features.{index}: unknown layer {type(layer).__name__}")
        name = f"features.{index}"
        values = add_convolution(graph, f"{name}.conv", values, layer.conv)
        values = add_gelu(
            graph, f"{name}.gelu", add_layer_norm(graph, f"{name}.layer_norm", values, layer.layer_norm)
        )
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        room = graph.add("Sub", [counts, graph.ints(f"taps_{kernel}", [kernel])], f"{name}.counts_room")
        steps = graph.add("Div", [room, graph.ints(f"step_{stride}", [stride])], f"{name}.counts_steps")
        counts = graph.add("Add", [steps, graph.ints("one", [1])], f"{name}.counts")
    values = add_layer_norm(graph, "projection_norm", values, model.projection_norm)
    values = add_linear(graph, "projection", values, model.projection)
    own = add_own_frames(graph, "own", values, counts)
    values = graph.add("Mul", [values, own], "projection.own")
    values = _add_positions(graph, model, values)
    bias = add_key_bias(graph, "bias", own)
    for index, encoder_layer in enumerate(model.layers):
        if not isinstance(encoder_layer, EncoderLayer):
            raise TypeError(f"layers.{index}: unknown layer {type(encoder_layer).__name__}")
        values = add_encoder_layer(graph, f"layers.{index}", encoder_layer, values, bias)
    values = add_layer_norm(graph, "layer_norm", values, model.layer_norm)
    graph.add("LogSoftmax", [add_linear(graph, "head", values, model.head)], "log_probs", axis=-1)
    graph.add("Identity", [counts], "frame_lengths")
    return graph.build("wav2vec2_ctc", model.head.out_features)


def _add_normalised(graph: GraphBuilder) -> str:
    """Mean 0 and variance 1 over an item's own samples, (batch, samples, 1)."""
    one, last = graph.ints("one", [1]), graph.ints("axis_last", [-1])
    column = graph.add("Unsqueeze", ["lengths", one], "frontend.lengths_column")
    own = graph.mask(add_frames(graph, "frontend.samples", "waveform"), column, "frontend.own")
    count = graph.add("Cast", [column], "frontend.count", to=onnx.TensorProto.FLOAT)
    signal = graph.add("Mul", ["waveform", own], "frontend.signal")
    total = graph.add("ReduceSum", [signal, one], "frontend.total", keepdims=1)
    mean = graph.add("Div", [total, count], "frontend.mean")
    difference = graph.add("Sub", [signal, mean], "frontend.difference")
    centred = graph.add("Mul", [difference, own], "frontend.centred")
    squared = graph.add("Mul", [centred, centred], "frontend.squared")
    squares = graph.add("ReduceSum", [squared, one], "frontend.squares", keepdims=1)
    variance = graph.add("Div", [squares, count], "frontend.variance")
    guarded = graph.add("Add", [variance, graph.floats("frontend.guard", 1e-7)], "frontend.guarded")
    deviation = graph.add("Sqrt", [guarded], "frontend.deviation")
    normalised = graph.add("Div", [centred, deviation], "frontend.normalised")
    return graph.add("Unsqueeze", [normalised, last], "frontend.column")


def _add_positions(graph: GraphBuilder, model: Wav2Vec2Ctc, values: str) -> str:
    """The grouped position convolution as Conv2d of height one; an even kernel makes no extra frame."""
    kernel = model.config.position_kernel
    padding = kernel // 2
    turned = graph.add("Transpose", [values], "positions.turned", perm=[0, 2, 1])
    high = graph.add("Unsqueeze", [turned, graph.ints("two", [2])], "positions.high")
    inputs = [
        high,
        graph.weights("positions.weight", array(model.positions.weight)[:, :, None, :]),
        graph.weights(
            "positions.bias", array(model.positions.bias) if model.positions.bias is not None else [0.0]
        ),
    ]
    convolved = graph.add(
        "Conv",
        inputs,
        "positions",
        kernel_shape=[1, kernel],
        pads=[0, padding, 0, padding - (kernel + 1) % 2],
        group=model.config.position_groups,
    )
    flat = graph.add("Squeeze", [convolved, graph.ints("two", [2])], "positions.flat")
    back = graph.add("Transpose", [flat], "positions.back", perm=[0, 2, 1])
    return graph.add("Add", [values, add_gelu(graph, "positions.gelu", back)], "positions.sum")
