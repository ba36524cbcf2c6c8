"""Transformer pieces as ONNX nodes, in (batch, frames, channels) throughout.

Convolutions over time become one matrix product of their stacked taps. In this layout that needs no
transposition around the layer normalisations, and INT8 on MatMul covers the convolutions as well.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from training.graph import GraphBuilder
from training.transformer import Attention, EncoderLayer


def array(values: Tensor) -> npt.NDArray[np.float32]:
    """Weights as numpy."""
    out: npt.NDArray[np.float32] = values.detach().cpu().float().numpy()
    return out


def add_linear(
    graph: GraphBuilder, name: str, values: str, module: nn.Linear | nn.Conv1d, scale: float = 1.0
) -> str:
    """(..., inputs) -> (..., outputs), times `scale`, which is folded into the weights.

    A convolution that sees one frame is a linear layer, too.
    """
    matrix = array(module.weight).reshape(module.weight.shape[:2])
    weight = graph.weights(f"{name}.weight", matrix.T * scale)
    bias: Tensor | None = module.bias
    if bias is None:
        return graph.add("MatMul", [values, weight], name)
    out = graph.add("MatMul", [values, weight], f"{name}.product")
    return graph.add("Add", [out, graph.weights(f"{name}.bias", array(bias) * scale)], name)


def add_layer_norm(graph: GraphBuilder, name: str, values: str, module: nn.LayerNorm) -> str:
    """Normalise the last axis (Ba et al. 2016)."""
    inputs = [values, graph.weights(f"{name}.weight", array(module.weight))]
    if module.bias is not None:
        inputs.append(graph.weights(f"{name}.bias", array(module.bias)))
    return graph.add("LayerNormalization", inputs, name, axis=-1, epsilon=float(module.eps))


def add_gelu(graph: GraphBuilder, name: str, values: str) -> str:
    """Exact GELU (Hendrycks and Gimpel 2016) in the form that ONNX Runtime fuses."""
    scaled = graph.add("Div", [values, graph.floats("sqrt_2", math.sqrt(2.0))], f"{name}.scaled")
    error = graph.add("Erf", [scaled], f"{name}.erf")
    shifted = graph.add("Add", [error, graph.floats("one_float", 1.0)], f"{name}.shifted")
    product = graph.add("Mul", [values, shifted], f"{name}.product")
    return graph.add("Mul", [product, graph.floats("half", 0.5)], name)


def add_frames(graph: GraphBuilder, name: str, values: str) -> str:
    """Frames of (batch, frames, channels), int64 of shape (1,)."""
    return add_size(graph, name, values, 1)


def add_size(graph: GraphBuilder, name: str, values: str, axis: int) -> str:
    """Length of an axis, the first three have names; int64 of shape (1,)."""
    shape = graph.add("Shape", [values], f"{name}.shape")
    return graph.add("Gather", [shape, graph.ints(("zero", "one", "two")[axis], [axis])], name, axis=0)


def add_convolution(graph: GraphBuilder, name: str, values: str, module: nn.Conv1d) -> str:
    """An ungrouped Conv1d as a product of its taps: (batch, frames, inputs) -> (batch, frames', outputs)."""
    if module.groups != 1 or module.dilation[0] != 1:
        raise ValueError(f"{name}: only plain convolutions are written as products")
    kernel, stride = module.kernel_size[0], module.stride[0]
    padding = int(module.padding[0])
    one, step = graph.ints("one", [1]), graph.ints(f"step_{stride}", [stride])
    if padding:
        pads = graph.ints(f"time_pads_{padding}", [0, padding, 0, 0, padding, 0])
        values = graph.add("Pad", [values, pads], f"{name}.padded")
    frames = add_frames(graph, f"{name}.frames", values)
    room = graph.add("Sub", [frames, graph.ints(f"taps_{kernel}", [kernel])], f"{name}.room")
    steps = graph.add("Div", [room, step], f"{name}.steps")
    span = graph.add("Mul", [steps, step], f"{name}.span")
    taps = []
    for tap in range(kernel):
        stop = graph.add("Add", [span, graph.ints(f"position_{tap + 1}", [tap + 1])], f"{name}.stop_{tap}")
        start = graph.ints(f"position_{tap}", [tap])
        taps.append(graph.add("Slice", [values, start, stop, one, step], f"{name}.tap_{tap}"))
    stacked = graph.add("Concat", taps, f"{name}.taps", axis=2) if kernel > 1 else taps[0]
    weight = array(module.weight).transpose(2, 1, 0).reshape(-1, module.out_channels)
    out = graph.add(
        "MatMul",
        [stacked, graph.weights(f"{name}.weight", weight)],
        f"{name}.product" if module.bias is not None else name,
    )
    if module.bias is None:
        return out
    return graph.add("Add", [out, graph.weights(f"{name}.bias", array(module.bias))], name)


def add_heads(graph: GraphBuilder, name: str, values: str, heads: int, *, keys: bool = False) -> str:
    """(batch, frames, width) -> (batch, heads, frames, width / heads); keys come transposed."""
    split = graph.add("Reshape", [values, graph.ints(f"split_{heads}", [0, 0, heads, -1])], f"{name}.split")
    return graph.add("Transpose", [split], f"{name}.heads", perm=[0, 2, 3, 1] if keys else [0, 2, 1, 3])


def add_attention_over(
    graph: GraphBuilder, name: str, module: Attention, values: str, keys: str, memory: str, bias: str | None
) -> str:
    """Attention of `values` (batch, queries, width) over the two results of add_keys_and_memory."""
    width = module.q_proj.in_features
    scale = 1.0 / math.sqrt(width // module.heads)
    query = add_linear(graph, f"{name}.q_proj", values, module.q_proj, scale)
    query = add_heads(graph, f"{name}.q_proj", query, module.heads)
    scores = graph.add("MatMul", [query, keys], f"{name}.scores")
    if bias is not None:
        scores = graph.add("Add", [scores, bias], f"{name}.biased")
    shares = graph.add("Softmax", [scores], f"{name}.shares", axis=-1)
    mixed = add_mixed(graph, name, shares, memory, width)
    return add_linear(graph, f"{name}.out_proj", mixed, module.out_proj)


def add_mixed(graph: GraphBuilder, name: str, shares: str, memory: str, width: int) -> str:
    """What each query takes of the values, its heads side by side: (batch, queries, width).

    Args:
        shares: (batch, heads, queries, n).
        memory: (batch, heads, n, width / heads).
    """
    mixed = graph.add("MatMul", [shares, memory], f"{name}.mixed")
    joined = graph.add("Transpose", [mixed], f"{name}.joined", perm=[0, 2, 1, 3])
    return graph.add("Reshape", [joined, graph.ints(f"flat_{width}", [0, 0, width])], f"{name}.flat")


def add_keys_and_memory(graph: GraphBuilder, name: str, module: Attention, source: str) -> tuple[str, str]:
    """Keys (batch, heads, width / heads, n) and values (batch, heads, n, width / heads) of a source."""
    keys = add_linear(graph, f"{name}.k_proj", source, module.k_proj)
    memory = add_linear(graph, f"{name}.v_proj", source, module.v_proj)
    return (
        add_heads(graph, f"{name}.k_proj", keys, module.heads, keys=True),
        add_heads(graph, f"{name}.v_proj", memory, module.heads),
    )


def add_feed_forward(graph: GraphBuilder, name: str, values: str, first: nn.Linear, second: nn.Linear) -> str:
    """Linear, GELU, Linear."""
    inner = add_gelu(graph, f"{name}.gelu", add_linear(graph, f"{name}.fc1", values, first))
    return add_linear(graph, f"{name}.fc2", inner, second)


def add_encoder_layer(
    graph: GraphBuilder, name: str, layer: EncoderLayer, values: str, bias: str | None
) -> str:
    """(batch, frames, width) -> the same."""
    normal = add_layer_norm(graph, f"{name}.self_attn_layer_norm", values, layer.self_attn_layer_norm)
    keys, memory = add_keys_and_memory(graph, f"{name}.self_attn", layer.self_attn, normal)
    mixed = add_attention_over(graph, f"{name}.self_attn", layer.self_attn, normal, keys, memory, bias)
    values = graph.add("Add", [values, mixed], f"{name}.attended")
    normal = add_layer_norm(graph, f"{name}.final_layer_norm", values, layer.final_layer_norm)
    return graph.add("Add", [values, add_feed_forward(graph, name, normal, layer.fc1, layer.fc2)], name)


def add_own_frames(graph: GraphBuilder, name: str, values: str, counts: str) -> str:
    """(batch, frames, 1) of ones on an item's own frames, zeros beyond; counts (batch,) int64."""
    column = graph.add("Unsqueeze", [counts, graph.ints("one", [1])], f"{name}.column")
    row = graph.mask(add_frames(graph, f"{name}.frames", values), column, f"{name}.row")
    return graph.add("Unsqueeze", [row, graph.ints("axis_last", [-1])], name)


def add_key_bias(graph: GraphBuilder, name: str, own: str) -> str:
    """(batch, frames, 1) of ones and zeros -> (batch, 1, 1, frames) of 0 and -1e9."""
    missing = graph.add("Sub", [own, graph.floats("one_float", 1.0)], f"{name}.missing")
    large = graph.add("Mul", [missing, graph.floats("large", 1e9)], f"{name}.large")
    turned = graph.add("Transpose", [large], f"{name}.turned", perm=[0, 2, 1])
    return graph.add("Unsqueeze", [turned, graph.ints("one", [1])], name)
