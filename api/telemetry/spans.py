"""Spans of stages, batches and requests, made once they are over.

What knows its beginning and its end when it reports needs none of what the SDK's ``Span`` does for work that
goes on: locks, limits, events, a place in the context. ``FinishedSpan`` has the attributes that
span processors and OTLP exporters read from a ``ReadableSpan``, and costs a tenth.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

AttributeValue = str | bool | int | float

SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_SCOPE = InstrumentationScope("api")


class Origin(Protocol):
    """What a span belongs to, or leads to: a request or a batch, whose own span need not have ids yet."""

    def kept(self) -> SpanContext | None:
        """The ids of that span; None where it is not kept."""
        ...


class KnownSpan:
    """The origin whose ids are there already."""

    __slots__ = ("_context",)

    def __init__(self, context: SpanContext) -> None:
        self._context = context

    def kept(self) -> SpanContext | None:
        """Its ids, if it is sampled."""
        context = self._context
        return context if context.trace_flags.sampled and context.is_valid else None


class RequestSpan(NonRecordingSpan):
    """The span of a transcription request that is being served: an origin, and OpenTelemetry's current span.

    It has its trace's id from the beginning. Whether it is kept, and its own id, is decided (`decide`) when
    somebody asks: the journal mostly, or a log line.
    """

    def __init__(
        self,
        scope: Mapping[str, Any],
        parent: Context,
        trace_id: int,
        decide: Callable[[RequestSpan], SpanContext],
    ) -> None:
        """`parent` is what the caller sent along."""
        self.scope = scope
        self.parent = parent
        self.trace_id = trace_id
        self.start_ns = time.time_ns()
        self._decide = decide
        self._decided: SpanContext | None = None

    def get_span_context(self) -> SpanContext:
        """Its ids, always the same ones."""
        if self._decided is None:
            with _deciding:
                if self._decided is None:
                    self._decided = self._decide(self)
        return self._decided

    def __repr__(self) -> str:
        return f"RequestSpan({self.get_span_context()!r})"

    def kept(self) -> SpanContext | None:
        """Its ids, if it is sampled."""
        context = self.get_span_context()
        return context if context.trace_flags.sampled else None


_deciding = threading.Lock()


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


def kept(origin: Origin | None) -> SpanContext | None:
    """The ids of the origin's span; None where there is none, or it is not kept."""
    return origin.kept() if origin is not None else None


def links_to(origins: Sequence[Origin | None]) -> list[Link]:
    """Links to those that are kept."""
    return [Link(context) for context in map(kept, origins) if context is not None]


def exception_event(error: BaseException, at_ns: int) -> Event:
    """What was raised at `at_ns` since the epoch, as OpenTelemetry's conventions have it on a span."""
    attributes = {
        "exception.type": type(error).__qualname__,
        "exception.message": str(error),
        "exception.stacktrace": "".join(traceback.format_exception(error)),
    }
    return Event("exception", attributes, at_ns)


def child_context(parent: SpanContext) -> SpanContext:
    """The context of a new span under `parent`."""
    span_id = random.getrandbits(64) or 1
    return SpanContext(parent.trace_id, span_id, False, parent.trace_flags, parent.trace_state)


def root_context() -> SpanContext:
    """The context of a new, sampled span that begins a trace."""
    return SpanContext(random.getrandbits(128) or 1, random.getrandbits(64) or 1, False, SAMPLED)


class SharedAttributes(dict[str, AttributeValue]):
    """Attributes that many spans have in common. ``encoded`` is the exporter's: what they look like to it."""

    encoded: Any = None


class FinishedSpan:
    """What an exporter reads; times in nanoseconds since the epoch."""

    __slots__ = (
        "context",
        "end_time",
        "events",
        "kind",
        "links",
        "name",
        "own_attributes",
        "parent",
        "resource",
        "shared_attributes",
        "start_time",
        "status",
    )

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
        shared: SharedAttributes | None = None,
        links: Sequence[Link] = (),
        events: Sequence[Event] = (),
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
        self.own_attributes = attributes or {}
        self.shared_attributes = shared
        self.links = links
        self.events = events
        self.status = _ERROR if failed else _UNSET

    @property
    def attributes(self) -> Mapping[str, AttributeValue]:
        """Those of its own and those it shares."""
        return {**(self.shared_attributes or {}), **self.own_attributes}

    def get_span_context(self) -> SpanContext:
        """Its own ids."""
        return self.context
