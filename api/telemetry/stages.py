"""The context managers around a stage and around a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opentelemetry.trace import SpanContext

from api.telemetry.spans import AttributeValue, Origin, exception_event, kept, links_to, root_context

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
        self.elapsed_s = time.perf_counter() - self._start_s
        failed = kind.__name__ if kind is not None else None
        self._telemetry.stage_ended(self.name, self.elapsed_s, self._attributes, error=failed)


class Batch:
    """See :meth:`Telemetry.batch`. ``elapsed_s`` is valid after the block.

    Its span is kept when one of its requests is. It is an origin: an inference leads to its batch, also one
    whose request ended before the batch did.
    """

    __slots__ = (
        "_context",
        "_lengths_s",
        "_model",
        "_requests",
        "_start_s",
        "_telemetry",
        "elapsed_s",
    )

    def __init__(
        self,
        telemetry: Telemetry,
        model: str,
        lengths_s: Sequence[float],
        requests: Sequence[Origin | None],
    ) -> None:
        self._telemetry = telemetry
        self._model = model
        self._lengths_s = lengths_s
        self._requests = requests
        self._context: SpanContext | None = None
        self.elapsed_s = 0.0

    def kept(self) -> SpanContext | None:
        """The ids of its span, also while it is still at work. For one thread at a time: the journal's."""
        if self._context is None and any(map(kept, self._requests)):
            self._context = root_context()
        return self._context

    def __enter__(self) -> Self:
        self._start_s = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.elapsed_s = time.perf_counter() - self._start_s
        self._telemetry.journal.note(self._write, time.time_ns(), error)

    def _write(self, end_ns: int, error: BaseException | None) -> None:
        metrics, lengths_s = self._telemetry.metrics, self._lengths_s
        model = metrics.model_label(self._model)
        padded_s = max(lengths_s) * len(lengths_s)
        padding_ratio = 1.0 - sum(lengths_s) / padded_s if padded_s > 0 else 0.0
        metrics.batch_size.observe(len(lengths_s))
        metrics.batch_padding.observe(padding_ratio)
        metrics.compute.labels(model).inc(self.elapsed_s)
        metrics.audio_computed.labels(model).inc(sum(lengths_s))
        tracing = self._telemetry.tracing
        context, links = self.kept(), links_to(self._requests)
        self._requests = ()
        if tracing is None or context is None:
            return
        attributes: dict[str, AttributeValue] = {
            "asr.model": model,
            "asr.batch_size": len(lengths_s),
            "asr.audio_s": float(sum(lengths_s)),
            "asr.padding_ratio": round(padding_ratio, 4),
        }
        if error is not None:
            attributes["error.type"] = type(error).__name__
        tracing.finished(
            "batch",
            context,
            None,
            start_ns=end_ns - int(self.elapsed_s * 1e9),
            end_ns=end_ns,
            attributes=attributes,
            links=links,
            events=[exception_event(error, end_ns)] if error is not None else (),
            failed=error is not None,
        )
