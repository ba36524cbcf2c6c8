"""Spans as OTLP messages, without what the library's encoder spends on generality.

A request makes about nine spans, and to encode them costs more than to make them. Here a span whose
attributes are plain values becomes its message directly; the library encodes the rest, and with the first
span of each group also what the group shares (resource, scope, schema).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, SpanFlags
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind

from api.telemetry.spans import FinishedSpan

_LOCAL_PARENT = SpanFlags.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK
_REMOTE_PARENT = _LOCAL_PARENT | SpanFlags.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
_INTERNAL = Span.SpanKind.SPAN_KIND_INTERNAL  # OTLP's numbers begin with "unspecified", the API's do not
_PLAIN = frozenset((str, bool, int, float))


class DirectSpanExporter(OTLPSpanExporter):
    """OTLP over gRPC, with :func:`encode`."""

    def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
        # Not public: in a version of the library that no longer calls it, spans are encoded the slow way.
        return encode(data)


def encode(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
    """The same spans as ``encode_spans`` gives, in another order.

    A value that no message can hold (half of a surrogate pair) costs this way, and not the other spans.
    """
    try:
        return _encode(spans)
    except ValueError:
        return encode_spans(spans)  # leaves out such an attribute, and says so in the log


def _encode(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
    groups: defaultdict[tuple[int, int], list[ReadableSpan]] = defaultdict(list)
    unusual = []
    for span in spans:
        if _is_plain(span):
            groups[id(span.resource), id(span.instrumentation_scope)].append(span)
        else:
            unusual.append(span)
    request = encode_spans([*unusual, *(group[0] for group in groups.values())])
    places = {
        message.span_id: scope_spans.spans
        for resource_spans in request.resource_spans
        for scope_spans in resource_spans.scope_spans
        for message in scope_spans.spans
    }
    for group in groups.values():
        place = places[_span_id(group[0].context)]
        for span in group[1:]:
            _fill(place.add(), span)
    return request


def _is_plain(span: ReadableSpan) -> bool:
    if span.context is None:
        return False
    if isinstance(span, FinishedSpan):
        return not span.events
    if span.events or span.links or span.status.description or span.dropped_attributes:
        return False
    return all(type(value) in _PLAIN for value in _attributes(span).values())


def _attributes(span: ReadableSpan) -> Mapping[str, object]:
    attributes = span.attributes or {}
    # The SDK's own mapping takes a lock and three calls for each item.
    return attributes.copy() if isinstance(attributes, MappingProxyType) else attributes


def _fill(message: Span, span: ReadableSpan) -> None:
    """Field by field: to copy a message into another would encode and parse it."""
    context, parent = span.context, span.parent
    message.trace_id = context.trace_id.to_bytes(16, "big")
    message.span_id = _span_id(context)
    message.name = span.name
    message.kind = _INTERNAL if span.kind is SpanKind.INTERNAL else span.kind.value + 1
    message.start_time_unix_nano = span.start_time or 0
    message.end_time_unix_nano = span.end_time or 0
    message.status.code = span.status.status_code.value  # type: ignore[assignment]
    message.flags = _flags(parent)
    if context.trace_state:
        message.trace_state = context.trace_state.to_header()
    if parent is not None:
        message.parent_span_id = _span_id(parent)
    if isinstance(span, FinishedSpan):
        shared = span.shared_attributes
        if shared:
            if shared.encoded is None:
                shared.encoded = _filled(Span(), shared).attributes
            message.attributes.extend(shared.encoded)
        _filled(message, span.own_attributes)
    else:
        _filled(message, _attributes(span))
    for link in span.links:
        message.links.add(
            trace_id=link.context.trace_id.to_bytes(16, "big"),
            span_id=_span_id(link.context),
            flags=_flags(link.context),
        )


def _filled(message: Span, attributes: Mapping[str, object]) -> Span:
    for key, value in attributes.items():
        item = message.attributes.add(key=key).value
        if isinstance(value, str):
            item.string_value = value
        elif isinstance(value, bool):
            item.bool_value = value
        elif isinstance(value, int):
            item.int_value = value
        else:
            item.double_value = value
    return message


def _span_id(context: SpanContext) -> bytes:
    return context.span_id.to_bytes(8, "big")


def _flags(context: SpanContext | None) -> int:
    return _REMOTE_PARENT if context is not None and context.is_remote else _LOCAL_PARENT
