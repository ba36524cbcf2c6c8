"""Spans of stages, batches and requests, made once they are over.

What knows its beginning and its end when it reports needs none of what the SDK's ``Span`` does for work that
goes on: locks, limits, events, a place in the context. ``FinishedSpan`` has the attributes that
span processors and OTLP exporters read from a ``ReadableSpan``, and costs a tenth.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

AttributeValue = str | bool | int | float

SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_SCOPE = InstrumentationScope("api")


def named(attributes: Mapping[str, AttributeValue]) -> dict[str, AttributeValue] | None:
    """Our attributes under their names in traces, ``asr.<name>``."""
    return {f"asr.{name}": value for name, value in attributes.items()} if attributes else None


def without_query(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a server span, less what a caller wrote into the URL by mistake (a key, a prompt)."""
    told = {**attributes, "url.query": "[removed]"}
    # Of the older names, which OTEL_SEMCONV_STABILITY_OPT_IN can ask for.
    for name in ("http.url", "http.target"):
        if name in told:
            told[name] = str(told[name]).partition("?")[0]
    return told


def exemplar(span_context: SpanContext) -> dict[str, str] | None:
    """The exemplar that leads from a histogram's bucket to a trace, or None when that trace is not kept."""
    if not span_context.trace_flags.sampled or not span_context.is_valid:
        return None
    return {"trace_id": f"{span_context.trace_id:032x}", "span_id": f"{span_context.span_id:016x}"}


class HashedResource(Resource):
    """A resource that is hashed once: the encoder looks it up for every span, and the SDK's own hash is of
    JSON."""

    _cached_hash: int | None = None

    def __hash__(self) -> int:
        if self._cached_hash is None:
            self._cached_hash = super().__hash__()
        return self._cached_hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


def child_context(parent: SpanContext) -> SpanContext:
    """The context of a new span under `parent`."""
    return SpanContext(parent.trace_id, random.getrandbits(64) or 1, False, parent.trace_flags)


def root_context() -> SpanContext:
    """The context of a new, sampled span that begins a trace."""
    return SpanContext(random.getrandbits(128) or 1, random.getrandbits(64) or 1, False, SAMPLED)


class FinishedSpan:
    """What an exporter reads; times in nanoseconds since the epoch."""

    __slots__ = (
        "attributes",
        "context",
        "end_time",
        "kind",
        "links",
        "name",
        "parent",
        "resource",
        "start_time",
        "status",
    )

    events = ()
    dropped_attributes = dropped_events = dropped_links = 0
    instrumentation_scope = _SCOPE

    def __init__(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        resource: Resource,
        *,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, AttributeValue] | None = None,
        links: Sequence[Link] = (),
        failed: bool = False,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        self.name = name
        self.kind = kind
        self.context = context
        self.parent = parent
        self.resource = resource
        self.start_time = start_ns
        self.end_time = end_ns
        self.attributes = attributes
        self.links = links
        self.status = _ERROR if failed else _UNSET

    def get_span_context(self) -> SpanContext:
        """Its own ids."""
        return self.context
