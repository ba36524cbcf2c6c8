"""`make bench-telemetry`: what tracing every request, plus metrics, costs.

    python -m loadtest.bench_telemetry [--model NAME] [--clip-s 5] [--requests 128] [--seconds 240]

One service, tracing 100 % to a collector that takes spans and drops them, whose telemetry is taken out and
put back between turns. It is one process, because two that do the same differ by up to 15 % for as long as
they live (where their memory lies), which is more than what is looked for. Both states get the same requests
in turns (A B, B A, ...), and every answer is compared. The service has half of the cores; the callers and the
collector have the others, since they are not what is measured.

A turn ends when its spans have left. Its throughput is requests over elapsed seconds; on a machine that
others use too, the process's own CPU seconds per request say the same with less noise. The cost is the median
over the pairs; the interval is that of the median (bootstrap, 95 %). The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

import api.main
from api.cli import main as asr
from api.telemetry import Batch, Stage, Telemetry, instrument
from api.telemetry.busy import BusyWindow
from api.telemetry.http import OnError
from loadtest.clips import cut_clips
from loadtest.command import bundle_parser
from loadtest.load import Form, make_form
from loadtest.processes import Servers, hardware, on_cores, split_cores

TRACE_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
CLIENTS = 2
LIMIT = 0.03
FEWEST_PAIRS = 10


@dataclass(frozen=True)
class Turn:
    """One state's share of a pair."""

    requests_per_s: float
    cpu_s_per_request: float


class Discard(grpc.GenericRpcHandler):  # type: ignore[misc]
    """An OTLP collector that counts exports and keeps nothing; bytes are not parsed."""

    def __init__(self) -> None:
        self.exports = 0

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Take exports of traces, nothing else."""
        if details.method != TRACE_EXPORT:
            return None

        def take(_: bytes, __: grpc.ServicerContext) -> bytes:
            self.exports += 1
            return b""

        return grpc.unary_unary_rpc_method_handler(take)


@contextlib.contextmanager
def collector() -> Iterator[tuple[str, Discard]]:
    """The discarding collector on a free port: its endpoint and itself."""
    handler = Discard()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(1))
    grpc_server.add_generic_rpc_handlers((handler,))
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    try:
        yield f"http://127.0.0.1:{port}", handler
    finally:
        grpc_server.stop(0).wait()


def _nothing(*_: object, **__: object) -> None:
    return None


def _itself(self: object) -> object:
    return self


class Switch:
    """The application with and without telemetry, between which ``POST /switch/on`` and ``/off`` choose.

    Each answers with the process's CPU seconds so far; ``/switch/end`` does so once all spans have left.
    """

    def __init__(self, full: ASGIApp, silent: ASGIApp, telemetry: Telemetry) -> None:
        self._stacks = {"on": full, "off": silent}
        self._stack = full
        self._telemetry = telemetry
        silenced: dict[tuple[type, str], object] = {
            (Stage, "__enter__"): _itself,
            (Stage, "__exit__"): _nothing,
            (Batch, "__enter__"): _itself,
            (Batch, "__exit__"): _nothing,
            (BusyWindow, "begin"): _nothing,
            (BusyWindow, "end"): _nothing,
            **{(Telemetry, name): _nothing for name in ("record_stage", "transcribed", "origin")},
        }
        real = {(owner, name): vars(owner)[name] for owner, name in silenced}
        self._parts: dict[str, Mapping[tuple[type, str], object]] = {"on": real, "off": silenced}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/switch/"):
            await self._stack(scope, receive, send)
            return
        state = scope["path"].removeprefix("/switch/")
        if state == "end":
            await asyncio.to_thread(self._telemetry.flush)
        else:
            self._stack = self._stacks[state]
            for (owner, name), part in self._parts[state].items():
                setattr(owner, name, part)
            gc.collect()  # no turn pays for another's garbage
        await JSONResponse(time.process_time())(scope, receive, send)


def serve_switchable() -> int:
    """`asr serve`, whose telemetry can be switched."""

    def switchable(app: FastAPI, telemetry: Telemetry, on_error: OnError) -> None:
        silent = app.build_middleware_stack()
        instrument(app, telemetry, on_error)
        build = app.build_middleware_stack
        vars(app)["build_middleware_stack"] = lambda: Switch(build(), silent, telemetry)

    vars(api.main)["instrument"] = switchable
    return asr(["serve"])


def variables(model: str, models_dir: Path, endpoint: str) -> dict[str, str]:
    """Those of the service."""
    return {
        "ASR_MODELS": model,
        "ASR_MODELS_DIR": str(models_dir),
        "ASR_CALIBRATE": "false",
        "ASR_LOG_LEVEL": "warning",  # the request log is not what is measured
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
    }


async def turn(
    client: httpx.AsyncClient, state: str, forms: Sequence[Form], requests: int, texts: dict[str, str]
) -> Turn:
    """`requests` requests by two callers; every text must be the one that the clip gave before."""
    left = requests

    async def caller() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            form = forms[left % len(forms)]
            headers = {"content-type": form.content_type}
            answer = await client.post("/transcribe", content=form.body, headers=headers)
            answer.raise_for_status()
            text = answer.json()["text"]
            if texts.setdefault(form.clip.name, text) != text:
                raise ValueError(f"two texts for {form.clip.name}: {text!r}, {texts[form.clip.name]!r}")

    cpu_s: float = (await client.post(f"/switch/{state}")).json()
    start_s = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CLIENTS)))
    end_cpu_s: float = (await client.post("/switch/end")).json()
    elapsed_s = time.perf_counter() - start_s
    return Turn(requests / elapsed_s, (end_cpu_s - cpu_s) / requests)


async def measure(
    url: str, forms: Sequence[Form], requests: int, seconds: float
) -> tuple[list[tuple[Turn, Turn]], str]:
    """Pairs of turns, with and without telemetry, for `seconds`; and /metrics at the end."""
    texts: dict[str, str] = {}
    pairs: list[tuple[Turn, Turn]] = []
    async with httpx.AsyncClient(base_url=url, timeout=120.0, trust_env=False) as client:
        for state in ("on", "off", "on", "off"):
            await turn(client, state, forms, requests, texts)  # warm
        until_s = time.perf_counter() + seconds
        while time.perf_counter() < until_s or len(pairs) < FEWEST_PAIRS:
            order = ("on", "off") if len(pairs) % 2 == 0 else ("off", "on")
            turns = {state: await turn(client, state, forms, requests, texts) for state in order}
            pairs.append((turns["on"], turns["off"]))
        return pairs, (await client.get("/metrics")).text


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the medians of 2,000 resamples."""
    chance = random.Random(7)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(2000))
    return medians[49], medians[1949]


