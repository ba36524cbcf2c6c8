"""Grouped convolutions in dynamic INT8 beside float32 ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from training.grouped_int8 import grouped_convolutions, quantize_grouped
from training.inference import cpu_session

CHANNELS = 24


def convolution(
    groups: int = 3, taps: int = 8, outputs: int = 12, *, bias: bool = True, inputs: int = 8, **changes: Any
) -> onnx.ModelProto:
    draws = np.random.default_rng(5)
    weight = draws.normal(size=(outputs, inputs, 1, taps)).astype(np.float32)
    weight[0] = 0.0
    told = {"group": groups, "pads": [0, taps // 2, 0, taps // 2 - 1], "kernel_shape": [1, taps]} | changes
    held = [numpy_helper.from_array(weight, "w")]
    if bias:
        held.append(numpy_helper.from_array(draws.normal(size=outputs).astype(np.float32), "b"))
    node = helper.make_node("Conv", ["x", *(tensor.name for tensor in held)], ["y"], name="conv", **told)
    graph = helper.make_graph(
        [node],
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", CHANNELS, 1, "frames"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs, 1, "out"])],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("frames", [1, 5, 40])
@pytest.mark.parametrize(
    "changes", [{}, {"taps": 5, "pads": [0, 2, 0, 2]}, {"bias": False}, {"taps": 1, "pads": [0, 0, 0, 0]}]
)
def test_windows_are_multiplied_as_the_convolution_does(
    changes: dict[str, Any], frames: int, batch: int
) -> None:
    model = convolution(**changes)
    exact = cpu_session(model.SerializeToString())
    assert grouped_convolutions(model) == ["conv"]
    quantize_grouped(model, ["conv"])
    onnx.checker.check_model(model)
    operators = Counter(node.op_type for node in model.graph.node)
    assert (operators["Conv"], operators["MatMulInteger"]) == (0, 1)
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert max(int(np.prod(tensor.dims)) for tensor in floats) == 12, "scales and biases"
    values = np.random.default_rng(6).normal(size=(batch, CHANNELS, 1, frames)).astype(np.float32) + 0.5
    (wanted,) = exact.run(None, {"x": values})
    (found,) = cpu_session(model.SerializeToString()).run(None, {"x": values})
    assert found.shape == wanted.shape
    apart = np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(wanted**2))
    assert apart < 0.02
    silent = found[:, 0]
    assert np.ptp(silent) == 0.0, "a channel of zero weights is its bias"


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": 1, "inputs": 24},
        {"groups": 24, "inputs": 1, "outputs": 24},
        {"strides": [1, 2]},
        {"dilations": [1, 2]},
        {"pads": [1, 0, 1, 0]},
    ],
    ids=["no groups", "one channel a group", "steps", "gaps", "padded above"],
)
def test_others_are_left_alone(changes: dict[str, Any]) -> None:
    assert grouped_convolutions(convolution(**changes)) == []


def test_what_is_not_named_stays() -> None:
    model = convolution()
    before = model.SerializeToString()
    quantize_grouped(model, [])
    assert model.SerializeToString() == before
