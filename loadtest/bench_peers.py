"""`make bench-peers`: the same weights and the same audio through this service and what people run instead.

    python -m loadtest.bench_peers [--seconds 8] [--rounds 3] [--clients 1,8,32,64] [--open-rates 0.5,0.9]
        [--image FILE]

Needs QuartzNet15x5 (`../shared/models`, or any NeMo CTC archive by --archive) and its bundle (`python -m
training.convert nemo`). All servers run at once and take turns under load, so a noisy machine treats them
alike; the figures are medians over the rounds. Load and servers share the cores. Texts are compared with this
service's. Open-loop rates are shares of this service's own closed-loop capacity. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from pathlib import Path

from api.bundle import load_bundle
from api.cgroup import cpu_limit_cores, usable_cores
from api.engine import Engine
from loadtest.bench import engine_row
from loadtest.clips import cut_clips, shared_dir
from loadtest.load import Answer, Clip, Form, closed_loop, make_form, open_loop, summarise
from loadtest.peers.graphs import EXPORTED, SHERPA_INT8, SHERPA_TOKENS
from loadtest.processes import ROOT, LiveServer, Servers, hardware

CLIP_LENGTHS_S = (2.0, 3.0, 4.0, 5.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0)
OURS, AS_EXPORTED, SAME_INT8, SHERPA = (
    "this service",
    "naive, as exported",
    "naive, same INT8",
    "naive, sherpa-onnx",
)
LEAST_AGREEMENT = 0.9  # of characters: the float32 graph and the INT8 graph differ in a few


Load = Callable[[str], tuple[list[Answer], float]]
"""Address -> answers, and the seconds until the last one came."""


@dataclass(frozen=True)
class Measure:
    """One server under one load."""

    server: str
    load: str
    requests_per_s: float
    audio_s_per_s_per_core: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    cpu_s_per_audio_s: float
    rss_mb: float


def measure(
    name: str, running: LiveServer, load: str, run: Load, cores: float
) -> tuple[Measure, list[Answer]]:
    """Run one load and account for the server's CPU during it."""
    before_s = running.cpu_s()
    answers, elapsed_s = run(f"{running.url}/transcribe")
    used_s = running.cpu_s() - before_s
    summary = summarise(answers, elapsed_s)
    if summary.succeeded != summary.requests:
        raise RuntimeError(f"{name}, {load}: {summary.by_status}")
    audio_s = summary.audio_s_per_s * elapsed_s
    return (
        Measure(
            name,
            load,
            summary.requests_per_s,
            summary.audio_s_per_s / cores,
            summary.p50_ms,
            summary.p95_ms,
            summary.p99_ms,
            used_s / audio_s,
            running.rss_mb(),
        ),
        answers,
    )


def median_of(measures: Sequence[Measure]) -> Measure:
    """Each figure's median over the rounds; memory's maximum."""
    figures = [asdict(each) for each in measures]
    numbers = [key for key, value in figures[0].items() if isinstance(value, float)]
    middle = {key: statistics.median(each[key] for each in figures) for key in numbers}
    middle["rss_mb"] = max(each["rss_mb"] for each in figures)
    return Measure(measures[0].server, measures[0].load, **middle)


def agreement(ours: dict[str, str], theirs: dict[str, str]) -> float:
    """Mean similarity of the texts of clips that both answered, 0 to 1 (Ratcliff and Obershelp, difflib)."""
    return statistics.fmean(
        SequenceMatcher(None, ours[clip], theirs[clip], autojunk=False).ratio()
        for clip in ours.keys() & theirs.keys()
    )


def peers(folder: Path, bundle: Path) -> dict[str, list[str]]:
    """Arguments of each naive server."""
    vocabulary = str(bundle / "vocab.txt")
    return {
        AS_EXPORTED: ["onnx", str(folder / EXPORTED), vocabulary],
        SAME_INT8: ["onnx", str(bundle / "model.int8.onnx"), vocabulary],
        SHERPA: ["sherpa", str(folder / SHERPA_INT8), str(folder / SHERPA_TOKENS)],
    }


def start_all(servers: Servers, folder: Path, bundle: Path) -> dict[str, LiveServer]:
    """Every server, ready."""
    started = {OURS: servers.api_with(bundle.name, bundle.parent)}
    for name, arguments in peers(folder, bundle).items():
        command = [sys.executable, "-m", "loadtest.peers.naive", "0", *arguments]
        started[name] = servers.start("peer", command, "/health/ready")
    return started


def closed(clients: int, forms: Sequence[Form], seconds: float) -> Load:
    """A closed loop, bound to everything but the address."""
    return lambda url: asyncio.run(closed_loop(url, forms, clients, seconds))


def opened(rate: float, forms: Sequence[Form], seconds: float) -> Load:
    """An open loop, bound to everything but the address."""
    return lambda url: asyncio.run(open_loop(url, forms, rate, seconds))


