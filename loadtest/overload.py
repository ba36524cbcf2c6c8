"""Three times the load the service can take: goodput, deadlines, honest Retry-After, liveness, recovery.

    python -m loadtest.overload [--model en-moonshine-tiny] [--seconds 120] [--factor 3]

First capacity (closed loop, eight clients), then Poisson arrivals at `factor` times that for `--seconds`. A
refused client waits as long as it was told and tries again, up to `--tries` times; new ones go on arriving
meanwhile. `/health/live` is asked ten times per second throughout. The service has half of the cores and the
callers the other half, as they are other machines in the field: three times a service's capacity is more work
for who sends it than for who refuses it. The last line is JSON.

Goodput is told in two ways. Of the capacity in requests, the mean of before and after: a host whose speed
changes meanwhile changes that as well. And of the processor time that the inference has at capacity, which it
does not: every accepted request is answered in time, so what inference still gets is what is of use.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from loadtest.clips import cut_clips
from loadtest.command import bundle_parser
from loadtest.load import Answer, Form, Poster, closed_loop, make_form, send, summarise
from loadtest.processes import LiveServer, Servers, hardware, on_cores, split_cores

DEADLINE_S = 20.0
QUEUE_S = 4.0  # of work at capacity that may wait
LIVENESS_EVERY_S = 0.1
CAPACITY_TEST_S = 8.0


@dataclass
class Watch:
    """A thread that asks for liveness and reads memory and processor time while the load runs."""

    running: LiveServer
    workers: int
    latencies_ms: list[float] = field(default_factory=list)
    failures: int = 0
    rss_mb: list[float] = field(default_factory=list)
    inference_s: list[tuple[float, float]] = field(default_factory=list)
    """Seconds from the start, and CPU seconds of the workers until then."""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began_s = time.perf_counter()
        with httpx.Client(trust_env=False, timeout=10.0) as client:
            while not self._stop.wait(LIVENESS_EVERY_S):
                start_s = time.perf_counter()
                try:
                    alive = client.get(f"{self.running.url}/health/live").status_code == 200
                except httpx.HTTPError:
                    alive = False
                self.latencies_ms.append((time.perf_counter() - start_s) * 1000)
                self.failures += not alive
                self.rss_mb.append(self.running.rss_mb())
                self.inference_s.append((start_s - began_s, self.running.busiest_threads_s(self.workers)))

    def inference_share(self, duration_s: float) -> float:
        """Of the workers' first `duration_s`, the part for which they had a processor."""
        spent = [entry for entry in self.inference_s if entry[0] <= duration_s]
        (first_s, before_s), (last_s, after_s) = spent[0], spent[-1]
        return (after_s - before_s) / (last_s - first_s) / self.workers


@dataclass
class Client:
    """One caller's answers, each with the seconds from the start at which it came."""

    answers: list[tuple[float, Answer]] = field(default_factory=list)


async def overload(
    url: str, forms: Sequence[Form], rate_per_s: float, duration_s: float, tries: int
) -> list[Client]:
    """Poisson arrivals; each client obeys Retry-After. Times are seconds from the start."""
    generator = random.Random(0)
    start_s = time.perf_counter()
    clients: list[Client] = []
    async with Poster(url, DEADLINE_S + 30) as http:

        async def caller(client: Client, form: Form) -> None:
            for _ in range(tries):
                answer = await send(http, form)
                client.answers.append((time.perf_counter() - start_s, answer))
                if answer.status != 429:
                    return
                await asyncio.sleep(answer.retry_after_s or 1.0)

        pending = []
        arrival_s = 0.0
        while (arrival_s := arrival_s + generator.expovariate(rate_per_s)) < duration_s:
            await asyncio.sleep(max(0.0, start_s + arrival_s - time.perf_counter()))
            clients.append(Client())
            pending.append(asyncio.create_task(caller(clients[-1], forms[len(clients) % len(forms)])))
        await asyncio.gather(*pending)
    return clients


