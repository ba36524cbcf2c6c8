"""A restart under load, seen by a real Prometheus: no request is missing from its sums."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

import httpx
import pytest

from loadtest.local_stack import LocalStack, MissingProgramError, PrometheusApi
from loadtest.processes import LiveServer, free_port
from tests.telemetry.live import clip, settings, stack

__all__ = ["stack"]

pytestmark = pytest.mark.telemetry


class Callers:
    """Threads that transcribe until told to stop, and count the answers."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.answered = 0
        self.refusals: set[str] = set()
        self._url = url
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{self._url}/transcribe", files={"file": clip()}, timeout=30.0)
            except httpx.TransportError:  # nobody listens, or closed with this one in the backlog
                time.sleep(0.05)
                continue
            if answer.status_code == 200:
                with self._lock:
                    self.answered += 1
            else:
                self.refusals.add(answer.json()["error"]["code"])
            time.sleep(0.02)


def total_with_resets(prometheus: PrometheusApi, selector: str) -> float:
    """What a counter has counted in the last ten minutes, over all its restarts, from the raw samples."""
    total = 0.0
    for series in prometheus.query(f"{selector}[10m]"):
        previous = 0.0
        for _, text in series["values"]:
            value = float(text)
            total += value - previous if value >= previous else value
            previous = value
    return total


def test_no_request_is_lost_from_the_sums_in_a_restart_that_drains(stack: LocalStack) -> None:
    variables = settings(stack.folder / "models", ASR_DRAIN_GRACE_S="0.5", ASR_PORT=str(free_port()))
    first = stack.api(variables)
    try:
        monitor = stack.prometheus({"asr-api": [first.address]}, interval_s=2.0)
    except MissingProgramError as missing:
        pytest.skip(str(missing))
    prometheus = PrometheusApi(monitor.url)
    try:
        wait_until(lambda: prometheus.value('up{job="asr-api"}') == 1)
        with Callers(first.url) as callers:
            time.sleep(4.0)
            assert first.terminate() == 0  # while requests are on their way
            before = callers.answered
            second = stack.api(variables)
            wait_until(lambda: callers.answered > before + 5)
        assert callers.refusals <= {"not_ready", "draining"}
        assert before > 5
        wait_for_scrape_of(prometheus, second)
        selector = 'asr_requests_total{outcome="ok",route="/transcribe"}'
        assert total_with_resets(prometheus, selector) == callers.answered
    finally:
        prometheus.close()


def wait_until(done: Callable[[], bool], timeout_s: float = 120.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def wait_for_scrape_of(prometheus: PrometheusApi, api: LiveServer) -> None:
    """Wait until Prometheus has what `api` shows now."""
    line = next(
        line
        for line in httpx.get(f"{api.url}/metrics").text.splitlines()
        if line.startswith("asr_requests_total") and 'outcome="ok"' in line and not line.endswith(" 0.0")
    )
    wanted = float(line.rpartition(" ")[2])
    wait_until(lambda: prometheus.value('max(asr_requests_total{outcome="ok"})') == wanted)
