"""Run bundle graphs outside the service: for agreement, error rates and benchmarks. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

Waveform = npt.NDArray[np.float32]
"""(samples,) in [-1, 1]."""
LogProbs = npt.NDArray[np.float32]
"""(frames, vocabulary)."""


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


def cpu_session(graph: bytes | Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A session on the CPU with every optimisation, as the service makes it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    content = str(graph) if isinstance(graph, Path) else graph
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_graph(session: onnxruntime.InferenceSession, waveforms: Sequence[Waveform]) -> list[LogProbs]:
    """Log-probabilities of a batch of waveforms (samples,), each cut to its own frames."""
    lengths = np.array([len(waveform) for waveform in waveforms], np.int64)
    padded = np.zeros((len(waveforms), int(lengths.max())), np.float32)
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = waveform
    log_probs, counts = session.run(["log_probs", "frame_lengths"], {"waveform": padded, "lengths": lengths})
    return [row[:count] for row, count in zip(log_probs, counts, strict=True)]


def compare(expected: Sequence[LogProbs], actual: Sequence[LogProbs]) -> Agreement:
    """Differences between two lists of (frames, vocabulary). Raises ValueError where shapes differ."""
    shapes = [(a.shape, b.shape) for a, b in zip(expected, actual, strict=True) if a.shape != b.shape]
    if shapes:
        raise ValueError(f"shapes differ: expected {shapes[0][0]}, got {shapes[0][1]}")
    pairs = list(zip(expected, actual, strict=True))
    worst = max(float(np.abs(a - b).max()) for a, b in pairs)
    posterior = max(float(np.abs(np.exp(a) - np.exp(b)).max()) for a, b in pairs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    frames = sum(len(a) for a in expected)
    return Agreement(posterior, worst, same / frames, frames)


def run_s(session: onnxruntime.InferenceSession, waveform: Waveform, repeats: int = 31) -> float:
    """Seconds of a single-item run on a machine of its own: see `paired_run_s`."""
    return paired_run_s([session], waveform, repeats)[0]


def paired_run_s(
    sessions: Sequence[onnxruntime.InferenceSession], waveform: Waveform, repeats: int = 31
) -> list[float]:
    """Seconds of a single-item run of each session, the sessions taking turns.

    The tenth percentile over the repeats, the first not counted: other work on the machine only adds time.
    """
    times_s: list[list[float]] = [[] for _ in sessions]
    for _ in range(repeats + 1):
        for session, kept in zip(sessions, times_s, strict=True):
            start = time.perf_counter()
            run_graph(session, [waveform])
            kept.append(time.perf_counter() - start)
    return [float(np.percentile(kept[1:], 10)) for kept in times_s]


def median_pair_s(
    first: onnxruntime.InferenceSession,
    second: onnxruntime.InferenceSession,
    waveform: Waveform,
    repeats: int = 9,
) -> tuple[float, float]:
    """Median seconds of two sessions that take turns, so that a noisy machine disturbs both alike."""
    times_s: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for session, kept in zip((first, second), times_s, strict=True):
            start = time.perf_counter()
            run_graph(session, [waveform])
            kept.append(time.perf_counter() - start)
    return float(np.median(times_s[0][1:])), float(np.median(times_s[1][1:]))
