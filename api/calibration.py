"""Measure, at start and within a second, what this machine runs best: batch cap, latency mode, threads.

On CPUs throughput falls with the batch size, so a larger batch must prove itself by a margin; on GPUs it
wins. Measurements on a busy machine are noisy: every choice has a default that holds unless something is
clearly better, and all numbers are logged and shown in ``/models``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from api.engine import Engine

CLIP_S = 4.0
ROUNDS = 3
CPU_BATCHES = (1, 2)
GPU_BATCHES = (1, 4, 16, 32)
MOST_SETUPS = 4  # that the budget is for; a replica with one CPU has two to compare, and is ready sooner
BATCH_MARGIN = 1.1  # a larger batch costs latency: it must give this much more throughput
WIDE_MARGIN = 1.25  # latency of a lone clip
WIDE_ONLY_MARGIN = 1.5  # throughput of one worker on all cores over one-thread workers

ALONE, ALONE_WIDE = "alone_one_thread", "alone_all_cores"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was chosen, and the measurements behind it.

    ``audio_s_per_s``: throughput to expect of all workers together. ``measured``: audio-seconds per second by
    name; empty where nothing was measured.
    """

    workers: int
    max_batch: int
    wide: bool
    wide_only: bool
    audio_s_per_s: float
    took_s: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)


def calibrate(engine: Engine, workers: int, *, max_batch: int = 0, budget_s: float = 1.0) -> Calibration:
    """Choose for ``engine`` on ``workers`` threads and configure it so.

    ``max_batch``: 0 measures, anything else is taken. ``budget_s`` bounds the measuring, but for the run that
    has begun; what was not measured in time keeps its default.
    """
    start_s = time.perf_counter()
    gpu = engine.provider == "cuda"
    batches = (max_batch,) if max_batch else (GPU_BATCHES if gpu else CPU_BATCHES)
    measured = _measure(engine, workers, batches, budget_s)
    best, wide, wide_only = choose(measured, batches)
    engine.configure(max_batch=best, wide=wide or wide_only)
    if wide_only:
        engine.use_wide_only()
    return Calibration(
        workers=1 if wide_only else workers,
        max_batch=best,
        wide=wide,
        wide_only=wide_only,
        audio_s_per_s=measured[ALONE_WIDE if wide_only else f"batch_{best}"],
        took_s=time.perf_counter() - start_s,
        measured={name: round(value, 1) for name, value in measured.items()},
    )


def choose(measured: Mapping[str, float], batches: Sequence[int]) -> tuple[int, bool, bool]:
    """Batch cap, whether a lone clip gets all cores, and whether every batch does (then not "lone", too).

    ``measured``: as in Calibration, with the first of ``batches`` at least.
    """
    best = batches[0]
    for batch in batches[1:]:
        if measured.get(f"batch_{batch}", 0.0) > BATCH_MARGIN * measured[f"batch_{best}"]:
            best = batch
    alone_wide = measured.get(ALONE_WIDE, 0.0)
    wide_only = alone_wide > WIDE_ONLY_MARGIN * measured[f"batch_{best}"]
    wide = alone_wide > WIDE_MARGIN * measured.get(ALONE, math.inf)
    return best, wide and not wide_only, wide_only


def _measure(engine: Engine, workers: int, batches: Sequence[int], budget_s: float) -> dict[str, float]:
    """Best rate of each configuration over a few rounds in which they take turns.

    The best and not the mean: whatever else the machine does can only slow a measurement down.
    """
    setups = {f"batch_{batch}": (workers, batch, False) for batch in batches}
    if engine.has_wide:
        setups |= {ALONE: (1, 1, False), ALONE_WIDE: (1, 1, True)}
    slice_s = budget_s / (ROUNDS * max(MOST_SETUPS, len(setups)))
    until_s = time.perf_counter() + budget_s
    measured: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, (threads, batch, wide) in setups.items():
            if measured and time.perf_counter() >= until_s:
                return measured
            rate = _throughput(engine, threads, batch, slice_s, wide=wide)
            measured[name] = max(rate, measured.get(name, 0.0))
    return measured


def _throughput(engine: Engine, workers: int, batch: int, for_s: float, *, wide: bool) -> float:
    """Audio-seconds per second of ``workers`` threads that each run batches for about ``for_s``."""
    limits = engine.limits  # what they bound, memory above all, they bound here too
    samples = min(
        int(CLIP_S * engine.sample_rate_hz), engine.longest_samples, limits.max_padded_samples // batch
    )
    noise = np.random.default_rng(0).normal(0.0, 0.05, (batch, samples)).astype(np.float32)
    lengths = np.full(batch, samples, np.int64)
    until_s = time.perf_counter() + for_s

    def work() -> int:
        runs = 0
        while runs == 0 or time.perf_counter() < until_s:
            engine.infer(noise, lengths, wide=wide)
            runs += 1
        return runs

    start_s = time.perf_counter()
    with ThreadPoolExecutor(workers, thread_name_prefix="calibrate") as pool:
        runs = sum(future.result() for future in [pool.submit(work) for _ in range(workers)])
    audio_s = runs * batch * samples / engine.sample_rate_hz
    return audio_s / (time.perf_counter() - start_s)