def report(clients: Sequence[Client], capacity_per_s: float, duration_s: float) -> dict[str, float | int]:
    """The figures of the overload phase."""
    answers = [entry for client in clients for entry in client.answers]
    in_time = [answer for at, answer in answers if answer.status == 200 and at <= duration_s]
    accepted = [answer for _, answer in answers if answer.status == 200]
    second = [client.answers[1][1].status == 200 for client in clients if len(client.answers) > 1]
    other = [answer.status for _, answer in answers if answer.status not in (200, 429)]
    latencies_s = [answer.latency_s for answer in accepted]
    return {
        "clients": len(clients),
        "refused_first": sum(client.answers[0][1].status == 429 for client in clients),
        "goodput_of_capacity": len(in_time) / duration_s / capacity_per_s,
        "accepted_p99_s": float(np.percentile(latencies_s, 99)) if latencies_s else float("nan"),
        "next_try_succeeded": float(np.mean(second)) if second else float("nan"),
        "other_statuses": len(other),
    }


def capacity(running: LiveServer, forms: Sequence[Form], workers: int) -> tuple[float, float]:
    """Requests per second of eight clients, and the share of the time that the workers had a processor."""
    before_s, start_s = running.busiest_threads_s(workers), time.perf_counter()
    full = summarise(*asyncio.run(closed_loop(f"{running.url}/transcribe", forms, 8, CAPACITY_TEST_S)))
    spent_s = running.busiest_threads_s(workers) - before_s
    return full.requests_per_s, spent_s / (time.perf_counter() - start_s) / workers


async def recovery(url: str, form: Form, usual_s: float) -> float:
    """Seconds until one request alone takes less than three times its usual time."""
    start_s = time.perf_counter()
    async with Poster(url, 60) as http:
        while time.perf_counter() - start_s < 60:
            answer = await send(http, form)
            if answer.status == 200 and answer.latency_s < 3 * usual_s:
                return time.perf_counter() - start_s
            await asyncio.sleep(0.2)
    return float("inf")


@contextlib.contextmanager
def started(model: str, models_dir: Path, cores: Sequence[int], **limits: object) -> Iterator[LiveServer]:
    """The service on `cores`, ready."""
    with Servers() as servers:
        with on_cores(cores):
            running = servers.api_with(model, models_dir, **limits)
        yield running


def main() -> None:
    """The command."""
    parser = bundle_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--tries", type=int, default=4)
    given = parser.parse_args()
    forms = [make_form(clip) for clip in cut_clips([3.0, 4.0, 5.0, 6.0, 7.0])[0]]
    audio_s = float(np.mean([form.clip.duration_s for form in forms]))
    service_cores, caller_cores = split_cores()
    workers = len(service_cores)
    with on_cores(caller_cores):
        with started(given.model, given.models_dir, service_cores) as running:
            asyncio.run(closed_loop(f"{running.url}/transcribe", forms, 2, 2.0))
            at_first, _ = capacity(running, forms, workers)
        limit_s = round(at_first * audio_s * QUEUE_S)
        limits = {"queue_limit_audio_s": limit_s, "request_timeout_s": DEADLINE_S}
        with started(given.model, given.models_dir, service_cores, **limits) as running:
            url = f"{running.url}/transcribe"
            asyncio.run(closed_loop(url, forms, 2, 2.0))
            alone = summarise(*asyncio.run(closed_loop(url, forms, 1, 3.0)))
            before, share_before = capacity(running, forms, workers)
            with Watch(running, workers) as watch:
                rate_per_s = given.factor * before
                clients = asyncio.run(overload(url, forms, rate_per_s, given.seconds, given.tries))
            recovered_s = asyncio.run(recovery(url, forms[2], alone.p50_ms / 1000))
            after, share_after = capacity(running, forms, workers)
    figures = report(clients, (before + after) / 2, given.seconds)
    figures |= {
        "goodput_of_inference": 2 * watch.inference_share(given.seconds) / (share_before + share_after),
        "capacity_before_per_s": before,
        "capacity_after_per_s": after,
        "deadline_s": DEADLINE_S,
        "liveness_p99_ms": float(np.percentile(watch.latencies_ms, 99)),
        "liveness_failures": watch.failures,
        "rss_first_mb": watch.rss_mb[min(10, len(watch.rss_mb) - 1)],
        "rss_most_mb": max(watch.rss_mb),
        "recovered_s": recovered_s,
    }
    load = f"{given.factor:g} times capacity for {given.seconds:g} s"
    print(f"{given.model}, clips of 3 to 7 s, {load}, {hardware()}, {len(service_cores)} for the service")
    for name, value in figures.items():
        print(f"{name:>22}  {value:.3f}" if isinstance(value, float) else f"{name:>22}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
