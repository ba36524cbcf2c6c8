"""Server-sent events: the text of each window as soon as it and all before it are done.

Whatever fails before the first text is an ordinary error answer; after it, a ``data: {"error": ...}`` frame.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Protocol

import structlog
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from api.errors import AsrError, ClientDisconnected, DrainingError, public
from api.multipart import Upload
from api.openai_format import delta_event, done_event
from api.routes.intake import Intake, request_id, unless_disconnected
from api.service import Service
from api.telemetry import current_record
from api.transcriber import Options, Transcriber
from api.transcript import Segment, Transcript
from api.windows import Progress

_log = structlog.get_logger("api.sse")

_WRITE_TIMEOUT_S = 60.0  # a caller that does not read is let go
_PING_S = 15.0  # a comment line keeps proxies from closing a quiet stream
_LAST_FRAME = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
]


class Details(Protocol):
    """What our own route tells beyond OpenAI's events."""

    def of_segment(self, segment: Segment) -> dict[str, Any]:
        """Fields for the delta that brings this segment."""

    def of_transcript(self, transcript: Transcript) -> dict[str, Any]:
        """Fields for the last event."""


async def stream_response(
    request: Request,
    service: Service,
    intake: Intake,
    transcriber: Transcriber,
    upload: Upload,
    options: Options,
    *,
    logprobs: bool = False,
    more: Details | None = None,
) -> Response:
    """The stream, once its first text is there; it releases ``intake`` at its end.

    ``more`` adds fields to the events of our own route; without it they are OpenAI's and nothing else.
    """
    record = current_record()
    if record is not None:
        record.transport = "sse"
    start_s = time.perf_counter()
    progress = Progress()
    parts = transcriber.stream(upload.file, options, progress)
    try:
        first = await unless_disconnected(request, _next_text(parts))
    except BaseException:
        await parts.aclose()
        raise
    intake.hand_over()

    async def frames() -> AsyncIterator[dict[str, Any]]:
        segments: list[Segment] = []
        part = first
        while part is not None:
            for segment in part:
                event = delta_event(segment, first=not segments, logprobs=logprobs)
                yield event if more is None else {**event, **more.of_segment(segment)}
                segments.append(segment)
            part = await _next_text(parts)
        elapsed_s = time.perf_counter() - start_s
        transcript = transcriber.finish(tuple(segments), options, progress, elapsed_s)
        event = done_event(transcript, logprobs=logprobs)
        yield event if more is None else {**event, **more.of_transcript(transcript)}

    return EventStream(request, service, intake, parts, frames())


async def _next_text(parts: AsyncGenerator[list[Segment], None]) -> list[Segment] | None:
    """Segments of the next window that has any; None at the end."""
    async for part in parts:
        if part:
            return part
    return None


class EventStream(Response):
    """Writes the frames; ends the work when the caller leaves."""

    def __init__(
        self,
        request: Request,
        service: Service,
        intake: Intake,
        parts: AsyncGenerator[list[Segment], None],
        frames: AsyncIterator[dict[str, Any]],
    ) -> None:
        super().__init__()
        self._request = request
        self._service = service
        self._intake = intake
        self._parts = parts
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sessions = self._service.telemetry.metrics.stream_sessions.labels("sse")
        sessions.inc()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            await unless_disconnected(self._request, self._write(send))
        except (ClientDisconnected, DrainingError) as error:
            record = current_record()
            if record is not None:
                record.failed(error.code, error.status)
            if isinstance(error, DrainingError):
                await send({"type": "http.response.body", "body": _frame(error.to_body()) + _LAST_FRAME})
        finally:
            sessions.dec()
            await self._parts.aclose()
            self._intake.release()

    async def _write(self, send: Send) -> None:
        lock = asyncio.Lock()

        async def write(data: bytes, *, more: bool = True) -> None:
            try:
                async with lock, asyncio.timeout(_WRITE_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": data, "more_body": more})
            except TimeoutError:
                raise ClientDisconnected("The client does not read its stream.") from None

        ping = asyncio.ensure_future(_ping(write))
        record = current_record()
        try:
            async for event in self._frames:
                if record is not None:
                    record.first_result()
                await write(_frame(event))
        except ClientDisconnected:
            raise
        except Exception as error:
            shown = public(error, request_id())
            if not isinstance(error, AsrError):
                _log.exception("unexpected error in a stream")
            if record is not None:
                record.failed(shown.code, shown.status)
            await write(_frame(shown.to_body()))
        finally:
            ping.cancel()
            await asyncio.gather(ping, return_exceptions=True)
        await write(_LAST_FRAME, more=False)


async def _ping(write: Any) -> None:
    while True:
        await asyncio.sleep(_PING_S)
        await write(b": ping\n\n")


def _frame(event: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
