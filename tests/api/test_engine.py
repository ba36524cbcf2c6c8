"""ONNX Runtime behind the engine's door: parity of batches, providers, refusals, calibration."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from structlog.testing import capture_logs

from api import exact_products
from api.bundle import Bundle, list_bundles, load_bundle
from api.calibration import ALONE, ALONE_WIDE, calibrate, choose
from api.ctc import greedy_of
from api.engine import (
    EncodedBatch,
    Engine,
    _cpu_sessions,
    _open,
    available_providers,
    session_options,
    verify_provider,
)
from api.errors import BundleError, InferenceError, SettingsError
from api.exact_products import WIDEN, has_vnni
from api.frames import Frames
from tests.tiny_bundle import FRAME, MAX_WINDOW_S, SAMPLE_RATE_HZ, make_bundle, sing

SHIPPED = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder)
    return load_bundle(folder, "tiny")


@pytest.fixture(scope="module")
def engine(tiny: Bundle) -> Engine:
    return Engine(tiny, max_batch=8)


def change_graph(folder: Path, change: object) -> Bundle:
    """The tiny bundle with a changed graph and the right sha256."""
    path = make_bundle(folder)
    model = onnx.load(path / "model.onnx")
    assert callable(change)
    change(model)
    onnx.save(model, path / "model.onnx")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = hashlib.sha256((path / "model.onnx").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return load_bundle(folder, "tiny")


def text_of(engine: Engine, frames: Frames) -> str:
    vocabulary = engine.bundle.vocabulary
    decoded = greedy_of(frames, vocabulary.blank_id)
    return vocabulary.decode(decoded.token_ids.tolist())


@given(texts=st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batched_equals_alone_and_both_are_right(engine: Engine, texts: list[str]) -> None:
    waveforms = [sing(text) for text in texts]
    together = engine.run(waveforms, alone=False)
    for text, waveform, frames in zip(texts, waveforms, together, strict=True):
        (alone,) = engine.run([waveform], alone=True)
        found, expected = frames.whole(), alone.whole()
        assert found.shape == expected.shape == (len(waveform) // FRAME, len(engine.bundle.vocabulary))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert text_of(engine, frames) == text


@pytest.mark.parametrize("name", list_bundles(SHIPPED) or [""])
def test_batched_equals_alone_on_the_bundles_that_ship(name: str) -> None:
    if not name:
        pytest.skip("no bundle in models/ yet")
    bundle = load_bundle(SHIPPED, name)
    rng = np.random.default_rng(0)
    rate_hz = bundle.manifest.sample_rate_hz
    for graph in bundle.manifest.graphs:
        engine = Engine(bundle, graph=graph, max_batch=4)
        waveforms = []
        for seconds in (0.7, 1.3, 2.9, 4.0):
            time_s = np.arange(int(seconds * rate_hz)) / rate_hz
            voiced = np.sin(2 * np.pi * 140 * time_s * (1 + 0.1 * np.sin(7 * time_s)))
            waveforms.append((0.2 * voiced + rng.normal(0, 0.02, len(time_s))).astype(np.float32))
        together = engine.run(waveforms, alone=False)
        for waveform, frames in zip(waveforms, together, strict=True):
            (alone,) = engine.run([waveform], alone=False)
            if (
                graph == "int4"
            ):  # rounds what it hears, each row by itself: what falls on an edge may tip over
                assert text_of(engine, frames) == text_of(engine, alone)
            else:
                np.testing.assert_allclose(
                    frames.whole(), alone.whole(), atol=1e-4, err_msg=f"{name} {graph}"
                )


def test_what_is_shorter_than_the_least_the_graph_takes_is_padded(engine: Engine) -> None:
    for samples in (0, 1, FRAME - 1):
        (frames,) = engine.run([np.zeros(samples, np.float32)], alone=False)
        assert len(frames) == 1


def test_a_clip_runs_at_its_own_length_and_a_batch_at_its_longest(engine: Engine) -> None:
    waveforms = [np.ones(5000, np.float32), np.ones(9001, np.float32)]
    padded, lengths = engine.pad(waveforms)
    assert padded.shape == (2, 9001)
    assert lengths.tolist() == [5000, 9001]
    assert padded.sum() == 14_001
    assert engine.pad(waveforms[1:])[0].base is waveforms[1]  # no copy where none is needed


def test_a_provider_that_compiles_for_each_shape_gets_few(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _open(tiny, str(tiny.graph_path("auto")), "cpu", 1, 0, kernels=False)
    as_if = replace(opened, provider="openvino")  # its own build of ONNX Runtime is not here
    monkeypatch.setattr("api.engine._open", lambda *_, **__: as_if)
    engine = WatchedEngine(tiny, provider="openvino")
    engine.warm_up(2)
    assert set(engine.limits.buckets) <= {samples for _, samples in engine.seen}
    assert engine.limits.buckets[-1] == int(MAX_WINDOW_S * SAMPLE_RATE_HZ)
    waveforms = [np.ones(5000, np.float32), np.ones(9000, np.float32)]
    padded, lengths = engine.pad(waveforms)
    assert padded.shape[1] in engine.limits.buckets
    assert lengths.tolist() == [5000, 9000]
    assert padded.sum() == 14_000
    exact = np.ones(engine.limits.buckets[-1], np.float32)
    assert engine.pad([exact])[0].base is exact
    assert engine.pad([exact, waveforms[0]])[0].shape == (2, len(exact))


def test_many_threads_share_the_session(engine: Engine) -> None:
    texts = ["abc", "hgf", "aabb", "dedede"] * 10
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda text: engine.run([sing(text)], alone=False)[0], texts))
    assert [text_of(engine, output) for output in outputs] == texts


class WatchedEngine(Engine):
    """Remembers the shapes it was given; ``delay_s`` makes it slow."""

    delay_s = 0.0

    @property
    def seen(self) -> list[tuple[int, int]]:
        """Rows and padded length of each batch."""
        shapes: list[tuple[int, int]] = self.__dict__.setdefault("shapes", [])
        return shapes

    def infer(
        self, waveform: NDArray[np.float32], lengths: NDArray[np.int64], *, wide: bool = False
    ) -> EncodedBatch:
        self.seen.append((waveform.shape[0], waveform.shape[1]))
        threading.Event().wait(self.delay_s)
        return super().infer(waveform, lengths, wide=wide)


def test_warm_up_runs_the_shortest_the_longest_and_the_largest_batch(tiny: Bundle) -> None:
    engine = WatchedEngine(tiny, max_batch=4, wide_threads=2)
    engine.warm_up(2)
    longest = int(MAX_WINDOW_S * SAMPLE_RATE_HZ)
    assert engine.seen.count((1, longest)) >= 3  # each worker and the session for all cores
    assert engine.seen.count((1, SAMPLE_RATE_HZ // 2)) >= 3
    assert max(rows for rows, _ in engine.seen) == 4


def test_no_window_of_a_warm_up_is_longer_than_the_model_takes(tiny: Bundle) -> None:
    engine = WatchedEngine(tiny, max_batch=2, max_batch_audio_s=4 * MAX_WINDOW_S)
    engine.warm_up(1)
    longest = int(MAX_WINDOW_S * SAMPLE_RATE_HZ)
    assert max(samples for _, samples in engine.seen) == longest
    assert (2, longest) in engine.seen


def test_a_session_on_all_cores_says_so(tiny: Bundle) -> None:
    engine = Engine(tiny, wide_threads=2)
    assert engine.describe()["threads_per_worker"] == 1
    engine.use_wide_only()
    assert engine.describe()["threads_per_worker"] == 2


def test_a_graph_that_gives_no_numbers_is_refused_at_warm_up(tmp_path: Path) -> None:
    def break_it(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "blank_level":
                tensor.CopyFrom(numpy_helper.from_array(np.array(np.nan, np.float32), "blank_level"))

    engine = Engine(change_graph(tmp_path, break_it))
    with pytest.raises(BundleError, match="finite"):
        engine.warm_up(1)


def test_an_input_that_gives_no_numbers_fails_alone(engine: Engine) -> None:
    bad = np.full(4000, np.nan, np.float32)
    with pytest.raises(InferenceError):
        engine.run([bad], alone=False)
    assert text_of(engine, engine.run([sing("abc")], alone=False)[0]) == "abc"


def test_a_graph_with_other_inputs_is_refused(tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.input[0].name = "audio"
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == "waveform":
                    node.input[index] = "audio"

    with pytest.raises(BundleError, match="waveform"):
        Engine(change_graph(tmp_path, rename))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = make_bundle(tmp_path)
    (path / "model.onnx").write_bytes(b"not a graph")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = hashlib.sha256(b"not a graph").hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="ONNX Runtime"):
        Engine(load_bundle(tmp_path, "tiny"))


def test_a_model_file_that_changes_under_a_running_engine_changes_nothing(tmp_path: Path) -> None:
    path = make_bundle(tmp_path)
    engine = Engine(load_bundle(tmp_path, "tiny"))
    (path / "model.onnx").write_bytes(b"overwritten")
    assert text_of(engine, engine.run([sing("abc")], alone=False)[0]) == "abc"
    with pytest.raises(BundleError, match="sha256"):
        load_bundle(tmp_path, "tiny")


def test_a_provider_that_is_asked_for_but_missing_is_an_error(tiny: Bundle) -> None:
    missing = next((name for name in ("cuda", "openvino") if name not in available_providers()), None)
    if missing is None:
        pytest.skip("every provider is installed here")
    with pytest.raises(SettingsError, match=f"ASR_PROVIDER={missing}"):
        Engine(tiny, provider=missing)  # type: ignore[arg-type]
    assert Engine(tiny, provider="auto").provider in available_providers()


def test_a_session_that_fell_back_to_the_cpu_silently_is_an_error(tiny: Bundle) -> None:
    session = onnxruntime.InferenceSession(tiny.graph_path(), providers=["CPUExecutionProvider"])
    verify_provider(session, "cpu")
    with pytest.raises(SettingsError, match=r"ASR_PROVIDER=openvino.*fell back to CPUExecutionProvider"):
        verify_provider(session, "openvino")


def products_of_bytes() -> onnx.ModelProto:
    """Large bytes multiplied in each way that a bundle's graph may have."""
    x_info = helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", 8])
    weights = np.full((8, 3), 127, np.int8)
    weights[:, 1] = -128
    constants = {
        "weights": weights,
        "product_weights": weights,
        "convolution_weights": np.ascontiguousarray(weights.T)[:, :, None],
        **{name: np.zeros(3, np.int8) for name in ("zeros", "product_zeros", "convolution_zeros")},
        "scales": np.ones(3, np.float32),
        "one": np.float32(1),
        "thousands": np.float32(4000),
        "zero": np.uint8(0),
        "middle": np.uint8(128),
        "last": np.array([2]),
    }
    scaled = ["one", "zero", "", "scales", "", "thousands", "middle"]
    nodes = [
        helper.make_node("MatMulInteger", ["x", "weights", "zero", "zeros"], ["sums"]),
        helper.make_node("QLinearMatMul", ["x", *scaled], ["product"]),
        helper.make_node("Unsqueeze", ["x", "last"], ["clip"]),
        helper.make_node("QLinearConv", ["clip", *scaled], ["convolution"]),
    ]
    for node, own in zip(nodes[1::2], ("product", "convolution"), strict=True):
        node.input[3], node.input[5] = f"{own}_weights", f"{own}_zeros"  # what is shared is another test's
    outputs = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in (
            ("sums", TensorProto.INT32),
            ("product", TensorProto.UINT8),
            ("convolution", TensorProto.UINT8),
        )
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", [x_info], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_products_of_bytes_are_exact_on_every_cpu() -> None:
    """Without VNNI ONNX Runtime adds two of them in 16 bits, unless it is told better."""
    session = onnxruntime.InferenceSession(products_of_bytes().SerializeToString(), session_options(1))
    x = np.full((5, 8), 255, np.uint8)
    sums, product, convolution = session.run(None, {"x": x})
    expected = np.tile([8 * 255 * 127, -8 * 255 * 128, 8 * 255 * 127], (5, 1))
    np.testing.assert_array_equal(sums, expected)
    rounded = np.rint(expected / 4000) + 128
    assert rounded[0].tolist() == [193, 63, 193]
    np.testing.assert_array_equal(product, rounded)
    np.testing.assert_array_equal(convolution[:, :, 0], rounded)


