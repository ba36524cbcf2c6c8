"""The one object through which the service reports: ``stage()``, ``batch()`` and the request's end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import Link, SpanContext

from api.telemetry.busy import BusyWindow
from api.telemetry.journal import Journal
from api.telemetry.metrics import (
    LIVE_ROUTES,
    REJECTION_REASONS,
    TIMED_OUTCOMES,
    UNKNOWN,
    UNMATCHED_ROUTE,
    Histogram,
    Metrics,
)
from api.telemetry.record import RequestRecord, current_record, outcome_of
from api.telemetry.scrape import ScrapeWatch
from api.telemetry.spans import AttributeValue, child_context, named
from api.telemetry.stages import Batch, Stage
from api.telemetry.tracing import Tracing, build_tracing

if TYPE_CHECKING:
    from api.telemetry.server_span import RequestSpan


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
        links: Sequence[SpanContext | None] = (),
        **attributes: AttributeValue,
    ) -> None:
        """Report a stage that was measured elsewhere (queue, inference), in the caller's context.

        It ended `ended_ago_s` ago and lasted `elapsed_s`. `links` leads, for instance, to the batch's span.
        """
        self.stage_ended(name, elapsed_s, attributes, ended_ago_s=ended_ago_s, links=links)

    def stage_ended(
        self,
        name: str,
        elapsed_s: float,
        attributes: Mapping[str, AttributeValue],
        *,
        ended_ago_s: float = 0.0,
        links: Sequence[SpanContext | None] = (),
        error: str | None = None,
    ) -> None:
        """What ``stage`` and ``record_stage`` report; `error` is the type of what it failed with."""
        end_ns = time.time_ns() - int(ended_ago_s * 1e9)
        histogram, parent = self.metrics.stages[name], self.sampled_parent()
        record = current_record()
        if record is not None:
            record.add_stage(name, elapsed_s)
        self.journal.note(
            self._write_stage, histogram, name, elapsed_s, end_ns, parent, links, error, attributes
        )

    def _write_stage(
        self,
        histogram: Histogram,
        name: str,
        elapsed_s: float,
        end_ns: int,
        parent: SpanContext | None,
        links: Sequence[SpanContext | None],
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
            links=[Link(context) for context in links if context is not None],
            failed=error is not None,
        )

    def sampled_parent(self) -> SpanContext | None:
        """The span that the caller works for, if it will be kept."""
        if self.tracing is None:
            return None
        record = current_record()
        if record is not None:
            return record.span
        context = trace.get_current_span().get_span_context()
        return context if context.trace_flags.sampled and context.is_valid else None

    def batch(
        self, *, model: str, lengths_s: Sequence[float], requests: Iterable[SpanContext | None] = ()
    ) -> Batch:
        """Around one inference, in the worker's thread: ``with telemetry.batch(...) as batch:``.

        `lengths_s` are the true lengths of the batch's rows in seconds, `requests` what
        :meth:`sampled_parent` gave for each. The span is the root of its own trace and linked to its
        requests: a batch belongs to all of them and is the child of none. ``batch.span_context`` leads back
        to it.
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
        model, language = self.metrics.model_label(model), self.metrics.language_label(language)
        kept = self.sampled_parent()
        real_time_factor = processing_s / audio_s if audio_s > 0 else None
        self.journal.note(
            self._write_transcript, model, language, audio_s, real_time_factor, confidence, kept
        )
        record = current_record()
        if record is not None:
            record.model, record.language = model, language
            record.audio_s += audio_s
            record.real_time_factor = real_time_factor or 0.0

    def _write_transcript(
        self,
        model: str,
        language: str,
        audio_s: float,
        real_time_factor: float | None,
        confidence: float | None,
        kept: SpanContext | None,
    ) -> None:
        metrics = self.metrics
        metrics.audio_duration.labels(model).record(audio_s, kept)
        metrics.audio_processed.labels(model, language).inc(audio_s)
        if real_time_factor is not None:
            metrics.real_time_factor.labels(model).record(real_time_factor, kept)
        if confidence is not None:
            metrics.confidence.labels(model, language).record(confidence, kept)

    def request_ended(self, record: RequestRecord, status: int, *, elapsed_s: float, cancelled: bool) -> None:
        """Count a finished transcription request and set its outcome. The middleware calls this, once."""
        status = record.error_status or status
        record.outcome = "cancelled" if cancelled else outcome_of(status, record.error_code)
        self.journal.note(self._write_request, record, elapsed_s)
        self.scrapes.changed()

    def _write_request(self, record: RequestRecord, elapsed_s: float) -> None:
        outcome = record.outcome
        model = self.metrics.model_label(record.model)
        self._count(record.route, model, outcome, record.error_code)
        if outcome in TIMED_OUTCOMES:
            self.metrics.request_duration.labels(record.route, model).record(elapsed_s, record.span)
        if outcome == "ok":
            first_s = record.first_result_s if record.first_result_s is not None else elapsed_s
            self.metrics.time_to_first_result.labels(record.transport).record(first_s, record.span)

    def http_ended(
        self, method: str, route: str, status: int, *, elapsed_s: float, span: SpanContext | None
    ) -> None:
        """Time an HTTP request of any route."""
        self.journal.note(self._write_http, method, route, status, elapsed_s, span)

    def _write_http(
        self, method: str, route: str, status: int, elapsed_s: float, span: SpanContext | None
    ) -> None:
        labels = (method, route, str(status), str(status) if status >= 500 else "")
        self.metrics.http_duration.labels(*labels).record(elapsed_s, span)

    def span_ended(
        self,
        span: RequestSpan,
        status: int,
        *,
        record: RequestRecord | None,
        error: Exception | None,
        cut_off: bool,
    ) -> None:
        """Have the span of a request made; arguments as of ``RequestSpans.end``."""
        if span.context.trace_flags.sampled:
            self.journal.note(self._write_span, span, time.time_ns(), status, record, error, cut_off)

    def _write_span(
        self,
        span: RequestSpan,
        end_ns: int,
        status: int,
        record: RequestRecord | None,
        error: Exception | None,
        cut_off: bool,
    ) -> None:
        if self.tracing is not None:
            told = named(_final_attributes(record)) if record is not None else None
            self.tracing.requests.end(span, end_ns, status, told or {}, error, cut_off)

    def utterance_ended(
        self, protocol: str, model: str, *, elapsed_s: float, status: int = 200, code: str | None = None
    ) -> None:
        """Count an utterance of a live session, told `elapsed_s` after its end, or failed with `status`.

        `protocol` is one of ``metrics.LIVE_ROUTES``. A session that is refused counts as an utterance, too.
        """
        route, model, outcome = (
            LIVE_ROUTES[protocol],
            self.metrics.model_label(model),
            outcome_of(status, code),
        )
        self._count(route, model, outcome, code)
        self.scrapes.changed()
        if outcome in TIMED_OUTCOMES:
            self.metrics.request_duration.labels(route, model).record(elapsed_s, self.sampled_parent())

    def refused(self, status: int, code: str) -> None:
        """Count a request that was refused before the application saw it, with `status` and error `code`.

        Nobody read whether it was meant for a transcription route, so it is counted as if it was.
        """
        self._count(UNMATCHED_ROUTE, UNKNOWN, outcome_of(status, code), code)
        self.scrapes.changed()

    def _count(self, route: str, model: str, outcome: str, code: str | None) -> None:
        self.metrics.requests.labels(route, model, outcome).inc()
        if code in REJECTION_REASONS:
            self.metrics.rejections.labels(code).inc()

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
