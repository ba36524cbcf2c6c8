"""Matrix products with constant weights -> dynamic INT8, in place and one weight at a time.

ONNX Runtime's own tool holds several copies of all weights while it works, too many for 600 million of them
on a machine with 24 GB. This one gives the same graph (a test compares them) and holds one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from training.qdq import SIGNED_LIMIT


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes (loops, branches), outer ones first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


def quantize_products(model: onnx.ModelProto, chosen: Collection[str]) -> None:
    """Make the MatMul nodes with these names INT8: weights S8 per channel, inputs U8, sums S32.

    An input's scale is found at every call over the whole batch; products that share an input share it. What
    is a convolution's taps side by side is rounded before it is stacked, a quarter of the bytes to move.
    CPUs without VNNI do not add products with S8 exactly; ONNX Runtime makes weights U8 there as it loads,
    but not those that products share or that are read inside a node's graph (a loop, a branch): they are U8.
    """
    outer, *inner = (
        [node.input[1] for node in g.node if node.name in chosen] for g in graphs_of(model.graph)
    )
    shared = {name for name, count in Counter(outer).items() if count > 1}
    weights = _Weights(model.graph, shared.union(*inner))
    for graph in graphs_of(model.graph):
        product = Int8Products(_stacks(graph, chosen))
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if node.name in chosen:
                nodes += product(node, *weights.quantized(node.input[1]))
            else:
                nodes += product.stacked(node)
        replace_nodes(graph, nodes)
    forget_unused(model.graph, weights.done)


def forget_unused(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Drop those of the named constants that nothing reads any more."""
    uses = Counter(name for inner in graphs_of(graph) for node in inner.node for name in node.input)
    uses.update(output.name for inner in graphs_of(graph) for output in inner.output)
    unused = {name for name in names if not uses[name]}
    for index in range(len(graph.initializer) - 1, -1, -1):
        if graph.initializer[index].name in unused:
            del graph.initializer[index]


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give a graph other nodes, some of its own among them."""
    kept = []
    for node in nodes:  # those of the graph end with its list
        kept.append(onnx.NodeProto())
        kept[-1].CopyFrom(node)
    del graph.node[:]
    graph.node.extend(kept)


def _stacks(graph: onnx.GraphProto, chosen: Collection[str]) -> dict[str, str]:
    """What is sliced: by slice, and by what chosen products are given, which stacks slices of it."""
    makers = {output: node for node in graph.node for output in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    found: dict[str, str] = {}
    for product in graph.node:
        stack = makers.get(product.input[0]) if product.name in chosen else None
        if stack is None or stack.op_type != "Concat" or uses[stack.output[0]] != 1:
            continue
        slices = [makers.get(name) for name in stack.input]
        sources = {one.input[0] for one in slices if one is not None and one.op_type == "Slice"}
        if len(sources) == 1 and None not in slices and all(uses[name] == 1 for name in stack.input):
            found |= dict.fromkeys((*stack.input, stack.output[0]), *sources)
    return found


class Rounded(NamedTuple):
    """Names of what 8 bits hold of a tensor."""

    bytes: str
    scale: str
    zero_point: str


def rounding_of(source: str, name: str) -> tuple[Rounded, onnx.NodeProto]:
    """The node that rounds a tensor, with one scale found at every call, for the node of this name."""
    made = Rounded(f"{name}.input_quantized", f"{name}.input_scale", f"{name}.input_zero_point")
    return made, helper.make_node("DynamicQuantizeLinear", [source], made, name=f"{name}.input_quantize")


def column_scales(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weights (..., inputs, outputs) -> what a step of 8 bits is worth in each column, (..., 1, outputs)."""
    largest = np.abs(values).max(axis=-2, keepdims=True)
    return np.where(largest > 0, largest / np.float32(SIGNED_LIMIT), 1).astype(np.float32)


class Int8Products:
    """Dynamic INT8 products of one graph; those that share an input share its rounding."""

    def __init__(self, stacks: Mapping[str, str] = MappingProxyType({})) -> None:
        """`stacks`: of `_stacks`."""
        self.stacks = stacks
        self.scaled: dict[str, Rounded] = {}

    def stacked(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A node that is no product, which slices what is rounded if a product is given the slices."""
        if node.op_type != "Slice" or node.output[0] not in self.stacks:
            return [node]
        nodes = self._rounding(node.input[0], node.name)
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[0] = self.scaled[node.input[0]].bytes
        return [*nodes, changed]

    def _rounding(self, source: str, name: str) -> list[onnx.NodeProto]:
        """The node that rounds `source`, unless it is there already."""
        if source in self.scaled:
            return []
        self.scaled[source], node = rounding_of(source, name)
        return [node]

    def __call__(
        self, node: onnx.NodeProto, weight: str, scale: str, zero_point: str
    ) -> list[onnx.NodeProto]:
        """The nodes that stand for a MatMul; the last has its output."""
        name, given = node.name, node.input[0]
        source = self.stacks.get(given, given)
        nodes = self._rounding(source, name)
        rounded = self.scaled[source]
        stacked = given if source != given else rounded.bytes
        inputs = [stacked, weight, rounded.zero_point, zero_point]
        return [
            *nodes,
            helper.make_node("MatMulInteger", inputs, [f"{name}.sums"], name=f"{name}.sums"),
            helper.make_node(
                "Cast", [f"{name}.sums"], [f"{name}.float"], name=f"{name}.float", to=TensorProto.FLOAT
            ),
            helper.make_node("Mul", [rounded.scale, scale], [f"{name}.scale"], name=f"{name}.scale"),
            helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [node.output[0]], name=name),
        ]


class _Weights:
    """Constants of the outer graph; inner graphs see them too."""

    def __init__(self, graph: onnx.GraphProto, unsigned: Collection[str]) -> None:
        self.graph, self.unsigned = graph, unsigned
        self.places = {tensor.name: index for index, tensor in enumerate(graph.initializer)}
        self.done: dict[str, tuple[str, str, str]] = {}

    def quantized(self, name: str) -> tuple[str, str, str]:
        """Names of a weight in bytes, of its scales and of its zero points, one of each per column."""
        if name not in self.done:
            values = numpy_helper.to_array(self.graph.initializer[self.places[name]])
            scales = column_scales(values)[0]
            zero, kind = (128, np.uint8) if name in self.unsigned else (0, np.int8)
            made: dict[str, npt.NDArray[Any]] = {
                f"{name}_quantized": (np.rint(values / scales) + zero).astype(kind),
                f"{name}_scale": scales,
                f"{name}_zero_point": np.full(len(scales), zero, kind),
            }
            self.graph.initializer.extend(numpy_helper.from_array(array, new) for new, array in made.items())
            quantized, scale, zero_point = made
            self.done[name] = quantized, scale, zero_point
        return self.done[name]
