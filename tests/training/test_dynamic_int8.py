"""Dynamic INT8 of our own beside that of ONNX Runtime's tool."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from tests.training.conformers import FAST, random_conformer
from tests.training.networks import chirps
from training.conformer_graph import export_graph
from training.dynamic_int8 import quantize_products
from training.graph import GraphBuilder
from training.inference import cpu_session, run_graph
from training.transformer_graph import add_convolution, add_linear
from training.transformer_quantize import dynamic, products


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "float32.onnx"
    path.write_bytes(export_graph(random_conformer(FAST)).SerializeToString())
    return path


@pytest.mark.parametrize("ends", [False, True], ids=["all", "but the ends"])
def test_it_is_the_graph_that_the_tool_makes(float32: Path, tmp_path: Path, ends: bool) -> None:
    names = products(onnx.load(float32))
    skipped = [names[0], names[-1]] if ends else []
    theirs = tmp_path / "theirs.onnx"
    quantize_dynamic(
        str(float32),
        str(theirs),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=[name for name in names if name not in skipped],
        extra_options={"MatMulConstBOnly": True},
    )
    ours = dynamic(float32, tmp_path / "ours.onnx", skipped)
    expected, found = (run_graph(cpu_session(path), chirps(3)) for path in (theirs, ours))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    operators = [Counter(node.op_type for node in onnx.load(path).graph.node) for path in (theirs, ours)]
    assert operators[0] == operators[1]
    assert ours.stat().st_size < float32.stat().st_size


def test_a_weight_that_is_still_read_as_float_stays() -> None:
    """Two products of one weight, one of them inside a branch, a column of zeros, and a float reader."""
    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    weight[:, 1] = 0.0
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inside"], name="inside")],
        "then",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["outside"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["outside"], name="outside"),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=inner, else_branch=other),
        helper.make_node("ReduceSum", ["w"], ["total"], keepdims=0),
        helper.make_node("Add", ["chosen", "total"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4]),
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    quantize_products(model, set(products(model)))
    onnx.checker.check_model(model)
    assert [tensor.name for tensor in model.graph.initializer].count("w") == 1
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
    session = cpu_session(model.SerializeToString())
    for yes in (True, False):
        (y,) = session.run(None, {"x": x, "yes": np.array(yes)})
        np.testing.assert_allclose(y, x @ weight + weight.sum(), atol=0.05)
        np.testing.assert_allclose(y[:, 1], weight.sum(), atol=1e-6)


def built(builder: GraphBuilder, *shown: str) -> onnx.ModelProto:
    """From x (batch, frames, 16) to what is named."""
    graph = helper.make_graph(
        builder.nodes,
        "taps",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "frames", 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None, None]) for name in shown],
        list(builder._constants.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("padding", [0, 1])
def test_taps_are_rounded_before_they_are_stacked(padding: int) -> None:
    """Once for all of them, and for another product of the same values."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv1d(16, 8, 3, stride=2, padding=padding)
    beside = torch.nn.Linear(16, 4)
    builder = GraphBuilder()
    convolved = add_convolution(builder, "conv", "x", convolution)
    product = add_linear(builder, "beside", "x", beside)
    model = built(builder, convolved, product)
    exact = cpu_session(model.SerializeToString())
    quantize_products(model, set(products(model)))
    onnx.checker.check_model(model)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["DynamicQuantizeLinear"] == (1 if padding == 0 else 2), "padded values are others"
    rounded = {node.output[0] for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"}
    sliced = [node for node in model.graph.node if node.op_type == "Slice"]
    assert len(sliced) == 3
    assert all(node.input[0] in rounded for node in sliced)
    values = np.random.default_rng(2).normal(size=(2, 21, 16)).astype(np.float32)
    for wanted, found in zip(
        exact.run(None, {"x": values}),
        cpu_session(model.SerializeToString()).run(None, {"x": values}),
        strict=True,
    ):
        assert found.shape == wanted.shape
        assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.02 * np.sqrt(np.mean(wanted**2))


def test_taps_that_something_else_reads_stay_float() -> None:
    """A slice that is an output of its own, and a product that stays float."""
    torch.manual_seed(0)
    builder = GraphBuilder()
    convolved = add_convolution(builder, "conv", "x", torch.nn.Conv1d(16, 8, 3))
    shown = builder.add("Neg", ["conv.tap_1"], "shown")
    values = np.random.default_rng(2).normal(size=(1, 9, 16)).astype(np.float32)
    for chosen in (["conv.product"], []):
        model = built(builder, convolved, shown)
        quantize_products(model, chosen)
        for node in model.graph.node:
            assert node.op_type != "Slice" or node.input[0] == "x"
        _, found = cpu_session(model.SerializeToString()).run(None, {"x": values})
        np.testing.assert_array_equal(found, -values[:, 1:8])
