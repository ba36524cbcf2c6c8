"""How long requests queue at a given load, how many replicas a load needs, what an autoscaler should aim at.

    python -m loadtest.capacity [--model en-moonshine-tiny] [--image docs/images/capacity.png]

Measures what single clips of 2 to 15 s cost the engine, simulates the service's queue with those times
(Poisson arrivals, one first-in-first-out queue, `workers` one-thread workers) and sets the simulation beside
the approximation that the sizing formula of docs/capacity.md uses. All waits are in mean service times of one
clip, so the table holds for any model and machine whose costs vary alike. The last line is JSON.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray

from api.bundle import load_bundle
from api.engine import Engine
from loadtest.clips import speech
from loadtest.command import bundle_parser
from loadtest.processes import hardware

WORKERS = (1, 2, 4, 8)
UTILISATIONS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
SHORTEST_S, LONGEST_S = 2.0, 15.0
RUNS = 20
TAIL = 0.05  # the 95th percentile


# --- the approximation ------------------------------------------------------------------------------------


def erlang_c(workers: int, utilisation: float) -> float:
    """Probability that an arrival waits in M/M/c (Erlang 1917), by the recursion of Erlang's B formula."""
    offered, blocked = workers * utilisation, 1.0
    for count in range(1, workers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked / (1.0 - utilisation * (1.0 - blocked))


def mean_wait(workers: int, utilisation: float, variation: float) -> float:
    """Mean wait in M/G/c in mean service times; ``variation``: squared coefficient of variation of service.

    Allen and Cunneen's approximation (A. O. Allen, Probability, Statistics, and Queueing Theory with Computer
    Science Applications, 2nd ed. 1990, section 5.3): the wait of M/M/c times (ca^2 + cs^2) / 2, where Poisson
    arrivals have ca^2 = 1. Exact for c = 1 (Pollaczek and Khinchine) and for exponential service.
    """
    exponential = erlang_c(workers, utilisation) / (workers * (1.0 - utilisation))
    return exponential * (1.0 + variation) / 2.0


def p95_wait(workers: int, utilisation: float, variation: float) -> float:
    """95th percentile of the wait in mean service times: those who wait, wait exponentially.

    Exact for M/M/c. With less variation the tail is still exponential in the limit, and the mean of those
    who wait is taken from `mean_wait`.
    """
    waiting = erlang_c(workers, utilisation)
    if waiting <= TAIL:
        return 0.0
    return mean_wait(workers, utilisation, variation) / waiting * math.log(waiting / TAIL)


def highest_utilisation(workers: int, target: float, variation: float) -> float:
    """The load, 0 to 1, at which `p95_wait` reaches ``target`` (in mean service times); by bisection."""
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if p95_wait(workers, middle, variation) <= target else (low, middle)
    return low


def replicas_needed(
    audio_s_per_s: float,
    *,
    replica_audio_s_per_s: float,
    clip_s: float,
    target_s: float,
    workers: int = 1,
    variation: float,
) -> int:
    """Replicas for a load of ``audio_s_per_s`` so that 19 of 20 requests wait at most ``target_s`` seconds.

    ``replica_audio_s_per_s``: what one replica does at full use. A load balancer that spreads requests
    blindly leaves every replica a Poisson stream and a queue of its own.
    """
    service_s = workers * clip_s / replica_audio_s_per_s
    utilisation = highest_utilisation(workers, target_s / service_s, variation)
    return math.ceil(audio_s_per_s / (replica_audio_s_per_s * utilisation) - 1e-9)


# --- the simulation ---------------------------------------------------------------------------------------


@njit(cache=True)
def _waits(gaps: NDArray[np.float64], services: NDArray[np.float64], workers: int) -> NDArray[np.float64]:
    """Waits of all arrivals, float64 (n,): each takes the worker that is free first, in order of arrival."""
    free = np.zeros(workers)
    waits = np.empty(len(gaps))
    now = 0.0
    for index in range(len(gaps)):
        now += gaps[index]
        first = free.argmin()
        start = max(now, free[first])
        waits[index] = start - now
        free[first] = start + services[index]
    return waits


@dataclass(frozen=True)
class Simulated:
    """Waits in mean service times, with the standard errors over independent runs."""

    mean: float
    mean_error: float
    p95: float
    p95_error: float


def simulate(
    workers: int,
    utilisation: float,
    services: NDArray[np.float64],
    *,
    arrivals: int = 60_000,
    runs: int = RUNS,
    seed: int = 0,
) -> Simulated:
    """Independent runs from an empty queue; the first fifth of each is thrown away.

    ``services``: float64 (n,), any unit; drawn from with replacement.
    """
    scaled = services / services.mean()
    means, tails = [], []
    for run in range(runs):
        generator = np.random.default_rng([seed, workers, round(1000 * utilisation), run])
        gaps = generator.exponential(1.0 / (workers * utilisation), arrivals)
        late = _waits(gaps, generator.choice(scaled, arrivals), workers)[arrivals // 5 :]
        means.append(late.mean())
        tails.append(np.quantile(late, 1.0 - TAIL))
    root = math.sqrt(runs)
    return Simulated(
        float(np.mean(means)),
        float(np.std(means, ddof=1)) / root,
        float(np.mean(tails)),
        float(np.std(tails, ddof=1)) / root,
    )


# --- the measurement --------------------------------------------------------------------------------------


def measure(model: str, models_dir: Path, count: int = 60) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lengths of ``count`` clips in seconds and what each cost the engine in seconds of processor time.

    Processor time, because a busy machine stretches the clock; the least of three runs.
    """
    engine = Engine(load_bundle(models_dir, model))
    rate_hz = engine.sample_rate_hz
    lengths_s = np.random.default_rng(0).uniform(SHORTEST_S, LONGEST_S, count)
    audio, _ = speech(float(lengths_s.sum()) + 1.0)
    costs, start = [], 0
    engine.warm_up(1)
    for length_s in lengths_s:
        clip = audio[start : start + int(length_s * rate_hz)]
        start += len(clip)
        spent = []
        for _ in range(3):
            begun_s = time.process_time()
            engine.run([clip], alone=False)
            spent.append(time.process_time() - begun_s)
        costs.append(min(spent))
    return lengths_s, np.array(costs)


@dataclass(frozen=True)
class Row:
    """One point: simulation beside approximation, in mean service times."""

    workers: int
    utilisation: float
    simulated: Simulated
    mean: float
    p95: float


def draw(rows: list[Row], path: Path) -> None:
    """p95 of the wait against utilisation, simulated (points) and approximated (lines)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for workers in sorted({row.workers for row in rows}):
        own = [row for row in rows if row.workers == workers]
        loads = [row.utilisation for row in own]
        (line,) = axes.plot(loads, [row.p95 for row in own], linewidth=1.2)
        axes.plot(
            loads, [row.simulated.p95 for row in own], "o", color=line.get_color(), label=f"c = {workers}"
        )
    axes.set(xlabel="utilisation", ylabel="95th percentile of the wait, mean service times", ylim=(0, 20))
    axes.legend(title="c workers\npoints: simulated\nlines: approximated", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    parser = bundle_parser(__doc__)
    parser.add_argument("--arrivals", type=int, default=60_000, help="of each of the twenty runs per point")
    parser.add_argument("--image", type=Path, help="where to draw the curves")
    given = parser.parse_args()
    lengths_s, costs_s = measure(given.model, given.models_dir)
    variation = float(costs_s.var() / costs_s.mean() ** 2)
    print(
        f"{given.model}, {len(costs_s)} clips of {lengths_s.min():.1f} to {lengths_s.max():.1f} s (mean "
        f"{lengths_s.mean():.1f}), {hardware()}\nservice: mean {costs_s.mean() * 1e3:.2f} ms, squared "
        f"coefficient of variation {variation:.3f}, {lengths_s.sum() / costs_s.sum():.0f} audio-seconds per "
        "second\n"
    )
    rows = [
        Row(
            workers,
            load,
            simulate(workers, load, costs_s, arrivals=given.arrivals),
            mean_wait(workers, load, variation),
            p95_wait(workers, load, variation),
        )
        for workers in WORKERS
        for load in UTILISATIONS
    ]
    print("| workers | utilisation | mean wait: simulated | approximated | p95: simulated | approximated |")
    print("|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        seen = row.simulated
        print(
            f"| {row.workers} | {row.utilisation:.2f} | {seen.mean:.3f} ± {seen.mean_error:.3f} "
            f"| {row.mean:.3f} | {seen.p95:.2f} ± {seen.p95_error:.2f} | {row.p95:.2f} |"
        )
    targets = (1.0, 2.0, 5.0, 10.0, 20.0)
    print("\n| p95 target in mean service times | " + " | ".join(f"{target:g}" for target in targets) + " |")
    print("|---|" + "--:|" * len(targets))
    for workers in WORKERS:
        loads = [highest_utilisation(workers, target, variation) for target in targets]
        print(f"| highest utilisation, c = {workers} | " + " | ".join(f"{load:.2f}" for load in loads) + " |")
    if given.image:
        draw(rows, given.image)
    print(
        json.dumps(
            {"model": given.model, "variation": round(variation, 4), "rows": [asdict(r) for r in rows]}
        )
    )


if __name__ == "__main__":
    main()
