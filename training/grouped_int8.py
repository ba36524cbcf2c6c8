"""Grouped convolutions along time -> dynamic INT8 products of each group's windows, in place.

ONNX Runtime has no dynamic INT8 convolution of groups, and its float32 one copies every window in 32 bits.
Here the input is rounded first (one scale at every call, as for the products), and windows are copied in
bytes: with 128 taps on 64 channels in 16 groups, 5 s of audio take 21 ms for 48 on one Zen 4 core.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from training.dynamic_int8 import column_scales, forget_unused, replace_nodes, rounding_of

MIDDLE = 128
"""Zero of unsigned bytes: CPUs without VNNI do not add products with signed ones exactly."""


def grouped_convolutions(model: onnx.ModelProto) -> list[str]:
    """Names of what `quantize_grouped` knows: height and step 1, groups of several channels."""
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in shapes:
            continue
        told = _attributes(node)
        shape = shapes[node.input[1]]
        plain = {*told.get("strides", [1]), *told.get("dilations", [1])} == {1}
        flat = len(shape) == 4 and shape[2] == 1 and told.get("pads", [0] * 4)[::2] == [0, 0]
        if told.get("group", 1) > 1 and shape[1] > 1 and plain and flat:
            found.append(node.name)
    return found


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def quantize_grouped(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Make the Conv nodes with these names, of `grouped_convolutions`, dynamic INT8, weights per channel."""
    nodes: list[onnx.NodeProto] = []
    weights = []
    for node in model.graph.node:
        if node.name in names:
            nodes += _Windows(model.graph, node).nodes()
            weights.append(node.input[1])
        else:
            nodes.append(node)
    replace_nodes(model.graph, nodes)
    forget_unused(model.graph, weights)


class _Windows:
    """One convolution: (batch, groups * inputs, 1, frames) -> (batch, groups * outputs, 1, frames')."""

    def __init__(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        self.graph, self.node, self.name = graph, node, node.name
        told = _attributes(node)
        self.groups, self.pads = told["group"], told.get("pads", [0] * 4)
        held = {tensor.name: tensor for tensor in graph.initializer}
        weight = numpy_helper.to_array(held[node.input[1]])[:, :, 0]
        self.inputs, self.taps = weight.shape[1:]
        self.outputs = len(weight) // self.groups
        by_group = weight.reshape(self.groups, self.outputs, self.inputs, self.taps)
        self.weight = by_group.transpose(0, 3, 2, 1).reshape(self.groups, -1, self.outputs)
        self.bias = numpy_helper.to_array(held[node.input[2]]) if len(node.input) > 2 else None
        self.made: list[onnx.NodeProto] = []

    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes that stand for it; the last has its output."""
        scales = column_scales(self.weight)
        weight = self._constant("weight_quantized", (np.rint(self.weight / scales) + MIDDLE).astype(np.uint8))
        zero_point = self._constant("weight_zero_point", np.uint8(MIDDLE))
        rounded, quantizer = rounding_of(self.node.input[0], self.name)
        self.made.append(quantizer)
        windows = self._windows(rounded.bytes, rounded.zero_point)
        sums = self._add("MatMulInteger", [windows, weight, rounded.zero_point, zero_point], "sums")
        values = self._add("Cast", [sums], "float", to=TensorProto.FLOAT)
        scale = self._add("Mul", [rounded.scale, self._constant("weight_scale", scales)], "scale")
        values = self._add("Mul", [values, scale], "scaled")
        if self.bias is not None:
            bias = self._constant("bias_by_group", self.bias.reshape(self.groups, 1, self.outputs))
            values = self._add("Add", [values, bias], "shifted")
        values = self._add("Transpose", [values], "channels", perm=[0, 1, 3, 2])
        shape = self._constant("shape", np.array([0, self.groups * self.outputs, 1, -1]))
        last = helper.make_node("Reshape", [values, shape], [self.node.output[0]], name=self.name)
        return [*self.made, last]

    def _windows(self, values: str, zero_point: str) -> str:
        """Bytes of every frame's window, (batch, groups, frames', taps * inputs)."""
        by_group = self._constant("groups", np.array([0, self.groups, self.inputs, -1]))
        values = self._add("Reshape", [values, by_group], "by_group")
        values = self._add("Transpose", [values], "frames_first", perm=[0, 1, 3, 2])
        before, after = self.pads[1], self.pads[3]
        pads = self._constant("pads", np.array([0, 0, before, 0, 0, 0, after, 0]))
        values = self._add("Pad", [values, pads, zero_point], "padded")
        room = self._add("Shape", [values], "padded_frames", start=2, end=3)
        count = self._add("Sub", [room, self._constant("last_tap", np.array([self.taps - 1]))], "frames")
        count = self._add("Squeeze", [count], "frames_scalar")
        bounds = [self._constant(name, np.array(value)) for name, value in (("zero", 0), ("one", 1))]
        starts = self._add("Range", [bounds[0], count, bounds[1]], "starts")
        column = self._add("Unsqueeze", [starts, self._constant("axis", np.array([1]))], "starts_column")
        places = self._add("Add", [column, self._constant("taps", np.arange(self.taps))], "places")
        windows = self._add("Gather", [values, places], "windows", axis=2)
        flat = self._constant("window", np.array([0, 0, 0, self.taps * self.inputs]))
        return self._add("Reshape", [windows, flat], "windows_flat")

    def _add(self, operator: str, inputs: list[str], label: str, **attributes: Any) -> str:
        name = f"{self.name}.{label}"
        self.made.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, label: str, values: npt.ArrayLike) -> str:
        name = f"{self.name}.{label}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name
