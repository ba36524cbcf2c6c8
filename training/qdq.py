"""Rewrite a float graph of our exporter into a static INT8 graph (QDQ form, U8 activations, S8 weights).

Only what a convolution touches is quantized: its input, its weights (symmetric, one scale per output
channel), its bias (int32), and what follows it, which is a ReLU, a mask, or a residual sum. A ReLU before a
quantizer with zero point 0 is what the quantizer does anyway, so it disappears. Scales are constants, so an
item's result does not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

UNSIGNED_LEVELS = 255
SIGNED_LIMIT = 127


@dataclass(frozen=True)
class Range:
    """Values a tensor takes on real sound."""

    low: float
    high: float

    def scale_and_zero(self) -> tuple[np.float32, np.uint8]:
        """Affine map onto 0..255 that holds zero exactly (Jacob et al. 2018)."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = max(high - low, 1e-8) / UNSIGNED_LEVELS
        return np.float32(scale), np.uint8(round(-low / scale))


Selector = Callable[[str], bool]


def quantizable(graph: onnx.ModelProto, selected: Selector) -> list[str]:
    """Names of the tensors whose ranges `quantize_graph` needs."""
    return sorted(_Plan(graph, selected).tensors)


class _Plan:
    """Which nodes work on integers, and which tensors carry a scale."""

    def __init__(self, model: onnx.ModelProto, selected: Selector) -> None:
        graph = model.graph
        self.convolutions = {n.output[0] for n in graph.node if n.op_type == "Conv" and selected(n.name)}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.masks: set[str] = set()
        self.relus: set[str] = set()
        self.sums: set[str] = set()
        for node in graph.node:
            self._classify(node)
        inputs = {self.producers[name].input[0] for name in self.convolutions}
        relu_inputs = {self.producers[name].input[0] for name in self.relus}
        sum_inputs = {name for output in self.sums for name in self.producers[output].input}
        integers = self.convolutions | self.masks | self.relus | self.sums | sum_inputs
        # what goes into a ReLU needs no scale of its own: the ReLU's output has one
        self.tensors = (inputs | integers) - {name for name in relu_inputs if self.uses[name] == 1}

    def _classify(self, node: onnx.NodeProto) -> None:
        output = node.output[0]
        integers = self.convolutions | self.relus | self.masks | self.sums
        if node.op_type == "Relu" and node.input[0] in integers:
            self.relus.add(output)
        elif node.op_type == "Mul" and node.input[1].endswith(".mask") and node.input[0] in self.relus:
            self.masks.add(output)
        elif node.op_type == "Add" and all(name in integers for name in node.input):
            self.sums.add(output)


def quantize_graph(
    model: onnx.ModelProto, ranges: Mapping[str, Range], selected: Selector
) -> onnx.ModelProto:
    """The INT8 form of `model`. `ranges` holds what `quantizable` names; raises KeyError where one lacks."""
    return _Rewriter(model, ranges, selected).run()


