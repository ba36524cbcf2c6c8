"""Which nodes of an optimised graph our operators take, and which they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from api.kernels.graph import DOMAIN, MAX_TAPS, OPERATORS, hand_over
from tests.kernels.conftest import MASK, Kept, Layer, unsigned

DEPTHWISE, POINTWISE = (DOMAIN, OPERATORS["depthwise"]), (DOMAIN, OPERATORS["pointwise"])


def kinds(model: bytes) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in onnx.load_from_string(model).graph.node]


def ours(node: onnx.NodeProto) -> dict[str, list[int]]:
    return {item.name: list(item.ints) for item in node.attribute if item.name in ("weights", "woven")}


def test_takes_the_node_and_its_mask() -> None:
    layer = Layer(bias=False)
    model = layer.model([MASK, layer.node("masked")])
    keep = Kept()
    rewritten, taken = hand_over(model, keep)
    assert (taken, kinds(rewritten)) == (1, [DEPTHWISE])
    found, original = onnx.load_from_string(rewritten), onnx.load_from_string(model)
    given = list(original.graph.node[1].input)
    assert list(found.graph.node[0].input) == ["x", *given[1:3], *given[4:], "", "mask"]
    weights = numpy_helper.to_array(original.graph.initializer[2])
    assert keep.weights == [("depthwise", weights.tobytes(), 32, 5)]
    assert ours(found.graph.node[0]) == {"weights": [70], "woven": [0]}
    assert (DOMAIN, 1) in [(opset.domain, opset.version) for opset in found.opset_import]


def test_takes_pointwise_convolutions() -> None:
    layer = Layer(channels=6, depth=10)
    keep = Kept()
    rewritten, taken = hand_over(layer.model([MASK, layer.node("masked")]), keep)
    assert (taken, kinds(rewritten)) == (1, [("", "Min"), POINTWISE])
    assert [(kind, len(weights), *shape) for kind, weights, *shape in keep.weights] == [
        ("pointwise", 60, 6, 10)
    ]


def pair(**changes: Any) -> list[onnx.NodeProto]:
    """A depthwise convolution and the pointwise one behind it. (Parameters of one: nobody runs it.)"""
    first, second = Layer(channels=32).node("x", "z", **changes), Layer(channels=32, depth=32).node("z")
    second.input[3] = "dense"
    return [first, second]


def pair_model(nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("y",)) -> bytes:
    model = onnx.load_from_string(Layer(channels=32).model(nodes, outputs))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((32, 32, 1, 1), np.int8), "dense"))
    return bytes(model.SerializeToString())


def test_frames_stay_woven_between_the_two() -> None:
    keep = Kept()
    rewritten, taken = hand_over(pair_model(pair()), keep)
    assert taken == 2
    first, second = onnx.load_from_string(rewritten).graph.node
    assert (ours(first), ours(second)) == ({"weights": [70], "woven": [1]}, {"weights": [71]})
    assert [kind for kind, *_ in keep.weights] == ["depthwise", "woven"]
    assert first.output[0] == second.input[0] != "z", "the graph may say what shape z has"


@pytest.mark.parametrize(
    "model",
    [
        pair_model([*pair(), helper.make_node("Identity", ["z"], ["copy"])], ("y", "copy")),
        pair_model(pair(), ("y", "z")),
        pair_model(pair(dilations=[1, 2], pads=[0, 4, 0, 4])),
    ],
)
def test_frames_that_others_read_or_that_are_apart_do_not_stay_woven(model: bytes) -> None:
    keep = Kept()
    rewritten, taken = hand_over(model, keep)
    assert taken == 2
    assert [kind for kind, *_ in keep.weights] == ["depthwise", "pointwise"]
    assert ours(onnx.load_from_string(rewritten).graph.node[0])["woven"] == [0]


def test_the_weights_leave_the_graph() -> None:
    layer = Layer(channels=500, depth=300)
    model = layer.model()
    rewritten, _ = hand_over(model, Kept())
    left = {tensor.name for tensor in onnx.load_from_string(rewritten).graph.initializer}
    assert left == {tensor.name for tensor in onnx.load_from_string(model).graph.initializer} - {"w"}
    assert len(rewritten) < len(model) - 150_000


def test_weights_that_others_read_stay() -> None:
    layer = Layer(channels=32, depth=32)
    copy = helper.make_node("Identity", ["w"], ["copy"])
    rewritten, taken = hand_over(layer.model([layer.node(), copy], ("y", "copy")), Kept())
    assert taken == 1
    assert "w" in {tensor.name for tensor in onnx.load_from_string(rewritten).graph.initializer}


def test_weights_of_two_layers_are_kept_for_each() -> None:
    layer = Layer(channels=32, depth=32)
    keep = Kept()
    rewritten, taken = hand_over(layer.model([layer.node("x", "z"), layer.node("z")]), keep)
    assert (taken, len(keep.weights)) == (2, 2)
    assert "w" not in {tensor.name for tensor in onnx.load_from_string(rewritten).graph.initializer}


@pytest.mark.parametrize("layer", [Layer(), Layer(depth=10)])
def test_what_the_library_does_not_want_stays(layer: Layer) -> None:
    model = layer.model([MASK, layer.node("masked")])
    assert hand_over(model, Kept(first=0)) == (model, 0)


@pytest.mark.parametrize("name", ["w", "w_scale", "y_zero"])
@pytest.mark.parametrize("layer", [Layer(), Layer(depth=10)])
def test_parameters_that_whoever_runs_it_may_replace_stay(layer: Layer, name: str) -> None:
    model = onnx.load_from_string(layer.model())
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    content = model.SerializeToString()
    assert hand_over(content, Kept()) == (content, 0)


@pytest.mark.parametrize("layer", [Layer(bias=True), Layer(channels=6, depth=10)])
def test_unsigned_weights_around_the_middle_are_signed_ones(layer: Layer) -> None:
    """ONNX Runtime makes them where it would not add products with signed ones exactly."""
    signed, unsigned_ = Kept(), Kept()
    hand_over(layer.model(), signed)
    rewritten, taken = hand_over(unsigned(layer.model()), unsigned_)
    assert taken == 1
    assert unsigned_.weights == signed.weights
    found = onnx.load_from_string(rewritten).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.initializer}
    zeros = tensors[found.node[0].input[4]]
    assert zeros.dtype == np.int8
    assert zeros.tolist() == [0] * layer.channels
    assert "w" not in tensors


@pytest.mark.parametrize("zero", [0, 127, 129])
def test_other_unsigned_weights_stay(zero: int) -> None:
    layer = Layer()
    zeros = np.full(layer.channels, 128, np.uint8)
    zeros[-1] = zero
    content = layer.model_with({"w": np.zeros((32, 1, 1, 5), np.uint8), "w_zero": zeros})
    assert hand_over(content, Kept()) == (content, 0)


def product_model(**tensors: np.ndarray) -> bytes:
    """A ``QLinearMatMul`` of 10 by 6."""
    node = Layer(channels=6).node()
    node.op_type, node.domain = "QLinearMatMul", ""
    del node.attribute[:]
    weights = np.arange(60, dtype=np.int8).reshape(10, 6)
    return Layer(channels=6).model_with({"w": weights} | tensors, node)


def test_takes_products_with_their_weights_turned_around() -> None:
    keep = Kept()
    rewritten, taken = hand_over(product_model(), keep)
    assert (taken, kinds(rewritten)) == (1, [POINTWISE])
    expected = np.arange(60, dtype=np.int8).reshape(10, 6).T
    assert keep.weights == [("pointwise", expected.tobytes(), 6, 10)]


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": np.zeros((1, 10, 6), np.int8)},
        {"w": np.zeros((10, 7), np.int8)},
        {"w_scale": np.float32(0.1), "w_zero": np.int8(0)},
        {"x_zero": np.int8(0)},
    ],
)
def test_leaves_alone_other_products(tensors: dict[str, np.ndarray]) -> None:
    content = product_model(**tensors)
    assert hand_over(content, Kept()) == (content, 0)


def test_nothing_stays_woven_without_registers_for_it() -> None:
    keep = Kept()
    rewritten, taken = hand_over(pair_model(pair()), keep, avx512=False)
    assert taken == 2
    assert [kind for kind, *_ in keep.weights] == ["depthwise", "pointwise"]
    assert ours(onnx.load_from_string(rewritten).graph.node[0])["woven"] == [0]


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((32, 1, 1, 5), np.uint8),
        np.zeros((32, 1, 1, 6), np.int8),
        np.zeros((32, 1, 5), np.int8),
        np.zeros((0, 1, 1, 5), np.int8),
        np.zeros((32, 1, 1, 0), np.int8),
    ],
)
def test_leaves_alone_weights_of_another_shape_or_type(weights: np.ndarray) -> None:
    model = onnx.load_from_string(Layer().model())
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(weights, "w"))
    content = model.SerializeToString()
    assert hand_over(content, Kept()) == (content, 0)


@pytest.mark.parametrize("layer", [Layer(), Layer(depth=10)])
@pytest.mark.parametrize(
    "change", [{"raw_data": b"too short"}, {"raw_data": b""}, {"dims": [2**62, 4, 1, 5]}]
)
def test_leaves_alone_sizes_that_lie(layer: Layer, change: dict[str, Any]) -> None:
    model = onnx.load_from_string(layer.model())
    weights = model.graph.initializer[2]
    weights.raw_data = change.get("raw_data", weights.raw_data)
    weights.dims[:] = change.get("dims", weights.dims)
    content = model.SerializeToString()
    assert hand_over(content, Kept()) == (content, 0)


def test_a_bias_stays_in_its_place() -> None:
    layer = Layer(bias=True)
    rewritten, _ = hand_over(layer.model([MASK, layer.node("masked")]), Kept())
    assert list(onnx.load_from_string(rewritten).graph.node[0].input)[7:] == ["bias", "mask"]


def test_a_mask_that_others_read_stays() -> None:
    layer = Layer()
    twice = [MASK, layer.node("masked"), helper.make_node("Identity", ["masked"], ["copy"])]
    for model in (
        layer.model(twice, ("y", "copy")),
        layer.model([MASK, layer.node("masked")], ("y", "masked")),
    ):
        rewritten, taken = hand_over(model, Kept())
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
    assert hand_over(model, Kept()) == (model, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels_last": 0},
        {"group": 2},
        {"group": 12},
        {"kernel_shape": [1, 2]},
        {"kernel_shape": [2, 1]},
        {"strides": [1, 2]},
        {"strides": [2, 1]},
        {"pads": [0, 1, 0, 0]},
        {"pads": [0, 1, 0, -1]},
        {"pads": [1, 0, 1, 0]},
    ],
)
def test_leaves_alone_what_is_no_matrix_product(changes: dict[str, Any]) -> None:
    layer = Layer(channels=12, depth=12)
    model = layer.model([layer.node(**changes)])
    assert hand_over(model, Kept()) == (model, 0)


def test_scales_for_all_channels_together_stay_with_onnx_runtime() -> None:
    model = onnx.load_from_string(Layer().model())
    for tensor in model.graph.initializer:
        if tensor.name == "w_scale":
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(np.float32(0.1)), "w_scale"))
    content = model.SerializeToString()
    assert hand_over(content, Kept()) == (content, 0)


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
    rewritten, taken = hand_over(layer.model([producer, layer.node("masked")]), Kept())
    assert taken == 1
    assert kinds(rewritten) == [("", producer.op_type), DEPTHWISE]
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
    rewritten, taken = hand_over(layer.model([MASK, layer.node("masked"), either], ("y", "copy")), Kept())
    assert taken == 1
    assert ("", "Min") in kinds(rewritten)


def test_leaves_alone_what_has_the_name_only() -> None:
    layer = Layer()
    model = onnx.load_from_string(layer.model())
    model.graph.node[0].domain = ""
    content = model.SerializeToString()
    assert hand_over(content, Kept()) == (content, 0)
