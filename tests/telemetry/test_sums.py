"""The sums on /metrics are the requests that were sent, whatever became of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import httpx
import numpy as np

from api.telemetry.record import outcome_of
from loadtest.local_stack import LocalStack
from loadtest.processes import LiveServer
from tests.telemetry.live import MODEL, clip, metric_sum, settings, stack
from tests.tiny_bundle import sing, wav

__all__ = ["stack"]

KEY = "key-for-the-test-of-sums"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
ROUTES = ("/transcribe", "/v1/audio/transcriptions")


async def post(client: httpx.AsyncClient, kind: str, route: str, long_clip: bytes) -> str:
    """Send one request of `kind`; returns the outcome that the caller saw."""
    file, headers, model = clip(), AUTHORIZED, MODEL
    if kind == "not audio":
        file = b"once upon a time " * 20
    elif kind == "unknown model":
        model = "no-such-model"
    elif kind == "no key":
        headers = {}
    elif kind == "long":
        file = long_clip
    answer = await client.post(route, files={"file": file}, data={"model": model}, headers=headers)
    code = answer.json().get("error", {}).get("code") if answer.status_code >= 400 else None
    return outcome_of(answer.status_code, code)


async def leave(api: LiveServer, route: str) -> str:
    """Announce a large body, send a part of it, and hang up."""
    host, port = api.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST {route} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {KEY}\r\n"
        "content-type: multipart/form-data; boundary=b\r\ncontent-length: 1000000\r\n\r\n"
    )
    body = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + b"R" * 1000
    writer.write(head.encode() + body)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b"", "refused before it could leave"
    return "cancelled"


async def send_all(api: LiveServer, kinds: list[str], long_clip: bytes, at_once: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    turns = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, number: int, kind: str) -> None:
        route = ROUTES[number % 2]
        async with turns:
            seen[await (leave(api, route) if kind == "leave" else post(client, kind, route, long_clip))] += 1

    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(base_url=api.url, timeout=120.0, limits=limits) as client:
        await asyncio.gather(*(one(client, number, kind) for number, kind in enumerate(kinds)))
    return seen


async def test_500_mixed_requests_are_counted_by_outcome(stack: LocalStack) -> None:
    api = stack.api(
        settings(stack.folder / "models", ASR_API_KEYS=f"test:{KEY}", ASR_QUEUE_LIMIT_AUDIO_S="5")
    )
    long_clip = wav(np.tile(sing("bad cafe " * 10), 12))
    # Two rounds: in the first the queue overflows, and who leaves then might have been refused before.
    overload = ["good"] * 180 + ["not audio"] * 40 + ["unknown model"] * 20 + ["long"] * 60
    departures = (
        ["good"] * 80 + ["not audio"] * 20 + ["unknown model"] * 20 + ["no key"] * 40 + ["leave"] * 40
    )
    for kinds in (overload, departures):
        random.Random(4).shuffle(kinds)
    seen = await send_all(api, overload, long_clip, at_once=24)
    seen += await send_all(api, departures, long_clip, at_once=3)
    assert sum(seen.values()) == 500
    assert 40 <= seen["invalid"] <= 100
    assert seen["unauthorized"] == 40
    assert seen["cancelled"] == 40
    assert seen["ok"] > 100
    assert seen["rejected"] > 0, "the queue's limit was never met"

    counted = await asyncio.to_thread(settled, api, seen)
    assert counted == dict(seen)
    for outcome, status in (("ok", "200"), ("rejected", "429"), ("unauthorized", "401")):
        by_status = sum(
            metric_sum(
                api,
                "http_server_request_duration_seconds_count",
                http_route=route,
                http_response_status_code=status,
            )
            for route in ROUTES
        )
        assert by_status == seen[outcome]
    assert metric_sum(api, "asr_rejections_total", reason="queue_full") == seen["rejected"]
    assert metric_sum(api, "asr_audio_duration_seconds_count", model=MODEL) == seen["ok"]
    assert metric_sum(api, "asr_inflight_requests") == 0
    assert metric_sum(api, "asr_queue_depth") == 0


def settled(api: LiveServer, expected: Counter[str], timeout_s: float = 20.0) -> dict[str, int]:
    """Requests by outcome, once the callers that left are noticed too."""
    until_s = time.monotonic() + timeout_s
    while True:
        counted = {
            outcome: int(metric_sum(api, "asr_requests_total", outcome=outcome)) for outcome in expected
        }
        total = int(metric_sum(api, "asr_requests_total"))
        if total >= 500 or time.monotonic() > until_s:
            assert total == sum(counted.values()) == 500
            return counted
        time.sleep(0.2)
