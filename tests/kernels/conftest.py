"""What the tests of the kernels share: small graphs with one convolution as ONNX Runtime leaves it behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from api.kernels import instructions
from api.kernels.graph import MIDDLE, hand_over
from api.kernels.library import LIBRARY, Layout, Weights, library


@contextlib.contextmanager
def instructions_of(wanted: str) -> Iterator[None]:
    """Weights are packed for these; skips where the processor has them not, or nothing was compiled."""
    loaded = library()
    if loaded is None:
        pytest.skip("the kernels were not compiled: no C compiler here")
    loaded.asr_avx2_only(wanted == "avx2")
    try:
        if instructions() != wanted:
            pytest.skip(f"this processor has no {wanted}")
        yield
    finally:
        loaded.asr_avx2_only(0)


@pytest.fixture(params=["vnni", "avx2"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions."""
    with instructions_of(request.param):
        yield request.param


@pytest.fixture
def vnni() -> Iterator[None]:
    """Where frames stay woven, and registers hold sixteen floats."""
    with instructions_of("vnni"):
        yield


@pytest.fixture
def avx2() -> Iterator[None]:
    """Also where there is VNNI."""
    with instructions_of("avx2"):
        yield


@dataclass
class Kept:
    """Stands in for the library: takes all weights, or none with ``first`` 0, and counts from ``first``."""

    first: int = 70
    weights: list[tuple[Layout, bytes, int, int]] = field(default_factory=list)

    def __call__(self, kind: Layout, weights: bytes, channels: int, depth: int) -> int:
        if not self.first:
            return 0
        self.weights.append((kind, weights, channels, depth))
        return self.first + len(self.weights) - 1


@dataclass(frozen=True)
class Layer:
    """One convolution, depthwise unless ``depth`` is given; ``pads`` before and behind.

    With ``depth`` a pointwise one: as many channels come in.
    """

    channels: int = 32
    depth: int = 0
    taps: int = 5
    pads: tuple[int, int] = (2, 2)
    dilation: int = 1
    stride: int = 1
    x_zero: int = 0
    y_zero: int = 0
    w_zero: int = 0
    bias: bool = False
    seed: int = 0

    def node(self, source: str = "x", name: str = "y", **changes: Any) -> onnx.NodeProto:
        inputs = [source, "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
        attributes = {
            "channels_last": 1,
            "group": 1 if self.depth else self.channels,
            "kernel_shape": [1, 1 if self.depth else self.taps],
            "pads": [0, 0, 0, 0] if self.depth else [0, self.pads[0], 0, self.pads[1]],
            "strides": [1, self.stride],
            "dilations": [1, self.dilation],
        } | changes
        inputs += ["bias"] if self.bias else []
        return helper.make_node("QLinearConv", inputs, [name], domain="com.microsoft", **attributes)

    def weights(self) -> list[onnx.TensorProto]:
        random = np.random.default_rng(self.seed)
        x_scale, w_scale = random.uniform(0.001, 0.1), random.uniform(0.001, 0.02, self.channels)
        spread = x_scale * float(w_scale.mean()) * 128 * 74  # of a random product, and then of a sum of them
        spread *= (self.depth or self.taps) ** 0.5
        shape = (self.channels, self.depth, 1, 1) if self.depth else (self.channels, 1, 1, self.taps)
        arrays = {
            "x_scale": np.float32(x_scale),
            "x_zero": np.uint8(self.x_zero),
            "w": random.integers(-128, 128, shape).astype(np.int8),
            "w_scale": w_scale.astype(np.float32),
            "w_zero": np.full(self.channels, self.w_zero, np.int8),
            "y_scale": np.float32(spread / random.uniform(10, 100)),
            "y_zero": np.uint8(self.y_zero),
            "bias": random.integers(-20_000, 20_000, self.channels).astype(np.int32),
        }
        return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]

    def model_with(self, tensors: dict[str, Any], *nodes: onnx.NodeProto) -> bytes:
        """A graph of these nodes, of the convolution alone unless said otherwise, with other parameters."""
        model = onnx.load_from_string(self.model(list(nodes)))
        for tensor in model.graph.initializer:
            if tensor.name in tensors:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(tensors[tensor.name]), tensor.name))
        return bytes(model.SerializeToString())

    def model(self, nodes: list[onnx.NodeProto] | None = None, outputs: tuple[str, ...] = ("y",)) -> bytes:
        """A graph of these nodes, of the convolution alone unless said otherwise."""
        inputs = [
            helper.make_tensor_value_info(
                "x", TensorProto.UINT8, ["batch", 1, "frames", self.depth or self.channels]
            ),
            helper.make_tensor_value_info("mask", TensorProto.UINT8, ["batch", 1, "frames", 1]),
        ]
        values = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in outputs]
        graph = helper.make_graph(nodes or [self.node()], "layer", inputs, values, self.weights())
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


MASK = helper.make_node("Min", ["x", "mask"], ["masked"])


WITH_VNNI = instructions() == "vnni"


def unsigned(model: bytes) -> bytes:
    """Weights and zero points around 128, with which ONNX Runtime is exact also where there is no VNNI."""
    parsed = onnx.load_from_string(model)
    for tensor in parsed.graph.initializer:
        if tensor.name in ("w", "w_zero") and tensor.data_type == TensorProto.INT8:
            values = numpy_helper.to_array(tensor).view(np.uint8) ^ MIDDLE
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return bytes(parsed.SerializeToString())


def open_graph(model: bytes, *, ours: bool = False, threads: int = 1) -> ort.InferenceSession:
    """The graph with our operators at hand, or as ONNX Runtime computes it exactly."""
    if not ours and not WITH_VNNI:
        model = unsigned(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if ours:
        options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_ours(model: bytes, *, threads: int = 1) -> ort.InferenceSession:
    """The graph with its convolution handed over."""
    with Weights() as weights:
        rewritten, taken = hand_over(model, weights.keep)
        assert taken == 1
        return open_graph(rewritten, ours=True, threads=threads)


def feeds(layer: Layer, batch: int, frames: int, seed: int = 0) -> dict[str, NDArray[np.uint8]]:
    """Bytes at random, and a mask that ends each item somewhere."""
    random = np.random.default_rng(seed)
    ends = random.integers(0, frames + 1, batch)
    mask = np.where(np.arange(frames) < ends[:, None], 255, 0).astype(np.uint8)
    x = random.integers(0, 256, (batch, 1, frames, layer.depth or layer.channels)).astype(np.uint8)
    return {"x": x, "mask": mask[:, None, :, None]}
