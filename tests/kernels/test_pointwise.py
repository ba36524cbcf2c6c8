"""The pointwise kernel gives the bits of ONNX Runtime's own, whatever the shape."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from api.kernels.graph import hand_over
from api.kernels.library import Weights
from tests.kernels.conftest import Layer, feeds, open_graph, open_ours, unsigned

pytestmark = pytest.mark.usefixtures("kernels")


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    return Layer(
        channels=draw(st.integers(1, 200)),
        depth=draw(st.integers(1, 300)),
        x_zero=draw(st.sampled_from([0, 1, 128, 255])),
        y_zero=draw(st.sampled_from([0, 3, 128, 255])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layer=layers(), batch=st.integers(1, 3), frames=st.integers(1, 300))
def test_same_bits(layer: Layer, batch: int, frames: int) -> None:
    model = layer.model()
    given_ = feeds(layer, batch, frames, layer.seed)
    (expected,) = open_graph(model).run(None, given_)
    np.testing.assert_array_equal(open_ours(model).run(None, given_)[0], expected)


@pytest.mark.parametrize("frames", [1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 251, 252, 253, 263, 505, 1000])
def test_edges_of_chunks(frames: int) -> None:
    layer = Layer(channels=64, depth=64, x_zero=7, y_zero=100, bias=True)
    model = layer.model()
    given_ = feeds(layer, 1, frames)
    (expected,) = open_graph(model).run(None, given_)
    assert len(np.unique(expected)) > min(30, expected.size // 8), "at the ends of the scale: shows little"
    np.testing.assert_array_equal(open_ours(model).run(None, given_)[0], expected)


def test_rounds_halves_to_even_and_cuts_at_the_ends() -> None:
    """Sums of -1000 to 1000 at a scale of a half: each other one lies between two bytes."""
    x = np.arange(256, dtype=np.uint8)[None, None, :, None]
    layer = Layer(channels=8, depth=1, y_zero=128)
    tensors = {
        "x_scale": np.float32(0.5),
        "x_zero": np.uint8(128),
        "w": np.array([1, -1, 2, -2, 3, 7, 0, 8], np.int8)[:, None, None, None],
        "w_scale": np.ones(8, np.float32),
        "y_scale": np.float32(1),
    }
    model = layer.model_with(tensors)
    given_ = {"x": x, "mask": np.zeros((1, 1, 256, 1), np.uint8)}
    (expected,) = open_graph(model).run(None, given_)
    assert {0, 255} < set(expected.ravel().tolist())
    assert expected[0, 0, [129, 131], 0].tolist() == [128, 130], "0.5 and 1.5 above the zero point"
    np.testing.assert_array_equal(open_ours(model).run(None, given_)[0], expected)


def test_sums_beyond_the_precision_of_floats() -> None:
    layer = Layer(channels=40, depth=4000, bias=True)
    tensors = {"w": np.random.default_rng(0).integers(100, 128, (40, 4000, 1, 1)).astype(np.int8)}
    model = layer.model_with(tensors | {"y_scale": np.float32(1e4), "x_scale": np.float32(1)})
    given_ = {"x": np.full((1, 1, 30, 4000), 255, np.uint8) - feeds(layer, 1, 30)["x"] // 50}
    given_["mask"] = np.zeros((1, 1, 30, 1), np.uint8)
    (expected,) = open_graph(model).run(None, given_)
    np.testing.assert_array_equal(open_ours(model).run(None, given_)[0], expected)


def test_batched_equals_alone() -> None:
    layer = Layer(channels=70, depth=50, x_zero=3)
    session = open_ours(layer.model())
    given_ = feeds(layer, 5, 61)
    (together,) = session.run(None, given_)
    for item in range(5):
        alone = session.run(None, {name: value[item : item + 1] for name, value in given_.items()})[0]
        np.testing.assert_array_equal(alone[0], together[item])


def test_threads_share_the_work_and_the_session() -> None:
    layer = Layer(channels=200, depth=130)
    model = layer.model()
    given_ = feeds(layer, 2, 400)
    (expected,) = open_graph(model).run(None, given_)
    shared = open_ours(model, threads=4)

    def run(_: int) -> bool:
        return np.array_equal(shared.run(None, given_)[0], expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(40)))


def test_no_frames_and_no_items() -> None:
    layer = Layer(channels=20, depth=30)
    session = open_ours(layer.model())
    for batch, frames in ((0, 5), (2, 0)):
        mask = np.zeros((batch, 1, frames, 1), np.uint8)
        empty = {"x": np.zeros((batch, 1, frames, 30), np.uint8), "mask": mask}
        assert session.run(None, empty)[0].shape == (batch, 1, frames, 20)


@pytest.mark.parametrize("depth", [1, 2, 17, 4095, 4096])
def test_deep_ones_without_vnni(avx2: None, depth: int) -> None:
    """All that fits into the room for widened rows."""
    layer = Layer(channels=18, depth=depth, x_zero=3)
    given_ = feeds(layer, 1, 20)
    (expected,) = open_graph(layer.model()).run(None, given_)
    np.testing.assert_array_equal(open_ours(layer.model()).run(None, given_)[0], expected)


def test_deeper_ones_are_left_alone_without_vnni(avx2: None) -> None:
    with Weights() as weights:
        assert hand_over(Layer(depth=4097).model(), weights.keep)[1] == 0


@pytest.mark.parametrize("shape", [(37,), (3, 37), (2, 3, 37)])
@pytest.mark.parametrize("make", [bytes, unsigned], ids=["signed", "unsigned"])
def test_products_of_any_rank(shape: tuple[int, ...], make: Callable[[bytes], bytes]) -> None:
    """As a ``QLinearMatMul``, its weights turned around and with either sign."""
    layer = Layer(channels=29, depth=50, x_zero=9, y_zero=70)
    x = np.random.default_rng(0).integers(0, 256, (*shape, 50)).astype(np.uint8)
    model = onnx.load_from_string(layer.model())
    weights = {tensor.name: tensor for tensor in model.graph.initializer}["w"]
    turned = np.ascontiguousarray(numpy_helper.to_array(weights).reshape(29, 50).T)
    weights.CopyFrom(numpy_helper.from_array(turned, "w"))
    inputs = list(model.graph.node[0].input)[:8]
    model.graph.node[0].CopyFrom(helper.make_node("QLinearMatMul", inputs, ["y"]))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape))
    product = model.SerializeToString()
    feeds_ = {"x": x, "mask": np.zeros((1, 1, 1, 1), np.uint8)}
    (expected,) = open_graph(product).run(None, feeds_)
    assert expected.shape == (*shape, 29)
    assert len(np.unique(expected)) > 30
    np.testing.assert_array_equal(open_ours(make(product)).run(None, feeds_)[0], expected)
