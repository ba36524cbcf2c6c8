"""A bundle is data from outside: whatever its graph says, the C code refuses what it cannot do safely."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from api.kernels.graph import BIAS, DOMAIN, MAX_TAPS, OPERATOR, hand_over
from tests.kernels.conftest import Layer, feeds, open_graph

LAYER = Layer(channels=32, taps=5, pads=(2, 2))


def model_with(
    tensors: dict[str, np.ndarray] | None = None, extra: tuple[str, ...] = (), **attributes: Any
) -> bytes:
    """A node of ours as no rewriting would leave it."""
    node = LAYER.node(**attributes)
    node.op_type, node.domain = OPERATOR, DOMAIN
    node.input.extend(extra)
    model = onnx.load_from_string(LAYER.model([node]))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    for tensor in model.graph.initializer:
        if tensor.name in (tensors or {}):
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return bytes(model.SerializeToString())


def test_the_node_itself_is_taken(kernels: str) -> None:
    assert open_graph(model_with(), ours=True).run(None, feeds(LAYER, 1, 9))


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [1, 0], "pads": [0, 0, 0, -1]},
        {"kernel_shape": [1, MAX_TAPS + 1], "pads": [0, 64, 0, 64]},
        {"kernel_shape": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 2**56 - 1]},
        {"kernel_shape": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 2**56]},
        {"dilations": [1, 0]},
        {"dilations": [1, 2]},
        {"pads": [0, 1, 0, 2]},
        {"pads": [0, 5, 0, -1]},
        {"pads": [0, -1, 0, 5]},
        {"pads": [1, 2, 0, 2]},
        {"kernel_shape": [2, 5]},
        {"strides": [1, 2]},
        {"strides": [2, 1]},
    ],
)
def test_attributes(kernels: str, attributes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="kernel, strides or pads are not supported"):
        open_graph(model_with(**attributes), ours=True)


@pytest.mark.parametrize("attributes", [{"pads": [0, 2]}, {"kernel_shape": [5]}, {"strides": [1, 1, 1]}])
def test_attributes_of_another_length(kernels: str, attributes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"too short|[Ss]ize|buffer"):
        open_graph(model_with(**attributes), ours=True)


@pytest.mark.parametrize(
    ("tensor", "value", "problem"),
    [
        ("w", np.ones((32, 1, 1, 4), np.int8), "w is not"),
        ("w", np.ones((32, 1, 5), np.int8), "w is not"),
        ("w", np.ones((16, 2, 1, 5), np.int8), "w is not"),
        ("w_scale", np.float32(0.1), "not one value per channel"),
        ("w_scale", np.ones(31, np.float32), "not one value per channel"),
        ("w_zero", np.int8(0), "not one value per channel"),
        ("x_scale", np.ones(2, np.float32), "not one value per channel"),
    ],
)
def test_parameters(kernels: str, tensor: str, value: np.ndarray, problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        open_graph(model_with({tensor: np.asarray(value)}), ours=True)


def test_more_channels_than_the_input_has(kernels: str) -> None:
    """A depth multiplier: twice as many filters as channels would read behind each frame."""
    twice = {
        "w": np.ones((64, 1, 1, 5), np.int8),
        "w_scale": np.ones(64, np.float32),
        "w_zero": np.zeros(64, np.int8),
    }
    session = open_graph(model_with(twice), ours=True)
    with pytest.raises(Exception, match="x is not"):
        session.run(None, feeds(LAYER, 1, 20))


@pytest.mark.parametrize("shape", [(1, 1, 19, 1), (1, 1, 20, 2), (2, 1, 20, 1), (1, 20)])
def test_masks_of_another_shape(kernels: str, shape: tuple[int, ...]) -> None:
    model = onnx.load_from_string(model_with(extra=("", "mask")))
    mask = next(value for value in model.graph.input if value.name == "mask")
    mask.CopyFrom(helper.make_tensor_value_info("mask", onnx.TensorProto.UINT8, shape))
    session = open_graph(model.SerializeToString(), ours=True)
    with pytest.raises(Exception, match="the mask is not"):
        session.run(None, {"x": feeds(LAYER, 1, 20)["x"], "mask": np.zeros(shape, np.uint8)})


def test_a_bias_that_is_not_part_of_the_model(kernels: str) -> None:
    model = onnx.load_from_string(model_with(extra=("given",)))
    assert model.graph.node[0].input[BIAS] == "given"
    model.graph.input.append(helper.make_tensor_value_info("given", onnx.TensorProto.INT32, [32]))
    session = open_graph(model.SerializeToString(), ours=True)
    with pytest.raises(Exception, match="bias is not constant"):
        session.run(None, feeds(LAYER, 1, 20) | {"given": np.zeros(32, np.int32)})


def test_weights_that_are_not_part_of_the_model(kernels: str) -> None:
    model = onnx.load_from_string(model_with())
    model.graph.node[0].input[3] = "given"
    model.graph.input.append(helper.make_tensor_value_info("given", onnx.TensorProto.INT8, [32, 1, 1, 5]))
    with pytest.raises(Exception, match="w is not constant"):
        open_graph(model.SerializeToString(), ours=True)


@pytest.mark.parametrize("dilation", [2**31 - 1, 10_000_000])
def test_dilations_beyond_the_clip_are_right(kernels: str, dilation: int) -> None:
    layer = Layer(taps=1, pads=(0, 0), dilation=dilation)
    model = layer.model()
    rewritten, taken = hand_over(model)
    assert taken == 1
    given = feeds(layer, 2, 300)
    (expected,) = open_graph(model, ours=False).run(None, given)
    np.testing.assert_array_equal(open_graph(rewritten, ours=True).run(None, given)[0], expected)
