"""Which nodes of an optimised graph our operators take, and which they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from api.kernels.graph import DOMAIN, MAX_TAPS, OPERATOR, hand_over
from tests.kernels.conftest import MASK, Layer


def kinds(model: bytes) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in onnx.load_from_string(model).graph.node]


def test_takes_the_node_and_its_mask() -> None:
    layer = Layer(bias=False)
    model = layer.model([MASK, layer.node("masked")])
    rewritten, taken = hand_over(model)
    assert (taken, kinds(rewritten)) == (1, [(DOMAIN, OPERATOR)])
    found, original = onnx.load_from_string(rewritten), onnx.load_from_string(model)
    assert list(found.graph.node[0].input) == ["x", *original.graph.node[1].input[1:], "", "mask"]
    assert found.graph.initializer == original.graph.initializer
    assert (DOMAIN, 1) in [(opset.domain, opset.version) for opset in found.opset_import]


def test_a_bias_stays_in_its_place() -> None:
    layer = Layer(bias=True)
    rewritten, _ = hand_over(layer.model([MASK, layer.node("masked")]))
    assert list(onnx.load_from_string(rewritten).graph.node[0].input)[8:] == ["bias", "mask"]


def test_a_mask_that_others_read_stays() -> None:
    layer = Layer()
    twice = [MASK, layer.node("masked"), helper.make_node("Identity", ["masked"], ["copy"])]
    for model in (
        layer.model(twice, ("y", "copy")),
        layer.model([MASK, layer.node("masked")], ("y", "masked")),
    ):
        rewritten, taken = hand_over(model)
        assert taken == 1
        assert ("", "Min") in kinds(rewritten)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": 0},
        {"group": 1},
        {"kernel_shape": [1, MAX_TAPS + 1], "pads": [0, 64, 0, 64]},
        {"kernel_shape": [3, 5]},
        {"strides": [1, 2]},
        {"strides": [2, 1]},
        {"dilations": [1, 2]},  # the pads would have to be wider
        {"pads": [0, 2, 0, 1]},
        {"pads": [1, 2, 1, 2]},
        {"kernel_shape": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 2**56]},
        {"kernel_shape": [1, 4], "pads": [0, 2, 0, 1]},  # the weights have five taps
        {"group": 16},  # a depth multiplier
    ],
)
def test_leaves_alone_what_the_kernel_cannot_do(changes: dict[str, Any]) -> None:
    layer = Layer()
    model = layer.model([layer.node(**changes)])
    assert hand_over(model) == (model, 0)


def test_scales_for_all_channels_together_stay_with_onnx_runtime() -> None:
    model = onnx.load_from_string(Layer().model())
    for tensor in model.graph.initializer:
        if tensor.name == "w_scale":
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(np.float32(0.1)), "w_scale"))
    content = model.SerializeToString()
    assert hand_over(content) == (content, 0)


@pytest.mark.parametrize(
    "producer",
    [
        helper.make_node("Max", ["x", "mask"], ["masked"]),
        helper.make_node("Min", ["x", "mask", "mask"], ["masked"]),
        helper.make_node("Min", ["x", "y_zero"], ["masked"]),  # a limit, not a mask
    ],
)
def test_takes_nothing_but_masks(producer: onnx.NodeProto) -> None:
    layer = Layer()
    rewritten, taken = hand_over(layer.model([producer, layer.node("masked")]))
    assert taken == 1
    assert kinds(rewritten) == [("", producer.op_type), (DOMAIN, OPERATOR)]
    assert onnx.load_from_string(rewritten).graph.node[1].input[0] == "masked"


def test_a_mask_that_an_inner_graph_reads_stays() -> None:
    layer = Layer()
    inner = helper.make_graph(
        [helper.make_node("Identity", ["masked"], ["inside"])],
        "inner",
        [],
        [helper.make_tensor_value_info("inside", onnx.TensorProto.UINT8, None)],
    )
    either = helper.make_node("If", ["condition"], ["copy"], then_branch=inner, else_branch=inner)
    rewritten, taken = hand_over(layer.model([MASK, layer.node("masked"), either], ("y", "copy")))
    assert taken == 1
    assert ("", "Min") in kinds(rewritten)


def test_leaves_alone_what_has_the_name_only() -> None:
    layer = Layer()
    model = onnx.load_from_string(layer.model())
    model.graph.node[0].domain = ""
    content = model.SerializeToString()
    assert hand_over(content) == (content, 0)
