"""A service in memory for the page's unit tests: answers that follow the wire contract (MockTransport)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from ui.client import AsrClient
from ui.retry import RetryPolicy
from ui.settings import UiSettings

TRANSCRIPT: dict[str, Any] = {
    "id": "tr_1",
    "text": "the quick brown fox",
    "duration": 2.5,
    "processing_time": 0.1,
    "real_time_factor": 0.04,
    "language": "en",
    "model": "en-small",
    "timestamp": "2026-01-01T00:00:00Z",
    "confidence": 0.9,
    "words": [
        {"word": "the", "start": 0.1, "end": 0.3, "confidence": 0.99},
        {"word": "quick", "start": 0.4, "end": 0.8, "confidence": 0.8},
        {"word": "brown", "start": 0.9, "end": 1.3, "confidence": 0.5},
        {"word": "fox", "start": 1.4, "end": 1.9, "confidence": 0.95},
    ],
    "segments": [{"id": 0, "start": 0.1, "end": 1.9, "text": "the quick brown fox", "confidence": 0.9}],
}

Handler = Callable[[httpx.Request], httpx.Response]


def envelope(status: int, code: str, message: str = "no", **headers: str) -> httpx.Response:
    """An error answer in the OpenAI envelope."""
    body = {"error": {"message": message, "type": "some_error", "param": None, "code": code}}
    return httpx.Response(status, json=body, headers={"x-request-id": "req-1", **headers})


def sse(*frames: object) -> bytes:
    """An event stream: objects become JSON, strings go as they are; ``[DONE]`` is added."""
    texts = [frame if isinstance(frame, str) else json.dumps(frame) for frame in frames]
    return "".join(f"data: {text}\n\n" for text in [*texts, "[DONE]"]).encode()


class Script:
    """A handler that plays answers in order, repeats the last one, and remembers what was asked."""

    def __init__(self, *answers: httpx.Response | Exception | Handler) -> None:
        self.answers: Sequence[httpx.Response | Exception | Handler] = answers
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(request)


class Sleeps(list[float]):
    """Stands in for ``asyncio.sleep`` and remembers the waits."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client_for(handler: Handler, sleeps: Sleeps | None = None, **settings: Any) -> AsrClient:
    """A client whose network is ``handler``; it never really waits."""
    return AsrClient(
        UiSettings(**{"api_url": "http://service.test", **settings}),
        retry=RetryPolicy(jitter=lambda: 1.0),
        transport=httpx.MockTransport(handler),
        sleep=sleeps if sleeps is not None else Sleeps(),
    )
