"""A bundle is data from outside: whatever its graph says, the C code refuses what it cannot do safely."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from api.kernels.graph import DOMAIN, MAX_TAPS, OPERATORS, WEIGHTS, hand_over
from api.kernels.library import Kind, Layout, Weights, weights_bytes
from tests.kernels.conftest import Kept, Layer, feeds, instructions_of, open_graph, open_ours

LAYERS: dict[Kind, Layer] = {
    "depthwise": Layer(channels=32, taps=5, pads=(2, 2)),
    "pointwise": Layer(channels=32, depth=20),
}
LAYER = LAYERS["depthwise"]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A kernel that is refused gives its weights back, too."""
    before = weights_bytes()
    yield
    assert weights_bytes() == before


@pytest.fixture(params=product(("depthwise", "pointwise"), ("vnni", "avx2")), ids="-".join)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """Each operator, with each set of instructions that it has."""
    found, wanted = request.param
    with instructions_of(wanted):
        yield found


def model_with(
    kind: Kind = "depthwise",
    tensors: dict[str, np.ndarray] | None = None,
    extra: tuple[str, ...] = (),
    weights: int | list[int] = 0,
    woven: int = 0,
    **attributes: Any,
) -> onnx.ModelProto:
    """A node of ours as no rewriting would leave it."""
    layer = LAYERS[kind]
    node = layer.node(**attributes)
    node.op_type, node.domain = OPERATORS[kind], DOMAIN
    del node.input[WEIGHTS]
    node.input.extend(extra)
    numbers = weights if isinstance(weights, list) else [weights]
    node.attribute.append(helper.make_attribute("weights", numbers, attr_type=onnx.AttributeProto.INTS))
    if kind == "depthwise":
        node.attribute.append(helper.make_attribute("woven", [woven]))
    model = onnx.load_from_string(layer.model([node]))
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    for tensor in model.graph.initializer:
        if tensor.name in (tensors or {}):
            tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return model


def open_with(
    kind: Kind = "depthwise", change: Any = None, layout: Layout | None = None, **options: Any
) -> ort.InferenceSession:
    """``model_with`` weights that fit, opened; ``change`` has a last look at the model."""
    layer = LAYERS[kind]
    with Weights() as weights:
        depth = layer.depth or layer.taps
        number = weights.keep(layout or kind, bytes(32 * depth), 32, depth)
        assert number
        model = model_with(kind, weights=number, **options)
        if change is not None:
            change(model)
        return open_graph(model.SerializeToString(), ours=True)


def test_the_node_itself_is_taken(kind: Kind) -> None:
    assert open_with(kind).run(None, feeds(LAYERS[kind], 1, 9))


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [1, 0], "pads": [0, 0, 0, -1]},
        {"kernel_shape": [1, 4]},
        {"kernel_shape": [1, MAX_TAPS + 1], "pads": [0, 64, 0, 64]},
        {"dilations": [1, 2**56 - 1]},
        {"dilations": [1, 2**56]},
        {"dilations": [1, 0], "pads": [0, 0, 0, 0]},
        {"dilations": [1, 2**63 - 1]},
        {"dilations": [1, -1]},
        {"pads": [0, 1, 0, 2]},
        {"pads": [0, 5, 0, -1]},
        {"pads": [0, -1, 0, 5]},
        {"pads": [0, 2**63 - 1, 0, -(2**63)]},
        {"pads": [0, -(2**63), 0, 2**63 - 1]},
        {"pads": [0, 2**63 - 1, 0, 2**63 - 1]},
        {"pads": [1, 2, 0, 2]},
        {"kernel_shape": [2, 5]},
        {"strides": [1, 2]},
        {"strides": [2, 1]},
    ],
)
def test_attributes(kind: Kind, attributes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="kernel, strides or pads are not supported"):
        open_with(kind, **attributes)


def test_frames_that_would_be_missing(kernels: str) -> None:
    with pytest.raises(Exception, match="kernel, strides or pads are not supported"):
        open_with(dilations=[1, 2])


