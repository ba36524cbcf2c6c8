"""A small builder of ONNX graphs with stable names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
MOST_BYTES = 2**31 - 1
"""What a serialized graph can have: protobuf's limit."""
NODES_BYTES = 2**23
"""Room for everything in a graph that is not weights."""


class GraphBuilder:
    """Collects nodes and constants; a node's name is its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}
        self._domains: set[str] = set()

    def inner(self) -> GraphBuilder:
        """A builder of a subgraph (a loop's body), whose constants are kept in this graph."""
        builder = GraphBuilder()
        builder._constants, builder._domains = self._constants, self._domains
        return builder

    def add(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Append a node with one output called `name`; gives that name."""
        self._domains.add(attributes.get("domain", ""))
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def several(self, operator: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> None:
        """Append a node with outputs of these names, the first of which is the node's; "" for none."""
        self._domains.add(attributes.get("domain", ""))
        self.nodes.append(helper.make_node(operator, list(inputs), list(names), name=names[0], **attributes))

    def ints(self, name: str, values: npt.ArrayLike) -> str:
        """An int64 tensor; the same name twice is the same constant."""
        return self._constant(name, np.asarray(values, dtype=np.int64))

    def floats(self, name: str, value: float) -> str:
        """A float32 scalar."""
        return self._constant(name, np.asarray(value, dtype=np.float32))

    def doubles(self, name: str, values: npt.ArrayLike) -> str:
        """A float64 tensor."""
        return self._constant(name, np.asarray(values, dtype=np.float64))

    def weights(self, name: str, values: npt.ArrayLike) -> str:
        """A float32 tensor."""
        return self._constant(name, np.ascontiguousarray(values, dtype=np.float32))

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        tensor = numpy_helper.from_array(values, name)
        known = self._constants.setdefault(name, tensor)
        if known is not tensor and known.SerializeToString() != tensor.SerializeToString():
            raise ValueError(f"constant {name} already has another value")
        return name

    def mask(self, size: str, lengths: str, name: str) -> str:
        """Ones below each item's length, zeros from there on, float32.

        Args:
            size: int64 of shape (1,), positions along the last axis.
            lengths: int64 of shape (batch, 1, ...), broadcast against the positions.
        """
        self._constant("zero_scalar", np.asarray(0, dtype=np.int64))
        self._constant("one_scalar", np.asarray(1, dtype=np.int64))
        scalar = self.add("Squeeze", [size], f"{name}.size")
        positions = self.add("Range", ["zero_scalar", scalar, "one_scalar"], f"{name}.positions")
        inside = self.add("Less", [positions, lengths], f"{name}.inside")
        return self.add("Cast", [inside], name, to=TensorProto.FLOAT)

    def build(self, title: str, vocabulary_size: int) -> onnx.ModelProto:
        """The model with the bundle contract's inputs and outputs, checked by onnx."""
        inputs = [
            helper.make_tensor_value_info("waveform", TensorProto.FLOAT, ["batch", "samples"]),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
        ]
        outputs = [
            helper.make_tensor_value_info(
                "log_probs", TensorProto.FLOAT, ["batch", "frames", vocabulary_size]
            ),
            helper.make_tensor_value_info("frame_lengths", TensorProto.INT64, ["batch"]),
        ]
        graph = helper.make_graph(self.nodes, title, inputs, outputs, list(self._constants.values()))
        others = [helper.make_opsetid(domain, 1) for domain in sorted(self._domains - {""})]
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), *others],
            ir_version=IR_VERSION,
            producer_name="asr-platform",
        )
        if fits_one_file(model):
            onnx.checker.check_model(model)
        return model


def weights_bytes(model: onnx.ModelProto) -> int:
    """Size of the constants."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def fits_one_file(model: onnx.ModelProto, most_bytes: int = MOST_BYTES) -> bool:
    """Whether the graph can be serialized with its weights, as the file of a bundle has to be."""
    return weights_bytes(model) + NODES_BYTES <= most_bytes


@contextmanager
def as_file(model: onnx.ModelProto, most_bytes: int = MOST_BYTES) -> Iterator[Path]:
    """The graph as a file for as long as the context lasts, with its weights beside it where they must be."""
    with tempfile.TemporaryDirectory(prefix="asr-graph-") as scratch:
        path = Path(scratch) / "graph.onnx"
        if fits_one_file(model, most_bytes):
            path.write_bytes(model.SerializeToString())
        else:
            # onnx moves the weights out of the model that it is given, so they are read back
            onnx.save_model(model, path, save_as_external_data=True, location="weights")
            onnx.checker.check_model(str(path))
            onnx.load_external_data_for_model(model, scratch)
        yield path
