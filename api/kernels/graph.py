"""Hand nodes of an optimised graph over to our operators.

Products with weights of four bits are in ``four_bits.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from api.kernels.ends import DOMAIN, POINTWISE, take_frames, take_head_input, take_mel
from api.kernels.library import Keep, Kind, Layout
from api.kernels.model import INT8, INTS, UINT8, constants_of, drop_unread, keep_only, model_class, readers_of

OPERATORS: dict[Kind, str] = {"depthwise": "DepthwiseQLinearConv", "pointwise": POINTWISE}
CONVOLUTION, PRODUCT = "QLinearConv", "QLinearMatMul"
MAX_TAPS = 128  # as in weights.h
WEIGHTS = 3  # place of QLinearConv's weights, which ours does not have: the library keeps them
W_ZERO = 5  # of their zero points there
BIAS, MASK = 7, 8  # places of our optional inputs
MIDDLE = 128  # as an unsigned byte what zero is as a signed one
ONE_BY_ONE = {"kernel_shape": [1, 1], "strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0]}


def hand_over(model: bytes, keep: Keep, *, avx512: bool = True) -> tuple[bytes, int]:
    """An optimised ONNX model -> the model with our operators, and how many nodes they took.

    ``keep`` takes int8 weights ``(channels, depth)`` and gives the number by which an operator finds them, 0
    if it does not want them (as ``library.Weights``); the model is written without them. A product with a
    scale for each channel is a pointwise convolution. Unsigned weights around 128, as ONNX Runtime makes them
    where it would not add products with signed ones exactly, are signed ones.
    Without ``avx512`` nothing is left woven, and what wants registers of sixteen floats stays ONNX Runtime's.
    A mask that only a depthwise convolution reads goes into it: it takes the minimum while it reads x. What
    only a pointwise convolution reads of a depthwise one stays woven in between. Where there are convolutions
    for them, our operators also take what ``ends.py`` finds.
    """
    parsed = model_class().FromString(model)
    graph = parsed.graph
    made_by = {name: node for node in graph.node for name in node.output}
    tensors = constants_of(graph)
    readers = readers_of(graph)
    gone = set()
    kept: set[str] = set()
    taken = 0
    for node in _in_order_of_execution(graph):
        kind = _kind(node, tensors)
        if kind is None:
            continue
        before: Any = made_by.get(node.input[0])
        layout: Layout = kind
        if kind == "pointwise" and avx512 and readers[node.input[0]] == 1 and _can_leave_woven(before):
            layout = "woven"
        weights = _signed_weights(node, tensors)
        number = keep(layout, weights.tobytes(), *weights.shape)
        if not number:
            continue
        taken += 1
        kept.add(node.input[WEIGHTS])
        zeros = tensors[node.input[W_ZERO]]
        if zeros.data_type == UINT8:
            name = f"{zeros.name}.signed"
            if name not in tensors:
                tensors[name] = graph.initializer.add(name=name, data_type=INT8, dims=zeros.dims)
                tensors[name].raw_data = bytes(len(zeros.raw_data))
            node.input[W_ZERO] = name
        if node.op_type == PRODUCT:
            for name, numbers in ONE_BY_ONE.items():
                node.attribute.add(name=name, ints=numbers, type=INTS)
        node.op_type, node.domain = OPERATORS[kind], DOMAIN
        node.attribute.add(name="weights", ints=[number], type=INTS)
        del node.input[WEIGHTS]
        if layout == "woven":
            next(item for item in before.attribute if item.name == "woven").ints[:] = [1]
            # Under a new name, because the graph may say what shape the old one has.
            before.output[0] = node.input[0] = f"{node.input[0]}.woven"
        if kind == "pointwise":
            continue
        node.attribute.add(name="woven", ints=[0], type=INTS)
        if before is not None and _is_mask(before, tensors) and readers[node.input[0]] == 1:
            node.input[0] = before.input[0]
            node.input.extend([""] * (MASK - len(node.input)))
            node.input.append(before.input[1])
            gone.add(before.output[0])
    if not taken:
        return model, 0
    keep_only(graph.node, [node for node in graph.node if node.output[0] not in gone])
    taken += take_frames(graph, tensors)
    if avx512:
        taken += take_mel(graph, tensors, readers) + take_head_input(graph, tensors, readers)
    _drop_unread_nodes(graph)
    drop_unread(graph, kept)
    parsed.opset_import.add(domain=DOMAIN, version=1)
    return parsed.SerializeToString(), taken


def _in_order_of_execution(graph: Any) -> list[Any]:
    """The nodes as ONNX Runtime runs them: from the last one back, of what a node reads the later made first.

    Weights are kept in this order, because a kernel asks memory for what lies behind its own.
    """
    places = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    order: list[Any] = []
    seen: set[int] = set()
    stack = [(place, False) for place in range(len(graph.node))]
    while stack:
        place, is_left = stack.pop()
        node = graph.node[place]
        if is_left:
            order.append(node)
        elif place not in seen:
            seen.add(place)
            stack.append((place, True))
            stack.extend((before, False) for before in sorted({places[x] for x in node.input if x in places}))
    return order


def _can_leave_woven(node: Any) -> bool:
    """A depthwise convolution of ours without dilation: frames that follow one another are woven together."""
    if node is None or (node.domain, node.op_type) != (DOMAIN, OPERATORS["depthwise"]):
        return False
    return any(item.name == "dilations" and list(item.ints) == [1, 1] for item in node.attribute)


def _drop_unread_nodes(graph: Any) -> None:
    """Take away nodes whose values nobody reads, and then those that only they read."""
    while True:
        readers = readers_of(graph)
        read = [node for node in graph.node if any(readers[name] for name in node.output)]
        if len(read) == len(graph.node):
            return
        keep_only(graph.node, read)


def _kind(node: Any, tensors: dict[str, Any]) -> Kind | None:
    """Which of our operators can do it: a convolution as long as its input or a product, channels scaled."""
    if (node.domain, node.op_type) not in (("com.microsoft", CONVOLUTION), ("", PRODUCT)):
        return None
    if len(node.input) < 8 or not all(name in tensors for name in node.input[1:] if name):
        return None
    x_zero, weights, w_scale, w_zero = (tensors[name] for name in node.input[WEIGHTS - 1 : WEIGHTS + 3])
    if x_zero.data_type != UINT8 or not _are_around_zero(weights, w_zero):
        return None
    kind, channels = _convolution(node, weights) if node.op_type == CONVOLUTION else _product(weights)
    return kind if all(list(tensor.dims) == [channels] for tensor in (w_scale, w_zero)) else None


def _convolution(node: Any, weights: Any) -> tuple[Kind | None, int]:
    """Which one a ``QLinearConv`` is, and of how many channels."""
    number: dict[str, int] = {item.name: item.i for item in node.attribute}
    numbers: dict[str, list[int]] = {item.name: list(item.ints) for item in node.attribute}
    if number.get("channels_last") != 1:
        return None, 0
    match numbers.get("kernel_shape"), numbers.get("strides"), numbers.get("dilations"), numbers.get("pads"):
        case [1, taps], [1, 1], [1, dilation], [0, before, 0, after]:
            if before < 0 or after < 0 or before + after != (taps - 1) * dilation:
                return None, 0
        case _:
            return None, 0
    group = number.get("group", 1)
    match list(weights.dims):
        case [channels, depth, 1, width] if width == taps and channels > 0 < depth:
            if len(weights.raw_data) != channels * depth * taps:
                return None, 0
            if depth == 1 and group == channels > 1 and 1 <= taps <= MAX_TAPS and 1 <= dilation < 2**31:
                return "depthwise", channels
            if taps == 1 == group:
                return "pointwise", channels
    return None, 0


def _product(weights: Any) -> tuple[Kind | None, int]:
    """Whether these are weights ``(depth, channels)`` of a ``QLinearMatMul``, and how many channels."""
    match list(weights.dims):
        case [depth, channels] if depth > 0 < channels and len(weights.raw_data) == depth * channels:
            return "pointwise", channels
    return None, 0


def _are_around_zero(weights: Any, zeros: Any) -> bool:
    """Signed weights, whose zero points the operators look at, or unsigned ones that are nothing else."""
    if weights.data_type == UINT8 == zeros.data_type:
        return set(zeros.raw_data) == {MIDDLE}
    return (weights.data_type, zeros.data_type) == (INT8, INT8)


def _signed_weights(node: Any, tensors: dict[str, Any]) -> NDArray[np.int8]:
    """int8 ``(channels, depth)`` of a node that ``_kind`` knows."""
    weights = tensors[node.input[WEIGHTS]]
    values = np.frombuffer(weights.raw_data, np.uint8)
    signed = values ^ np.uint8(MIDDLE if weights.data_type == UINT8 else 0)
    rows = signed.view(np.int8).reshape(weights.dims[0], -1)
    return np.ascontiguousarray(rows.T) if node.op_type == PRODUCT else rows


def _is_mask(node: Any, tensors: dict[str, Any]) -> bool:
    """The exporter's: the minimum of a value and a mask that the graph computes."""
    return (
        (node.domain, node.op_type) == ("", "Min") and len(node.input) == 2 and node.input[1] not in tensors
    )
