"""Our operators at both ends of a graph give the bits of its nodes, and are taken where they fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from api.kernels import instructions
from api.kernels.ends import DOMAIN, MAX_BINS, MAX_HOP
from api.kernels.graph import hand_over
from api.kernels.library import Weights
from tests.kernels.conftest import Kept, Layer, feeds, open_graph

SHIPPED = Path(__file__).parents[2] / "models" / "en-quartznet-small" / "model.int8.onnx"
BLOCKED = "com.microsoft.nchwc"


def kinds(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


def open_ours(model: bytes) -> tuple[bytes, list[ort.InferenceSession]]:
    """The graph as it is handed over, and sessions of one thread and of more."""
    with Weights() as weights:
        rewritten, _ = hand_over(model, weights.keep, avx512=instructions() == "vnni")
        return rewritten, [open_graph(rewritten, ours=True, threads=threads) for threads in (1, 3)]


def front_end(changes: Iterable[onnx.TensorProto] = ()) -> onnx.ModelProto:
    """The exporter's nodes up to the products with the bases, and a convolution for our operators to take."""
    shipped, model = onnx.load(SHIPPED).graph, onnx.load_from_string(Layer().model())
    outputs = ["frontend.even", "frontend.odd"]
    wanted: set[str] = set(outputs)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(shipped.node):
        if wanted & set(node.output):
            nodes.insert(0, node)
            wanted |= set(node.input)
    model.graph.node.extend(nodes)
    replaced = {tensor.name: tensor for tensor in changes}
    for tensor in shipped.initializer:
        if tensor.name in wanted | {"frontend.cosine"}:
            model.graph.initializer.append(replaced.get(tensor.name, tensor))
    model.graph.input.extend(shipped.input)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs
    )
    return model


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples=st.integers(1, 12_000), batch=st.integers(1, 3), seed=st.integers(0, 1000))
def test_frames_have_the_same_bits(kernels: str, samples: int, batch: int, seed: int) -> None:
    model = front_end().SerializeToString()
    rewritten, sessions = open_ours(model)
    assert len(kinds(rewritten)) < len(kinds(model)) - 15
    random = np.random.default_rng(seed)
    given_: dict[str, Any] = feeds(Layer(), 1, 7)
    given_["waveform"] = random.normal(0, 0.1, (batch, samples)).astype(np.float32)
    given_["lengths"] = random.integers(0, samples + 1, batch)
    expected = open_graph(model).run(None, given_)
    for session in sessions:
        for one, other in zip(session.run(None, given_), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def renamed(name: str) -> bytes:
    content: bytes = front_end().SerializeToString()
    return content.replace(name.encode(), name.replace("frontend", "backend_").encode())


@pytest.mark.parametrize(
    "model",
    [
        *map(renamed, ("frontend.even", "frontend.odd", "frontend.preemphasis", "frontend.frames")),
        front_end([numpy_helper.from_array(np.ones((MAX_HOP + 1, 2), np.float32), "frontend.cosine")]),
        front_end([numpy_helper.from_array(np.ones(160, np.float32), "frontend.cosine")]),
        front_end([numpy_helper.from_array(np.array([0.97]), "frontend.preemphasis")]),
    ],
)
def test_frames_that_are_not_the_exporters_stay(model: bytes | onnx.ModelProto) -> None:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    rewritten, taken = hand_over(content, Kept())
    assert taken == 1
    assert "Frames" not in kinds(rewritten)


def mel(
    shape: tuple[int, ...] = (64, 32),
    sum_: str = "Add",
    factor: str = "real",
    extra: str = "",
    kind: Any = np.float32,
) -> bytes:
    """The powers of two parts through filters, and a pointwise convolution."""
    layer = Layer(channels=8, depth=8)
    nodes = [
        helper.make_node("Mul", ["real", factor], ["real_power"]),
        helper.make_node("Mul", ["imaginary", "imaginary"], ["imaginary_power"]),
        helper.make_node(sum_, ["real_power", "imaginary_power"], ["power"]),
        helper.make_node("MatMul", ["power", "filters"], ["energies"]),
        layer.node(),
    ]
    model = onnx.load_from_string(layer.model(nodes))
    filters = np.zeros(shape, kind)
    for feature in range(shape[1] if len(shape) == 2 else 0):  # a few bins each, as mel filters have
        first = feature * shape[0] // shape[1]
        filters[first : first + 5, feature] = np.random.default_rng(feature).uniform(0, 1)
    model.graph.initializer.append(numpy_helper.from_array(filters, "filters"))
    float_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for name in ("real", "imaginary"):
        model.graph.input.append(
            helper.make_tensor_value_info(name, float_type, ["batch", "rows", shape[0] if shape else 1])
        )
    for name in ["energies", extra] if extra else ["energies"]:
        model.graph.output.append(helper.make_tensor_value_info(name, float_type, None))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("shape", [(16, 16), (64, 32), (240, 64), (MAX_BINS, 256)])
@pytest.mark.parametrize("frames", [1, 7, 8, 504])
def test_energies_have_the_same_bits(vnni: None, shape: tuple[int, int], frames: int) -> None:
    model = mel(shape)
    rewritten, sessions = open_ours(model)
    assert kinds(rewritten) == ["Mel", "PointwiseQLinearConv"]
    random = np.random.default_rng(frames)
    given_: dict[str, Any] = feeds(Layer(depth=8), 1, 3)
    for name in ("real", "imaginary"):
        given_[name] = random.normal(0, 3, (2, frames, shape[0])).astype(np.float32)
    expected = open_graph(model).run(None, given_)
    for session in sessions:
        for one, other in zip(session.run(None, given_), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "model",
    [
        mel((65, 32)),
        mel((64, 33)),
        mel((MAX_BINS + 16, 32)),
        mel((64, 272)),
        mel((2, 64, 32)),
        mel(sum_="Sub"),
        mel(factor="imaginary"),
        mel(extra="power"),
        mel(extra="real_power"),
        mel(kind=np.float64),
    ],
)
def test_other_products_stay(model: bytes) -> None:
    rewritten, taken = hand_over(model, Kept())
    assert taken == 1
    assert "Mel" not in kinds(rewritten)


def test_energies_are_left_alone_without_vnni(avx2: None) -> None:
    assert "Mel" not in kinds(open_ours(mel())[0])


def head(
    channels: int,
    perm: tuple[int, ...] = (0, 3, 1, 2),
    scales: tuple[int, ...] = (),
    extra: str = "",
    last: int = 0,
) -> bytes:
    """A pointwise convolution and the nodes that ONNX Runtime puts before the one of the head."""
    layer = Layer(channels=channels, depth=20, y_zero=7)
    nodes = [
        layer.node("x", "bytes"),
        helper.make_node("Transpose", ["bytes"], ["turned"], perm=perm),
        helper.make_node("DequantizeLinear", ["turned", "head_scale", "head_zero"], ["floats"], axis=1),
        helper.make_node("ReorderInput", ["floats"], ["blocks"], domain=BLOCKED, channels_last=last),
        helper.make_node("ReorderOutput", ["blocks"], ["y"], domain=BLOCKED, channels=channels),
    ]
    model = onnx.load_from_string(layer.model(nodes, ("y", extra) if extra else ("y",)))
    values = {"head_scale": np.full(scales, 0.0371, np.float32), "head_zero": np.full(scales, 7, np.uint8)}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()
    )
    for output in model.graph.output:
        if output.name != "turned":
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    model.opset_import.append(helper.make_opsetid(BLOCKED, 1))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("channels", [16, 32, 64, 80, 1024])
@pytest.mark.parametrize("frames", [1, 33])
def test_the_input_of_the_head_has_the_same_bits(vnni: None, channels: int, frames: int) -> None:
    model = head(channels)
    rewritten, sessions = open_ours(model)
    assert kinds(rewritten) == ["PointwiseQLinearConv", "HeadInput", "ReorderOutput"]
    given_ = feeds(Layer(channels=channels, depth=20), 2, frames)
    (expected,) = open_graph(model).run(None, given_)
    for session in sessions:
        np.testing.assert_array_equal(session.run(None, given_)[0], expected)


