"""One trace from the page to the service and back.

The page opens the root span of each transcription and passes it on as W3C ``traceparent``. Spans are exported
only when the standard ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or its traces variant) is set; without it the
identifiers are still made, so that the request's trace can be found in the service's own spans.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator


@dataclass(frozen=True)
class SpanHandle:
    """The open span: its trace id in hexadecimal (empty when tracing is off) and the headers to send."""

    trace_id: str
    headers: dict[str, str] = field(default_factory=dict)


class Tracing:
    """Owns the page's tracer. ``exporter`` is the seam for tests."""

    def __init__(
        self, environ: Mapping[str, str] | None = None, exporter: SpanExporter | None = None
    ) -> None:
        env = os.environ if environ is None else environ
        service = env.get("OTEL_SERVICE_NAME") or "asr-ui"
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), shutdown_on_exit=exporter is None
        )
        if exporter is None and (
            env.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or env.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        ):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
        if exporter is not None:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ui.client")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, attributes: Mapping[str, str | int | float]) -> Iterator[SpanHandle]:
        """An open client span; an exception that leaves it is recorded and marks it failed.

        It is not made the thread's current span: it may stay open across the steps of an async generator,
        which can end in another context than the one it began in.
        """
        span = self._tracer.start_span(name, kind=trace.SpanKind.CLIENT, attributes=dict(attributes))
        headers: dict[str, str] = {}
        self._propagator.inject(headers, trace.set_span_in_context(span))
        context = span.get_span_context()
        with _ended(span):
            yield SpanHandle(trace.format_trace_id(context.trace_id) if context.is_valid else "", headers)

    def close(self) -> None:
        """Send what is pending and stop."""
        self._provider.shutdown()


@contextmanager
def _ended(span: trace.Span) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        span.record_exception(error)
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        span.end()
