"""OpenTelemetry tracing, configured by the standard ``OTEL_*`` variables and off without an endpoint.

Read here: ``OTEL_SDK_DISABLED``, ``OTEL_TRACES_EXPORTER`` (``otlp`` or ``none``),
``OTEL_EXPORTER_OTLP[_TRACES]_ENDPOINT``, ``OTEL_EXPORTER_OTLP[_TRACES]_PROTOCOL`` (``grpc``,
``http/protobuf``). Read by the SDK itself: the sampler (``OTEL_TRACES_SAMPLER``, ``_ARG``),
``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_BSP_*``, headers, certificates and timeouts of
the exporter.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import structlog
from opentelemetry.sdk.resources import DEPLOYMENT_ENVIRONMENT, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, SpanContext, SpanKind

from api.errors import SettingsError
from api.telemetry.spans import AttributeValue, FinishedSpan, HashedResource, SharedAttributes

_log = structlog.get_logger("api.telemetry")

# These report every retry of every batch; ToleratingExporter reports the change of state instead.
_NOISY_LOGGERS = (
    "opentelemetry.exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.trace.export",
)

CountSpans = Callable[[str, int], None]


def tracing_enabled(environ: Mapping[str, str] = os.environ) -> bool:
    """True when the environment names a place to send spans to."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none":
        return False
    return bool(_endpoint(environ))


def _endpoint(environ: Mapping[str, str]) -> str:
    specific = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
    return specific or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()


def _protocol(environ: Mapping[str, str]) -> str:
    specific = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "").strip()
    return specific or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "").strip() or "grpc"


def build_exporter(environ: Mapping[str, str] = os.environ) -> SpanExporter:
    """The OTLP exporter that the environment asks for.

    Raises SettingsError when the protocol is neither ``grpc`` nor ``http/protobuf``.
    """
    protocol = _protocol(environ)
    if protocol == "grpc":
        from api.telemetry.otlp import DirectSpanExporter

        return DirectSpanExporter()
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

        return Http()
    raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: grpc and http/protobuf are supported")


class ToleratingExporter(SpanExporter):
    """Passes spans on; a backend that is down costs one log line when it goes and one when it returns."""

    def __init__(self, inner: SpanExporter, endpoint: str, count: CountSpans) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._count = count
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._inner.export(spans)
        except Exception as error:
            result, reason = SpanExportResult.FAILURE, type(error).__name__
        else:
            reason = "the collector did not take them"
        failed = result is not SpanExportResult.SUCCESS
        self._count("failed" if failed else "exported", len(spans))
        if failed and not self._failing:
            _log.warning("traces_lost", endpoint=self._endpoint, reason=reason, spans=len(spans))
        elif self._failing and not failed:
            _log.info("traces_recovered", endpoint=self._endpoint)
        self._failing = failed
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)


class CountingProcessor(BatchSpanProcessor):
    """Counts the spans that a full queue pushes out; the SDK by itself only logs that it happens."""

    def __init__(self, exporter: SpanExporter, count: CountSpans) -> None:
        # Four times the SDK's sizes, where the environment names none: a request makes nine spans, and an
        # export takes a millisecond however many it brings.
        sized = {"OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"} & os.environ.keys()
        super().__init__(
            exporter,
            max_queue_size=None if sized else 8192,
            max_export_batch_size=None if sized else 2048,
        )
        self._count = count

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self.take(span)

    def take(self, span: ReadableSpan) -> None:
        """Queue a span that is sampled."""
        processor = self._batch_processor
        queue = processor._queue
        if len(queue) == queue.maxlen:
            self._count("dropped", 1)
        processor.emit(span)


class Tracing:
    """A tracer provider that belongs to one application (nothing global is set)."""

    def __init__(
        self, exporter: SpanExporter, endpoint: str, count: CountSpans, version: str, environment: str
    ) -> None:
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        resource = Resource.create(
            {
                SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME") or "asr-api",
                SERVICE_VERSION: version,
                DEPLOYMENT_ENVIRONMENT: environment,
            }
        )
        self.resource = HashedResource(resource.attributes, resource.schema_url)
        self._exporter = ToleratingExporter(exporter, endpoint, count)
        self.provider = TracerProvider(resource=self.resource, shutdown_on_exit=False)
        self.processor = CountingProcessor(self._exporter, count)
        self.provider.add_span_processor(self.processor)
        # Stable HTTP attributes (http.request.method, ...) instead of the old names; read once per process.
        os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
        from api.telemetry.server_span import RequestSpans

        self.requests = RequestSpans(self)

    def finished(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        *,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, AttributeValue] | None = None,
        shared: SharedAttributes | None = None,
        links: Sequence[Link] = (),
        events: Sequence[Event] = (),
        failed: bool = False,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        """Hand a span that is over to the exporter's queue; `context` must be sampled."""
        span = FinishedSpan(
            name,
            context,
            parent,
            self.resource,
            start_ns=start_ns,
            end_ns=end_ns,
            attributes=attributes,
            shared=shared,
            links=links,
            events=events,
            failed=failed,
            kind=kind,
        )
        self.processor.take(cast(ReadableSpan, span))

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """Send what is buffered, for at most `timeout_s`; a dead backend does not hold up the exit."""
        flush = threading.Thread(target=self.provider.shutdown, name="trace-flush", daemon=True)
        flush.start()
        flush.join(timeout_s)
        if flush.is_alive():
            self._exporter.shutdown()  # ends the retries
            flush.join(1.0)


def build_tracing(
    count: CountSpans, version: str, environment: str, environ: Mapping[str, str] = os.environ
) -> Tracing | None:
    """Tracing as the environment asks for, or None when it is off."""
    if not tracing_enabled(environ):
        return None
    return Tracing(build_exporter(environ), _endpoint(environ), count, version, environment)
