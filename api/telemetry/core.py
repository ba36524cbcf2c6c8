"""The one object through which the service reports: ``stage()``, ``batch()`` and the request's end."""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVarTuple

from opentelemetry import trace
from opentelemetry.trace import SpanContext

from api.telemetry.busy import BusyWindow
from api.telemetry.journal import Journal, write
from api.telemetry.metrics import (
    FAILED_OUTCOMES,
    LIVE_ROUTES,
    TIMED_OUTCOMES,
    UNKNOWN,
    UNMATCHED_ROUTE,
    Histogram,
    Metrics,
)
from api.telemetry.record import RequestEnd, RequestRecord, current_record, outcome_of
from api.telemetry.scrape import ScrapeWatch
from api.telemetry.spans import (
    AttributeValue,
    KnownSpan,
    Origin,
    RequestSpan,
    child_context,
    kept,
    links_to,
    named,
)
from api.telemetry.stages import Batch, Stage
from api.telemetry.tracing import Tracing, build_tracing

MOST_NOTES_OF_A_REQUEST = 64
"""More are written before the request ends, so that hour-long files show while they are at work."""

Args = TypeVarTuple("Args")


class Telemetry:
    """Metrics and tracer of one application.

    Give the same object to everything that create_app() wires. All of it may be called from any thread.
    Without an OTLP endpoint in the environment no span is made and only the metrics cost anything.
    """

    def __init__(
        self,
        *,
        version: str = "0",
        commit: str = "unknown",
        environment: str = "development",
        environ: Mapping[str, str] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`environment` is the setting ``ASR_ENV``; `environ` holds the ``OTEL_*`` variables.

        Give ``os.environ`` there; None means no tracing.
        """
        self.journal = Journal()
        self.metrics = Metrics(
            version=version,
            commit=commit,
            environment=environment,
            before_collecting=self.journal.work_off,
        )
        if tracing is None and environ is not None:
            tracing = build_tracing(self._count_spans, version, environment, environ)
        self.tracing = tracing
        self.scrapes = ScrapeWatch()
        self.busy = BusyWindow()
        self._inflight = 0
        self.metrics.inflight.set_function(lambda: self._inflight)
        self.metrics.worker_busy.set_function(self.busy.ratio)

    def _count_spans(self, result: str, count: int) -> None:
        self.metrics.trace_spans.labels(result).inc(count)

    # -- stages

    def stage(self, name: str, **attributes: AttributeValue) -> Stage:
        """``with telemetry.stage("decode") as stage:`` is one span and one observation.

        `name` is one of :data:`api.telemetry.STAGES` (KeyError otherwise). In a pool thread the span finds
        its parent when the thread runs in the caller's context, as ``asyncio.to_thread`` does; with
        ``run_in_executor`` pass ``contextvars.copy_context().run``.
        """
        return Stage(self, name, attributes)

    def record_stage(
        self,
        name: str,
        elapsed_s: float,
        *,
        ended_ago_s: float = 0.0,
        links: Sequence[Origin | None] = (),
        error: str | None = None,
        **attributes: AttributeValue,
    ) -> None:
        """Report a stage that was measured elsewhere (queue, inference), in the caller's context.

        It ended `ended_ago_s` ago and lasted `elapsed_s`. `links` leads, for instance, to the batch; `error`
        is the type of what it ended with, where that is no result. Raises KeyError like :meth:`stage`.
        """
        self.stage_ended(name, elapsed_s, attributes, ended_ago_s=ended_ago_s, links=links, error=error)

    def stage_ended(
        self,
        name: str,
        elapsed_s: float,
        attributes: Mapping[str, AttributeValue],
        *,
        ended_ago_s: float = 0.0,
        links: Sequence[Origin | None] = (),
        error: str | None = None,
    ) -> None:
        """What ``stage`` and ``record_stage`` report; `error` is the type of what it failed with.

        What was cancelled is not marked as failed: its caller left, or another part of the request failed.
        """
        histogram = self.metrics.stages[name]
        end_ns = time.time_ns() - int(ended_ago_s * 1e9)
        record = current_record()
        if record is not None:
            record.stages_s[name] = record.stages_s.get(name, 0.0) + elapsed_s
        self._note(record, self._write_stage, histogram, name, elapsed_s, end_ns, links, error, attributes)

    def _write_stage(
        self,
        parent: SpanContext | None,
        histogram: Histogram,
        name: str,
        elapsed_s: float,
        end_ns: int,
        links: Sequence[Origin | None],
        error: str | None,
        attributes: Mapping[str, AttributeValue],
    ) -> None:
        histogram.record(elapsed_s, parent)
        if self.tracing is None or parent is None:
            return
        told = named(attributes)
        if error is not None:
            told = {**(told or {}), "error.type": error}
        self.tracing.finished(
            name,
            child_context(parent),
            parent,
            start_ns=end_ns - int(elapsed_s * 1e9),
            end_ns=end_ns,
            attributes=told,
            links=links_to(links),
            failed=error is not None and error != CancelledError.__name__,
        )

    def _note(
        self,
        record: RequestRecord | None,
        function: Callable[[SpanContext | None, *Args], None],
        *args: *Args,
    ) -> None:
        """Have ``function(ids of the caller's span if that is kept, *args)`` called from the journal."""
        if record is None:
            self.journal.note(self._write_alone, self.origin(), function, args)
            return
        record.notes.append((function, args))
        # In this order: what is appended while the request ends is written by it or by this.
        if record.ended or len(record.notes) >= MOST_NOTES_OF_A_REQUEST:
            self.journal.note(self._write_notes, record)

    def _write_alone(
        self,
        origin: Origin | None,
        function: Callable[[SpanContext | None, *Args], None],
        args: tuple[*Args],
    ) -> None:
        function(kept(origin), *args)

    def _write_notes(self, record: RequestRecord) -> None:
        span = kept(record.origin)
        while record.notes:
            function, args = record.notes.popleft()
            write(function, (span, *args))

    def origin(self) -> Origin | None:
        """The request that the caller works for, as what its spans belong to; None without tracing."""
        if self.tracing is None:
            return None
        record = current_record()
        return record.origin if record is not None else KnownSpan(trace.get_current_span().get_span_context())

    def batch(
        self, *, model: str, lengths_s: Sequence[float], requests: Sequence[Origin | None] = ()
    ) -> Batch:
        """Around one inference, in the worker's thread: ``with telemetry.batch(...) as batch:``.

        `lengths_s` are the true lengths of the batch's rows in seconds, `requests` what :meth:`origin` gave
        for each. The span is the root of its own trace and linked to its requests: a batch belongs to all of
        them and is the child of none. ``batch`` is what leads back to it.
        """
        return Batch(self, model, lengths_s, requests)

    def segments_dropped(self, reason: str, count: int = 1) -> None:
        """Count segments that will be in no transcript; `reason` is one of ``metrics.DROP_REASONS``."""
        if count:
            self.metrics.segments_dropped.labels(reason).inc(count)

    # -- set-up

    def engine_configured(
        self, *, workers: int, threads_per_worker: int, max_batch: int, cpu_limit_cores: float
    ) -> None:
        """Export what calibration chose."""
        self.busy.workers = workers
        self.metrics.workers.set(workers)
        self.metrics.worker_threads.set(threads_per_worker)
        self.metrics.max_batch.set(max_batch)
        self.metrics.cpu_limit.set(cpu_limit_cores)

    def model_loaded(
        self,
        name: str,
        *,
        languages: Iterable[str],
        revision: str,
        quantization: str,
        provider: str,
        kernels: str,
        load_s: float,
    ) -> None:
        """A bundle is loaded and warm: from now on `name` and its languages are labels of their own."""
        self.metrics.add_model(name, languages)
        self.metrics.model_loaded.labels(name).set(1)
        self.metrics.model_load_seconds.labels(name).set(load_s)
        self.metrics.model_info.labels(name, revision, quantization, provider, kernels).set(1)

    def model_not_loaded(self, name: str) -> None:
        """A configured bundle is not loaded: not yet (say so before loading), or no longer."""
        self.metrics.add_model(name, ())
        self.metrics.model_loaded.labels(name).set(0)

    # -- results

    def transcribed(
        self,
        *,
        model: str,
        language: str | None,
        audio_s: float,
        processing_s: float,
        confidence: float | None,
    ) -> None:
        """One recording became a transcript: once per file, for each file of a batch request.

        `processing_s` includes waiting. `confidence` is None where there was nothing to be confident about
        (silence): an empty transcript must not move the drift that operators watch.
        """
        real_time_factor = processing_s / audio_s if audio_s > 0 else None
        record = current_record()
        if record is not None:
            record.model, record.language = model, language
            record.audio_s += audio_s
            record.real_time_factor = real_time_factor or 0.0
        self._note(record, self._write_transcript, model, language, audio_s, real_time_factor, confidence)

    def _write_transcript(
        self,
        span: SpanContext | None,
        model: str,
        language: str | None,
        audio_s: float,
        real_time_factor: float | None,
        confidence: float | None,
    ) -> None:
        metrics = self.metrics
        model, language = metrics.model_label(model), metrics.language_label(language)
        metrics.audio_duration.labels(model).record(audio_s, span)
        metrics.audio_processed.labels(model, language).inc(audio_s)
        if real_time_factor is not None:
            metrics.real_time_factor.labels(model).record(real_time_factor, span)
        if confidence is not None:
            metrics.confidence.labels(model, language).record(confidence, span)

    def request_began(self) -> None:
        """A transcription request is being served, until ``request_ended``. Called on the event loop."""
        self._inflight += 1

    def session_began(self) -> None:
        """The request was for a live session, and that is open. Called on the event loop."""
        self._inflight -= 1

    def request_ended(self, end: RequestEnd, record: RequestRecord | None) -> None:
        """An HTTP request is over. The middleware calls this, once, on the event loop.

        With a `record`, of a transcription request, its outcome is set and everything it noted is written.
        """
        if record is not None:
            self._inflight -= 1
            status = record.error_status or end.status
            record.outcome = "cancelled" if end.cancelled else outcome_of(status, record.error_code)
            record.ended = True
            self.scrapes.changed()
        self.journal.note(self._write_request, end, record)

    def _write_request(self, end: RequestEnd, record: RequestRecord | None) -> None:
        span = kept(end.origin)
        status = str(end.status)
        labels = (end.method, end.route, status, status if end.status >= 500 else "")
        self.metrics.http_duration.labels(*labels).record(end.elapsed_s, span)
        if record is not None:
            self._write_notes(record)
            self._write_record(record, end.elapsed_s, span)
        if self.tracing is not None and span is not None and isinstance(end.origin, RequestSpan):
            told = named(_final_attributes(record)) if record is not None else None
            failed = record is not None and record.outcome in FAILED_OUTCOMES
            self.tracing.requests.end(end.origin, end, told or {}, failed=failed)

    def _write_record(self, record: RequestRecord, elapsed_s: float, span: SpanContext | None) -> None:
        outcome = record.outcome
        model = self.metrics.model_label(record.model)
        self._count(record.route, model, outcome, record.error_code)
        if outcome in TIMED_OUTCOMES:
            self.metrics.request_duration.labels(record.route, model).record(elapsed_s, span)
        if outcome == "ok":
            first_s = record.first_result_s if record.first_result_s is not None else elapsed_s
            self.metrics.time_to_first_result.labels(record.transport).record(first_s, span)

    def utterance_ended(
        self, protocol: str, model: str, *, elapsed_s: float, status: int = 200, code: str | None = None
    ) -> None:
        """Count an utterance of a live session, told `elapsed_s` after its end, or failed with `status`.

        `protocol` is one of ``metrics.LIVE_ROUTES``.
        """
        route, model, outcome = (
            LIVE_ROUTES[protocol],
            self.metrics.model_label(model),
            outcome_of(status, code),
        )
        self._count(route, model, outcome, code)
        self.scrapes.changed()
        if outcome in TIMED_OUTCOMES:
            self.metrics.request_duration.labels(route, model).record(elapsed_s, kept(self.origin()))

    def session_failed(self, protocol: str, status: int, code: str) -> None:
        """Count an open live session that ended with an error which is no utterance's."""
        self._count(LIVE_ROUTES[protocol], UNKNOWN, outcome_of(status, code), code)
        self.scrapes.changed()

    def session_ended(self, protocol: str, end: str) -> None:
        """Count a live session that was open; `end` is one of ``metrics.SESSION_ENDS``."""
        self.metrics.stream_sessions_ended.labels(protocol, end).inc()
        self.scrapes.changed()

    def refused(self, status: int, code: str) -> None:
        """Count a request that was refused before the application saw it, with `status` and error `code`.

        Nobody read whether it was meant for a transcription route, so it is counted as if it was.
        """
        self._count(UNMATCHED_ROUTE, UNKNOWN, outcome_of(status, code), code)
        self.scrapes.changed()

    def _count(self, route: str, model: str, outcome: str, code: str | None) -> None:
        self.metrics.requests.labels(route, model, outcome).inc()
        self.metrics.reject(code)

    def flush(self) -> None:
        """Write everything that is noted and send the spans."""
        self.journal.work_off()
        if self.tracing is not None:
            self.tracing.provider.force_flush()

    def shutdown(self, timeout_s: float = 5.0) -> None:
        """The last step of a stop: write what is noted, send the spans that are still buffered."""
        self.journal.work_off()
        if self.tracing is not None:
            self.tracing.shutdown(timeout_s)


def _final_attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"outcome": record.outcome, "request_id": record.request_id}
    if record.audio_s > 0:
        attributes["audio_s"] = round(record.audio_s, 4)
        attributes["real_time_factor"] = round(record.real_time_factor, 5)
    if record.model is not None:
        attributes["model"] = record.model
    if record.language is not None:
        attributes["language"] = record.language
    if record.batch_size:
        attributes["batch_size"] = record.batch_size
    if "queue" in record.stages_s:
        attributes["queue_s"] = round(record.stages_s["queue"], 6)
    if record.error_code is not None:
        attributes["error_code"] = record.error_code
    return attributes