@pytest.mark.parametrize("attributes", [{"pads": [0, 2]}, {"kernel_shape": [5]}, {"strides": [1, 1, 1]}])
def test_attributes_of_another_length(kind: Kind, attributes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"too short|[Ss]ize|buffer"):
        open_with(kind, **attributes)


@pytest.mark.parametrize("number", [0, -1, 1, 2**63 - 1])
def test_numbers_that_name_no_weights(kind: Kind, number: int) -> None:
    with pytest.raises(Exception, match="no weights of this number"):
        open_graph(model_with(kind, weights=number).SerializeToString(), ours=True)


@pytest.mark.parametrize("numbers", [[], [1, 2]])
def test_more_or_fewer_numbers(kind: Kind, numbers: list[int]) -> None:
    with pytest.raises(Exception, match=r"too short|[Ss]ize|buffer|attribute"):
        open_graph(model_with(kind, weights=numbers).SerializeToString(), ours=True)


def test_numbers_of_weights_that_have_gone(kind: Kind) -> None:
    rewritten = None
    with Weights() as weights:
        rewritten, _ = hand_over(LAYERS[kind].model(), weights.keep)
        session = open_graph(rewritten, ours=True)
    del session
    with pytest.raises(Exception, match="no weights of this number"):
        open_graph(rewritten, ours=True)


def test_weights_of_the_other_operator(kernels: str) -> None:
    other: dict[Kind, Kind] = {"depthwise": "pointwise", "pointwise": "depthwise"}
    for kind in other:
        with Weights() as weights:
            number = weights.keep(other[kind], bytes(32 * 5), 32, 5)
            model = model_with(kind, weights=number)
            with pytest.raises(Exception, match=f"the weights are a {other[kind]} convolution's"):
                open_graph(model.SerializeToString(), ours=True)


@pytest.mark.parametrize(
    ("size", "channels", "depth"),
    [
        (160, 32, 4),
        (160, 31, 5),
        (160, -32, -5),
        (0, 0, 5),
        (0, 32, 0),
        (0, 2**32, 2**32),
        (160, 2**63 - 1, 1),
    ],
)
def test_weights_whose_size_lies(kernels: str, size: int, channels: int, depth: int) -> None:
    with Weights() as weights:
        assert weights.keep("depthwise", bytes(size), channels, depth) == 0
        assert weights.keep("pointwise", bytes(size), channels, depth) == 0


def test_more_taps_than_there_is_room_for(kernels: str) -> None:
    with Weights() as weights:
        assert weights.keep("depthwise", bytes(MAX_TAPS), 1, MAX_TAPS)
        assert not weights.keep("depthwise", bytes(MAX_TAPS + 1), 1, MAX_TAPS + 1)


@pytest.mark.parametrize(
    ("tensor", "value", "problem"),
    [
        ("w_scale", np.float32(0.1), "not one value per channel"),
        ("w_scale", np.ones(31, np.float32), "not one value per channel"),
        ("w_zero", np.int8(0), "not one value per channel"),
        ("w_zero", np.ones(32, np.int8), "weights with a zero point"),
        ("x_scale", np.ones(2, np.float32), "not one value per channel"),
        ("x_scale", np.float32(np.nan), "a scale of one or more"),
        ("y_scale", np.float32(0), "a scale of one or more"),
        ("y_scale", np.float32(1e-9), "a scale of one or more"),
        ("w_scale", np.full(32, -np.inf, np.float32), "a scale of one or more"),
    ],
)
def test_parameters(kind: Kind, tensor: str, value: np.ndarray, problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        open_with(kind, tensors={tensor: np.asarray(value)})


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 20, -1), (2, 1, 20, 1), (2, 20, 0), (1, 2, 1, 20, 0)],
)
def test_inputs_of_another_shape(kind: Kind, shape: tuple[int, ...]) -> None:
    """The last: channels too many."""
    if kind == "pointwise" and len(shape) == 3:
        shape = (*shape[:-1], 1)  # it takes products of any rank
    shape = (*shape[:-1], shape[-1] + (LAYERS[kind].depth or LAYERS[kind].channels))

    def declare(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, shape))

    session = open_with(kind, declare)
    with pytest.raises(Exception, match="x is not"):
        session.run(None, {"x": np.zeros(shape, np.uint8), "mask": np.zeros((2, 1, 20, 1), np.uint8)})


