"""Weights of four bits: the rounding that training hears through is the one that is served."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from training.four_bits import (
    GROUP,
    LOWEST,
    SMALL_GROUP,
    group_of,
    halve,
    integers,
    quantize_to_four_bits,
    rounded,
    shares_and_steps,
    within_steps,
)
from training.inference import cpu_session

SMALL_INPUTS = 2 * GROUP + SMALL_GROUP


@pytest.mark.parametrize(
    ("inputs", "group"), [(128, 128), (384, 128), (288, 32), (2016, 32), (32, 32), (200, 128), (16, 128)]
)
def test_groups_are_small_only_where_they_are_whole(inputs: int, group: int) -> None:
    assert group_of(inputs) == group
    whole, scales = integers(torch.randn(3, inputs))
    assert whole.shape == (3, -(-inputs // group), group)
    assert scales.shape == (3, -(-inputs // group), 1)


def test_rounding_what_is_rounded_changes_nothing() -> None:
    weight = torch.randn(5, 2 * GROUP, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0.0
    once = rounded(weight)
    torch.testing.assert_close(rounded(once), once, rtol=0, atol=0)
    assert not once[3].any()
    for row in once.view(-1, GROUP):
        assert len(row.unique()) <= 16


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1e-40, 3e-8, 1e-6, 1e-4, 0.02, 1.0, 1e6])
def test_rounding_small_groups_again_changes_nothing(size: float, seed: int) -> None:
    """Also where steps have a digit or none, and where a group is nothing beside the others of its row."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, SMALL_INPUTS, generator=generator) * size
    groups = weight.view(64, -1, SMALL_GROUP)
    groups *= 10.0 ** torch.randint(-6, 1, (64, groups.shape[1], 1), generator=generator)
    groups[3], groups[4, 2], groups[5, :, 1:] = 0.0, 0.0, 0.0
    groups[6], groups[7, :, ::2], groups[7, :, 1::2] = -size, size, -size
    once = rounded(weight)
    assert once.isfinite().all()
    assert torch.equal(rounded(once), once)
    assert not once[3].any()
    assert not once[4].view(-1, SMALL_GROUP)[2].any()
    whole, scales = integers(weight)
    lost = scales[..., 0] == 0
    assert not whole[lost].any(), "a group without a scale has no weights"
    assert (whole[~lost].amin(dim=-1) == LOWEST).all()
    shares, steps = shares_and_steps(scales[..., 0])
    assert torch.equal(shares * steps, scales[..., 0])
    assert shares.abs().max() <= 127
    assert torch.equal(shares, shares.to(torch.int8).float())
    assert torch.equal(steps, steps.half().float())


def test_small_groups_are_off_by_no_more_than_large_ones() -> None:
    weight = torch.randn(64, 9 * GROUP, generator=torch.Generator().manual_seed(1))
    small = torch.cat([rounded(part) for part in weight.split(SMALL_INPUTS, dim=1)], dim=1)
    assert (small - weight).square().mean() < 0.8 * (rounded(weight) - weight).square().mean()


def test_no_value_is_off_by_more_than_half_a_step_but_at_the_short_end() -> None:
    weight = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(1))
    _, scales = integers(weight)
    steps = (rounded(weight) - weight).abs() / scales[:, 0].abs()
    assert steps.max() <= 1.01, "a value of the other sign as large as the largest is cut to 7 steps"
    assert steps.quantile(0.98) <= 0.51


def test_a_group_is_filled_up() -> None:
    weight = torch.randn(4, GROUP + 72, generator=torch.Generator().manual_seed(2))
    whole, scales = integers(weight)
    assert whole.shape == (4, 2, GROUP)
    assert not whole[:, 1, 72:].any()
    torch.testing.assert_close(rounded(weight)[:, :GROUP], rounded(weight[:, :GROUP]))
    assert scales.shape == (4, 2, 1)


def test_a_convolution_is_rounded_as_the_product_of_its_taps() -> None:
    weight = torch.randn(6, GROUP, 3, generator=torch.Generator().manual_seed(3))
    for tap in range(3):
        torch.testing.assert_close(rounded(weight)[:, :, tap], rounded(weight[:, :, tap]))


