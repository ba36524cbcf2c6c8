"""Weights of four bits: the same rounding for networks that learn with it and for graphs that are served.

A matrix (outputs, inputs) is cut into groups of 128 inputs. A group has one float16 scale and integers from
-8 to 7; its largest magnitude is -8, so rounding what is rounded already changes nothing. Inputs that are
whole groups of 32 only are cut into those; their scales would be an eighth of the file in float16, and are
whole numbers of 8 bits, by a float16 step per row. In a graph the products become ONNX Runtime's
``MatMulNBits``, which also rounds what it is given to 8 bits, each row and group by its own scale: an item in
a batch gives what it gives alone. It is fast for one row, and for hundreds less than half as fast as dynamic
INT8, to which weights can be widened as the graph is loaded. The service has a kernel of its own that is
faster than either (``api/kernels/four_bits.py``).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from training.dynamic_int8 import Int8Products, forget_unused, graphs_of, replace_nodes
from training.qdq import SIGNED_LIMIT

GROUP = 128
SMALL_GROUP = 32
WITHIN = 0.45
"""Of a step, how far a weight may be from the level to which it is rounded."""
LOWEST = -8
HIGHEST = 7
DOMAIN = "com.microsoft"
"""Of the operators that are ONNX Runtime's own."""
INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits: sums of 8-bit products."""


def group_of(inputs: int) -> int:
    """How many of so many inputs share a scale: the larger groups, unless only the smaller ones are whole."""
    return SMALL_GROUP if inputs % GROUP and inputs % SMALL_GROUP == 0 else GROUP


def integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, inputs) -> whole numbers (outputs, groups, inputs of one) and scales (outputs, groups, 1).

    Both are float32. The last group is filled up with zeros; the scales are such as can be stored.
    """
    group = group_of(weight.shape[1])
    missing = -weight.shape[1] % group
    groups = functional.pad(weight, (0, missing)).reshape(len(weight), -1, group)
    places = groups.abs().argmax(-1, keepdim=True)
    scales = storable((groups.gather(-1, places) / LOWEST)[..., 0], group)[..., None]
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    whole = (groups * inverse).round_().clamp_(LOWEST, HIGHEST)
    if group == SMALL_GROUP:  # a share of few steps may be half as large again as the scale was
        whole.scatter_(-1, places, torch.where(scales == 0, 0.0, float(LOWEST)))
    return whole, scales


def storable(scales: Tensor, group: int) -> Tensor:
    """Scales (outputs, groups) of groups of this size with the values that they have in a file."""
    if group == GROUP:
        return scales.half().to(scales.dtype)
    shares, steps = shares_and_steps(scales)
    return shares * steps