def test_products_that_share_weights_are_exact_or_it_is_told(tmp_path: Path) -> None:
    """ONNX Runtime does not make them exact where it would have to: better heard badly than not at all."""
    model = products_of_bytes()
    again = helper.make_node("MatMulInteger", ["x", "weights", "zero", "zeros"], ["again"])
    model.graph.node.append(again)
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.INT32, None))
    onnx.save(model, tmp_path / "shared.onnx")
    with capture_logs() as logs:
        (session,), _ = _cpu_sessions(str(tmp_path / "shared.onnx"), [1], None)
    (sums,) = session.run(["again"], {"x": np.full((5, 8), 255, np.uint8)})
    exact = sums[0].tolist() == [8 * 255 * 127, -8 * 255 * 128, 8 * 255 * 127]
    assert exact or [line["event"] for line in logs] == ["products_inexact"]
    assert not (logs and has_vnni())


CORE = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2{more}\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        (CORE.format(more=" avx512f avx512_vnni"), True),
        (CORE.format(more=" avx_vnni"), True),
        (CORE.format(more=" avx512f avx512_vnnix"), False),
        (CORE.format(more=" avx_vnni") + CORE.format(more=""), False),
        ("processor : 0\nFeatures : asimd\n", False),
        (None, False),
    ],
)
def test_vnni_is_what_every_processor_says(tmp_path: Path, cpuinfo: str | None, *, found: bool) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert has_vnni(tmp_path / "cpuinfo") is found