def report(name: str, costs: Sequence[float]) -> dict[str, float | str]:
    """Print one line; the same as numbers."""
    low, high = interval_of_median(costs)
    median = statistics.median(costs)
    verdict = "met" if high < LIMIT else "missed" if low > LIMIT else "not settled"
    print(f"{name:34} {median:+7.2%}   [{low:+.2%}, {high:+.2%}]   {verdict}")
    return {"median": round(median, 5), "low": round(low, 5), "high": round(high, 5), "verdict": verdict}


def run(model: str, models_dir: Path, clip_s: float, requests: int, seconds: float) -> dict[str, object]:
    """Measure; prints the table, returns what the JSON line says."""
    clips, source = cut_clips([clip_s] * 8)
    forms = [make_form(clip) for clip in clips]
    command = [sys.executable, "-m", "loadtest.bench_telemetry", "--serve"]
    service_cores, other_cores = split_cores()
    with on_cores(other_cores), collector() as (endpoint, handler), Servers() as servers:
        with on_cores(service_cores):
            running = servers.api(variables(model, models_dir, endpoint), command)
        pairs, metrics = asyncio.run(measure(running.url, forms, requests, seconds))
        exports = handler.exports
    if exports < len(pairs) or 'asr_requests_total{model="' not in metrics:
        raise RuntimeError("the service under test traced nothing")
    print(f"{model}, {clip_s:g} s clips ({source}), {CLIENTS} callers")
    print(f"{len(pairs)} pairs of turns of {requests} requests, in one process")
    print(f"{hardware()}, {len(service_cores)} for the service; load average {os.getloadavg()[0]:.1f}")
    print(f"{exports} exports of spans\n")
    print(f"{'cost of telemetry':34} {'median':>7}   [95 % interval]   below {LIMIT:.0%}?")
    throughput = report("throughput lost", [1 - a.requests_per_s / b.requests_per_s for a, b in pairs])
    cpu = report("CPU per request added", [a.cpu_s_per_request / b.cpu_s_per_request - 1 for a, b in pairs])
    added_us = statistics.median((a.cpu_s_per_request - b.cpu_s_per_request) * 1e6 for a, b in pairs)
    silent_ms = statistics.median(b.cpu_s_per_request for _, b in pairs) * 1000
    print(f"{'the same in microseconds':34} {added_us:+7.0f}")
    print(f"{'CPU per request without telemetry':34} {silent_ms:7.2f} ms")
    return {
        "model": model,
        "throughput_lost": throughput,
        "cpu_added": cpu,
        "cpu_added_us": round(added_us, 1),
        "cpu_ms_per_request": round(silent_ms, 3),
        "limit": LIMIT,
        "pairs": len(pairs),
        "requests": requests,
    }


def main() -> int:
    """Run the measurement, or (for itself) the service."""
    parser = bundle_parser(__doc__)
    parser.add_argument("--clip-s", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=128, help="in one turn")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long to measure pairs of turns")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve_switchable()
    outcome = run(options.model, options.models_dir, options.clip_s, options.requests, options.seconds)
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