@pytest.mark.parametrize(
    "model",
    [
        head(20),
        head(16, perm=(0, 3, 2, 1)),
        head(16, scales=(16,)),
        head(16, last=1),
        head(16, extra="turned"),
        head(16, extra="floats"),
    ],
)
def test_other_inputs_of_a_head_stay(model: bytes) -> None:
    rewritten, taken = hand_over(model, Kept())
    assert taken == 1
    assert "HeadInput" not in kinds(rewritten)


def test_the_input_of_the_head_is_left_alone_without_vnni(avx2: None) -> None:
    assert "HeadInput" not in kinds(open_ours(head(16))[0])


def run_alone(
    operator: str, inputs: dict[str, np.ndarray], outputs: int, constant: str = "", **attributes: Any
) -> None:
    """A node as no rewriting would leave it; one of its inputs may be part of the model."""
    names = [f"y{place}" for place in range(outputs)]
    node = helper.make_node(operator, list(inputs), names, domain=DOMAIN, **attributes)
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in inputs.items()
        if name != constant
    ]
    tensors = [numpy_helper.from_array(inputs[constant], constant)] if constant else []
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], operator, values, results, tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    open_graph(model, ours=True).run(None, {name: inputs[name] for name in inputs if name != constant})


FRAMES: dict[str, np.ndarray] = {
    "waveform": np.zeros((2, 500), np.float32),
    "lengths": np.array([500, 3]),
    "factor": np.array(0.97, np.float32),
    "count": np.array([4]),
}
HEAD: dict[str, np.ndarray] = {
    "x": np.zeros((1, 1, 9, 32), np.uint8),
    "scale": np.array(0.1, np.float32),
    "zero": np.array(3, np.uint8),
}


