"""Hand over what is in float at both ends of a graph, around the convolutions.

ONNX Runtime's large float products are as fast as the processor; what surrounds them are many passes that
each do little. Those are ours, and products of which most are by zero: no order of additions changes. Nodes
whose values nobody reads any more are left behind.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from api.kernels.model import FLOAT, INTS

DOMAIN = "asr"
POINTWISE = "PointwiseQLinearConv"
MAX_HOP = 1024  # as in frames.c
MAX_BINS, MAX_FEATURES = 256, 256  # as in mel.c
LANES = 16  # channels in a block of ONNX Runtime's float convolutions where there is AVX-512, as in weights.h


def take_frames(graph: Any, tensors: dict[str, Any]) -> int:
    """The blocks of samples that the front end multiplies by its bases; how many nodes of ours there are.

    They are known by the names that ``training/graph_frontend.py`` gives.
    """
    places = {name: place for place, node in enumerate(graph.node) for name in node.output}
    even, odd = places.get("frontend.even"), places.get("frontend.odd")
    factor, bases = tensors.get("frontend.preemphasis"), tensors.get("frontend.cosine")
    if even is None or odd is None or factor is None or bases is None or "frontend.frames" not in places:
        return 0
    if (graph.node[even].op_type, graph.node[odd].op_type) != ("Add", "Sub"):
        return 0
    if not {"waveform", "lengths"} <= {value.name for value in graph.input}:
        return 0
    if (factor.data_type, list(factor.dims)) != (FLOAT, []):
        return 0
    if len(bases.dims) != 2 or not 1 <= bases.dims[0] <= MAX_HOP:
        return 0
    # In the place of the first, before all that read one of them.
    inputs = ["waveform", "lengths", "frontend.preemphasis", "frontend.frames"]
    become(graph.node[min(even, odd)], "Frames", inputs, ["frontend.even", "frontend.odd"])
    graph.node[min(even, odd)].attribute.add(name="hop", ints=[bases.dims[0]], type=INTS)
    del graph.node[max(even, odd)]
    return 1


def take_mel(graph: Any, tensors: dict[str, Any], readers: Counter[str]) -> int:
    """Power spectra through mel filters; how many nodes of ours there are. As pointwise it needs VNNI."""
    made_by = {name: node for node in graph.node for name in node.output}
    if not any(_is_pointwise(node) for node in graph.node):
        return 0
    for product in graph.node:
        power = made_by.get(product.input[0]) if product.op_type == "MatMul" else None
        filters = tensors.get(product.input[1]) if power is not None else None
        if power is None or power.op_type != "Add" or filters is None or readers[power.output[0]] != 1:
            continue
        squares = [made_by.get(name) for name in power.input]
        if not all(square is not None and _is_square(square, readers) for square in squares):
            continue
        match list(filters.dims):
            case [bins, features] if 1 <= bins <= MAX_BINS and 1 <= features <= MAX_FEATURES:
                if bins % LANES or features % LANES or filters.data_type != FLOAT:
                    continue
            case _:
                continue
        parts = [square.input[0] for square in squares if square is not None]
        become(product, "Mel", [*parts, product.input[1]], list(product.output))
        return 1
    return 0


def _is_square(node: Any, readers: Counter[str]) -> bool:
    return node.op_type == "Mul" and node.input[0] == node.input[1] and readers[node.output[0]] == 1


def _is_pointwise(node: Any) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, POINTWISE)


def take_head_input(graph: Any, tensors: dict[str, Any], readers: Counter[str]) -> int:
    """Bytes of a pointwise convolution of ours as floats in blocks of channels; how many nodes of ours."""
    made_by = {name: node for node in graph.node for name in node.output}
    taken = 0
    for blocks in graph.node:
        if (blocks.domain, blocks.op_type) != ("com.microsoft.nchwc", "ReorderInput"):
            continue
        floats = made_by.get(blocks.input[0])
        if floats is None or floats.op_type != "DequantizeLinear" or readers[floats.output[0]] != 1:
            continue
        turned = made_by.get(floats.input[0])
        if turned is None or turned.op_type != "Transpose" or readers[turned.output[0]] != 1:
            continue
        convolution = made_by.get(turned.input[0])
        if convolution is None or not _is_pointwise(convolution):
            continue
        scales = convolution.input[3]
        parameters = [tensors.get(name) for name in floats.input[1:]]
        scalars = [list(tensor.dims) for tensor in parameters if tensor is not None] == [[], []]
        to_channels_first = [list(item.ints) for item in turned.attribute] == [[0, 3, 1, 2]]
        channels_last = any(item.name == "channels_last" and item.i for item in blocks.attribute)
        if tensors[scales].dims[0] % LANES or not scalars or not to_channels_first or channels_last:
            continue
        become(blocks, "HeadInput", [turned.input[0], *floats.input[1:]], list(blocks.output))
        taken += 1
    return taken


def become(node: Any, operator: str, inputs: list[str], outputs: list[str]) -> None:
    """One of our operators, whatever the node was."""
    node.op_type, node.domain = operator, DOMAIN
    node.input[:], node.output[:] = inputs, outputs
    del node.attribute[:]
