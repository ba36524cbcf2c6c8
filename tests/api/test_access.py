"""What counts against the rate limit, and what is asked before a transcription."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from api.access import Access

BURST = 2  # a tenth of the requests per minute


@pytest.mark.parametrize("path", ["/transcribe", "/transcribe/batch", "/v1/audio/transcriptions"])
@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_every_method_on_a_transcription_route_counts(path: str, method: str) -> None:
    assert _statuses(method, path, "POST", path) == [200, 200, 429]


@pytest.mark.parametrize("path", ["/models", "/", "/health/ready"])
def test_other_routes_do_not_count(path: str) -> None:
    assert _statuses("GET", path, "POST", "/transcribe") == [200, 200, 200]


def test_a_preflight_does_not_count() -> None:
    assert _statuses("OPTIONS", "/transcribe", "POST", "/transcribe") == [200, 200, 200]


def test_a_websocket_counts() -> None:
    opened, answered = [], []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        opened.append(scope["path"])

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        answered.append(message.get("status"))

    access = Access(app, (), rate_limit_per_minute=10 * BURST, check_room=lambda: None)
    scope = {"type": "websocket", "path": "/v1/realtime", "headers": [], "client": ("192.0.2.1", 1)}
    scope["extensions"] = {"websocket.http.response": {}}
    for _ in range(BURST + 1):
        asyncio.run(access(dict(scope), receive, send))
    assert len(opened) == BURST
    assert answered[0] == 429


def _statuses(first: str, first_path: str, last: str, last_path: str) -> list[int]:
    """Of as many first requests as the burst holds, and of one last."""
    access = Access(PlainTextResponse("ok"), (), rate_limit_per_minute=10 * BURST, check_room=lambda: None)

    async def send() -> list[int]:
        transport = httpx.ASGITransport(access)
        async with httpx.AsyncClient(transport=transport, base_url="http://asr.example") as client:
            answers = [await client.request(first, first_path) for _ in range(BURST)]
            answers.append(await client.request(last, last_path))
            return [answer.status_code for answer in answers]

    return asyncio.run(send())
