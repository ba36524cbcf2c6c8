"""The depthwise kernel gives the bits of ONNX Runtime's own, whatever the shape, and touches nothing else."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.kernels.graph import MAX_TAPS, hand_over
from tests.kernels.conftest import MASK, Layer, feeds, open_graph


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
    rewritten, taken = hand_over(model)
    assert taken == 1
    given_ = feeds(layer, batch, frames, layer.seed)
    (expected,) = open_graph(model, ours=False).run(None, given_)
    (found,) = open_graph(rewritten, ours=True).run(None, given_)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 63, 255, 256, 257, 512, 513])
def test_edges_of_tiles(kernels: str, frames: int) -> None:
    layer = Layer(channels=64, taps=MAX_TAPS, pads=(64, 63), x_zero=7, y_zero=100)
    model = layer.model()
    given_ = feeds(layer, 2, frames)
    (expected,) = open_graph(model, ours=False).run(None, given_)
    assert len(np.unique(expected)) > min(50, expected.size // 8), (
        "mostly at the ends of the scale: shows little"
    )
    (found,) = open_graph(hand_over(model)[0], ours=True).run(None, given_)
    np.testing.assert_array_equal(found, expected)


def test_threads_share_the_work(kernels: str) -> None:
    layer = Layer(channels=200, taps=33, pads=(16, 16))
    model = layer.model([MASK, layer.node("masked")])
    given_ = feeds(layer, 3, 300)
    (expected,) = open_graph(model, ours=False).run(None, given_)
    shared = open_graph(hand_over(model)[0], ours=True, threads=4)
    for _ in range(20):
        np.testing.assert_array_equal(shared.run(None, given_)[0], expected)


def test_no_frames_and_no_items(kernels: str) -> None:
    layer = Layer()
    session = open_graph(hand_over(layer.model())[0], ours=True)
    for batch, frames in ((0, 5), (2, 0)):
        shape = (batch, 1, frames, layer.channels)
        empty = {"x": np.zeros(shape, np.uint8), "mask": np.zeros((batch, 1, frames, 1), np.uint8)}
        assert session.run(None, empty)[0].shape == shape


def test_a_mask_of_another_shape_is_refused(kernels: str) -> None:
    layer = Layer()
    session = open_graph(hand_over(layer.model([MASK, layer.node("masked")]))[0], ours=True)
    given_ = feeds(layer, 2, 20)
    with pytest.raises(Exception, match="the mask is not"):
        session.run(None, {"x": given_["x"], "mask": given_["mask"][:1]})


def test_weights_with_a_zero_point_are_refused(kernels: str) -> None:
    rewritten, _ = hand_over(Layer(w_zero=1).model())
    with pytest.raises(Exception, match="weights with a zero point"):
        open_graph(rewritten, ours=True)


def test_no_byte_outside_of_the_buffers(tmp_path: Path) -> None:
    """The C code on its own, under the sanitizers, against a plain reference."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler for x86-64 here")
    program = tmp_path / "fuzz"
    flags = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-Wno-unused",
    ]
    source = Path(__file__).with_name("fuzz_depthwise.c")
    built = subprocess.run(
        [compiler, *flags, "-o", str(program), str(source), "-lm"], capture_output=True, text=True
    )
    if built.returncode != 0 and "san" in built.stderr:
        pytest.skip(f"{compiler} has no sanitizers here")
    assert built.returncode == 0, built.stderr
    seed = str(random.randrange(2**31))  # printed with a failure
    done = subprocess.run([program, "5", seed], capture_output=True, text=True, timeout=120)
    if "no AVX2" in done.stdout:
        pytest.skip("this processor has no AVX2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10
