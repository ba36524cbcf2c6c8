"""`make bench-telemetry`: what tracing every request, plus metrics, costs.

    python -m loadtest.bench_telemetry [--model NAME] [--clip-s 5] [--requests 60] [--pairs 12]

Two services stand side by side: one as it ships, tracing 100 % to a collector that takes spans and drops
them, and one whose telemetry is taken out. They get the same requests in turns (A B, B A, ...), one turn at
a time, so that a machine whose speed drifts treats them alike; every answer is compared. Throughput of one
turn is requests over elapsed seconds; on a machine that others use too, the processes' own CPU seconds per
request say the same with less noise. The cost is the median over the pairs; the interval is that of the
median (bootstrap, 95 %). The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx

from loadtest.clips import cut_clips
from loadtest.load import Form, make_form
from loadtest.processes import ROOT, Running, free_port, hardware, server

TRACE_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
CLIENTS = 2
LIMIT = 0.03


@dataclass(frozen=True)
class Turn:
    """One service's share of a pair."""

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


def serve_without_telemetry() -> int:
    """`asr serve` with the stages, the batches and the middleware of telemetry taken out."""
    import api.main
    from api.cli import main as asr
    from api.telemetry import Batch, Stage, Telemetry

    def nothing(*_: object, **__: object) -> None:
        return None

    def enter(self: object) -> object:
        return self

    for part in (Stage, Batch):
        part.__enter__ = enter  # type: ignore[method-assign, assignment]
        part.__exit__ = nothing  # type: ignore[method-assign]
    for name in ("record_stage", "transcribed", "set_attributes", "span_context"):
        setattr(Telemetry, name, nothing)
    vars(api.main)["instrument"] = nothing
    return asr(["serve"])


@contextlib.contextmanager
def service(model: str, models_dir: Path, *, silent: bool, endpoint: str) -> Iterator[Running]:
    """One of the two services, ready."""
    port = free_port()
    environment = {
        "ASR_PORT": str(port),
        "ASR_MODELS": model,
        "ASR_MODELS_DIR": str(models_dir),
        "ASR_CALIBRATE": "false",
        "ASR_LOG_FORMAT": "json",
        "ASR_LOG_LEVEL": "warning",  # the request log is not what is measured
        "OTEL_EXPORTER_OTLP_ENDPOINT": "" if silent else endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
    }
    call = "loadtest.bench_telemetry", "--serve-without-telemetry"
    command = [sys.executable, "-m", *(call if silent else ("api.cli", "serve"))]
    with server(command, port, "/health/ready", environment, timeout_s=300.0) as running:
        yield running


async def turn(running: Running, forms: Sequence[Form], requests: int, texts: dict[str, str]) -> Turn:
    """`requests` requests by two callers; every text must be the one that the clip gave before."""
    cpu_s, start_s = running.cpu_s(), time.perf_counter()
    left = requests
    async with httpx.AsyncClient(base_url=running.base_url, timeout=120.0, trust_env=False) as client:

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

        await asyncio.gather(*(caller() for _ in range(CLIENTS)))
    elapsed_s = time.perf_counter() - start_s
    return Turn(requests / elapsed_s, (running.cpu_s() - cpu_s) / requests)


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the medians of 2,000 resamples."""
    chance = random.Random(7)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(2000))
    return medians[49], medians[1949]


def report(name: str, costs: Sequence[float]) -> dict[str, float]:
    """Print one line; the same as numbers."""
    low, high = interval_of_median(costs)
    median = statistics.median(costs)
    print(f"{name:34} {median:+7.2%}   [{low:+.2%}, {high:+.2%}]")
    return {"median": round(median, 5), "low": round(low, 5), "high": round(high, 5)}


def run(model: str, models_dir: Path, clip_s: float, requests: int, pairs: int) -> dict[str, object]:
    """Measure; prints the table, returns what the JSON line says."""
    clips, source = cut_clips([clip_s] * 8)
    forms = [make_form(clip) for clip in clips]
    texts: dict[str, str] = {}
    with collector() as (endpoint, handler), contextlib.ExitStack() as stack:
        full = stack.enter_context(service(model, models_dir, silent=False, endpoint=endpoint))
        silent = stack.enter_context(service(model, models_dir, silent=True, endpoint=endpoint))
        for running in (full, silent):
            asyncio.run(turn(running, forms, max(16, requests // 2), texts))
        measured: list[tuple[Turn, Turn]] = []
        for pair in range(pairs):
            order = (full, silent) if pair % 2 == 0 else (silent, full)
            turns = {each.base_url: asyncio.run(turn(each, forms, requests, texts)) for each in order}
            measured.append((turns[full.base_url], turns[silent.base_url]))
        exports = handler.exports
        metrics = httpx.get(f"{full.base_url}/metrics").text
    if exports == 0 or 'asr_requests_total{model="' not in metrics:
        raise RuntimeError("the service under test traced nothing")
    print(f"{model}, {clip_s:g} s clips ({source}), {CLIENTS} callers, {pairs} pairs of {requests} requests")
    print(f"{hardware()}; load average {os.getloadavg()[0]:.1f}; {exports} exports of spans\n")
    print(f"{'cost of telemetry':34} {'median':>7}   [95 % interval]")
    throughput = report("throughput lost", [1 - a.requests_per_s / b.requests_per_s for a, b in measured])
    cpu = report(
        "CPU per request added", [a.cpu_s_per_request / b.cpu_s_per_request - 1 for a, b in measured]
    )
    per_request_ms = statistics.median(b.cpu_s_per_request for _, b in measured) * 1000
    print(f"{'CPU per request without telemetry':34} {per_request_ms:7.2f} ms")
    return {
        "throughput_lost": throughput,
        "cpu_added": cpu,
        "cpu_ms_per_request": round(per_request_ms, 3),
        "limit": LIMIT,
        "pairs": pairs,
        "requests": requests,
    }


def main() -> int:
    """Run the measurement, or (for itself) the service without telemetry."""
    parser = argparse.ArgumentParser(description="What telemetry costs, measured in pairs.")
    parser.add_argument("--model", default="en-quartznet-small")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    parser.add_argument("--clip-s", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--serve-without-telemetry", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_without_telemetry:
        return serve_without_telemetry()
    outcome = run(options.model, options.models_dir, options.clip_s, options.requests, options.pairs)
    print(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
