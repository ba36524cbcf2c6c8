"""The context managers around a stage and around a batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opentelemetry.trace import Link, SpanContext

from api.telemetry.record import current_record
from api.telemetry.spans import AttributeValue, child_context, named, root_context

if TYPE_CHECKING:
    from api.telemetry.core import Telemetry


class Stage:
    """See :meth:`Telemetry.stage`. ``elapsed_s`` is valid after the block."""

    __slots__ = ("_attributes", "_start_s", "_telemetry", "elapsed_s", "name")

    def __init__(self, telemetry: Telemetry, name: str, attributes: dict[str, AttributeValue]) -> None:
        if name not in telemetry.metrics.stages:
            raise KeyError(name)
        self._telemetry = telemetry
        self._attributes = attributes
        self.name = name
        self.elapsed_s = 0.0

    def __enter__(self) -> Self:
        self._start_s = time.perf_counter()
        return self

    def set(self, **attributes: AttributeValue) -> None:
        """Set ``asr.<name>`` on the stage's span."""
        self._attributes.update(attributes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        elapsed_s = self.elapsed_s = time.perf_counter() - self._start_s
        telemetry = self._telemetry
        telemetry.metrics.stages[self.name].observe(elapsed_s)
        record = current_record()
        if record is not None:
            record.add_stage(self.name, elapsed_s)
        parent = telemetry.sampled_parent()
        if telemetry.tracing is None or parent is None:
            return
        attributes = named(self._attributes)
        if kind is not None:
            attributes = {**(attributes or {}), "error.type": kind.__name__}
        end_ns = time.time_ns()
        telemetry.tracing.finished(
            self.name,
            child_context(parent),
            parent,
            start_ns=end_ns - int(elapsed_s * 1e9),
            end_ns=end_ns,
            attributes=attributes,
            failed=kind is not None,
        )


class Batch:
    """See :meth:`Telemetry.batch`. ``elapsed_s`` is valid after the block.

    Its span is kept when one of its requests is. ``span_context`` is then what leads to it, else None.
    """

    __slots__ = (
        "_busy_handle",
        "_lengths_s",
        "_links",
        "_model",
        "_padding_ratio",
        "_start_s",
        "_telemetry",
        "elapsed_s",
        "span_context",
    )

    def __init__(
        self,
        telemetry: Telemetry,
        model: str,
        lengths_s: Sequence[float],
        requests: Iterable[SpanContext | None],
    ) -> None:
        self._telemetry = telemetry
        self._model = telemetry.metrics.model_label(model)
        self._lengths_s = lengths_s
        self._links = [Link(each) for each in requests if each is not None and each.trace_flags.sampled]
        self.span_context = root_context() if telemetry.tracing is not None and self._links else None
        self.elapsed_s = 0.0

    def __enter__(self) -> Self:
        metrics, lengths_s = self._telemetry.metrics, self._lengths_s
        padded_s = max(lengths_s) * len(lengths_s)
        self._padding_ratio = 1.0 - sum(lengths_s) / padded_s if padded_s > 0 else 0.0
        metrics.batch_size.observe(len(lengths_s))
        metrics.batch_padding.observe(self._padding_ratio)
        self._busy_handle = self._telemetry.busy.begin()
        self._start_s = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        elapsed_s = self.elapsed_s = time.perf_counter() - self._start_s
        telemetry = self._telemetry
        telemetry.busy.end(self._busy_handle)
        telemetry.metrics.compute.labels(self._model).inc(elapsed_s)
        if telemetry.tracing is None or self.span_context is None:
            return
        attributes: dict[str, AttributeValue] = {
            "asr.model": self._model,
            "asr.batch_size": len(self._lengths_s),
            "asr.audio_s": float(sum(self._lengths_s)),
            "asr.padding_ratio": round(self._padding_ratio, 4),
        }
        if kind is not None:
            attributes["error.type"] = kind.__name__
        end_ns = time.time_ns()
        telemetry.tracing.finished(
            "batch",
            self.span_context,
            None,
            start_ns=end_ns - int(elapsed_s * 1e9),
            end_ns=end_ns,
            attributes=attributes,
            links=self._links,
            failed=kind is not None,
        )
