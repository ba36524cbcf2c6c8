"""Sessions take our kernels where they are right, and do without them wherever anything is amiss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from structlog.testing import capture_logs

from api.bundle import load_bundle
from api.engine import Engine
from api.kernels import graph, instructions, open_session, sessions

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = MODELS / "en-quartznet-small" / "model.int8.onnx"


def make_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return options


@pytest.fixture
def fresh_library() -> Iterator[None]:
    sessions.library.cache_clear()
    yield
    sessions.library.cache_clear()


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
    lengths = np.array([48_000, 31_111, 500], np.int64)
    waveform = np.random.default_rng(3).normal(0, 0.1, (3, 48_000)).astype(np.float32)
    for row, length in zip(waveform, lengths, strict=True):
        row[length:] = 0.0
    return {"waveform": waveform, "lengths": lengths}


def test_the_shipped_model_runs_on_them_with_the_same_bits(kernels: str, tmp_path: Path) -> None:
    def profiled() -> ort.SessionOptions:
        options = make_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        return options

    session, found = open_session(str(SHIPPED), profiled, least_samples=400)
    assert found == kernels
    expected = ort.InferenceSession(SHIPPED, make_options()).run(None, clips())
    for ours, theirs in zip(session.run(None, clips()), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert graph.OPERATOR in operators(session, tmp_path / "profile.json")


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
    monkeypatch.setattr(sessions, "LIBRARY", tmp_path / "nothing.so")
    assert instructions() == "onnxruntime"
    session, found = open_session(str(SHIPPED), make_options, least_samples=400)
    assert found == "onnxruntime"
    assert session.run(None, clips())


def test_a_broken_library_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF and nothing else")
    monkeypatch.setattr(sessions, "LIBRARY", broken)
    with capture_logs() as logs:
        assert instructions() == "onnxruntime"
    assert [(line["event"], line["file"]) for line in logs] == [("kernels_unusable", str(broken))]


def test_other_bits_are_not_used(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: bytes) -> tuple[bytes, int]:
        rewritten, taken = graph.hand_over(model)
        parsed = graph._model_class().FromString(rewritten)
        for node in parsed.graph.node:
            if node.op_type == graph.OPERATOR:
                del node.input[graph.BIAS :]  # without its mask
        return parsed.SerializeToString(), taken

    monkeypatch.setattr(sessions, "hand_over", spoil)
    with capture_logs() as logs:
        _, found = open_session(str(SHIPPED), make_options, least_samples=400)
    assert found == "onnxruntime"
    assert [line["event"] for line in logs] == ["kernels_refused"]
    assert "other log-probabilities" in logs[0]["problem"]


def test_what_onnx_runtime_refuses_is_told(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "hand_over", lambda model: (b"no model", 1))
    with capture_logs() as logs:
        session, found = open_session(str(SHIPPED), make_options, least_samples=400)
    assert found == "onnxruntime"
    assert [line["event"] for line in logs] == ["kernels_refused"]
    assert session.run(None, clips())


@pytest.mark.parametrize("problem", [PermissionError(1, "memfd_create"), AttributeError("memfd_create")])
def test_without_files_in_memory(compiled: None, monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def refuse(name: str) -> int:
        raise problem

    monkeypatch.setattr(sessions.os, "memfd_create", refuse)
    with capture_logs() as logs:
        session, found = open_session(str(SHIPPED), make_options, least_samples=400)
    assert found == "onnxruntime"
    assert [line["event"] for line in logs] == ["kernels_refused"]
    assert session.run(None, clips())


def test_what_is_wrong_with_the_graph_itself_is_raised(compiled: None, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(Exception, match=r"model\.onnx"):
        open_session(str(broken), make_options, least_samples=400)


class Fake:
    """A session that gives these outputs, and keeps what it was asked."""

    def __init__(self, log_probs: np.ndarray, frames: np.ndarray) -> None:
        self.outputs = [log_probs, frames]
        self.asked: dict[str, np.ndarray] = {}

    def run(self, names: None, asked: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.asked = asked
        return self.outputs


def test_every_output_of_both_clips_is_compared() -> None:
    def outputs() -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((2, 300, 5), np.float32), np.array([300, 200])

    same, expected = Fake(*outputs()), Fake(*outputs())
    assert sessions._same_bits(expected, same, 96_000)
    lengths = same.asked["lengths"]
    assert lengths[0] == 96_000 > lengths[1] > 0
    assert np.abs(same.asked["waveform"][0]).max() > 0.1
    assert not same.asked["waveform"][1, lengths[1] :].any()
    for output, place in ((0, (0, 299, 4)), (0, (1, 0, 0)), (1, (1,))):
        other = Fake(*outputs())
        other.outputs[output][place] += 1
        assert not sessions._same_bits(expected, other, 96_000)


def test_the_comparison_reaches_beyond_one_tile(compiled: None) -> None:
    frames = Engine(load_bundle(MODELS, "en-quartznet-small")).infer(
        np.zeros((1, sessions.NOISE_SAMPLES), np.float32), np.array([sessions.NOISE_SAMPLES])
    )
    assert frames.frame_lengths[0] > 256, "TILE of depthwise.c"


def test_large_graphs_are_left_alone(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_GRAPH_BYTES", SHIPPED.stat().st_size - 1)
    monkeypatch.setattr(sessions, "hand_over", None)
    assert open_session(str(SHIPPED), make_options, least_samples=400)[1] == "onnxruntime"


def test_no_descriptor_stays_open(compiled: None) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    open_session(str(SHIPPED), make_options, least_samples=400)
    before = descriptors()
    for _ in range(3):
        open_session(str(SHIPPED), make_options, least_samples=400)
    assert descriptors() == before