class _Rewriter:
    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, Range], selected: Selector) -> None:
        self.model = model
        self.plan = _Plan(model, selected)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.new_constants: dict[str, npt.NDArray[np.generic]] = {}
        self.scales = {name: self._range(name, ranges).scale_and_zero() for name in self.plan.tensors}
        self.quantized: set[str] = set()
        self.masks: dict[str, str] = {}
        self.uses: Counter[str] = Counter()

    def _range(self, name: str, ranges: Mapping[str, Range]) -> Range:
        """A mask's output is its input with zeros: the same map, so that masking is exact."""
        while name in self.plan.masks:
            name = self.plan.producers[name].input[0]
        return ranges[name]

    def run(self) -> onnx.ModelProto:
        for node in self.model.graph.node:
            output = node.output[0]
            if output in self.plan.convolutions:
                self._convolution(node)
            elif output in self.plan.relus:
                self._relu(node)
            elif output in self.plan.masks:
                self._mask(node)
            elif output in self.plan.sums:
                inputs = [self._dequantized(name) for name in node.input]
                self._integer(helper.make_node("Add", inputs, [output], name=node.name))
            else:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.input[:] = [
                    self._dequantized(name) if name in self.quantized else name for name in node.input
                ]
                self.nodes.append(copy)
        return self._finish()

    def _convolution(self, node: onnx.NodeProto) -> None:
        weight = numpy_helper.to_array(self.constants[node.input[1]])
        inputs = [self._dequantized(node.input[0]), ""]
        peak = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        scales = np.maximum(peak / SIGNED_LIMIT, 1e-12).astype(np.float32)
        steps = np.round(weight / scales[:, None, None, None])
        inputs[1] = self._constant_dequantized(
            node.input[1], np.clip(steps, -SIGNED_LIMIT, SIGNED_LIMIT).astype(np.int8), scales
        )
        if len(node.input) > 2:
            bias = numpy_helper.to_array(self.constants[node.input[2]]).astype(np.float64)
            bias_scales = scales.astype(np.float64) * float(self.scales[node.input[0]][0])
            limit = 2**31 - 1
            values = np.clip(np.round(bias / bias_scales), -limit, limit).astype(np.int32)
            inputs.append(self._constant_dequantized(node.input[2], values, bias_scales.astype(np.float32)))
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = inputs
        self._integer(copy)

    def _integer(self, node: onnx.NodeProto) -> None:
        """Append a node; quantize its output unless a ReLU takes it."""
        self.nodes.append(node)
        if node.output[0] in self.plan.tensors:
            self._quantize(node.output[0])

    def _relu(self, node: onnx.NodeProto) -> None:
        source, output = node.input[0], node.output[0]
        if source in self.quantized or self.scales[output][1] != 0:
            values = self._dequantized(source) if source in self.quantized else source
            self.nodes.append(helper.make_node("Relu", [values], [output], name=node.name))
            self._quantize(output)
        else:
            self._quantize(output, source)

    def _mask(self, node: onnx.NodeProto) -> None:
        """Zero frames on the integers themselves: the smaller of a value and 0 or 255.

        It costs a fifth of a quantized product. The zero point must be 0, which it is after a ReLU.
        """
        source, mask, output = node.input[0], node.input[1], node.output[0]
        if self.scales[source][1] != 0:
            raise ValueError(
                f"{node.name}: masks a tensor whose zero point is {self.scales[source][1]}, not 0"
            )
        if mask not in self.masks:
            self.masks[mask] = self._byte_mask(mask)
        if source not in self.quantized:
            self._quantize(source)
        inputs = [f"{source}.quantized", self.masks[mask]]
        self.nodes.append(helper.make_node("Min", inputs, [f"{output}.quantized"], name=node.name))
        scale, zero = self.scales[source]
        self._number(f"{output}.scale", scale)
        self._number(f"{output}.zero", zero)
        self.quantized.add(output)

    def _byte_mask(self, mask: str) -> str:
        """The mask as 255 and 0."""
        step = self._number("mask.scale", np.float32(1 / UNSIGNED_LEVELS))
        zero = self._number("mask.zero", np.uint8(0))
        self._quantizer(mask, mask, step, zero)
        return f"{mask}.quantized"

    def _number(self, name: str, value: np.generic) -> str:
        self.new_constants[name] = np.asarray(value)
        return name

    def _quantizer(self, source: str, output: str, scale: str, zero: str) -> None:
        name = f"{output}.quantized"
        self.nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [name], name=name))

    def _quantize(self, name: str, source: str | None = None) -> None:
        """Add the quantizer of tensor `name`, fed from `source` where the ReLU between disappeared."""
        scale, zero = self.scales[name]
        self._quantizer(
            source or name, name, self._number(f"{name}.scale", scale), self._number(f"{name}.zero", zero)
        )
        self.quantized.add(name)

    def _dequantized(self, name: str) -> str:
        """Each user has a dequantizer of its own, which is what ONNX Runtime's fusions look for."""
        if name not in self.quantized:
            self._quantize(name)
        self.uses[name] += 1
        output = f"{name}.dequantized.{self.uses[name]}"
        inputs = [f"{name}.quantized", f"{name}.scale", f"{name}.zero"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=output))
        return output

    def _constant_dequantized(
        self, name: str, values: npt.NDArray[np.generic], scales: npt.NDArray[np.float32]
    ) -> str:
        self.new_constants[f"{name}.quantized"] = values
        self.new_constants[f"{name}.scales"] = scales
        self.new_constants[f"{name}.zeros"] = np.zeros(len(scales), values.dtype)
        inputs = [f"{name}.{part}" for part in ("quantized", "scales", "zeros")]
        output = f"{name}.dequantized"
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=output, axis=0))
        return output

    def _finish(self) -> onnx.ModelProto:
        used = {name for node in self.nodes for name in node.input}
        kept = [tensor for name, tensor in self.constants.items() if name in used]
        made = [
            numpy_helper.from_array(value, name) for name, value in self.new_constants.items() if name in used
        ]
        source = self.model.graph
        graph = helper.make_graph(self.nodes, source.name, source.input, source.output, kept + made)
        model = helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            producer_name=self.model.producer_name,
        )
        onnx.checker.check_model(model)
        return model