@pytest.fixture(params=[2 * GROUP, SMALL_INPUTS])
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A product and a look-up in one weight, the look-up inside a branch, and a weight that stays."""
    generator = np.random.default_rng(0)
    inputs = request.param
    weight = generator.normal(size=(inputs, 10)).astype(np.float32)
    inner = helper.make_graph(
        [helper.make_node("Gather", ["w", "places"], ["columns"], name="look-up", axis=1)],
        "then",
        [],
        [helper.make_tensor_value_info("columns", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("If", ["yes"], ["found"], then_branch=inner, else_branch=other),
        helper.make_node("MatMul", ["product", "small"], ["out"], name="stays"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, inputs]),
            helper.make_tensor_value_info("places", TensorProto.INT64, [2, 1]),
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("product", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("found", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("out", TensorProto.FLOAT, None),
        ],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(generator.normal(size=(10, 4)).astype(np.float32), "small"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rows_for(model: onnx.ModelProto, seed: int) -> npt.NDArray[np.float32]:
    inputs = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    return np.random.default_rng(seed).normal(size=(3, inputs)).astype(np.float32)


def test_scales_of_small_groups_have_eight_bits(model: onnx.ModelProto) -> None:
    weight = numpy_helper.to_array(model.graph.initializer[0])
    quantize_to_four_bits(model, {"product"})
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    added = {name: (values.dtype, values.shape) for name, values in stored.items() if name.startswith("w_")}
    if len(weight) == 2 * GROUP:
        assert added == {"w_packed": (np.uint8, (10, 2, 64)), "w_scales_half": (np.float16, (10, 2))}
    else:
        assert added == {
            "w_packed": (np.uint8, (10, 9, 16)),
            "w_scale_shares": (np.int8, (10, 9)),
            "w_scale_steps": (np.float16, (10, 1)),
        }
        scales = stored["w_scale_shares"] * stored["w_scale_steps"].astype(np.float32)
        np.testing.assert_array_equal(scales, integers(torch.from_numpy(weight.T.copy()))[1][..., 0])


def test_the_graph_multiplies_and_looks_up_the_rounded_weights(model: onnx.ModelProto) -> None:
    weight = numpy_helper.to_array(model.graph.initializer[0])
    expected = rounded(torch.from_numpy(weight.T.copy())).numpy().T
    quantize_to_four_bits(model, {"product"})
    feeds = {
        "x": rows_for(model, 1),
        "places": np.array([[7], [2]]),
        "yes": np.array(True),
    }
    product, found, _ = cpu_session(model.SerializeToString()).run(None, feeds)
    np.testing.assert_allclose(found[:, :, 0], expected[:, [7, 2]], rtol=0, atol=1e-6)
    exact = feeds["x"] @ expected
    assert np.abs(product - exact).max() < 0.03 * np.abs(exact).std()
    feeds["yes"] = np.array(False)
    whole = cpu_session(model.SerializeToString()).run(["found"], feeds)[0]
    np.testing.assert_array_equal(whole, weight, "another reader still has the float weight")


def test_a_row_in_a_batch_gives_what_it_gives_alone(model: onnx.ModelProto) -> None:
    quantize_to_four_bits(model, {"product"})
    x = rows_for(model, 2)
    del model.graph.input[0].type.tensor_type.shape.dim[0]
    model.graph.input[0].type.tensor_type.shape.dim.insert(0, onnx.TensorShapeProto.Dimension())
    session = cpu_session(model.SerializeToString())
    x[1] *= 100.0
    rest = {"places": np.array([[0], [1]]), "yes": np.array(True)}
    together = session.run(["product"], {"x": x, **rest})[0]
    for row, values in enumerate(x):
        alone = session.run(["product"], {"x": values[None], **rest})[0]
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-4, atol=1e-4)


def test_only_what_is_named_is_halved(model: onnx.ModelProto) -> None:
    halve(model, {"small"})
    types = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in model.graph.initializer}
    assert types == {"w": np.float32, "small_half": np.float16}
    feeds = {"x": rows_for(model, 0), "places": np.array([[0], [1]]), "yes": np.array(True)}
    out = cpu_session(model.SerializeToString()).run(["out"], feeds)[0]
    assert out.dtype == np.float32


def test_a_look_up_that_is_none_of_columns_is_refused(model: onnx.ModelProto) -> None:
    gather = model.graph.node[1].attribute[1].g.node[0]
    gather.attribute[0].i = 0
    with pytest.raises(ValueError, match="look-up: only whole columns"):
        quantize_to_four_bits(model, {"product"})


def test_a_widened_weight_multiplies_as_dynamic_int8(model: onnx.ModelProto) -> None:
    weight = numpy_helper.to_array(model.graph.initializer[0])
    expected = rounded(torch.from_numpy(weight.T.copy())).numpy().T
    quantize_to_four_bits(model, {"product"}, {"product"})
    assert not any(node.op_type == "MatMulNBits" for node in model.graph.node)
    x = rows_for(model, 1)
    feeds = {"x": x, "places": np.array([[7], [2]]), "yes": np.array(True)}
    product, found = cpu_session(model.SerializeToString()).run(["product", "found"], feeds)
    np.testing.assert_allclose(found[:, :, 0], expected[:, [7, 2]], rtol=0, atol=1e-6)
    exact = x @ expected
    assert np.abs(product - exact).max() < 0.05 * np.abs(exact).std()


def test_a_column_of_zeros_is_widened_to_zeros() -> None:
    """Its scale is nothing, and nothing is divided by it; the last group is not whole."""
    weight = np.random.default_rng(0).normal(size=(GROUP + 40, 3)).astype(np.float32)
    weight[:, 1] = 0.0
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, GROUP + 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    quantize_to_four_bits(model, {"product"}, {"product"})
    x = np.random.default_rng(1).normal(size=(2, GROUP + 40)).astype(np.float32)
    (found,) = cpu_session(model.SerializeToString()).run(None, {"x": x})
    exact = x @ rounded(torch.from_numpy(weight.T.copy())).numpy().T
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).std()
    assert not found[:, 1].any()


@pytest.mark.parametrize("shape", [(6, 256), (5, 96), (4, 32, 3)], ids=["128", "32", "convolution"])
def test_what_learns_on_begins_next_to_the_exact_weights(shape: tuple[int, ...]) -> None:
    """And is served as it was rounded."""
    torch.manual_seed(2)
    exact = torch.randn(shape)
    served = rounded(exact + 0.1 * torch.randn(shape))
    found = within_steps(exact, served)
    torch.testing.assert_close(rounded(found), served)
    assert (found - exact).square().mean() < 0.5 * (served - exact).square().mean()
    torch.testing.assert_close(within_steps(served, served), served)
