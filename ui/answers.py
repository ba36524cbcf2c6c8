"""From HTTP answers to typed values and typed errors: the reading half of ``client.py``."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx

from ui.errors import (
    ApiError,
    ApiProtocolError,
    ApiStatusError,
    ApiTimeoutError,
    ApiUnreachableError,
    status_error,
)
from ui.retry import retry_after_s
from ui.sse import SseError, events
from ui.tracing import SpanHandle
from ui.transcript import Transcript

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_SERVER_TIMING = re.compile(r"\s*([^\s;,]+)[^,]*?;\s*dur=([0-9.]+)")
_UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL)


async def stream_events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a stream until ``[DONE]``.

    Raises:
        ApiProtocolError: what came is no stream of events.
        ApiStatusError: the service says in the stream that it failed.
    """
    try:
        async for data in events(response.aiter_bytes()):
            if data == "[DONE]":
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ApiProtocolError("The service's stream carries something that is not an event.")
            if "error" in event:
                raise status_error(0, event, request_id=response.headers.get("x-request-id", ""))
            yield event
    except (SseError, json.JSONDecodeError) as error:
        raise ApiProtocolError(f"The service's stream cannot be read: {error}.") from error


def from_done(event: dict[str, Any], *, language: str, model: str) -> Transcript:
    """The last event as a transcript; a plain one (another server's) has only text and a duration."""
    usage = event.get("usage")
    seconds = usage.get("seconds", 0.0) if isinstance(usage, dict) else 0.0
    defaults = {"duration": seconds, "language": language, "model": model}
    return Transcript.from_json({**defaults, **event})


def finish(transcript: Transcript, response: httpx.Response, span: SpanHandle) -> Transcript:
    """The transcript with what the headers say: identifiers, and stage times where the body has none."""
    return transcript.with_trace(
        request_id=response.headers.get("x-request-id", ""),
        trace_id=response.headers.get("x-trace-id", "") or span.trace_id,
        stages_s=_server_timing(response.headers.get("server-timing", "")),
    )


def batch_entry(entry: object, response: httpx.Response, span: SpanHandle) -> Transcript | ApiError:
    """One file's place in a batch: its transcript, or its error."""
    fields = entry if isinstance(entry, dict) else {}
    if fields.get("error"):
        return status_error(0, fields, request_id=response.headers.get("x-request-id", ""))
    return finish(Transcript.from_json(fields.get("transcription")), response, span)


def _server_timing(header: str) -> dict[str, float]:
    """Stage times in seconds from a ``Server-Timing`` header, whose ``dur`` is in milliseconds (W3C)."""
    plain = _QUOTED.sub("", header)
    return {name: float(ms) / 1000 for name, ms in _SERVER_TIMING.findall(plain)}


def entries(body: object, key: str) -> list[object]:
    """The list in an answer: the body itself, or under ``key`` or ``data``. Raises ApiProtocolError."""
    if isinstance(body, dict):
        body = body.get(key, body.get("data"))
    if not isinstance(body, list):
        raise ApiProtocolError(f"The service's answer has no list of {key}.")
    return body


def seconds(value: object) -> float | None:
    """A number of seconds; None for what is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def decode(response: httpx.Response) -> object:
    """The body's JSON; None where it is none."""
    try:
        return response.json()
    except ValueError:
        return None


def json_body(response: httpx.Response) -> object:
    """The body's JSON. Raises ApiProtocolError."""
    body = decode(response)
    if body is None:
        raise ApiProtocolError("The address answers, but not as the speech service does.")
    return body


def failure(response: httpx.Response) -> ApiStatusError:
    """The typed error of an answer with an error status."""
    return status_error(
        response.status_code,
        decode(response),
        request_id=response.headers.get("x-request-id", ""),
        retry_after_s=retry_after_s(response.headers),
    )


def transport_failure(error: Exception, address: str) -> ApiError:
    """The typed error for what httpx raises when no answer came from ``address``."""
    if isinstance(error, _UNREACHABLE):
        return ApiUnreachableError(f"No connection to {address} could be made.")
    if isinstance(error, httpx.TimeoutException):
        return ApiTimeoutError(f"{address} did not answer in time.")
    return ApiUnreachableError(f"The connection to {address} was lost.")
