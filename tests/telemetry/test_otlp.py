"""Our encoding of spans against the library's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from api.telemetry.otlp import encode
from api.telemetry.spans import FinishedSpan, child_context, exception_event, root_context
from api.telemetry.tracing import Tracing


class Keep(SpanExporter):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans.extend(spans)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


def all_kinds_of_spans() -> list[ReadableSpan]:
    exporter = Keep()
    tracing = Tracing(exporter, "nowhere", lambda *_: None, "1", "test")
    tracer, other = (tracing.provider.get_tracer(name, "2", schema_url="http://s") for name in ("a", "b"))
    remote = SpanContext(2**127 + 5, 7, True, TraceFlags(1), TraceState([("vendor", "x")]))
    plain_remote = SpanContext(9, 2**63 + 1, True, TraceFlags(1))
    for start in (tracer.start_span, other.start_span):
        for parent in (None, remote, plain_remote):
            context = set_span_in_context(NonRecordingSpan(parent)) if parent else None
            plain: dict[str, Any] = {"text": "ä", "yes": True, "count": -3, "ratio": 0.25}
            start("plain", context=context, kind=SpanKind.SERVER, attributes=plain).end()
            start("list", context=context, attributes={"many": ["a", "b"]}).end()
        failed = start("failed", kind=SpanKind.CLIENT)
        failed.record_exception(ValueError("no"))
        failed.set_status(Status(StatusCode.ERROR, "no"))
        failed.end()
        start("linked", links=[Link(plain_remote, {"why": "because"})]).end()
    root = root_context()
    links = [Link(plain_remote), Link(root_context())]
    told = {"asr.model": "m"}
    tracing.finished("batch", root, None, start_ns=1, end_ns=2, attributes=told, links=links)
    events = [exception_event(ValueError("no"), 2)]
    tracing.finished(
        "batch", root_context(), None, start_ns=1, end_ns=2, links=links, events=events, failed=True
    )
    for name in ("decode", "ctc"):
        tracing.finished(name, child_context(root), root, start_ns=3, end_ns=4, failed=name == "ctc")
    tracing.finished("queue", child_context(remote), remote, start_ns=3, end_ns=4, links=[Link(remote)])
    asked = {"text": "ä", "count": 3}
    tracing.finished(
        "GET /", remote, plain_remote, start_ns=5, end_ns=6, attributes=asked, kind=SpanKind.SERVER
    )
    tracing.shutdown()
    return exporter.spans


def flat(request: ExportTraceServiceRequest) -> list[tuple[bytes, bytes]]:
    """Each span with its resource and scope, in an order of its own."""
    return sorted(
        (
            group.resource.SerializeToString(deterministic=True)
            + group.schema_url.encode()
            + part.scope.SerializeToString(deterministic=True)
            + part.schema_url.encode(),
            span.SerializeToString(deterministic=True),
        )
        for group in request.resource_spans
        for part in group.scope_spans
        for span in part.spans
    )


def test_the_encoding_is_the_librarys() -> None:
    spans = all_kinds_of_spans()
    assert {type(span) for span in spans} == {ReadableSpan, FinishedSpan}
    assert len(spans) == 22
    assert flat(encode(spans)) == flat(encode_spans(spans))


def test_the_state_of_a_callers_trace_is_that_of_its_spans_too() -> None:
    (span,) = [span for span in all_kinds_of_spans() if span.name == "queue"]
    assert span.context is not None
    assert span.context.trace_state.to_header() == "vendor=x"


def test_a_value_that_cannot_be_sent_takes_no_span_along() -> None:
    spans = all_kinds_of_spans()
    name, context = "odd", root_context()
    resource = spans[0].resource
    odd = FinishedSpan(name, context, None, resource, start_ns=1, end_ns=2, attributes={"agent": "\ud800"})
    sent = flat(encode([*spans, odd]))  # type: ignore[list-item]
    assert len(sent) == len(spans) + 1
    assert set(flat(encode(spans))) < set(sent)


def test_every_span_alone_and_none_at_all() -> None:
    for span in all_kinds_of_spans():
        assert flat(encode([span])) == flat(encode_spans([span]))
    assert flat(encode([])) == []
