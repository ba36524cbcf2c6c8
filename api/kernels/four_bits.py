"""Hand products with weights of four bits over to our operator, inside of loops as well.

For the hundreds of rows of an encoder ours takes a quarter of the time of ONNX Runtime's ``MatMulNBits``.
Both round inputs to 8 bits in the same way and add up in another order, so that the graph has not quite the
same bits: products are compared one by one. Ours gives a row the same bits in any company.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from api.kernels.ends import DOMAIN
from api.kernels.library import Keep, Layout
from api.kernels.model import (
    FLOAT,
    INTS,
    UINT8,
    constants_of,
    drop_unread,
    graphs_of,
    model_class,
    readers_of,
)
from api.kernels.rows import give_rows

PRODUCT, FOUR_BITS = "MatMulNBits", "FourBitsProduct"
SET, SMALL_SET, MIDDLE = 128, 32, 8  # as in weights.h
LAYOUTS: dict[int, Layout] = {SET: "four_bits", SMALL_SET: "four_bits_small"}
PACKED, SCALES, ZEROS, ORDER, BIAS = 1, 2, 3, 4, 5  # places of MatMulNBits' inputs
# Products of bytes (accuracy level 4), of weights as they are in the file.
WANTED = {"bits": 4, "accuracy_level": 4, "weight_prepacked": 0}
PROBE_ROWS = 17  # of a product that is compared: whole groups of each kernel's rows, and some more


@dataclass(frozen=True, slots=True)
class Probe:
    """A model with each product twice, as ONNX Runtime has it and as ours.

    Its inputs are float32 ``(PROBE_ROWS, depth)`` under the names of ``depths``; its outputs are in pairs.
    """

    model: bytes
    depths: dict[str, int]


def hand_over_products(model: bytes, keep: Keep, *, rows: bool = False) -> tuple[bytes, Probe | None]:
    """An optimised ONNX model -> the model with our operators, and what to compare, None if it has nothing.

    ``keep`` takes int8 weights ``(channels, depth)`` and gives the number by which an operator finds them, 0
    if it does not want them (as ``library.Weights``). Where all products are ours, a clip that is alone needs
    no company (``search.rows`` of ``training/recipes/whisper_seq2seq/export.py``). ``rows``: the graph may
    give each different frame once (``rows.give_rows``).
    """
    parsed = model_class().FromString(model)
    tensors = constants_of(parsed.graph)
    pairs: list[tuple[Any, Any]] = []
    left = False
    for graph in graphs_of(parsed.graph):
        for node in graph.node:
            if (node.domain, node.op_type) != ("com.microsoft", PRODUCT):
                continue
            size = next((item.i for item in node.attribute if item.name == "block_size"), 0)
            weights = _weights(node, tensors, size) if size in LAYOUTS else None
            number = 0 if weights is None else keep(LAYOUTS[size], weights.tobytes(), *weights.shape)
            if not number:
                left = True
                continue
            before = type(node)()
            before.CopyFrom(node)
            _become_ours(node, number)
            if graph is not parsed.graph:
                _bring_in(graph, node, tensors)
            pairs.append((before, node))
    if not pairs:
        return model, None
    probe = _probe(parsed, pairs, tensors)
    for node in parsed.graph.node:
        if not left and (list(node.output), node.op_type) == (["search.rows"], "Max"):
            node.op_type, node.input[:] = "Identity", ["search.batch"]
    drop_unread(parsed.graph, {name for before, _ in pairs for name in before.input})
    if rows:
        give_rows(parsed.graph)
    parsed.opset_import.add(domain=DOMAIN, version=1)
    return parsed.SerializeToString(), probe


def _bring_in(graph: Any, node: Any, tensors: dict[str, Any]) -> None:
    """Scales and bias into the inner graph: what is outside is not constant to operators of it."""
    for place, name in enumerate(node.input[1:], 1):
        node.input[place] = inner = f"{name}.inner"
        if inner not in {tensor.name for tensor in graph.initializer}:
            tensors[inner] = graph.initializer.add()
            tensors[inner].CopyFrom(tensors[name])
            tensors[inner].name = inner


def probe_inputs(probe: Probe) -> dict[str, NDArray[np.float32]]:
    """Rows at random; one of them zero, one with a value that is far larger than the others."""
    random = np.random.default_rng(0)
    rows = {name: random.normal(0, 1, (PROBE_ROWS, depth)) for name, depth in probe.depths.items()}
    for values in rows.values():
        values[1], values[2, 0] = 0.0, 100.0
    return {name: values.astype(np.float32) for name, values in rows.items()}


def _weights(node: Any, tensors: dict[str, Any], size: int) -> NDArray[np.int8] | None:
    """int8 ``(channels, depth)`` of a product, in sets of a size, that our operator can do, else None."""
    number: dict[str, int] = {item.name: item.i for item in node.attribute}
    if {name: number.get(name, 0) for name in WANTED} != WANTED:
        return None
    channels, depth = number.get("N", 0), number.get("K", 0)
    sets = -(-depth // size)
    inputs = [*node.input, *[""] * (BIAS + 1 - len(node.input))]
    packed, scales = tensors.get(inputs[PACKED]), tensors.get(inputs[SCALES])
    if packed is None or scales is None or inputs[ZEROS] or inputs[ORDER]:
        return None
    if (packed.data_type, list(packed.dims)) != (UINT8, [channels, sets, size // 2]):
        return None
    if (scales.data_type, list(scales.dims)) != (FLOAT, [channels, sets]) or channels < 1 or depth < 1:
        return None
    if inputs[BIAS]:
        bias = tensors.get(inputs[BIAS])
        if bias is None or (bias.data_type, list(bias.dims)) != (FLOAT, [channels]):
            return None
    pairs = np.frombuffer(packed.raw_data, np.uint8)
    if len(pairs) != channels * sets * size // 2:
        return None
    values = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(channels, -1)[:, :depth]
    return np.ascontiguousarray(values.astype(np.int8) - np.int8(MIDDLE))


def _become_ours(node: Any, number: int) -> None:
    bias = node.input[BIAS : BIAS + 1]
    node.input[:] = [node.input[0], node.input[SCALES], *bias]
    node.op_type, node.domain = FOUR_BITS, DOMAIN
    del node.attribute[:]
    node.attribute.add(name="weights", ints=[number], type=INTS)


def _probe(parsed: Any, pairs: list[tuple[Any, Any]], tensors: dict[str, Any]) -> Probe:
    model = type(parsed)()
    model.ir_version = parsed.ir_version
    model.opset_import.extend(parsed.opset_import)
    model.opset_import.add(domain=DOMAIN, version=1)
    model.graph.name = "probe"
    depths: dict[str, int] = {}
    for place, nodes in enumerate(pairs):
        depth = next(item.i for item in nodes[0].attribute if item.name == "K")
        depths[f"rows_of_{depth}"] = depth
        for node in nodes:
            copied = model.graph.node.add()
            copied.CopyFrom(node)
            copied.input[0] = f"rows_of_{depth}"
            copied.output[0] = copied.name = f"product_{place}_{node.op_type}"
            model.graph.output.add(name=copied.output[0])
    for name, depth in depths.items():
        value = model.graph.input.add(name=name)
        value.type.tensor_type.elem_type = FLOAT
        for size in (PROBE_ROWS, depth):
            value.type.tensor_type.shape.dim.add(dim_value=size)
    wanted = readers_of(model.graph)
    model.graph.initializer.extend(tensor for name, tensor in tensors.items() if wanted[name])
    return Probe(model.SerializeToString(), depths)
