"""Closed-loop and open-loop load on an HTTP transcription route, with every answer kept.

Closed loop: N clients, each sends its next request when the answer came; measures capacity.
Open loop: requests leave on a Poisson schedule whatever comes back; latency counts from the scheduled moment,
so a server that stalls cannot hide the requests that would have come meanwhile (coordinated omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import numpy as np

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Clip:
    """One encoded audio file and its length."""

    name: str
    content: bytes
    duration_s: float


@dataclass(frozen=True)
class Form:
    """A multipart body built once, so that the load generator spends its time on sending."""

    clip: Clip
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What came back: status 0 stands for a connection that broke."""

    clip: Clip
    status: int
    latency_s: float
    text: str
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    retry_after_s: float | None = None


def make_form(clip: Clip, fields: Mapping[str, str] | None = None) -> Form:
    """`clip` as multipart/form-data with the file as the last part."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in (fields or {}).items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{clip.name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n".encode()
    )
    parts += [clip.content, f"\r\n--{boundary}--\r\n".encode()]
    return Form(clip, f"multipart/form-data; boundary={boundary}", b"".join(parts))


def parse_server_timing(header: str | None) -> dict[str, float]:
    """`Server-Timing: decode;dur=1.2, inference;dur=30` as milliseconds by stage (W3C Server Timing)."""
    stages: dict[str, float] = {}
    for entry in (header or "").split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key == "dur":
                stages[name] = float(value)
    return stages


class Poster:
    """POSTs forms to one URL over kept-alive HTTP/1.1 connections, with as little work as possible.

    Generator and server share the cores: a general client takes 2 ms of processor time for a request, this
    one a tenth. It reads what the measured servers send, answers with a content-length. A context manager;
    leaving it closes the connections.
    """

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url}: expected http://host:port/path")
        self._address = parts.hostname, parts.port or 80
        self._head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        self._timeout_s = timeout_s
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        self._idle.clear()

    async def post(self, form: Form) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body.

        Raises OSError, EOFError, TimeoutError or ValueError for a connection that breaks or is no HTTP.
        """
        async with asyncio.timeout(self._timeout_s):
            reader, writer = await self._connection()
            try:
                head = f"Content-Type: {form.content_type}\r\nContent-Length: {len(form.body)}\r\n\r\n"
                writer.write((self._head + head).encode() + form.body)
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                fields = (line.partition(":") for line in lines[1:] if line)
                headers = {name.lower(): value.strip() for name, _, value in fields}
                body = await reader.readexactly(int(headers["content-length"]))
                status = int(lines[0].split(" ", 2)[1])
            except BaseException:
                writer.close()
                raise
        if headers.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return status, headers, body

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)


async def send(client: Poster, form: Form, scheduled_s: float | None = None) -> Answer:
    """One request; latency from `scheduled_s` (time.perf_counter) or from now."""
    start_s = time.perf_counter() if scheduled_s is None else scheduled_s
    try:
        status, headers, body = await client.post(form)
        text = json.loads(body).get("text", "") if status == 200 else ""
    except (OSError, EOFError, TimeoutError, LookupError, ValueError, asyncio.LimitOverrunError):
        return Answer(form.clip, 0, time.perf_counter() - start_s, "")
    latency_s = time.perf_counter() - start_s
    retry_after = headers.get("retry-after")
    return Answer(
        form.clip,
        status,
        latency_s,
        text,
        parse_server_timing(headers.get("server-timing")),
        float(retry_after) if retry_after else None,
    )


async def closed_loop(
    url: str, forms: Sequence[Form], clients: int, duration_s: float
) -> tuple[list[Answer], float]:
    """`clients` callers for `duration_s`; the answers, and the seconds until the last one came."""
    answers: list[Answer] = []
    start_s = time.perf_counter()
    async with Poster(url) as http:

        async def caller(number: int) -> None:
            turn = number
            while time.perf_counter() - start_s < duration_s:
                answers.append(await send(http, forms[turn % len(forms)]))
                turn += clients

        await asyncio.gather(*(caller(number) for number in range(clients)))
    return answers, time.perf_counter() - start_s


async def open_loop(
    url: str, forms: Sequence[Form], rate_per_s: float, duration_s: float, seed: int = 0
) -> tuple[list[Answer], float]:
    """Poisson arrivals at `rate_per_s` for `duration_s`; the answers, and the seconds until the last."""
    generator = random.Random(seed)
    start_s = time.perf_counter()
    scheduled_s = start_s
    pending: list[asyncio.Task[Answer]] = []
    async with Poster(url) as http:
        turn = 0
        while True:
            scheduled_s += generator.expovariate(rate_per_s)
            if scheduled_s - start_s > duration_s:
                break
            await asyncio.sleep(max(0.0, scheduled_s - time.perf_counter()))
            pending.append(asyncio.create_task(send(http, forms[turn % len(forms)], scheduled_s)))
            turn += 1
        answers = list(await asyncio.gather(*pending))
    return answers, time.perf_counter() - start_s


@dataclass(frozen=True)
class Summary:
    """Figures of one run; latencies of the answers with status 200."""

    requests: int
    succeeded: int
    by_status: dict[int, int]
    requests_per_s: float
    audio_s_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


def summarise(answers: Sequence[Answer], elapsed_s: float) -> Summary:
    """Throughput and latency percentiles (NaN where nothing succeeded)."""
    good = [answer for answer in answers if answer.status == 200]
    latencies_ms = np.array([answer.latency_s * 1000 for answer in good])
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99]) if good else (np.nan,) * 3
    statuses = sorted({answer.status for answer in answers})
    return Summary(
        requests=len(answers),
        succeeded=len(good),
        by_status={status: sum(answer.status == status for answer in answers) for status in statuses},
        requests_per_s=len(good) / elapsed_s,
        audio_s_per_s=sum(answer.clip.duration_s for answer in good) / elapsed_s,
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
    )
