"""The depthwise kernel gives the bits of ONNX Runtime's own, whatever the shape, and touches nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.kernels.graph import MAX_TAPS
from tests.kernels.conftest import MASK, Layer, feeds, open_graph, open_ours


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    taps = draw(st.integers(1, MAX_TAPS))
    dilation = draw(st.integers(1, 3))
    before = draw(st.integers(0, (taps - 1) * dilation))
    return Layer(
        channels=draw(st.integers(2, 150)),
        taps=taps,
        pads=(before, (taps - 1) * dilation - before),
        dilation=dilation,
        x_zero=draw(st.sampled_from([0, 1, 128, 255])),
        y_zero=draw(st.sampled_from([0, 3, 128, 255])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layer=layers(), batch=st.integers(1, 3), frames=st.integers(1, 700), masked=st.booleans())
def test_same_bits(kernels: str, layer: Layer, batch: int, frames: int, masked: bool) -> None:
    nodes = [MASK, layer.node("masked")] if masked else [layer.node()]
    model = layer.model(nodes)
    given_ = feeds(layer, batch, frames, layer.seed)
    (expected,) = open_graph(model).run(None, given_)
    (found,) = open_ours(model).run(None, given_)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 63, 255, 256, 257, 512, 513])
def test_edges_of_tiles(kernels: str, frames: int) -> None:
    layer = Layer(channels=64, taps=MAX_TAPS, pads=(64, 63), x_zero=7, y_zero=100)
    model = layer.model()
    given_ = feeds(layer, 2, frames)
    (expected,) = open_graph(model).run(None, given_)
    assert len(np.unique(expected)) > min(50, expected.size // 8), (
        "mostly at the ends of the scale: shows little"
    )
    (found,) = open_ours(model).run(None, given_)
    np.testing.assert_array_equal(found, expected)


def test_threads_share_the_work(kernels: str) -> None:
    layer = Layer(channels=200, taps=33, pads=(16, 16))
    model = layer.model([MASK, layer.node("masked")])
    given_ = feeds(layer, 3, 300)
    (expected,) = open_graph(model).run(None, given_)
    shared = open_ours(model, threads=4)
    for _ in range(20):
        np.testing.assert_array_equal(shared.run(None, given_)[0], expected)


def test_no_frames_and_no_items(kernels: str) -> None:
    layer = Layer()
    session = open_ours(layer.model())
    for batch, frames in ((0, 5), (2, 0)):
        shape = (batch, 1, frames, layer.channels)
        empty = {"x": np.zeros(shape, np.uint8), "mask": np.zeros((batch, 1, frames, 1), np.uint8)}
        assert session.run(None, empty)[0].shape == shape


def test_a_mask_of_another_shape_is_refused(kernels: str) -> None:
    layer = Layer()
    session = open_ours(layer.model([MASK, layer.node("masked")]))
    given_ = feeds(layer, 2, 20)
    with pytest.raises(Exception, match="the mask is not"):
        session.run(None, {"x": given_["x"], "mask": given_["mask"][:1]})


def test_weights_with_a_zero_point_are_refused(kernels: str) -> None:
    with pytest.raises(Exception, match="weights with a zero point"):
        open_ours(Layer(w_zero=1).model())