def table(rows: Sequence[Measure]) -> str:
    """The rows as text."""
    head = (
        f"{'':20} {'load':>14} {'req/s':>7} {'audio s/s/core':>15} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8}"
    )
    lines = [f"{head} {'CPU s/audio s':>14} {'RSS MB':>7}"]
    for row in rows:
        lines.append(
            f"{row.server:20} {row.load:>14} {row.requests_per_s:>7.1f} {row.audio_s_per_s_per_core:>15.1f} "
            f"{row.p50_ms:>8.1f} {row.p95_ms:>8.1f} {row.p99_ms:>8.1f} "
            f"{row.cpu_s_per_audio_s:>14.5f} {row.rss_mb:>7.0f}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Measure], engine_rate_per_core: float, path: Path) -> None:
    """Throughput and p99 of each server over the number of clients, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    for name in (OURS, AS_EXPORTED, SAME_INT8, SHERPA):
        own = [row for row in rows if row.server == name and row.load.endswith("clients")]
        own.sort(key=lambda row: int(row.load.split()[0]))
        clients = [row.load.split()[0] for row in own]
        throughput.plot(clients, [row.audio_s_per_s_per_core for row in own], "o-", label=name)
        latency.plot(clients, [row.p99_ms for row in own], "o-", label=name)
    throughput.axhline(engine_rate_per_core, color="grey", linestyle=":", label="engine in process")
    throughput.set(xlabel="clients", ylabel="audio seconds per second and core", ylim=(0, None))
    latency.set(xlabel="clients", ylabel="p99 latency, ms", yscale="log")
    throughput.legend(frameon=False)
    for axes in (throughput, latency):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@dataclass
class Results:
    """All that the rounds gave, by server and load."""

    cores: float
    measures: dict[tuple[str, str], list[Measure]] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Server -> clip -> text."""
    engine_audio_s_per_s: list[float] = field(default_factory=list)

    def note(self, name: str, running: LiveServer, load: str, run: Load) -> None:
        """Measure one server under one load."""
        row, answers = measure(name, running, load, run, self.cores)
        self.measures.setdefault((name, load), []).append(row)
        self.texts.setdefault(name, {}).update({answer.clip.name: answer.text for answer in answers})

    def capacity(self) -> float:
        """Requests per second of this service at the load where it does most."""
        return max(
            statistics.median(row.requests_per_s for row in rows)
            for (name, _), rows in self.measures.items()
            if name == OURS
        )


def run_rounds(
    results: Results,
    servers: Mapping[str, LiveServer],
    engine: Engine,
    clips: Sequence[Clip],
    given: argparse.Namespace,
) -> None:
    """Closed loops in turns, round by round; then open loops at shares of this service's capacity."""
    forms, workers = [make_form(clip) for clip in clips], usable_cores(results.cores)
    engine.warm_up(workers)
    for running in servers.values():
        closed(2, forms, 2.0)(f"{running.url}/transcribe")
    for _ in range(given.rounds):
        results.engine_audio_s_per_s.append(engine_row(engine, clips, workers, given.seconds).audio_s_per_s)
        for clients in (int(part) for part in given.clients.split(",")):
            for name, running in servers.items():
                results.note(name, running, f"{clients} clients", closed(clients, forms, given.seconds))
    capacity = results.capacity()
    for share in (float(part) for part in given.open_rates.split(",") if part):
        for name, running in servers.items():
            if name != AS_EXPORTED:  # it cannot keep up with any of these rates: the queue only grows
                run = opened(share * capacity, forms, 2 * given.seconds)
                results.note(name, running, f"open {share:.0%}", run)


def main() -> None:
    """Build the peers' graphs, run the rounds, print the table, end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=shared_dir() / "models" / "quartznet15x5_en.nemo")
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "en-quartznet15x5")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,8,32,64")
    parser.add_argument("--open-rates", default="0.5,0.9")
    parser.add_argument("--image", type=Path, help="where to draw throughput and p99")
    arguments = parser.parse_args()
    for path, how in (
        (arguments.archive, "--archive"),
        (arguments.bundle, "python -m training.convert nemo"),
    ):
        if not path.exists():
            parser.exit(1, f"error: {path} is not there; see {how}\n")
    folder = ROOT / ".cache" / "peers"
    command = [sys.executable, "-m", "loadtest.peers.graphs", arguments.archive, arguments.bundle, folder]
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)

    clips, source = cut_clips(CLIP_LENGTHS_S)
    cores = cpu_limit_cores()
    results = Results(cores)
    with Servers() as started:
        servers = start_all(started, folder, arguments.bundle)
        engine = Engine(load_bundle(arguments.bundle.parent, arguments.bundle.name))
        run_rounds(results, servers, engine, clips, arguments)
    rows = [median_of(each) for each in results.measures.values()]
    engine_rate = statistics.median(results.engine_audio_s_per_s)
    print(f"QuartzNet15x5, {len(clips)} clips of 2 to 15 s from {source}; {hardware()}")
    print(table(sorted(rows, key=lambda row: row.load.rjust(12))))
    print(f"engine in process: {engine_rate / cores:.1f} audio s/s/core")
    if arguments.image:
        plot(rows, engine_rate / cores, arguments.image)
    same = {name: agreement(results.texts[OURS], said) for name, said in results.texts.items()}
    print("agreement of texts with this service: " + ", ".join(f"{n} {v:.3f}" for n, v in same.items()))
    too_different = [name for name, value in same.items() if value < LEAST_AGREEMENT]
    print(
        json.dumps(
            {
                "hardware": hardware(),
                "engine_audio_s_per_s": engine_rate,
                "agreement": same,
                "rows": [asdict(row) for row in rows],
            }
        )
    )
    if too_different:
        raise SystemExit(f"error: {', '.join(too_different)} gave other texts: the comparison means nothing")


if __name__ == "__main__":
    main()
