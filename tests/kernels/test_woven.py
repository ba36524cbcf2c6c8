"""Frames that the depthwise kernel hands to the pointwise one woven: the bits of ONNX Runtime's two nodes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.kernels.graph import hand_over
from api.kernels.library import Weights
from tests.kernels.conftest import MASK, Layer, feeds, open_graph

pytestmark = pytest.mark.usefixtures("vnni")


def pair(first: Layer, second: Layer, *, masked: bool = False) -> bytes:
    """``second`` reads what ``first`` gives, and has parameters of its own."""
    mask = [MASK] if masked else []
    model = onnx.load_from_string(first.model([*mask, first.node("masked" if masked else "x", "between")]))
    node = second.node("between")
    node.input[1:] = [f"second_{name}" for name in node.input[1:]]
    model.graph.node.append(node)
    model.graph.output[0].name = "y"
    for tensor in onnx.load_from_string(second.model()).graph.initializer:
        tensor.name = f"second_{tensor.name}"
        model.graph.initializer.append(tensor)
    return bytes(model.SerializeToString())


def open_pair(model: bytes, *, threads: int = 1) -> ort.InferenceSession:
    with Weights() as weights:
        rewritten, taken = hand_over(model, weights.keep)
        assert taken == 2
        assert b"between.woven" in rewritten
        return open_graph(rewritten, ours=True, threads=threads)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Layer, Layer]:
    channels, taps = draw(st.integers(2, 200)), draw(st.integers(1, 128))
    before = draw(st.integers(0, taps - 1))
    zeros = st.sampled_from([0, 3, 128, 255])
    between = draw(zeros)
    first = Layer(
        channels=channels,
        taps=taps,
        pads=(before, taps - 1 - before),
        x_zero=draw(zeros),
        y_zero=between,
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    second = Layer(
        channels=draw(st.integers(1, 100)),
        depth=channels,
        x_zero=between,
        y_zero=draw(zeros),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    return first, second


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=pairs(), batch=st.integers(1, 3), frames=st.integers(1, 600), masked=st.booleans())
def test_same_bits(layers: tuple[Layer, Layer], batch: int, frames: int, masked: bool) -> None:
    model = pair(*layers, masked=masked)
    given_ = feeds(layers[0], batch, frames, layers[0].seed)
    (expected,) = open_graph(model).run(None, given_)
    np.testing.assert_array_equal(open_pair(model).run(None, given_)[0], expected)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 11, 12, 13, 252, 253, 255, 256, 257, 505])
def test_edges(frames: int) -> None:
    first = Layer(channels=128, taps=33, pads=(16, 16), x_zero=3, y_zero=120)
    second = Layer(channels=64, depth=128, x_zero=120, y_zero=90, bias=True)
    model = pair(first, second)
    given_ = feeds(first, 2, frames)
    (expected,) = open_graph(model).run(None, given_)
    assert len(np.unique(expected)) > min(30, expected.size // 8), "at the ends of the scale: shows little"
    np.testing.assert_array_equal(open_pair(model).run(None, given_)[0], expected)


def test_batched_equals_alone_on_one_thread_and_on_many() -> None:
    first, second = Layer(channels=100, taps=9, pads=(4, 4)), Layer(channels=70, depth=100)
    model = pair(first, second, masked=True)
    given_ = feeds(first, 4, 301)
    alone, many = open_pair(model), open_pair(model, threads=4)
    items = [{name: value[item : item + 1] for name, value in given_.items()} for item in range(4)]
    expected = np.concatenate([alone.run(None, item)[0] for item in items])
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: many.run(None, given_)[0], range(20)):
            np.testing.assert_array_equal(found, expected)


def test_no_frames_and_no_items() -> None:
    first, second = Layer(channels=20), Layer(channels=30, depth=20)
    session = open_pair(pair(first, second))
    for batch, frames in ((0, 5), (2, 0)):
        mask = np.zeros((batch, 1, frames, 1), np.uint8)
        empty = {"x": np.zeros((batch, 1, frames, 20), np.uint8), "mask": mask}
        assert session.run(None, empty)[0].shape == (batch, 1, frames, 30)