def test_products_that_are_exact_anyway_are_not_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widening halves the speed of INT8 where there is VNNI."""
    monkeypatch.setattr(exact_products, "has_vnni", lambda: False)
    assert session_options(1).get_session_config_entry(WIDEN) == "1"
    monkeypatch.setattr(exact_products, "has_vnni", lambda: True)
    with pytest.raises(Exception, match=WIDEN):
        session_options(1).get_session_config_entry(WIDEN)


def test_what_cannot_be_opened_either_way_is_refused_once(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with capture_logs() as logs, pytest.raises(Exception, match=r"broken\.onnx"):
        _cpu_sessions(str(tmp_path / "broken.onnx"), [1], None)
    assert not logs


def test_calibration_chooses_configures_and_says_so(tiny: Bundle) -> None:
    engine = Engine(tiny, wide_threads=2)
    engine.warm_up(2)
    chosen = calibrate(engine, 2, budget_s=0.2)
    assert chosen.max_batch in (1, 2)
    assert engine.limits.max_batch == chosen.max_batch
    assert chosen.audio_s_per_s > 0
    assert f"batch_{chosen.max_batch}" in chosen.measured
    assert engine.has_wide == chosen.wide
    assert chosen.workers == (1 if chosen.wide_only else 2)


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"batch_1": 100.0}, (1, False, False)),  # there was no time for more
        ({"batch_1": 100.0, "batch_2": 109.0, "batch_4": 109.0}, (1, False, False)),
        ({"batch_1": 100.0, "batch_2": 111.0, "batch_4": 121.0}, (2, False, False)),
        ({"batch_1": 100.0, "batch_2": 111.0, "batch_4": 123.0}, (4, False, False)),
        ({"batch_1": 100.0, ALONE: 60.0, ALONE_WIDE: 74.0}, (1, False, False)),
        ({"batch_1": 100.0, ALONE: 60.0, ALONE_WIDE: 76.0}, (1, True, False)),
        ({"batch_1": 100.0, ALONE: 60.0, ALONE_WIDE: 151.0}, (1, False, True)),
        ({"batch_1": 100.0, "batch_2": 120.0, ALONE: 60.0, ALONE_WIDE: 170.0}, (2, True, False)),
    ],
)
def test_only_what_is_clearly_better_is_chosen(
    measured: dict[str, float], chosen: tuple[int, bool, bool]
) -> None:
    assert choose(measured, (1, 2, 4)) == chosen


def test_calibration_takes_what_is_set(tiny: Bundle) -> None:
    engine = Engine(tiny)
    engine.warm_up(1)
    chosen = calibrate(engine, 1, max_batch=3, budget_s=0.05)
    assert chosen.max_batch == engine.limits.max_batch == 3
    assert list(chosen.measured) == ["batch_3"]


def test_calibration_keeps_the_bounds_of_a_batch(tiny: Bundle) -> None:
    engine = WatchedEngine(tiny, max_batch_audio_s=10)
    engine.warm_up(1)
    calibrate(engine, 1, max_batch=16, budget_s=0.05)
    assert max(rows for rows, _ in engine.seen) == 16
    assert max(rows * samples for rows, samples in engine.seen) <= engine.limits.max_padded_samples


def test_calibration_of_a_slow_engine_stops_at_its_budget(tiny: Bundle) -> None:
    engine = WatchedEngine(tiny, wide_threads=2)
    engine.warm_up(1)
    engine.delay_s = 0.3
    before = len(engine.seen)
    chosen = calibrate(engine, 1, budget_s=0.2)
    assert (chosen.max_batch, chosen.wide) == (1, False)
    assert len(engine.seen) == before + 1