@pytest.mark.parametrize(
    "shape", [(2, 1, 20, 20), (2, 1, 20, 32), (2, 1, 2, 64), (2, 2, 20, 64), (2, 20, 64)]
)
def test_woven_inputs_of_another_shape(vnni: None, shape: tuple[int, ...]) -> None:
    """The third: fewer frames than there are of none at all."""

    def declare(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, shape))

    session = open_with("pointwise", declare, layout="woven")
    with pytest.raises(Exception, match="x is not"):
        session.run(None, {"x": np.zeros(shape, np.uint8), "mask": np.zeros((2, 1, 20, 1), np.uint8)})


def test_nothing_is_woven_with_dilation(vnni: None) -> None:
    with pytest.raises(Exception, match="leaves nothing woven"):
        open_with(woven=1, dilations=[1, 2], pads=[0, 4, 0, 4])


def test_nothing_is_woven_without_vnni(avx2: None) -> None:
    with pytest.raises(Exception, match="leaves nothing woven"):
        open_with(woven=1)
    with Weights() as weights:
        assert not weights.keep("woven", bytes(64), 8, 8)


def test_frames_in_two_dimensions(kernels: str) -> None:
    def declare(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, None))

    session = open_with(change=declare)
    with pytest.raises(Exception, match="x is not"):
        session.run(
            None, {"x": np.zeros((2, 20, 1, 32), np.uint8), "mask": np.zeros((2, 1, 20, 1), np.uint8)}
        )


@pytest.mark.parametrize("shape", [(1, 1, 19, 1), (1, 1, 20, 2), (2, 1, 20, 1), (1, 20)])
def test_masks_of_another_shape(kernels: str, shape: tuple[int, ...]) -> None:
    def declare(model: onnx.ModelProto) -> None:
        mask = next(value for value in model.graph.input if value.name == "mask")
        mask.CopyFrom(helper.make_tensor_value_info("mask", onnx.TensorProto.UINT8, shape))

    session = open_with(change=declare, extra=("", "mask"))
    with pytest.raises(Exception, match="the mask is not"):
        session.run(None, {"x": feeds(LAYER, 1, 20)["x"], "mask": np.zeros(shape, np.uint8)})


def test_a_bias_that_is_not_part_of_the_model(kind: Kind) -> None:
    def declare(model: onnx.ModelProto) -> None:
        model.graph.input.append(helper.make_tensor_value_info("given", onnx.TensorProto.INT32, [32]))

    session = open_with(kind, declare, extra=("given",))
    with pytest.raises(Exception, match="bias is not constant"):
        session.run(None, feeds(LAYERS[kind], 1, 20) | {"given": np.zeros(32, np.int32)})


@pytest.mark.parametrize("name", ["w_scale", "x_zero"])
def test_parameters_that_are_not_part_of_the_model(kind: Kind, name: str) -> None:
    def declare(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))

    with pytest.raises(Exception, match="a parameter is not constant"):
        open_with(kind, declare)


@pytest.mark.parametrize("dilation", [2**31 - 1, 10_000_000])
def test_dilations_beyond_the_clip_are_right(kernels: str, dilation: int) -> None:
    layer = Layer(taps=1, pads=(0, 0), dilation=dilation)
    model = layer.model()
    given = feeds(layer, 2, 300)
    (expected,) = open_graph(model).run(None, given)
    np.testing.assert_array_equal(open_ours(model).run(None, given)[0], expected)


def test_a_graph_that_names_our_operators_itself_is_no_graph() -> None:
    rewritten, _ = hand_over(LAYER.model(), Kept())
    with pytest.raises(Exception, match="asr"):
        open_graph(rewritten)
