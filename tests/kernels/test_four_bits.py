"""Products with weights of four bits: the bits of their definition, and nearly what ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from api.kernels.ends import DOMAIN
from api.kernels.four_bits import FOUR_BITS, LAYOUTS, SET, SMALL_SET, hand_over_products, probe_inputs
from api.kernels.library import Weights, weights_bytes
from api.kernels.sessions import MOST_ERROR
from tests.kernels.conftest import Kept, open_graph
from training.four_bits import quantize_to_four_bits


@dataclass(frozen=True)
class Product:
    """One ``MatMulNBits`` as an exporter writes it."""

    channels: int = 24
    depth: int = 200
    bias: bool = True
    seed: int = 0
    size: int = SET

    @property
    def sets(self) -> int:
        return -(-self.depth // self.size)

    def values(self) -> dict[str, NDArray[Any]]:
        random = np.random.default_rng(self.seed)
        whole = random.integers(-8, 8, (self.channels, self.sets * self.size)).astype(np.int8)
        whole[:, self.depth :] = 0
        scales = random.normal(0, 0.02, (self.channels, self.sets)).astype(np.float32)
        return {"whole": whole, "scales": scales, "bias": random.normal(0, 1, self.channels).astype("f")}

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The packed form: two weights in a byte, the lower four bits first."""
        values = self.values()
        halves = (values["whole"] + 8).astype(np.uint8).reshape(self.channels, self.sets, self.size // 2, 2)
        packed = halves[..., 0] | halves[..., 1] << 4
        return {"packed": packed, "scales": values["scales"], "bias": values["bias"]}

    def node(self, source: str = "x", name: str = "y", **changes: Any) -> onnx.NodeProto:
        inputs = [source, "packed", "scales", *(["", "", "bias"] if self.bias else [])]
        attributes = {"K": self.depth, "N": self.channels, "bits": 4, "accuracy_level": 4}
        attributes["block_size"] = self.size
        return helper.make_node("MatMulNBits", inputs, [name], domain="com.microsoft", **attributes | changes)

    def model(
        self,
        *nodes: onnx.NodeProto,
        outputs: tuple[str, ...] = ("y",),
        inputs: tuple[str, ...] = (),
        **tensors: NDArray[Any],
    ) -> bytes:
        """A graph of these nodes, of the product alone unless said otherwise, with other tensors."""
        values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
        constants = self.tensors() | tensors
        for name in inputs:  # that have a value, and may be given another one
            kind = helper.np_dtype_to_tensor_dtype(constants[name].dtype)
            values.append(helper.make_tensor_value_info(name, kind, constants[name].shape))
        graph = helper.make_graph(
            nodes or [self.node()],
            "product",
            values,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())

    def expected(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """As four_bits.h defines it, one set after another, each step rounded to float32."""
        values = self.values()
        rows = np.zeros((*x.shape[:-1], self.sets * self.size), np.float32)
        rows[..., : self.depth] = x
        rows = rows.reshape(-1, self.sets, self.size)
        whole = values["whole"].reshape(self.channels, self.sets, self.size).astype(np.int64)
        most = np.abs(rows).max(-1)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most != 0)
        q = np.rint(rows * inverse[..., None]).astype(np.int64)
        total = np.zeros((len(rows), self.channels), np.float32)
        for place in range(self.sets):
            sums = (q[:, place] @ whole[:, place].T).astype(np.float32)
            total += most[:, place, None] / np.float32(127) * values["scales"][:, place] * sums
        total += values["bias"] if self.bias else np.float32(0)
        return total.reshape(*x.shape[:-1], self.channels)


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def open_ours(model: bytes, *, threads: int = 1) -> ort.InferenceSession:
    with Weights() as weights:
        rewritten, probe = hand_over_products(model, weights.keep)
        assert probe is not None
        return open_graph(rewritten, ours=True, threads=threads)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Also where a kernel is refused."""
    before = weights_bytes()
    yield
    assert weights_bytes() == before


@pytest.mark.usefixtures("kernels")
class TestComputes:
    """With each set of instructions."""

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        channels=st.integers(1, 500),
        depth=st.integers(1, 700),
        bias=st.booleans(),
        rows=st.integers(1, 5) | st.integers(1, 300),
        seed=st.integers(0, 1000),
        size=st.sampled_from([SET, SMALL_SET]),
    )
    def test_the_bits_of_the_definition(
        self, channels: int, depth: int, bias: bool, rows: int, seed: int, size: int
    ) -> None:
        product = Product(channels, depth, bias, seed, size)
        x = noise(rows, depth, seed=seed)
        (found,) = open_ours(product.model()).run(None, {"x": x})
        np.testing.assert_array_equal(found, product.expected(x))

    @pytest.mark.parametrize(
        "product",
        [
            Product(384, 384),
            Product(1536, 384, bias=False),
            Product(40, 240),
            Product(1152, 288, size=SMALL_SET),
            Product(288, 2016, bias=False, size=SMALL_SET),
        ],
    )
    def test_nearly_those_of_onnx_runtime(self, product: Product) -> None:
        x = noise(250, product.depth)
        (theirs,) = open_graph(product.model()).run(None, {"x": x})
        (ours,) = open_ours(product.model()).run(None, {"x": x})
        assert np.abs(ours - theirs).max() < MOST_ERROR * np.abs(theirs).max()

    @pytest.mark.parametrize("size", [SET, SMALL_SET])
    def test_sums_as_large_as_they_can_be(self, size: int) -> None:
        """Sixteen bits hold eight pairs of them, and not one more."""
        product = Product(20, 256, size=size)
        halves = np.zeros((20, product.sets, size // 2), np.uint8)
        halves[::2] = 0xFF  # 7 and 7, else -8 and -8
        x = np.full((7, 256), 3.0, np.float32)
        x[::2] *= -1
        model = product.model(
            packed=halves, scales=np.ones((20, product.sets), np.float32), bias=np.zeros(20, "f")
        )
        (found,) = open_ours(model).run(None, {"x": x})
        np.testing.assert_allclose(found, x[:, :1] * np.where(np.arange(20) % 2, -8, 7) * 256, rtol=1e-5)

    @pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 5)])
    def test_any_rank(self, shape: tuple[int, ...]) -> None:
        product = Product()
        x = noise(*shape, product.depth)
        (found,) = open_ours(product.model()).run(None, {"x": x})
        np.testing.assert_array_equal(found, product.expected(x))

    @pytest.mark.parametrize("shape", [(0, 200), (2, 0, 200)])
    def test_no_rows(self, shape: tuple[int, ...]) -> None:
        (found,) = open_ours(Product().model()).run(None, {"x": np.zeros(shape, np.float32)})
        assert found.shape == (*shape[:-1], 24)

    @pytest.mark.parametrize("size", [SET, SMALL_SET])
    def test_a_row_is_what_it_is_alone(self, size: int) -> None:
        """Which is why a clip gives the same words in any company."""
        product = Product(70, 384, size=size)
        session = open_ours(product.model())
        x = noise(61, 384)
        (together,) = session.run(None, {"x": x})
        for row in range(len(x)):
            np.testing.assert_array_equal(session.run(None, {"x": x[row : row + 1]})[0][0], together[row])

    @pytest.mark.parametrize("size", [SET, SMALL_SET])
    def test_threads_share_the_work_and_the_session(self, size: int) -> None:
        product = Product(900, 1500, size=size)
        x = noise(400, 1500)
        expected = product.expected(x)
        shared = open_ours(product.model(), threads=4)

        def run(_: int) -> bool:
            return np.array_equal(shared.run(None, {"x": x})[0], expected)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run, range(12)))

    @pytest.mark.parametrize("size", [SET, SMALL_SET])
    def test_the_deepest(self, size: int) -> None:
        product = Product(18, 8192, size=size)
        x = noise(30, 8192)
        (found,) = open_ours(product.model()).run(None, {"x": x})
        np.testing.assert_array_equal(found, product.expected(x))
        with Weights() as weights:
            assert hand_over_products(Product(18, 8193, size=size).model(), weights.keep)[1] is None

    def test_what_is_not_finite_stays_so(self) -> None:
        """The engine looks for it in the outputs."""
        x = noise(5, 200)
        x[3, 7] = np.inf
        (found,) = open_ours(Product().model()).run(None, {"x": x})
        assert np.isfinite(found[:3]).all()
        assert not np.isfinite(found[3]).any()


def taken(model: bytes, keep: Kept | None = None) -> list[str]:
    """The operators of the graph afterwards."""
    rewritten, _ = hand_over_products(model, keep or Kept())
    return [node.op_type for node in onnx.load_from_string(rewritten).graph.node]


def test_takes_the_node_without_its_weights() -> None:
    product, keep = Product(), Kept()
    rewritten, probe = hand_over_products(product.model(), keep)
    found = onnx.load_from_string(rewritten)
    (node,) = found.graph.node
    assert (node.domain, node.op_type, list(node.input)) == (DOMAIN, FOUR_BITS, ["x", "scales", "bias"])
    assert {tensor.name for tensor in found.graph.initializer} == {"scales", "bias"}
    assert (DOMAIN, 1) in [(opset.domain, opset.version) for opset in found.opset_import]
    whole = product.values()["whole"][:, :200]
    assert keep.weights == [("four_bits", whole.tobytes(), 24, 200)]
    assert probe is not None
    assert probe.depths == {"rows_of_200": 200}
    assert probe_inputs(probe)["rows_of_200"].shape == (17, 200)


def test_small_sets_are_other_weights_of_the_library(kernels: str) -> None:
    """Which fills them up to whole sets of their own size."""
    product, keep = Product(depth=288, size=SMALL_SET), Kept()
    _, probe = hand_over_products(product.model(), keep)
    assert keep.weights == [("four_bits_small", product.values()["whole"].tobytes(), 24, 288)]
    assert probe is not None
    before = weights_bytes()
    with Weights() as weights:
        weights.keep(*keep.weights[0])
        assert weights_bytes() == before + 32 * 288 // 2, "whole blocks of channels"


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy_level": 0},
        {"accuracy_level": 1},
        {"bits": 8},
        {"block_size": 32},
        {"block_size": 64},
        {"weight_prepacked": 1},
        {"K": 300},
        {"N": 25},
    ],
)
def test_leaves_what_is_another_product(changes: dict[str, Any]) -> None:
    product = Product()
    assert taken(product.model(product.node(**changes))) == ["MatMulNBits"]


@pytest.mark.parametrize("place", [3, 4])
def test_leaves_zero_points_and_another_order(place: int) -> None:
    product = Product()
    node = product.node()
    node.input[place] = "more"
    assert taken(product.model(node, more=np.zeros((24, 1), np.uint8))) == ["MatMulNBits"]


@pytest.mark.parametrize("name", ["packed", "scales", "bias"])
def test_leaves_what_may_be_given_with_the_input(name: str) -> None:
    assert taken(Product().model(inputs=(name,))) == ["MatMulNBits"]


@pytest.mark.parametrize(
    "tensors",
    [
        {"scales": np.ones(48, np.float32)},
        {"scales": np.ones((24, 2), np.float16)},
        {"bias": np.ones((1, 24), np.float32)},
        {"packed": np.zeros((24, 128), np.uint8)},
    ],
)
def test_leaves_other_shapes_and_types(tensors: dict[str, Any]) -> None:
    assert taken(Product().model(**tensors)) == ["MatMulNBits"]


def test_leaves_all_where_the_library_has_no_use_for_them() -> None:
    model = Product().model()
    assert hand_over_products(model, Kept(first=0)) == (model, None)


def test_keeps_weights_that_somebody_else_reads() -> None:
    product = Product()
    rows = helper.make_node("Cast", ["packed"], ["z"], to=TensorProto.FLOAT)
    rewritten, _ = hand_over_products(product.model(product.node(), rows, outputs=("y", "z")), Kept())
    assert "packed" in {tensor.name for tensor in onnx.load_from_string(rewritten).graph.initializer}


@pytest.mark.parametrize("yes", [True, False])
def test_takes_what_is_inside_of_branches(kernels: str, yes: bool) -> None:
    """The same weights in both, twice in one of them."""
    product = Product()
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    once = helper.make_graph([product.node()], "once", [], [value])
    twice = [product.node(name="a"), product.node(name="b"), helper.make_node("Add", ["a", "b"], ["y"])]
    branches = {"then_branch": helper.make_graph(twice, "twice", [], [value]), "else_branch": once}
    which = helper.make_node("If", ["yes"], ["chosen"], **branches)
    model = product.model(which, outputs=("chosen",), yes=np.array(yes))
    x = noise(9, 200)
    (found,) = open_ours(model).run(None, {"x": x})
    np.testing.assert_array_equal(found, product.expected(x) * (2 if yes else 1))
    keep = Kept()
    rewritten, probe = hand_over_products(model, keep)
    assert len(keep.weights) == 3
    assert [tensor.name for tensor in onnx.load_from_string(rewritten).graph.initializer] == ["yes"]
    assert probe is not None
    assert len(onnx.load_from_string(probe.model).graph.output) == 6


@pytest.mark.parametrize("all_ours", [True, False])
def test_a_lone_clip_has_no_company_where_all_products_are_ours(all_ours: bool) -> None:
    product = Product()
    nodes = [
        helper.make_node("Shape", ["x"], ["search.batch"], start=0, end=1),
        helper.make_node("Max", ["search.batch", "two"], ["search.rows"]),
        product.node(),
        product.node("x", "z", accuracy_level=4 if all_ours else 1),
    ]
    model = product.model(*nodes, outputs=("y", "z", "search.rows"), two=np.array([2]))
    found = onnx.load_from_string(hand_over_products(model, Kept())[0]).graph.node[1]
    wanted = ("Identity", ["search.batch"]) if all_ours else ("Max", ["search.batch", "two"])
    assert (found.op_type, list(found.input), list(found.output)) == (*wanted, ["search.rows"])


@pytest.mark.parametrize("inputs", [288, 256])
def test_scales_as_they_are_stored(kernels: str, inputs: int, tmp_path: Path) -> None:
    """ONNX Runtime has made constants of them before products are handed over; in loops as well."""
    weight = noise(inputs, 40)
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    once = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], name="in")], "once", [], [value])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"], name="out"),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=once, else_branch=once),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, inputs]),
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("z", "chosen")],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    quantize_to_four_bits(model, {"in", "out"})
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    feeds = {"x": noise(5, inputs, seed=1), "yes": np.array(True)}
    theirs = ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)
    keep = Kept()
    optimised = (tmp_path / "optimised.onnx").read_bytes()
    assert taken(optimised, keep).count(FOUR_BITS) == 1
    assert len(keep.weights) == 3, "one outside, one in either branch"
    for found, expected in zip(open_ours(optimised).run(None, feeds), theirs, strict=True):
        assert np.abs(found - expected).max() < MOST_ERROR * np.abs(expected).max()


def ours(change: Any = None, *, kind: str = "four_bits", depth: int = 200) -> ort.InferenceSession:
    """The node as no rewriting would leave it."""
    with Weights() as weights:
        number = weights.keep(kind, bytes(24 * depth), 24, depth)  # type: ignore[arg-type]
        assert number
        node = helper.make_node(FOUR_BITS, ["x", "scales", "bias"], ["y"], domain=DOMAIN, weights=[number])
        model = onnx.load_from_string(Product().model(node))
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        if change is not None:
            change(model)
        return open_graph(model.SerializeToString(), ours=True)


@pytest.mark.usefixtures("kernels")
class TestRefuses:
    """A bundle is data from outside: whatever its graph says, the C code refuses what it cannot do safely."""

    def test_the_node_itself_is_taken(self) -> None:
        assert ours().run(None, {"x": noise(3, 200)})

    def test_scales_of_another_size_of_sets(self) -> None:
        """Two sets of 128 inputs, where the weights are seven of 32."""
        with pytest.raises(Exception, match="the scales are not"):
            ours(kind="four_bits_small")

    def test_weights_of_a_convolution(self) -> None:
        with pytest.raises(Exception, match="the weights are a convolution's"):
            ours(kind="pointwise")

    @pytest.mark.parametrize(
        ("tensor", "value", "problem"),
        [
            ("scales", np.ones((24, 3), np.float32), "the scales are not"),
            ("scales", np.ones((23, 2), np.float32), "the scales are not"),
            ("scales", np.ones(48, np.float32), "the scales are not"),
            ("bias", np.ones(25, np.float32), "the bias is not"),
            ("bias", np.ones((1, 24), np.float32), "the bias is not"),
        ],
    )
    def test_tensors_of_another_shape(self, tensor: str, value: NDArray[Any], problem: str) -> None:
        def change(model: onnx.ModelProto) -> None:
            for found in model.graph.initializer:
                if found.name == tensor:
                    found.CopyFrom(numpy_helper.from_array(value, tensor))

        with pytest.raises(Exception, match=problem):
            ours(change)

    @pytest.mark.parametrize("name", ["scales", "bias"])
    def test_tensors_that_are_not_part_of_the_model(self, name: str) -> None:
        def change(model: onnx.ModelProto) -> None:
            tensor = next(found for found in model.graph.initializer if found.name == name)
            model.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))

        with pytest.raises(Exception, match="not constant"):
            ours(change)

    @pytest.mark.parametrize("number", [0, -1, 2**62])
    def test_numbers_that_name_no_weights(self, number: int) -> None:
        def change(model: onnx.ModelProto) -> None:
            model.graph.node[0].attribute[0].ints[0] = number

        with pytest.raises(Exception, match="no weights of this number"):
            ours(change)

    @pytest.mark.parametrize("shape", [(3, 199), (3, 201), (1, 2, 3, 4, 200)])
    def test_inputs_of_another_shape(self, shape: tuple[int, ...]) -> None:
        session = ours()
        with pytest.raises(Exception, match="x is not"):
            session.run(None, {"x": noise(*shape)})

    @pytest.mark.parametrize("value", [-9, 8, 127, -128])
    def test_weights_of_more_than_four_bits(self, value: int) -> None:
        whole = np.zeros(240, np.int8)
        whole[239] = value
        with Weights() as weights:
            for kind in LAYOUTS.values():
                assert weights.keep(kind, whole.tobytes(), 2, 120) == 0
                assert weights.keep(kind, bytes(240), 2, 119) == 0