MEL: dict[str, np.ndarray] = {
    "real": np.zeros((1, 9, 32), np.float32),
    "imaginary": np.zeros((1, 9, 32), np.float32),
    "filters": np.zeros((32, 16), np.float32),
}


def test_all_run_alone(vnni: None) -> None:
    run_alone("Frames", FRAMES, 2, hop=[160])
    run_alone("Frames", FRAMES | {"count": np.array([0])}, 2, hop=[MAX_HOP])
    run_alone("Mel", MEL, 1, "filters")
    run_alone(
        "Mel", MEL | {name: np.zeros((0, 9, 32), np.float32) for name in ("real", "imaginary")}, 1, "filters"
    )
    run_alone("HeadInput", HEAD, 1)
    run_alone("HeadInput", HEAD | {"x": np.zeros((0, 1, 9, 32), np.uint8)}, 1)
    run_alone("HeadInput", HEAD | {"x": np.zeros((1, 1, 0, 32), np.uint8)}, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"waveform": np.zeros((2, 5, 1), np.float32)},
        {"waveform": np.zeros(5, np.float32)},
        {"waveform": np.zeros((3, 5), np.float32)},
        {"lengths": np.array([[1, 2]])},
        {"lengths": np.array([1, 2, 3])},
        {"factor": np.ones(1, np.float32)},
        {"count": np.array([4, 4])},
        {"count": np.array(4)},
        {"count": np.array([-1])},
        {"count": np.array([2**40])},
    ],
)
def test_frames_of_another_shape(kernels: str, change: dict[str, np.ndarray]) -> None:
    with pytest.raises(Exception, match="frames:"):
        run_alone("Frames", FRAMES | change, 2, hop=[160])


@pytest.mark.parametrize("hop", [[], [0], [MAX_HOP + 1], [160, 160]])
def test_hops_that_there_is_no_room_for(kernels: str, hop: list[int]) -> None:
    with pytest.raises(Exception, match=r"frames:|attribute|hop|buffer"):
        run_alone("Frames", FRAMES, 2, hop=hop)


@pytest.mark.parametrize(
    "change",
    [
        {"x": np.zeros((1, 1, 9, 20), np.uint8)},
        {"x": np.zeros((1, 2, 9, 32), np.uint8)},
        {"x": np.zeros((1, 9, 32), np.uint8)},
        {"scale": np.ones(32, np.float32)},
        {"zero": np.ones(1, np.uint8)},
    ],
)
def test_inputs_of_a_head_of_another_shape(vnni: None, change: dict[str, np.ndarray]) -> None:
    with pytest.raises(Exception, match="head input:"):
        run_alone("HeadInput", HEAD | change, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"real": np.zeros((1, 9, 16), np.float32)},
        {"imaginary": np.zeros((1, 9, 48), np.float32)},
        {"imaginary": np.zeros((1, 8, 32), np.float32)},
        {"imaginary": np.zeros((2, 9, 32), np.float32)},
        {"real": np.zeros((9, 32), np.float32)},
        {"filters": np.zeros((16, 16), np.float32)},
        {"filters": np.zeros((32, 17), np.float32)},
        {"filters": np.zeros((MAX_BINS + 16, 16), np.float32)},
        {"filters": np.zeros((32, 272), np.float32)},
        {"filters": np.zeros((0, 16), np.float32)},
        {"filters": np.zeros((1, 32, 16), np.float32)},
    ],
)
def test_spectra_and_filters_of_another_shape(vnni: None, change: dict[str, np.ndarray]) -> None:
    with pytest.raises(Exception, match="mel:"):
        run_alone("Mel", MEL | change, 1, "filters")


def test_filters_that_are_not_part_of_the_model(vnni: None) -> None:
    with pytest.raises(Exception, match="mel: the filters are not constant"):
        run_alone("Mel", MEL, 1)


def test_what_needs_vnni_is_refused_without(avx2: None) -> None:
    with pytest.raises(Exception, match="blocks of sixteen"):
        run_alone("HeadInput", HEAD, 1)
    with pytest.raises(Exception, match="not for this processor"):
        run_alone("Mel", MEL, 1, "filters")