def shares_and_steps(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (outputs, groups) as whole numbers of at most 127, and steps (outputs, 1) of float16's digits.

    A row's largest is 127 steps, however the step was rounded: what is stored already stays as it is.
    """
    largest = scales.abs().amax(dim=1, keepdim=True)
    steps = (largest / SIGNED_LIMIT).half().to(scales.dtype)
    return torch.where(steps == 0, 0.0, scales / largest * SIGNED_LIMIT).round_(), steps


def rounded(weight: Tensor) -> Tensor:
    """A matrix (outputs, inputs), or a convolution (outputs, inputs, taps), with the values that are served.

    A convolution is served as the product of its taps, which stand side by side.
    """
    with torch.no_grad():
        matrix = as_matrix(weight)
        whole, scales = integers(matrix)
        return from_matrix((whole * scales).flatten(1)[:, : matrix.shape[1]], weight.shape)


def within_steps(exact: Tensor, served: Tensor) -> Tensor:
    """What is nearest to exact weights and rounds to what is served, for who learns through the rounding.

    Both have the shape that `rounded` takes; `served` has values that it leaves as they are.
    """
    with torch.no_grad():
        matrix, wanted = as_matrix(served), as_matrix(exact)
        whole, scales = integers(matrix)
        steps = scales.abs().expand_as(whole).flatten(1)[:, : matrix.shape[1]]
        largest = (whole == LOWEST).flatten(1)[:, : matrix.shape[1]]  # sets the scale
        found = wanted.clamp(matrix - WITHIN * steps, matrix + WITHIN * steps)
        return from_matrix(torch.where(largest, matrix, found), served.shape)


def as_matrix(weight: Tensor) -> Tensor:
    """A convolution (outputs, inputs, taps) as the product of its taps side by side; a matrix as it is."""
    return weight.permute(0, 2, 1).flatten(1) if weight.ndim == 3 else weight


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of `as_matrix`."""
    if len(shape) == 3:
        outputs, inputs, taps = shape
        return matrix.reshape(outputs, taps, inputs).permute(0, 2, 1)
    return matrix


def quantize_to_four_bits(
    model: onnx.ModelProto, chosen: Collection[str], widened: Collection[str] = ()
) -> None:
    """Give the MatMul nodes with these names, and the look-ups in their weights, weights of four bits.

    Those among them that are `widened` become dynamic INT8, one scale per column, as the graph is loaded.
    """
    weights = _Weights(model.graph)
    for graph in graphs_of(model.graph):
        products = [node for node in graph.node if node.op_type == "MatMul" and node.name in chosen]
        for node in products:
            weights.pack(node.input[1])
    for graph in graphs_of(model.graph):
        int8 = Int8Products()
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if node.op_type == "MatMul" and node.name in widened:
                nodes += int8(node, *weights.widen(node.input[1]))
            elif node.op_type == "MatMul" and node.name in chosen:
                nodes.append(weights.product(node))
            elif node.op_type == "Gather" and node.input[0] in weights.packed:
                nodes += weights.look_up(node)
            else:
                nodes.append(node)
        replace_nodes(graph, nodes)
    forget_unused(model.graph, weights.packed)
    replace_nodes(model.graph, (*weights.unpacking, *model.graph.node))
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def halve(model: onnx.ModelProto, chosen: Collection[str]) -> None:
    """Store the float32 constants with these names in float16; ONNX Runtime widens them as it loads."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name in chosen:
            name, values = tensor.name, numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
            casts.append(cast_to_float(f"{name}_half", name))
    replace_nodes(model.graph, (*casts, *model.graph.node))


def cast_to_float(source: str, name: str) -> onnx.NodeProto:
    """A node that widens a constant."""
    return helper.make_node("Cast", [source], [name], name=name, to=TensorProto.FLOAT)


class _Weights:
    """Constants of the outer graph; inner graphs see them too."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.places = {tensor.name: index for index, tensor in enumerate(graph.initializer)}
        self.packed: dict[str, tuple[int, int]] = {}
        """Inputs and outputs of each weight that has been packed."""
        self.widened: set[str] = set()
        self.unpacking: list[onnx.NodeProto] = []
        """What is computed of constants, once."""

    def pack(self, name: str) -> None:
        """Add a weight's integers (outputs, groups, bytes), two in a byte, and its scales."""
        if name in self.packed:
            return
        values = torch.from_numpy(numpy_helper.to_array(self.graph.initializer[self.places[name]]).T.copy())
        whole, scales = integers(values)
        raised = (whole - LOWEST).to(torch.uint8).numpy()
        pairs: npt.NDArray[np.uint8] = raised[..., 0::2] | (raised[..., 1::2] << 4)
        self.graph.initializer.append(numpy_helper.from_array(pairs, f"{name}_packed"))
        self._add_scales(name, scales[..., 0], whole.shape[-1])
        self.packed[name] = (values.shape[1], values.shape[0])

    def _add_scales(self, name: str, scales: Tensor, group: int) -> None:
        """What they are stored as, and how they are computed from it."""
        found = f"{name}_scales"
        if group == GROUP:
            self.graph.initializer.append(numpy_helper.from_array(scales.half().numpy(), f"{found}_half"))
            self.unpacking.append(cast_to_float(f"{found}_half", found))
            return
        shares, steps = shares_and_steps(scales)
        factors = (f"{name}_scale_shares", shares.to(torch.int8)), (f"{name}_scale_steps", steps.half())
        for factor, stored in factors:
            self.graph.initializer.append(numpy_helper.from_array(stored.numpy(), factor))
            self.unpacking.append(cast_to_float(factor, f"{factor}_float"))
        wide = [f"{factor}_float" for factor, _ in factors]
        self.unpacking.append(helper.make_node("Mul", wide, [found], name=found))

    def product(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """(..., inputs) -> (..., outputs)."""
        source, weight = node.input
        inputs, outputs = self.packed[weight]
        return helper.make_node(
            "MatMulNBits",
            [source, f"{weight}_packed", f"{weight}_scales"],
            list(node.output),
            name=node.name,
            domain=DOMAIN,
            K=inputs,
            N=outputs,
            bits=4,
            block_size=group_of(inputs),
            accuracy_level=INT8_ACTIVATIONS,
        )

    def widen(self, name: str) -> tuple[str, str, str]:
        """Names of a packed weight in S8 (inputs, outputs), of its scales and zero points, one per column."""
        found = f"{name}_bytes", f"{name}_byte_scales", f"{name}_byte_zeros"
        if name in self.widened:
            return found
        self.widened.add(name)
        inputs, outputs = self.packed[name]
        limit = np.float32(-LOWEST / SIGNED_LIMIT)
        constants: dict[str, npt.NDArray[Any]] = {
            "four_bits.shift": np.array(4, np.uint8),
            "four_bits.sixteen": np.array(16, np.uint8),
            "four_bits.middle": np.array(-LOWEST, np.float32),
            "four_bits.limit": np.array(limit),
            "four_bits.least": np.array(np.finfo(np.float32).tiny),
            "four_bits.last": np.array([-1], np.int64),
            f"{name}_groups": np.array([outputs, -1, group_of(inputs)], np.int64),
            f"{name}_matrix": np.array([outputs, -1], np.int64),
            f"{name}_inputs": np.array([inputs], np.int64),
            "four_bits.first": np.array([0], np.int64),
            "four_bits.second": np.array([1], np.int64),
            found[2]: np.zeros(outputs, np.int8),
        }
        for constant, values in constants.items():
            if constant not in self.places:
                self.places[constant] = len(self.graph.initializer)
                self.graph.initializer.append(numpy_helper.from_array(values, constant))

        def add(operator: str, inputs: list[str], label: str, **attributes: Any) -> str:
            output = f"{name}_{label}"
            self.unpacking.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
            return output

        packed, scales = f"{name}_packed", f"{name}_scales"
        halves = [
            add("Mod", [packed, "four_bits.sixteen"], "low"),
            add("BitShift", [packed, "four_bits.shift"], "high", direction="RIGHT"),
        ]
        pairs = [add("Unsqueeze", [half, "four_bits.last"], f"pair_{i}") for i, half in enumerate(halves)]
        joined = add("Concat", pairs, "pairs", axis=-1)
        raised = add("Reshape", [joined, f"{name}_groups"], "raised")
        raised = add("Cast", [raised], "raised_float", to=TensorProto.FLOAT)
        whole = add("Sub", [raised, "four_bits.middle"], "whole")
        largest = add("ReduceMax", [add("Abs", [scales], "sizes")], "largest", axes=[1], keepdims=1)
        columns = add("Mul", [largest, "four_bits.limit"], "columns_raw")
        columns = add("Max", [columns, "four_bits.least"], "columns")
        shares = add("Div", [scales, columns], "shares")
        shares = add("Unsqueeze", [shares, "four_bits.last"], "shares_of_groups")
        steps = add("Round", [add("Mul", [whole, shares], "steps")], "rounded")
        steps = add("Cast", [steps], "whole_steps", to=TensorProto.INT8)
        steps = add("Reshape", [steps, f"{name}_matrix"], "rows")
        bounds = ["four_bits.first", f"{name}_inputs", "four_bits.second"]
        add("Transpose", [add("Slice", [steps, *bounds], "own_rows")], "bytes", perm=[1, 0])
        add("Reshape", [columns, "four_bits.last"], "byte_scales")
        return found

    def look_up(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Columns (inputs, n, 1) of a weight (inputs, outputs), as Gather gives those at places (n, 1)."""
        weight, places = node.input
        inputs, outputs = self.packed[weight]
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        group = group_of(inputs)
        if axis != 1 or inputs % group:
            raise ValueError(f"{node.name}: only whole columns of whole groups of {SMALL_GROUP} weights")
        name = node.name
        rows = np.array([outputs, inputs // 2], np.int64)
        self.graph.initializer.append(numpy_helper.from_array(rows, f"{name}.rows"))
        return [
            helper.make_node(
                "Reshape", [f"{weight}_packed", f"{name}.rows"], [f"{name}.table"], name=f"{name}.table"
            ),
            helper.make_node(
                "GatherBlockQuantized",
                [f"{name}.table", places, f"{weight}_scales"],
                [f"{name}.found"],
                name=f"{name}.found",
                domain=DOMAIN,
                bits=4,
                block_size=group,
                gather_axis=0,
                quantize_axis=1,
            ),
            helper.make_node("Transpose", [f"{name}.found"], list(node.output), name=name, perm=[2, 0, 1]),
        ]
