"""A steady load of transcriptions from clients that retry as HTTP clients do, every answer checked.

The retry rule is that of the OpenAI Python client: connection errors, 408, 409, 429 and 5xx are tried again
twice, after the server's Retry-After or half a second doubling. A request *failed* when the client gave up,
or when the text is not the text of the clip that was sent.
"""

from __future__ import annotations

import asyncio
import collections
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

MAX_RETRIES = 2
RETRIED_STATUSES = frozenset({408, 409, 429})


@dataclass(frozen=True)
class Clip:
    """A file and the text that the service gave for it while nothing else happened."""

    name: str
    data: bytes
    text: str


@dataclass
class Tally:
    """What the clients saw. ``retried`` counts attempts by cause; ``failures`` says what and when."""

    answered: int = 0
    retried: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)

    def line(self) -> str:
        """One line for people."""
        ordered = sorted(self.latencies_s) or [0.0]
        p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.50, 0.99))
        causes = ", ".join(f"{cause} {count}" for cause, count in sorted(self.retried.items())) or "none"
        return (
            f"{self.answered} answered, {len(self.failures)} failed, retried: {causes}; "
            f"p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms"
        )


def _cause(outcome: httpx.Response | httpx.TransportError) -> str | None:
    """Why an attempt is repeated, or None when it is final."""
    if isinstance(outcome, httpx.TransportError):
        return type(outcome).__name__
    if outcome.status_code in RETRIED_STATUSES or outcome.status_code >= 500:
        return str(outcome.status_code)
    return None


def _delay_s(outcome: httpx.Response | httpx.TransportError, attempt: int) -> float:
    if isinstance(outcome, httpx.Response):
        after = outcome.headers.get("retry-after", "")
        if after.replace(".", "", 1).isdigit() and float(after) <= 60:
            return float(after)
    return float(min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.0))


async def transcribe(client: httpx.AsyncClient, name: str, data: bytes, tally: Tally) -> str | None:
    """The text of one file, after retries; None when the client gave up (the tally knows why)."""
    for attempt in range(MAX_RETRIES + 1):
        outcome: httpx.Response | httpx.TransportError
        try:
            outcome = await client.post("/transcribe", files={"file": (name, data)})
        except httpx.TransportError as error:
            outcome = error
        cause = _cause(outcome)
        if cause is None:
            assert isinstance(outcome, httpx.Response)
            if outcome.status_code == 200:
                return str(outcome.json()["text"])
            tally.failures.append(
                f"{time.strftime('%H:%M:%S')} {name}: {outcome.status_code} {outcome.text[:200]}"
            )
            return None
        tally.retried[cause] += 1
        if attempt < MAX_RETRIES:
            await asyncio.sleep(_delay_s(outcome, attempt))
    tally.failures.append(
        f"{time.strftime('%H:%M:%S')} {name}: gave up after {MAX_RETRIES} retries ({cause})"
    )
    return None


async def learn(url: str, files: list[Path], headers: dict[str, str]) -> list[Clip]:
    """Transcribe each file once, in peace. Raises RuntimeError when one fails."""
    clips = []
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        for path in files:
            data = path.read_bytes()
            text = await transcribe(client, path.name, data, tally)
            if text is None:
                raise RuntimeError(f"the service does not transcribe {path.name}: {tally.failures}")
            clips.append(Clip(path.name, data, text))
    return clips


class Load:
    """``clients`` concurrent clients, each with its own kept connections, until the block ends.

    Each thinks for up to ``think_s`` between requests: the proof is about failures, not about saturation.
    """

    def __init__(
        self, url: str, clips: list[Clip], clients: int, headers: dict[str, str], think_s: float = 0.3
    ) -> None:
        self._think_s = think_s
        self.tally = Tally()
        self._url, self._clips, self._clients, self._headers = url, clips, clients, headers
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._client(index)) for index in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()  # what was sent is waited for: nothing is cut off by the test itself
        await asyncio.gather(*self._tasks)

    async def answered(self, count: int, timeout_s: float = 120.0) -> None:
        """Wait until so many more requests were answered. Raises TimeoutError."""
        target, deadline_s = self.tally.answered + count, time.monotonic() + timeout_s
        while self.tally.answered < target:
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"{self.tally.answered} of {target} answers after {timeout_s:.0f} s: {self.tally.line()}"
                )
            await asyncio.sleep(0.1)

    async def _client(self, index: int) -> None:
        shuffled = random.Random(index)
        async with httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=60) as client:
            while not self._stopping.is_set():
                clip = shuffled.choice(self._clips)
                started_s = time.monotonic()
                text = await transcribe(client, clip.name, clip.data, self.tally)
                if text is None:
                    continue
                self.tally.latencies_s.append(time.monotonic() - started_s)
                self.tally.answered += 1
                if text != clip.text:
                    self.tally.failures.append(f"{clip.name}: {text!r} instead of {clip.text!r}")
                await asyncio.sleep(shuffled.uniform(0, self._think_s))
