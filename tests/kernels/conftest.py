"""What the tests of the kernels share: small graphs with one convolution as ONNX Runtime leaves it behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from api.kernels import instructions
from api.kernels.sessions import LIBRARY, library


@pytest.fixture(params=["vnni", "avx2"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of instructions; skips where the processor has it not, or nothing was compiled."""
    loaded = library()
    if loaded is None:
        pytest.skip("the kernels were not compiled: no C compiler here")
    loaded.asr_avx2_only(request.param == "avx2")
    try:
        if instructions() != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param
    finally:
        loaded.asr_avx2_only(0)


@dataclass(frozen=True)
class Layer:
    """One depthwise convolution; ``pads`` before and behind."""

    channels: int = 32
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
            "group": self.channels,
            "kernel_shape": [1, self.taps],
            "pads": [0, self.pads[0], 0, self.pads[1]],
            "strides": [1, self.stride],
            "dilations": [1, self.dilation],
        } | changes
        inputs += ["bias"] if self.bias else []
        return helper.make_node("QLinearConv", inputs, [name], domain="com.microsoft", **attributes)

    def weights(self) -> list[onnx.TensorProto]:
        random = np.random.default_rng(self.seed)
        x_scale, w_scale = random.uniform(0.001, 0.1), random.uniform(0.001, 0.02, self.channels)
        spread = x_scale * float(w_scale.mean()) * 128 * 74 * self.taps**0.5  # of a sum of random products
        arrays = {
            "x_scale": np.float32(x_scale),
            "x_zero": np.uint8(self.x_zero),
            "w": random.integers(-128, 128, (self.channels, 1, 1, self.taps)).astype(np.int8),
            "w_scale": w_scale.astype(np.float32),
            "w_zero": np.full(self.channels, self.w_zero, np.int8),
            "y_scale": np.float32(spread / random.uniform(10, 100)),
            "y_zero": np.uint8(self.y_zero),
            "bias": random.integers(-20_000, 20_000, self.channels).astype(np.int32),
        }
        return [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]

    def model(self, nodes: list[onnx.NodeProto] | None = None, outputs: tuple[str, ...] = ("y",)) -> bytes:
        """A graph of these nodes, of the convolution alone unless said otherwise."""
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.UINT8, ["batch", 1, "frames", self.channels]),
            helper.make_tensor_value_info("mask", TensorProto.UINT8, ["batch", 1, "frames", 1]),
        ]
        values = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in outputs]
        graph = helper.make_graph(nodes or [self.node()], "layer", inputs, values, self.weights())
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


MASK = helper.make_node("Min", ["x", "mask"], ["masked"])


def open_graph(model: bytes, *, ours: bool, threads: int = 1) -> ort.InferenceSession:
    """The graph as it is, with our operators at hand or without."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if ours:
        options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds(layer: Layer, batch: int, frames: int, seed: int = 0) -> dict[str, NDArray[np.uint8]]:
    """Bytes at random, and a mask that ends each item somewhere."""
    random = np.random.default_rng(seed)
    ends = random.integers(0, frames + 1, batch)
    mask = np.where(np.arange(frames) < ends[:, None], 255, 0).astype(np.uint8)
    x = random.integers(0, 256, (batch, 1, frames, layer.channels)).astype(np.uint8)
    return {"x": x, "mask": mask[:, None, :, None]}
