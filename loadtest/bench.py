"""`make bench`: what a caller gets, against the same engine called directly, in one run.

    python -m loadtest.bench [--model NAME] [--clip-s 5] [--seconds 15] [--rounds 3]

The rows take turns (`--rounds`), so that a machine whose speed drifts treats them alike; a row's figure is
the median of its rounds. A clip's text must be the same in every answer to it, however many clients ask.
The load generator runs on the same cores, so its CPU time is in the HTTP rows. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from api.bundle import load_bundle
from api.cgroup import cpu_limit_cores, usable_cores
from api.engine import Engine
from loadtest.clips import cut_clips
from loadtest.command import bundle_parser
from loadtest.load import Answer, Clip, Form, closed_loop, make_form, summarise
from loadtest.processes import LiveServer, api_server, hardware

CLIENTS = (1, 8, 32)


@dataclass(frozen=True)
class Row:
    """One line of the table; latencies in milliseconds, throughput in audio-seconds per second."""

    name: str
    requests_per_s: float
    audio_s_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


def waveform(clip: Clip) -> NDArray[np.float32]:
    """The clip's samples, float32 `(samples,)`."""
    samples: NDArray[np.float32] = soundfile.read(BytesIO(clip.content), dtype="float32")[0]
    return samples


def engine_row(engine: Engine, clips: Sequence[Clip], workers: int, duration_s: float) -> Row:
    """`workers` threads that call the engine one clip at a time: the ceiling of the service."""
    waveforms = [waveform(clip) for clip in clips]
    stop_s = time.perf_counter() + duration_s
    latencies_ms: list[float] = []

    def work(turn: int) -> None:
        while time.perf_counter() < stop_s:
            start_s = time.perf_counter()
            engine.run([waveforms[turn % len(waveforms)]], alone=False)
            latencies_ms.append((time.perf_counter() - start_s) * 1000)
            turn += workers

    start_s = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(latencies_ms) / (time.perf_counter() - start_s)
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99])
    audio_s = statistics.fmean(clip.duration_s for clip in clips)
    return Row(
        f"engine in process, {workers} threads", rate, rate * audio_s, float(p50), float(p95), float(p99)
    )


def http_row(
    running: LiveServer, forms: Sequence[Form], clients: int, duration_s: float
) -> tuple[Row, list[Answer]]:
    """Closed loop through POST /transcribe."""
    answers, elapsed_s = asyncio.run(closed_loop(f"{running.url}/transcribe", forms, clients, duration_s))
    summary = summarise(answers, elapsed_s)
    if summary.succeeded != summary.requests:
        raise RuntimeError(f"{clients} clients: not every request succeeded: {summary.by_status}")
    row = Row(
        f"HTTP, {clients} client{'s' if clients > 1 else ''}",
        summary.requests_per_s,
        summary.audio_s_per_s,
        summary.p50_ms,
        summary.p95_ms,
        summary.p99_ms,
    )
    return row, answers


def overhead_ms(answers: Sequence[Answer]) -> float:
    """Median of what one lone request costs beyond the inference it waited for, as the caller sees it."""
    return statistics.median(answer.latency_s * 1000 - answer.stages_ms["inference"] for answer in answers)


def median_row(rows: Sequence[Row]) -> Row:
    """The median of each figure over the rounds."""
    figures = [asdict(row) for row in rows]
    keys = [key for key in figures[0] if key != "name"]
    return Row(rows[0].name, **{key: statistics.median(each[key] for each in figures) for key in keys})


def check_texts(answers: Sequence[Answer]) -> int:
    """Every answer to a clip says the same; the number of distinct clips. RuntimeError otherwise."""
    texts: dict[str, set[str]] = {}
    for answer in answers:
        texts.setdefault(answer.clip.name, set()).add(answer.text)
    for name, said in texts.items():
        if len(said) != 1:
            raise RuntimeError(f"{name} was transcribed differently under load: {sorted(said)}")
    if not any(text for said in texts.values() for text in said):
        raise RuntimeError("every answer was empty")
    return len(texts)


def main() -> None:
    """Run the rounds, print the table, end with one JSON line."""
    parser = bundle_parser(__doc__)
    parser.add_argument("--clip-s", type=float, default=5.0)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    clips, source = cut_clips([arguments.clip_s] * arguments.clips)
    workers = usable_cores(cpu_limit_cores())
    engine = Engine(load_bundle(arguments.models_dir, arguments.model))
    engine.warm_up(workers)
    forms = [make_form(clip, {"model": arguments.model}) for clip in clips]
    rounds: dict[str, list[Row]] = {}
    answers: list[Answer] = []
    alone: list[Answer] = []
    with api_server(arguments.model, arguments.models_dir) as running:
        http_row(running, forms, 1, 2.0)
        for _ in range(arguments.rounds):
            row = engine_row(engine, clips, workers, arguments.seconds)
            rounds.setdefault(row.name, []).append(row)
            for clients in CLIENTS:
                row, got = http_row(running, forms, clients, arguments.seconds)
                rounds.setdefault(row.name, []).append(row)
                answers += got
                alone += got if clients == 1 else []
        distinct = check_texts(answers)
        rss_mb = running.rss_mb()
        ready_s = running.ready_s
    rows = [median_row(each) for each in rounds.values()]
    print(f"{arguments.model}, {distinct} clips of {arguments.clip_s:g} s from {source}; {hardware()}")
    print(f"{'':32} {'requests/s':>10} {'audio s/s':>10} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8}")
    for row in rows:
        figures = f"{row.requests_per_s:>10.1f} {row.audio_s_per_s:>10.1f}"
        print(f"{row.name:32} {figures} {row.p50_ms:>8.1f} {row.p95_ms:>8.1f} {row.p99_ms:>8.1f}")
    result = {
        "model": arguments.model,
        "hardware": hardware(),
        "clip_s": arguments.clip_s,
        "real_time_factor": rows[1].p50_ms / 1000 / arguments.clip_s,
        "single_request_overhead_ms": overhead_ms(alone),
        "share_of_engine": max(row.audio_s_per_s for row in rows[1:]) / rows[0].audio_s_per_s,
        "requests": len(answers),
        "rss_mb": rss_mb,
        "ready_s": ready_s,
        "rows": [asdict(row) for row in rows],
    }
    print(
        f"real-time factor {result['real_time_factor']:.4f}, overhead above inference "
        f"{result['single_request_overhead_ms']:.2f} ms, {result['share_of_engine']:.2f} of the engine, "
        f"ready after {ready_s:.1f} s, RSS {rss_mb:.0f} MB after {len(answers)} requests"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
