"""The server span of a transcription request: its trace at the beginning, all the rest when it is over.

While a request runs, others need no more of its span than where it belongs: stages, batches, log lines. The
sampler decides, and its own id is drawn, when one of them asks, which is in the journal as a rule. The span
itself, with the attributes that OpenTelemetry's instrumentation would give it, is made there, too. Every
other route is instrumented in the usual way, which costs more than all other telemetry of a request (ADR 11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation._semconv import (
    _OpenTelemetrySemanticConventionStability,
    _OpenTelemetryStabilitySignalType,
)
from opentelemetry.instrumentation.asgi import asgi_getter, collect_request_attributes, set_status_code
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)
from opentelemetry.util.http import sanitize_method

from api.telemetry.record import RequestEnd
from api.telemetry.spans import AttributeValue, RequestSpan, SharedAttributes, without_query

if TYPE_CHECKING:
    from api.telemetry.tracing import Tracing

_NOWHERE = Context()

# What the instrumentation's attributes are made of: the same for all requests of a connection, mostly.
_TOLD = ("method", "path", "scheme", "http_version", "client", "server", "query_string")
_TOLD_HEADERS = frozenset((b"host", b"user-agent"))
_MOST_REMEMBERED = 256
_LONGEST_REMEMBERED = 512  # bytes of those headers


class RequestSpans:
    """Begins and ends the spans of requests. ``end`` is for one thread at a time: the journal's."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._sampler = tracing.provider.sampler
        self._ids = tracing.provider.id_generator
        self._fields = {name.encode() for name in propagate.get_global_textmap().fields}
        self._known: dict[object, SharedAttributes] = {}
        self._given = _GivenIds()
        late = TracerProvider(
            resource=tracing.resource,
            sampler=ALWAYS_ON,  # only spans that the provider's own sampler keeps come this far
            id_generator=self._given,
            shutdown_on_exit=False,
        )
        late.add_span_processor(tracing.processor)
        self._tracer = late.get_tracer("api")
        _OpenTelemetrySemanticConventionStability._initialize()  # type: ignore[no-untyped-call]
        self._convention = _OpenTelemetrySemanticConventionStability._get_opentelemetry_stability_opt_in_mode(
            _OpenTelemetryStabilitySignalType.HTTP
        )
        self._status_names = self._names_of_status()

    def begin(self, scope: Mapping[str, Any]) -> RequestSpan:
        """The span of a request, in the trace that the caller names or in one of its own."""
        parent = _NOWHERE
        if not self._fields.isdisjoint([name for name, _ in scope["headers"]]):
            parent = propagate.extract(dict(in_utf8(scope)), getter=asgi_getter)
        above = _context_of(parent)
        trace_id = above.trace_id if above is not None else self._ids.generate_trace_id()
        return RequestSpan(scope, parent, trace_id, self._decide)

    def _decide(self, span: RequestSpan) -> SpanContext:
        """Ask the sampler, draw an id."""
        decided = self._sampler.should_sample(span.parent, span.trace_id, _name(span.scope), SpanKind.SERVER)
        above = _context_of(span.parent)
        random = above.trace_flags.random_trace_id if above is not None else self._ids.is_trace_id_random()
        flags = TraceFlags.RANDOM_TRACE_ID if random else TraceFlags.DEFAULT
        if decided.decision is Decision.RECORD_AND_SAMPLE:
            flags |= TraceFlags.SAMPLED
        return SpanContext(
            span.trace_id,
            self._ids.generate_span_id(),
            is_remote=False,
            trace_flags=TraceFlags(flags),
            trace_state=decided.trace_state,
        )

    def end(
        self,
        request: RequestSpan,
        end: RequestEnd,
        attributes: Mapping[str, AttributeValue],
        *,
        failed: bool = False,
    ) -> None:
        """Make the span of a request that is over; `failed`: also where its answer began with 200."""
        shared = self._attributes(request.scope)
        context, status = request.get_span_context(), end.answered
        if end.error is None and 0 < status < 500:
            self._tracing.finished(
                _name(request.scope),
                context,
                _context_of(request.parent),
                start_ns=request.start_ns,
                end_ns=end.end_ns,
                attributes={**attributes, **dict.fromkeys(self._status_names, status)},
                shared=shared,
                failed=failed,
                kind=SpanKind.SERVER,
            )
            return
        self._given.context = context
        told = {**shared, **attributes}
        span = self._tracer.start_span(
            _name(request.scope), request.parent, SpanKind.SERVER, told, start_time=request.start_ns
        )
        if status:
            self._set_status(span, status)
        if end.error is not None:
            span.record_exception(end.error)
            if end.cut_off:
                span.set_status(Status(StatusCode.ERROR, f"{type(end.error).__name__}: {end.error}"))
        span.end(end.end_ns)

    def _set_status(self, span: trace.Span, status: int) -> None:
        set_status_code(span, status, sem_conv_opt_in_mode=self._convention)  # type: ignore[no-untyped-call]

    def _names_of_status(self) -> tuple[str, ...]:
        """Under which names the instrumentation tells a status that is no error."""
        span = TracerProvider(shutdown_on_exit=False).get_tracer("api").start_span("probe")
        self._set_status(span, 200)
        return tuple(span.attributes or ()) if isinstance(span, ReadableSpan) else ()

    def _attributes(self, scope: Mapping[str, Any]) -> SharedAttributes:
        """What the instrumentation tells of a request; put together once for those that look the same."""
        headers = tuple([header for header in scope["headers"] if header[0] in _TOLD_HEADERS])
        # The specification lets addresses be lists.
        told = [tuple(value) if isinstance(value, list) else value for value in map(scope.get, _TOLD)]
        key = (tuple(told), headers)
        known = self._known.get(key)
        if known is not None:
            return known
        attributes = SharedAttributes(
            collect_request_attributes(in_utf8(scope), self._convention)  # type: ignore[no-untyped-call]
        )
        attributes["http.route"] = scope["path"]
        if scope.get("query_string"):
            return SharedAttributes(without_query(attributes))
        if sum(len(value) for _, value in headers) <= _LONGEST_REMEMBERED:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = attributes
        return attributes


