"""Run bundle graphs outside the service: for agreement, error rates and benchmarks. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from tqdm import tqdm

from api.engine import session_options
from api.exact_products import make_products_exact
from api.kernels import open_sessions
from training.graph import as_file, fits_one_file

Waveform = npt.NDArray[np.float32]
"""(samples,) in [-1, 1]."""
LogProbs = npt.NDArray[np.float32]
"""(frames, vocabulary)."""
CALIBRATION_LIMIT_S = 12.0


@dataclass(frozen=True)
class Agreement:
    """How far two forms of the network are apart on the same sound, over frames that count."""

    worst_posterior: float
    """Largest difference of a probability."""
    worst_log_prob: float
    """Largest difference of a log-probability, the hopeless tokens' included."""
    same_best: float
    """Share of frames with the same most probable token."""
    frames: int

    def describe(self) -> str:
        """One line for a report."""
        return (
            f"largest difference of a posterior {self.worst_posterior:.1e}, of a log-probability "
            f"{self.worst_log_prob:.1e}, same best token in {self.same_best:.2%} of {self.frames} frames"
        )


def cpu_session(graph: onnx.ModelProto | bytes | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU with every optimisation, all of it ONNX Runtime's."""
    if isinstance(graph, onnx.ModelProto):
        if not fits_one_file(graph):
            with as_file(graph) as path:
                return cpu_session(path, threads)
        graph = graph.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    make_products_exact(options)
    content = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def served_session(graph: onnx.ModelProto | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session with the service's own kernels, where they take something of the graph."""
    if isinstance(graph, onnx.ModelProto):
        with as_file(graph) as path:
            return served_session(path, threads)
    (session,), _ = open_sessions(str(graph), [partial(session_options, threads)], least_samples=1)
    return session


def tensors_of(
    graph: onnx.ModelProto, names: Sequence[str], clips: Iterable[Waveform]
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """What inner float32 tensors of a graph hold on each clip's first `CALIBRATION_LIMIT_S`."""
    open_graph = onnx.ModelProto()
    open_graph.CopyFrom(graph)
    open_graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    session = cpu_session(open_graph.SerializeToString())
    for clip in clips:
        part = clip[: int(CALIBRATION_LIMIT_S * 16_000)]
        yield session.run(list(names), {"waveform": part[None], "lengths": np.array([len(part)])})


def run_graph(session: onnxruntime.InferenceSession, waveforms: Sequence[Waveform]) -> list[LogProbs]:
    """Log-probabilities of a batch of waveforms (samples,), each cut to its own frames."""
    lengths = np.array([len(waveform) for waveform in waveforms], np.int64)
    padded = np.zeros((len(waveforms), int(lengths.max())), np.float32)
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = waveform
    log_probs, counts = session.run(["log_probs", "frame_lengths"], {"waveform": padded, "lengths": lengths})
    return [row[:count] for row, count in zip(log_probs, counts, strict=True)]


def compare(expected: Sequence[LogProbs], actual: Sequence[LogProbs]) -> Agreement:
    """Differences between two lists of (frames, vocabulary), NaN where either has one.

    Raises ValueError where shapes differ.
    """
    shapes = [(a.shape, b.shape) for a, b in zip(expected, actual, strict=True) if a.shape != b.shape]
    if shapes:
        raise ValueError(f"shapes differ: expected {shapes[0][0]}, got {shapes[0][1]}")
    pairs = list(zip(expected, actual, strict=True))
    # Python's own max would drop a NaN
    worst = float(np.max([np.abs(a - b).max() for a, b in pairs]))
    posterior = float(np.max([np.abs(np.exp(a) - np.exp(b)).max() for a, b in pairs]))
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    frames = sum(len(a) for a in expected)
    return Agreement(posterior, worst, same / frames, frames)


def spoken(log_probs: LogProbs, blank_id: int) -> LogProbs:
    """Every token of a decoder once, wherever it stands: (tokens, vocabulary).

    Where it stands is the largest of many close values, which another order of additions moves.
    """
    kept = log_probs[log_probs[:, blank_id] < 0.0]
    new = np.ones(len(kept), bool)
    new[1:] = (kept[1:] != kept[:-1]).any(axis=1)
    return kept[new]


def clip_of(waveforms: Sequence[Waveform], seconds: float, sample_rate_hz: int) -> Waveform:
    """`seconds` of real signal: the recordings one after the other, repeated as often as needed."""
    return np.resize(np.concatenate(waveforms), round(seconds * sample_rate_hz))


def in_turns_s(
    runs: Sequence[Callable[[], object]], repeats: int, label: str = ""
) -> npt.NDArray[np.float64]:
    """Seconds of each run, (runs, repeats). They take turns, so that a noisy machine disturbs all alike.

    One round more comes first and does not count. A progress bar shows where there is a `label`.
    """
    times_s = np.zeros((repeats + 1, len(runs)))
    for row in tqdm(times_s, desc=label, unit="round", disable=None if label else True):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            run()
            row[place] = time.perf_counter() - start
    return times_s[1:].T


def quiet_run_s(
    sessions: Sequence[onnxruntime.InferenceSession], waveform: Waveform, repeats: int = 31
) -> list[float]:
    """Seconds of a single-item run of each session, in turns, on a machine of its own.

    The tenth percentile over the repeats: other work on the machine only adds time.
    """
    runs = [partial(run_graph, session, [waveform]) for session in sessions]
    return [float(value) for value in np.percentile(in_turns_s(runs, repeats), 10, axis=1)]
