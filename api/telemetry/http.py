"""The HTTP edge: request ids, the request's metrics and log line, the server span, ``GET /metrics``."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI
from opentelemetry import context, trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.telemetry.core import Telemetry
from api.telemetry.logs import is_logged
from api.telemetry.metrics import LIVE_ROUTES, TRANSCRIPTION_ROUTES, UNMATCHED_ROUTE, is_transcription
from api.telemetry.record import RequestEnd, RequestRecord, _current, current_record, request_id_in_logs
from api.telemetry.scrape import SCRAPER_HEADER
from api.telemetry.server_span import is_utf8
from api.telemetry.spans import RequestSpan, without_query

_log = structlog.get_logger("api.request")

OnError = Callable[[Exception, str], Response]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
_QUIET_ROUTES = re.compile(r"^/(health|metrics)(/|$)")
# Searched in the whole URL: probes and scrapes make no spans.
EXCLUDED_URLS = r"^[a-z]+://[^/]+/health(/|\?|$),^[a-z]+://[^/]+/metrics(\?|$)"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
CLIENT_CLOSED = 499


def instrument(app: FastAPI, telemetry: Telemetry, on_error: OnError) -> None:
    """Put ``app`` under observation; call it after every other middleware is added.

    `on_error` turns an exception that nobody handled, and the request id, into the answer.
    """
    app.add_middleware(TelemetryMiddleware, telemetry=telemetry, on_error=on_error)
    if telemetry.tracing is None:
        return
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=telemetry.tracing.provider,
        meter_provider=NoOpMeterProvider(),  # the durations are ours, on /metrics
        excluded_urls=EXCLUDED_URLS,
        exclude_spans=["receive", "send"],
        server_request_hook=_without_query,
    )
    app.build_middleware_stack = _around_instrumentation(  # type: ignore[method-assign]
        app.build_middleware_stack
    )


def _around_instrumentation(build: Callable[[], ASGIApp]) -> Callable[[], ASGIApp]:
    """Requests whose spans are ours go past the instrumentation, which would look at their URL first.

    So does one with a header that the instrumentation cannot read: it would fail, and nobody would count it.
    """

    def build_middleware_stack() -> ASGIApp:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

        stack = build()
        middleware = getattr(stack, "app", None)
        if not isinstance(middleware, OpenTelemetryMiddleware):
            raise TypeError("The FastAPI instrumentation is not where it was.")
        instrumented, plain = middleware, middleware.app

        async def way(scope: Scope, receive: Receive, send: Send) -> None:
            past = _makes_own_span(scope) or not is_utf8(scope)
            await (plain if past else instrumented)(scope, receive, send)

        vars(stack)["app"] = way
        return stack

    return build_middleware_stack


def _makes_own_span(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] in TRANSCRIPTION_ROUTES


def _without_query(span: trace.Span, scope: Scope) -> None:
    if scope.get("query_string") and isinstance(span, ReadableSpan):
        span.set_attributes(without_query(span.attributes or {}))


def metrics_response(telemetry: Telemetry, request: Request) -> Response:
    """The answer of ``GET /metrics``: OpenMetrics with exemplars where asked for, else the text format."""
    if SCRAPER_HEADER in request.headers:
        telemetry.scrapes.scraped()
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(telemetry.metrics.registry), headers={"content-type": content_type})


def request_id_of(scope: Scope, span: RequestSpan | None) -> str:
    """The id of this request, 8 to 64 characters.

    The caller's ``x-request-id`` where it has a sane one (a proxy's log then agrees with ours), else the
    trace id, else a random one. The log line and the span carry both ids.
    """
    given = traceparent = b""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value
        elif name == b"traceparent":
            traceparent = value
    if given and _REQUEST_ID.fullmatch(given):
        return bytes(given).decode("ascii")
    if span is not None:
        return f"{span.trace_id:032x}"
    current = trace.get_current_span().get_span_context()
    if current.is_valid:
        return f"{current.trace_id:032x}"
    match = _TRACEPARENT.fullmatch(traceparent)
    if match:
        return match.group(1).decode("ascii")
    return f"{random.getrandbits(128):032x}"


class TelemetryMiddleware:
    """Counts, times and logs every request, whatever way it ends.

    A WebSocket is one until it is accepted; then it counts its utterances.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, on_error: OnError) -> None:
        self.app = app
        self.telemetry = telemetry
        self.on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        tracing = self.telemetry.tracing
        if tracing is None or not _makes_own_span(scope):
            await self._observe(_Exchange(self.telemetry, scope, receive, send))
            return
        span = tracing.requests.begin(scope)
        token = context.attach(trace.set_span_in_context(span, span.parent))
        try:
            await self._observe(_Exchange(self.telemetry, scope, receive, send, span))
        finally:
            context.detach(token)

    async def _observe(self, exchange: _Exchange) -> None:
        record_before = _current.set(exchange.record)
        id_before = request_id_in_logs.set(exchange.request_id)
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except Exception as error:
            await self._unhandled(error, exchange)
        finally:
            # Reached without a last body message: the task was cancelled, or the answer was cut off.
            exchange.finish(cut_off=True)
            request_id_in_logs.reset(id_before)
            _current.reset(record_before)

    async def _unhandled(self, error: Exception, exchange: _Exchange) -> None:
        if exchange.disconnected:
            return
        _log.error("unhandled_exception", exc_info=error)
        exchange.error = error
        trace.get_current_span().record_exception(error)
        if exchange.status:
            exchange.failed_late = True
            raise error
        response = self.on_error(error, exchange.request_id)
        await response(exchange.scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer, watched from both sides."""

    def __init__(
        self,
        telemetry: Telemetry,
        scope: Scope,
        receive: Receive,
        send: Send,
        span: RequestSpan | None = None,
    ) -> None:
        """`span` is begun and the current one; None where the instrumentation, or nobody, makes it."""
        self.telemetry = telemetry
        self.scope = scope
        self._receive = receive
        self._send = send
        self.request_id = request_id_of(scope, span)
        self.status = 0
        self.disconnected = False
        self.failed_late = False
        self.error: Exception | None = None
        self._finished = False
        self.record: RequestRecord | None = None
        self._origin = span if span is not None else telemetry.origin()
        is_socket = scope["type"] == "websocket"
        if is_socket or is_transcription(scope):
            known = not is_socket or scope["path"] in LIVE_ROUTES.values()
            self.record = RequestRecord(
                request_id=self.request_id,
                route=scope["path"] if known else UNMATCHED_ROUTE,
                origin=self._origin,
            )
            telemetry.request_began()
        self.start_s = time.perf_counter() if self.record is None else self.record.start_s

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] in ("http.disconnect", "websocket.disconnect") and not self._finished:
            self.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            self._finished = True
            self.telemetry.session_began()
            _current.set(None)
        elif kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            headers.append((b"x-request-id", self.request_id.encode("ascii")))
            if self.record is not None and self.record.stages_s:
                headers.append((b"server-timing", self.record.server_timing().encode("ascii")))
        elif kind.endswith("http.response.body") and not message.get("more_body", False):
            # Before the last byte leaves: the span is still open, and a caller that has its answer finds it
            # counted on /metrics.
            self.finish()
        await self._send(message)

    def finish(self, *, cut_off: bool = False) -> None:
        """Write the request out, once."""
        if self._finished:
            return
        self._finished = True
        elapsed_s = time.perf_counter() - self.start_s
        cancelled = self.disconnected or (cut_off and not self.failed_late) or self.status == CLIENT_CLOSED
        status = CLIENT_CLOSED if cancelled else 500 if self.failed_late else self.status
        method, route = self.scope.get("method", "GET"), self._route()
        if self.record is not None and self.failed_late:
            self.record.failed("internal_error", 500)
        end = RequestEnd(
            method=method if method in _METHODS else "_OTHER",
            route=route,
            status=status,
            answered=self.status,
            elapsed_s=elapsed_s,
            end_ns=time.time_ns(),
            cancelled=cancelled,
            error=self.error,
            cut_off=self.failed_late,
            origin=self._origin,
        )
        self.telemetry.request_ended(end, self.record)
        level = logging.DEBUG if _QUIET_ROUTES.match(self.scope["path"]) else logging.INFO
        if is_logged(level):
            duration_ms = round(elapsed_s * 1000, 2)
            fields = self._log_fields()
            _log.log(
                level, "request", method=method, route=route, status=status, duration_ms=duration_ms, **fields
            )

    def _route(self) -> str:
        if self.record is not None:
            return self.record.route
        route = getattr(self.scope.get("route"), "path", None)
        return route if isinstance(route, str) else UNMATCHED_ROUTE

    def _log_fields(self) -> dict[str, Any]:
        record = self.record
        if record is None:
            return {}
        fields: dict[str, Any] = {
            "outcome": record.outcome,
            "model": record.model,
            "audio_s": round(record.audio_s, 3),
        }
        if record.stages_s:
            fields["stages_ms"] = {
                stage: round(elapsed_s * 1000, 2) for stage, elapsed_s in record.stages_s.items()
            }
        if record.error_code is not None:
            fields["error_code"] = record.error_code
        caller = self.scope.get("state", {}).get("key_name")
        if caller is not None:
            fields["caller"] = caller
        return fields


def request_id() -> str | None:
    """The id of the transcription request this code runs for."""
    record = current_record()
    return record.request_id if record is not None else None