def is_utf8(scope: Mapping[str, Any]) -> bool:
    """Whether all headers are; a scope without headers has none that is not."""
    return all(_is_utf8(value) for _, value in scope.get("headers", ()))


def in_utf8(scope: Mapping[str, Any]) -> Mapping[str, Any]:
    """`scope` itself, or a copy in which headers that are not UTF-8 are, read as Latin-1.

    OpenTelemetry would take such a header for one with escapes: it may fail at that, or make half of a
    surrogate pair, which no exporter can send.
    """
    if is_utf8(scope):
        return scope
    headers = [
        (name, value if _is_utf8(value) else value.decode("latin-1").encode())
        for name, value in scope["headers"]
    ]
    return {**scope, "headers": headers}


def _is_utf8(value: bytes) -> bool:
    try:
        return value.isascii() or bool(value.decode())
    except UnicodeDecodeError:
        return False


def _context_of(parent: Context) -> SpanContext | None:
    """The caller's span; None where none was sent."""
    if not parent:
        return None
    context = trace.get_current_span(parent).get_span_context()
    return context if context.is_valid else None


def _name(scope: Mapping[str, Any]) -> str:
    method = sanitize_method(scope["method"])
    return f"{'HTTP' if method == '_OTHER' else method} {scope['path']}"


class _GivenIds(IdGenerator):
    """Ids that the request has already."""

    context = INVALID_SPAN_CONTEXT

    def generate_trace_id(self) -> int:
        return self.context.trace_id

    def generate_span_id(self) -> int:
        return self.context.span_id

    def is_trace_id_random(self) -> bool:
        return self.context.trace_flags.random_trace_id
