"""The engine in process: workers x threads x batch, and one clip on one core against all cores.

    python -m loadtest.bench_engine [--model en-moonshine-tiny] [--clip-s 5] [--slice-s 1] [--rounds 3]

Workers share one session unless a row says otherwise. The rows take turns; a row's figure is the median of
its rounds. Every configuration must give the same log-probabilities. The last line is JSON.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from api.bundle import Bundle, load_bundle
from api.cgroup import usable_cores
from api.engine import Engine
from loadtest.clips import speech
from loadtest.command import bundle_parser
from loadtest.processes import hardware

TOLERANCE = 1e-4


@dataclass
class Setup:
    """One row: an engine per worker, or the same for all."""

    name: str
    engines: list[Engine]
    batch: int
    rates: list[float] = field(default_factory=list)


def throughput(setup: Setup, clip: NDArray[np.float32], for_s: float) -> float:
    """Audio-seconds per second of all workers together."""
    rate_hz = setup.engines[0].sample_rate_hz
    runs = [0] * len(setup.engines)
    until_s = time.perf_counter() + for_s

    def work(number: int) -> None:
        while time.perf_counter() < until_s:
            setup.engines[number].run([clip] * setup.batch, alone=False)
            runs[number] += 1

    start_s = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(runs) * setup.batch * len(clip) / rate_hz / (time.perf_counter() - start_s)


def setups(bundle: Bundle, cores: int) -> list[Setup]:
    """The table's rows."""
    one = Engine(bundle, max_batch=16)
    rows = [Setup("1 worker x 1 thread", [one], 1)]
    if cores > 1:
        wide = Engine(bundle, threads=cores, max_batch=16)
        rows.append(Setup(f"1 worker x {cores} threads", [wide], 1))
        rows.append(Setup(f"{cores} workers x 1 thread", [one] * cores, 1))
        own = [Engine(bundle, max_batch=16) for _ in range(cores)]
        rows.append(Setup(f"{cores} workers x 1 thread, a session each", own, 1))
    workers = [one] * cores
    rows += [Setup(f"{cores} workers x 1 thread", workers, batch) for batch in (2, 4, 8, 16)]
    return rows


def main() -> None:
    """The command."""
    parser = bundle_parser(__doc__)
    parser.add_argument("--clip-s", type=float, default=5.0)
    parser.add_argument("--slice-s", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    bundle = load_bundle(given.models_dir, given.model)
    cores = usable_cores()
    clip = speech(given.clip_s)[0][: int(given.clip_s * bundle.manifest.sample_rate_hz)]
    rows = setups(bundle, cores)
    expected = rows[0].engines[0].run([clip], alone=False)[0].whole()
    for row in rows:
        for frames in row.engines[0].run([clip] * row.batch, alone=False):
            if np.abs(frames.whole() - expected).max() > TOLERANCE:
                raise SystemExit(f"{row.name}, batch {row.batch}: other log-probabilities than alone")
    for _ in range(given.rounds):
        for row in rows:
            row.rates.append(throughput(row, clip, given.slice_s))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    graph = rows[0].engines[0].graph
    print(f"{given.model} ({graph}), clips of {given.clip_s:g} s, {hardware()}\n")
    print(f"| {'setup':<38} | batch | audio s/s | per core |\n|{'-' * 40}|------:|----------:|---------:|")
    for row in rows:
        rate = float(np.median(row.rates))
        print(f"| {row.name:<38} | {row.batch:5} | {rate:9.1f} | {rate / cores:8.1f} |")
    print(f"\npeak memory of this process, all sessions together: {peak_mb:.0f} MB")
    table = [
        {"setup": row.name, "batch": row.batch, "audio_s_per_s": float(np.median(row.rates))} for row in rows
    ]
    print(json.dumps({"model": given.model, "graph": graph, "cores": cores, "rows": table}))


if __name__ == "__main__":
    main()
