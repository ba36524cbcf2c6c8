"""Sessions take our kernels where they are right, and do without them wherever anything is amiss."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import soundfile
from structlog.testing import capture_logs

from api.bundle import load_bundle
from api.engine import Engine
from api.exact_products import make_products_exact
from api.kernels import four_bits, graph, instructions, library, open_sessions, sessions
from api.kernels.model import model_class
from api.kernels.rows import give_rows

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = MODELS / "en-quartznet-small" / "model.int8.onnx"
FOUR_BITS = MODELS / "en-whisper-tiny" / "model.int4.onnx"
LEAST_SAMPLES = 895
"""That either hears."""
BOTH_OF_FOUR_BITS = pytest.mark.parametrize(
    "four_bits_model",
    [FOUR_BITS, MODELS / "en-moonshine-tiny" / "model.int4.onnx"],
    ids=["whisper", "moonshine"],
)


def make_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    make_products_exact(options)
    return options


def profiled(folder: Path) -> ort.SessionOptions:
    options = make_options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    return options


@pytest.fixture
def fresh_library() -> Iterator[None]:
    library.library.cache_clear()
    yield
    library.library.cache_clear()


@pytest.fixture
def compiled() -> None:
    if instructions() == "onnxruntime":
        pytest.skip("the kernels were not compiled: no C compiler here")


def operators(session: ort.InferenceSession, path: Path) -> set[str]:
    """What a run of the session calls, by its own profile."""
    session.run(None, clips())
    profile = Path(session.end_profiling()).rename(path)
    return {
        line.split('"op_name" : "')[1].split('"')[0]
        for line in profile.read_text().splitlines()
        if "op_name" in line
    }


def clips() -> dict[str, np.ndarray]:
    lengths = np.array([48_000, 31_111, 900], np.int64)
    waveform = np.random.default_rng(3).normal(0, 0.1, (3, 48_000)).astype(np.float32)
    for row, length in zip(waveform, lengths, strict=True):
        row[length:] = 0.0
    return {"waveform": waveform, "lengths": lengths}


def test_the_shipped_model_runs_on_them_with_the_same_bits(kernels: str, tmp_path: Path) -> None:
    (session,), found = open_sessions(str(SHIPPED), [partial(profiled, tmp_path)], least_samples=400)
    assert found == kernels
    expected = ort.InferenceSession(SHIPPED, make_options()).run(None, clips())
    for ours, theirs in zip(session.run(None, clips()), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    found_operators = operators(session, tmp_path / "profile.json")
    ours = {operator for operator in found_operators if "QLinearConv" in operator}
    assert ours == set(graph.OPERATORS.values())
    assert "Frames" in found_operators
    assert ({"Mel", "HeadInput"} <= found_operators) == (kernels == "vnni")


def test_weights_lie_in_the_order_in_which_they_are_used(kernels: str, tmp_path: Path) -> None:
    """Because a kernel asks memory for what lies behind its own."""
    options = make_options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(SHIPPED, options)
    with library.Weights() as weights:
        optimised = (tmp_path / "optimised.onnx").read_bytes()
        rewritten, _ = graph.hand_over(optimised, weights.keep, avx512=kernels == "vnni")
        options = make_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.register_custom_ops_library(str(library.LIBRARY))
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        session = ort.InferenceSession(rewritten, options)
    session.run(None, clips())
    events = json.loads(Path(session.end_profiling()).read_text())
    numbers = {
        f"{node.name}_kernel_time": item.ints[0]
        for node in onnx.load_from_string(rewritten).graph.node
        for item in node.attribute
        if item.name == "weights"
    }
    used = [numbers[event["name"]] for event in events if event["name"] in numbers]
    assert len(used) == len(numbers) > 50
    assert used == sorted(used)


def test_the_engine_uses_them_on_one_core_and_on_all(kernels: str) -> None:
    bundle = load_bundle(MODELS, "en-quartznet-small")
    ours, plain = Engine(bundle, wide_threads=2), Engine(bundle, wide_threads=2, kernels=False)
    assert (ours.kernels, plain.kernels) == (kernels, "onnxruntime")
    assert ours.describe()["kernels"] == kernels
    waveform, lengths = clips().values()
    for wide in (False, True):
        found, expected = (engine.infer(waveform, lengths, wide=wide) for engine in (ours, plain))
        np.testing.assert_array_equal(found.log_probs, expected.log_probs)


def test_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "nothing.so")
    assert instructions() == "onnxruntime"
    (session,), found = open_sessions(str(SHIPPED), [make_options], least_samples=400)
    assert found == "onnxruntime"
    assert session.run(None, clips())


def test_a_broken_library_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF and nothing else")
    monkeypatch.setattr(library, "LIBRARY", broken)
    with capture_logs() as logs:
        assert instructions() == "onnxruntime"
    assert [(line["event"], line["file"]) for line in logs] == [("kernels_unusable", str(broken))]


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_other_bits_are_not_used(kernels: str, monkeypatch: pytest.MonkeyPatch, kind: library.Kind) -> None:
    def spoil(model: bytes, keep: library.Keep, avx512: bool) -> tuple[bytes, int]:
        rewritten, taken = graph.hand_over(model, keep, avx512=avx512)
        parsed = model_class().FromString(rewritten)
        for node in parsed.graph.node:
            if node.op_type == graph.OPERATORS[kind]:
                del node.input[graph.BIAS :]  # without its mask, or without its bias
        return parsed.SerializeToString(), taken

    monkeypatch.setattr(sessions, "hand_over", spoil)
    with capture_logs() as logs:
        _, found = open_sessions(str(SHIPPED), [make_options], least_samples=400)
    assert found == "onnxruntime"
    assert [line["event"] for line in logs] == ["kernels_refused"]
    assert "other log-probabilities" in logs[0]["problem"]


def test_what_onnx_runtime_refuses_is_told(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "hand_over", lambda model, keep, avx512: (b"no model", 1))
    with capture_logs() as logs:
        (session,), found = open_sessions(str(SHIPPED), [make_options], least_samples=400)
    assert found == "onnxruntime"
    assert [line["event"] for line in logs] == ["kernels_refused"]
    assert session.run(None, clips())


@BOTH_OF_FOUR_BITS
def test_products_of_four_bits_run_on_them(four_bits_model: Path, kernels: str, tmp_path: Path) -> None:
    (session,), found = open_sessions(
        str(four_bits_model), [partial(profiled, tmp_path)], least_samples=LEAST_SAMPLES
    )
    assert found == kernels
    (log_probs, lengths), (plain, plain_lengths) = (
        each.run(None, clips()) for each in (session, ort.InferenceSession(four_bits_model, make_options()))
    )
    np.testing.assert_array_equal(lengths, plain_lengths)
    # Frames of noise, nearly all of which hear nothing: what they are sure of is the same.
    np.testing.assert_array_equal(log_probs.argmax(-1), plain.argmax(-1))
    found_operators = operators(session, tmp_path / "profile.json")
    assert "FourBitsProduct" in found_operators
    assert "MatMulNBits" not in found_operators


@BOTH_OF_FOUR_BITS
def test_each_different_frame_is_given_once(four_bits_model: Path, kernels: str) -> None:
    """And gathered it has the bits of a session that gathers."""
    ours = Engine(load_bundle(MODELS, four_bits_model.parent.name), max_batch=3)
    (whole,), _ = open_sessions(str(four_bits_model), [make_options], least_samples=LEAST_SAMPLES)
    feeds = spoken()
    found = ours.infer(feeds["waveform"], feeds["lengths"])
    assert found.places is not None
    log_probs, frames = whole.run(None, feeds)
    np.testing.assert_array_equal(found.frame_lengths, frames)
    assert len(found.log_probs) < 0.4 * log_probs.shape[0] * log_probs.shape[1]
    for item, expected, count in zip(found.frames(), log_probs, frames, strict=True):
        np.testing.assert_array_equal(item.whole(), expected[:count])


def test_frames_that_are_read_elsewhere_are_not_given_once(kernels: str) -> None:
    """Nor those of a graph that makes them in another way."""
    optimised = onnx.load(FOUR_BITS).graph
    assert give_rows(parsed(optimised))
    for change in (read_again, with_batches, added):
        changed = onnx.GraphProto()
        changed.CopyFrom(optimised)
        change(changed)
        before = parsed(changed)
        after = parsed(changed)
        assert not give_rows(after)
        assert after == before


def read_again(graph: onnx.GraphProto) -> None:
    gather = next(node for node in graph.node if "log_probs" in node.output)
    graph.node.append(onnx.helper.make_node("Identity", [gather.input[0]], ["again"]))


def with_batches(graph: onnx.GraphProto) -> None:
    gather = next(node for node in graph.node if "log_probs" in node.output)
    gather.attribute.append(onnx.helper.make_attribute("batch_dims", 1))


def added(graph: onnx.GraphProto) -> None:
    gather = next(node for node in graph.node if "log_probs" in node.output)
    gather.op_type = "Add"


def parsed(graph: onnx.GraphProto) -> Any:
    return model_class().FromString(onnx.helper.make_model(graph).SerializeToString()).graph


def spoken() -> dict[str, np.ndarray]:
    """Speech, half of it, and backwards."""
    speech = soundfile.read(MODELS.parent / "samples" / "hello.flac", dtype="float32")[0]
    half = len(speech) // 2
    waveform = np.stack([speech, np.pad(speech[:half], (0, len(speech) - half)), speech[::-1]])
    return {"waveform": waveform, "lengths": np.array([len(speech), half, len(speech)])}


@BOTH_OF_FOUR_BITS
def test_words_of_four_bits_do_not_depend_on_company(four_bits_model: Path, kernels: str) -> None:
    """Nor is a clip that is alone searched in two rows for that."""
    (session,), _ = open_sessions(str(four_bits_model), [make_options], least_samples=LEAST_SAMPLES)
    feeds = spoken()
    waveform, lengths = feeds["waveform"], feeds["lengths"]
    log_probs, frames = session.run(None, feeds)
    for row, length in enumerate(lengths):
        alone, count = session.run(
            None, {"waveform": waveform[row : row + 1, :length], "lengths": lengths[row : row + 1]}
        )
        assert count[0] == frames[row]
        found = log_probs[row, : count[0]].argmax(-1)
        np.testing.assert_array_equal(alone[0, : count[0]].argmax(-1), found)
        assert row == 2 or len(set(found)) > 3, "speech was heard"


@pytest.mark.parametrize("spoiled", ["scales", "bias"])
def test_another_product_is_not_used(kernels: str, monkeypatch: pytest.MonkeyPatch, spoiled: str) -> None:
    def spoil(model: bytes, keep: library.Keep, *, rows: bool) -> tuple[bytes, four_bits.Probe | None]:
        rewritten, probe = four_bits.hand_over_products(model, keep, rows=rows)
        assert probe is not None
        parsed = model_class().FromString(probe.model)
        node = next(
            node
            for node in parsed.graph.node
            if node.op_type == four_bits.FOUR_BITS and (spoiled == "scales" or len(node.input) == 3)
        )
        wrong = parsed.graph.initializer.add(name="wrong")
        wrong.CopyFrom(next(x for x in parsed.graph.initializer if x.name == node.input[-1]))
        wrong.name = node.input[-1] = "wrong"
        values = np.frombuffer(wrong.raw_data, np.float32).copy()
        values[-1] += 1.0
        wrong.raw_data = values.tobytes()
        return rewritten, replace(probe, model=parsed.SerializeToString())

    before = library.weights_bytes()
    monkeypatch.setattr(sessions, "hand_over_products", spoil)
    with capture_logs() as logs:
        (session,), found = open_sessions(str(FOUR_BITS), [make_options], least_samples=400)
    assert found == "onnxruntime"
    assert [line["event"] for line in logs] == ["kernels_refused"]
    assert "is off by" in logs[0]["problem"]
    assert library.weights_bytes() == before
    assert session.run(None, clips())


@pytest.mark.parametrize("problem", [PermissionError(1, "memfd_create"), AttributeError("memfd_create")])
def test_without_files_in_memory(compiled: None, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def refuse(name: str) -> int:
        raise problem

    monkeypatch.setattr(sessions.os, "memfd_create", refuse)
    with capture_logs() as logs:
        (session,), found = open_sessions(str(SHIPPED), [make_options], least_samples=400)
    assert found == "onnxruntime"
    assert [line["event"] for line in logs] == ["kernels_refused"]
    assert session.run(None, clips())


def test_what_is_wrong_with_the_graph_itself_is_raised(compiled: None, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(Exception, match=r"model\.onnx"):
        open_sessions(str(broken), [make_options], least_samples=400)


def test_sessions_share_one_copy_of_the_weights(kernels: str) -> None:
    before = library.weights_bytes()
    (one,), _ = open_sessions(str(SHIPPED), [make_options], least_samples=400)
    alone = library.weights_bytes() - before
    assert alone > 0
    pair, _ = open_sessions(str(SHIPPED), [make_options, make_options], least_samples=400)
    assert library.weights_bytes() - before == 2 * alone, "a second graph, and two sessions of it"
    expected = one.run(None, clips())
    for session in pair:
        for found, wanted in zip(session.run(None, clips()), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    del one, session
    pair.pop()
    assert library.weights_bytes() - before == alone, "the other session needs them"
    assert pair[0].run(None, clips())
    pair.clear()
    assert library.weights_bytes() == before


def test_nothing_stays_of_what_was_refused(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what earlier tests left would go meanwhile
    before = library.weights_bytes()
    for name, broken in (
        ("_open_rewritten", lambda path, options: 1 / 0),
        ("_same_bits", lambda session, noise, expected: False),
    ):
        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(sessions, name, broken)
            assert open_sessions(str(SHIPPED), [make_options] * 2, least_samples=400)[1] == "onnxruntime"
        assert [line["event"] for line in logs] == ["kernels_refused"]
        gc.collect()  # an exception holds the frames it went through
        assert library.weights_bytes() == before


def test_engines_come_and_go(kernels: str) -> None:
    """A bundle may be loaded again and again, also while the old engine still works."""
    bundle = load_bundle(MODELS, "en-quartznet-small")
    before = library.weights_bytes()
    engine = Engine(bundle, wide_threads=2)
    held = library.weights_bytes() - before
    waveform, lengths = clips().values()
    expected = engine.infer(waveform, lengths).log_probs
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(engine.infer, waveform, lengths, wide=wide) for wide in (False, True)]
            fresh = Engine(bundle, wide_threads=2)
        for result in running:
            np.testing.assert_array_equal(result.result().log_probs, expected)
        del running, result
        engine = fresh
        del fresh
        gc.collect()
        assert library.weights_bytes() - before == held
    del engine
    gc.collect()
    assert library.weights_bytes() == before


class Fake:
    """A session that gives these outputs, and keeps what it was asked."""

    NAMES = ("log_probs", "frame_lengths")

    def __init__(self, log_probs: np.ndarray, frames: np.ndarray) -> None:
        self.outputs = [log_probs, frames]
        self.asked: dict[str, np.ndarray] = {}

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.NAMES]

    def run(self, names: None, asked: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.asked = asked
        return self.outputs


def test_every_output_of_both_clips_is_compared() -> None:
    def outputs() -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((2, 300, 5), np.float32), np.array([300, 200])

    noise = sessions._noise(96_000)
    lengths = noise["lengths"]
    assert lengths[0] == 96_000 > lengths[1] > 0
    assert np.abs(noise["waveform"][0]).max() > 0.1
    assert not noise["waveform"][1, lengths[1] :].any()
    same, expected = Fake(*outputs()), dict(zip(Fake.NAMES, outputs(), strict=True))
    assert sessions._same_bits(same, noise, expected)
    assert same.asked is noise
    for output, place in ((0, (0, 299, 4)), (0, (1, 0, 0)), (1, (1,))):
        other = Fake(*outputs())
        other.outputs[output][place] += 1
        assert not sessions._same_bits(other, noise, expected)


def test_the_comparison_reaches_beyond_one_tile(compiled: None) -> None:
    frames = Engine(load_bundle(MODELS, "en-quartznet-small")).infer(
        np.zeros((1, sessions.NOISE_SAMPLES), np.float32), np.array([sessions.NOISE_SAMPLES])
    )
    assert frames.frame_lengths[0] > 256, "a tile of depthwise_vnni.c, a chunk of pointwise.c"


def test_large_graphs_are_left_alone(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_GRAPH_BYTES", SHIPPED.stat().st_size - 1)
    monkeypatch.setattr(sessions, "hand_over", None)
    assert open_sessions(str(SHIPPED), [make_options], least_samples=400)[1] == "onnxruntime"


def test_large_graphs_of_four_bits_are_not(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = load_bundle(MODELS, "en-whisper-tiny").graph_path()
    monkeypatch.setattr(sessions, "MAX_GRAPH_BYTES", 1)
    assert open_sessions(str(path), [make_options], least_samples=400)[1] != "onnxruntime"
    monkeypatch.setattr(sessions, "MAX_FOUR_BITS_BYTES", path.stat().st_size - 1)
    assert open_sessions(str(path), [make_options], least_samples=400)[1] == "onnxruntime"


def test_no_descriptor_stays_open(compiled: None) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    open_sessions(str(SHIPPED), [make_options], least_samples=400)
    before = descriptors()
    for _ in range(3):
        open_sessions(str(SHIPPED), [make_options], least_samples=400)
    assert descriptors() == before
