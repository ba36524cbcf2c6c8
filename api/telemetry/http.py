"""The HTTP edge: request ids, the request's metrics and log line, the server span, ``GET /metrics``."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.telemetry.core import Telemetry
from api.telemetry.metrics import UNMATCHED_ROUTE, is_transcription
from api.telemetry.record import RequestRecord, _current, current_record
from api.telemetry.scrape import SCRAPER_HEADER

_log = structlog.get_logger("api.request")

OnError = Callable[[Exception, str], Response]
SpanDetails = Callable[[dict[Any, Any]], tuple[str, dict[str, Any]]]

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
    # Stable HTTP attributes (http.request.method, ...) instead of the old names.
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=telemetry.tracing.provider,
        meter_provider=NoOpMeterProvider(),  # the durations are ours, on /metrics
        excluded_urls=EXCLUDED_URLS,
        exclude_spans=["receive", "send"],
        server_request_hook=_without_query,
    )
    app.build_middleware_stack = _with_known_names(app.build_middleware_stack)  # type: ignore[method-assign]


def _without_query(span: trace.Span, scope: Scope) -> None:
    """What a caller wrote into the URL by mistake (a key, a prompt) stays out of traces."""
    if scope.get("query_string") and isinstance(span, ReadableSpan):
        span.set_attribute("url.query", "[removed]")
        # Of the older names, which OTEL_SEMCONV_STABILITY_OPT_IN can ask for.
        if url := (span.attributes or {}).get("http.url"):
            span.set_attribute("http.url", str(url).partition("?")[0])


def _with_known_names(build: Callable[[], ASGIApp]) -> Callable[[], ASGIApp]:
    """Let the instrumentation ask once what the spans of the transcription routes are called.

    With every request it would try the application's routes in turn, as the router does again afterwards.
    """

    def build_middleware_stack() -> ASGIApp:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

        stack = build()
        middleware = getattr(stack, "app", None)
        if isinstance(middleware, OpenTelemetryMiddleware):
            middleware.default_span_details = _remember(middleware.default_span_details)
        return stack

    return build_middleware_stack


def _remember(details: SpanDetails) -> SpanDetails:
    known: dict[str, tuple[str, dict[str, Any]]] = {}

    def remembered(scope: dict[Any, Any]) -> tuple[str, dict[str, Any]]:
        if scope["type"] != "http" or not is_transcription(scope):
            return details(scope)
        path = scope["path"]
        if path not in known:
            known[path] = details(scope)
        return known[path]

    return remembered


def metrics_response(telemetry: Telemetry, request: Request) -> Response:
    """The answer of ``GET /metrics``: OpenMetrics with exemplars where asked for, else the text format."""
    if SCRAPER_HEADER in request.headers:
        telemetry.scrapes.scraped()
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(telemetry.metrics.registry), headers={"content-type": content_type})


def request_id_of(scope: Scope) -> str:
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
    if _REQUEST_ID.fullmatch(given):
        return bytes(given).decode("ascii")
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        return f"{context.trace_id:032x}"
    match = _TRACEPARENT.fullmatch(traceparent)
    if match:
        return match.group(1).decode("ascii")
    return uuid.uuid4().hex


class TelemetryMiddleware:
    """Counts, times and logs every request, whatever way it ends."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, on_error: OnError) -> None:
        self.app = app
        self.telemetry = telemetry
        self.on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self.telemetry, scope, receive, send)
        reset = _current.set(exchange.record)
        with structlog.contextvars.bound_contextvars(request_id=exchange.request_id):
            try:
                await self.app(scope, exchange.receive, exchange.send)
            except Exception as error:
                await self._unhandled(error, exchange)
            finally:
                # Reached without a last body message: the task was cancelled, or the answer was cut off.
                exchange.finish(cut_off=True)
                _current.reset(reset)

    async def _unhandled(self, error: Exception, exchange: _Exchange) -> None:
        if exchange.disconnected:
            return
        _log.error("unhandled_exception", exc_info=error)
        trace.get_current_span().record_exception(error)
        if exchange.status:
            exchange.failed_late = True
            raise error
        response = self.on_error(error, exchange.request_id)
        await response(exchange.scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer, watched from both sides."""

    def __init__(self, telemetry: Telemetry, scope: Scope, receive: Receive, send: Send) -> None:
        self.telemetry = telemetry
        self.scope = scope
        self._receive = receive
        self._send = send
        self.request_id = request_id_of(scope)
        self.status = 0
        self.disconnected = False
        self.failed_late = False
        self._finished = False
        self.record: RequestRecord | None = None
        if is_transcription(scope):
            self.record = RequestRecord(request_id=self.request_id, route=scope["path"])
            telemetry.metrics.inflight.inc()
        self.start_s = time.perf_counter() if self.record is None else self.record.start_s

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._finished:
            self.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            headers.append((b"x-request-id", self.request_id.encode("ascii")))
            if self.record is not None and self.record.stages_s:
                headers.append((b"server-timing", self.record.server_timing().encode("ascii")))
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
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
        self._observe_http(status, elapsed_s)
        fields: dict[str, Any] = {}
        if self.record is not None:
            self.telemetry.metrics.inflight.dec()
            if self.failed_late:
                self.record.failed("internal_error", 500)
            fields["outcome"] = self.telemetry.request_ended(
                self.record, status, elapsed_s=elapsed_s, cancelled=cancelled
            )
            fields.update(_log_fields(self.record))
            caller = self.scope.get("state", {}).get("key_name")
            if caller is not None:
                fields["caller"] = caller
        self._log(status, elapsed_s, fields)

    def _route(self) -> str:
        route = getattr(self.scope.get("route"), "path", None)
        if isinstance(route, str):
            return route
        # Refused before it was routed (no key, over the rate limit, no room).
        return self.record.route if self.record is not None else UNMATCHED_ROUTE

    def _observe_http(self, status: int, elapsed_s: float) -> None:
        method = self.scope["method"]
        self.telemetry.metrics.http_duration.labels(
            method if method in _METHODS else "_OTHER",
            self._route(),
            str(status),
            str(status) if status >= 500 else "",
        ).record(elapsed_s, self.telemetry.sampled_parent())

    def _log(self, status: int, elapsed_s: float, fields: dict[str, Any]) -> None:
        quiet = _QUIET_ROUTES.match(self.scope["path"])
        (_log.debug if quiet else _log.info)(
            "request",
            method=self.scope["method"],
            route=self._route(),
            status=status,
            duration_ms=round(elapsed_s * 1000, 2),
            **fields,
        )


def _log_fields(record: RequestRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": record.model, "audio_s": round(record.audio_s, 3)}
    if record.stages_s:
        fields["stages_ms"] = {
            stage: round(elapsed_s * 1000, 2) for stage, elapsed_s in record.stages_s.items()
        }
    if record.error_code is not None:
        fields["error_code"] = record.error_code
    return fields


def request_id() -> str | None:
    """The id of the transcription request this code runs for."""
    record = current_record()
    return record.request_id if record is not None else None
