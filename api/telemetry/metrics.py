"""Every metric of the service, declared once.

``Metrics`` owns a registry of its own, so that two applications in one process (tests, mostly) never share a
number. Names follow the Prometheus conventions: base units, ``_seconds``, ``_total``, ``_info``. No label
takes a value that a caller chose: models and languages come from what is loaded, everything else from the
closed sets below, and what is in neither is ``unknown``.
"""

from __future__ import annotations

import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from opentelemetry.trace import SpanContext
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client import Histogram as PlainHistogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.telemetry.resources import MemoryCollector, memory_limit_bytes
from api.telemetry.spans import exemplar

UNKNOWN = "unknown"

# How a transcription request ended. `rejected` is our lack of capacity and counts against availability;
# `limited` is the caller's own rate limit, `invalid` and `unauthorized` are the caller's mistakes: they do
# not.
OUTCOMES = ("ok", "invalid", "unauthorized", "limited", "rejected", "cancelled", "timeout", "error")
# Outcomes whose duration says something about the service: fast refusals would flatter the percentiles.
TIMED_OUTCOMES = frozenset({"ok", "timeout", "error"})

# Outcomes whose trace is red, also where the answer began with 200: a batch, a stream.
FAILED_OUTCOMES = frozenset({"timeout", "error"})

# Answers of the transcription routes whose series are there from the start: a burst of errors is over before
# a rate sees anything of a series that only begins with it. Each costs 18 lines on /metrics (15 buckets, Inf,
# sum and count), three routes 162 in all; other statuses begin with their first answer.
FAILED_STATUSES = ("500", "503", "504")

# A request's way, in order. `read` is the upload, `render` makes the body of the answer.
STAGES = ("read", "decode", "segment", "queue", "inference", "ctc", "render")

REJECTION_REASONS = (
    "queue_full",
    "rate_limit_exceeded",
    "not_ready",
    "draining",
    "out_of_resources",
    "deadline_exceeded",
    "upload_too_large",
    "audio_too_long",
    "too_many_connections",
    "too_many_streams",
)

# What became of segments that are in no transcript. `abandoned`: the caller left while it waited; `expired`:
# its deadline passed while it waited; `unclaimed`: it was computed, but its caller had left or given up by
# then; `failed`: the engine failed on it, or the process stopped; `noise`: recognised, with so little
# confidence that it is taken for noise.
DROP_REASONS = ("abandoned", "expired", "unclaimed", "failed", "noise")

# The routes that transcribe; every other route is in http_server_request_duration_seconds only.
TRANSCRIPTION_ROUTES = ("/transcribe", "/transcribe/batch", "/v1/audio/transcriptions")


def is_transcription(scope: Mapping[str, Any]) -> bool:
    """Whether this ASGI scope is an HTTP request for a transcription."""
    return scope.get("method") == "POST" and scope["path"] in TRANSCRIPTION_ROUTES


# Live sessions: each utterance counts as a request, whose duration is the wait for its transcript after its
# end. A session that is refused, or ends with an error of its own, is a request, too.
LIVE_ROUTES = {"realtime": "/v1/realtime", "vosk": "/vosk"}

# How a live session ended. `closed`: it was done, or the caller said good-bye; `lost`: the connection broke
# off; `unread`: the caller did not read what it was sent; `protocol_error`: frames that are none, or a flood.
SESSION_ENDS = (
    "closed",
    "lost",
    "unread",
    "ping_timeout",
    "message_too_large",
    "protocol_error",
    "draining",
    "stream_timeout",
    "invalid",
    "error",
)

# Where no route was found, or the request was refused before anybody looked for one.
UNMATCHED_ROUTE = "unmatched"
# How a request ends that is refused before the application sees it: malformed or too large a head, all
# connections in use, a head that never ended.
REFUSED_OUTCOMES = ("invalid", "rejected", "cancelled")

TRANSPORTS = ("http", "sse", "websocket")
PROTOCOLS = ("sse", *LIVE_ROUTES)

_REQUEST_BUCKETS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_AUDIO_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0)
_RTF_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
_RATIO_BUCKETS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
_CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
_BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


_EXEMPLAR_EVERY_S = 1.0


class Histogram(PlainHistogram):
    """A histogram whose buckets take an exemplar at most once a second.

    A scrape sees only the last one of each bucket, and to set it costs three times the observation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds: tuple[float, ...] = kwargs["buckets"]
        self._exemplar_due_s = [0.0] * (len(self._bounds) + 1)

    def record(self, value: float, span: SpanContext | None) -> None:
        """Observe `value` in the trace of `span`; None where there is none, or where it is not kept."""
        kept = None
        if span is not None:
            bucket, now_s = bisect_left(self._bounds, value), time.monotonic()
            if now_s >= self._exemplar_due_s[bucket]:
                self._exemplar_due_s[bucket] = now_s + _EXEMPLAR_EVERY_S
                kept = exemplar(span)
        self.observe(value, kept)


AnyMetric = TypeVar("AnyMetric", Counter, Gauge, Histogram)


def _remembering(metric: AnyMetric) -> AnyMetric:
    """`metric`, whose ``labels`` finds a known series without a lock and without making strings."""
    metric.labels = cache(metric.labels)  # type: ignore[method-assign]
    return metric


class _Before(Collector):
    """No metric of its own; registered first, it is asked before the others, whoever reads the registry."""

    def __init__(self, collecting: Callable[[], None]) -> None:
        self._collecting = collecting

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        self._collecting()
        return ()


class Metrics:
    """The metrics of one application, on one registry."""

    def __init__(
        self,
        *,
        version: str = "0",
        commit: str = UNKNOWN,
        environment: str = "development",
        before_collecting: Callable[[], None] = lambda: None,
    ) -> None:
        """``before_collecting`` is called before the registry is read, to write what is not written yet."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()
        registry.register(_Before(before_collecting))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(MemoryCollector())
        self._models: set[str] = set()
        self._languages: set[str] = set()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return _remembering(Counter(name, text, labels, registry=registry))

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return _remembering(Gauge(name, text, labels, registry=registry))

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return _remembering(Histogram(name, text, labels, buckets=tuple(buckets), registry=registry))

        # Requests
        self.requests = counter(
            "asr_requests_total", "Transcription requests by how they ended.", "route", "model", "outcome"
        )
        self.request_duration = histogram(
            "asr_request_duration_seconds",
            "From the first byte read to the last written, of requests that ended ok, timeout or error.",
            _REQUEST_BUCKETS,
            "route",
            "model",
        )
        self.http_duration = histogram(
            "http_server_request_duration_seconds",
            "Duration of every HTTP request (OpenTelemetry http.server.request.duration).",
            _HTTP_BUCKETS,
            "http_request_method",
            "http_route",
            "http_response_status_code",
            "error_type",
        )
        self.stage_duration = histogram(
            "asr_stage_duration_seconds",
            "One stage of one request (per segment for long files).",
            _STAGE_BUCKETS,
            "stage",
        )
        self.inflight = gauge("asr_inflight_requests", "Transcription requests being served now.")
        self.rejections = counter(
            "asr_rejections_total", "Files and requests refused, or given up, by reason.", "reason"
        )
        self.time_to_first_result = histogram(
            "asr_time_to_first_result_seconds",
            "From the first byte read to the first byte of text written.",
            _REQUEST_BUCKETS,
            "transport",
        )
        self.stream_sessions = gauge(
            "asr_stream_sessions", "Open streaming answers and live sessions.", "protocol"
        )
        self.stream_sessions_ended = counter(
            "asr_stream_sessions_ended_total", "Live sessions by how they ended.", "protocol", "end"
        )

        # Audio and models
        self.audio_duration = histogram(
            "asr_audio_duration_seconds", "Length of each transcribed recording.", _AUDIO_BUCKETS, "model"
        )
        self.audio_processed = counter(
            "asr_audio_processed_seconds_total", "Seconds of audio transcribed.", "model", "language"
        )
        self.compute = counter(
            "asr_compute_seconds_total",
            "Seconds workers spent on inference; over asr_audio_computed_seconds_total: real-time factor.",
            "model",
        )
        # Not what asr_audio_processed_seconds_total counts: that is a recording when it is done, but batches
        # also run for recordings that end later or never, and several times for a live utterance.
        self.audio_computed = counter(
            "asr_audio_computed_seconds_total",
            "Seconds of audio in the batches that workers ran, whatever became of them.",
            "model",
        )
        self.real_time_factor = histogram(
            "asr_real_time_factor",
            "Processing time over audio length, per recording, waiting included.",
            _RTF_BUCKETS,
            "model",
        )
        self.confidence = histogram(
            "asr_confidence",
            "Confidence of each transcript (1 is certain).",
            _CONFIDENCE_BUCKETS,
            "model",
            "language",
        )
        self.model_loaded = gauge(
            "asr_model_loaded", "1 when the model is loaded and warm, 0 when it failed.", "model"
        )
        self.model_load_seconds = gauge(
            "asr_model_load_seconds", "Verify, load and warm up, at start.", "model"
        )
        self.model_info = gauge(
            "asr_model_info",
            "What serves under this model name.",
            "model",
            "revision",
            "quantization",
            "provider",
            "kernels",
        )

        # Queue and workers
        self.queue_depth = gauge("asr_queue_depth", "Segments that wait for a worker.")
        self.queue_audio = gauge(
            "asr_queue_audio_seconds", "Audio-seconds that wait for a worker, or are on their way."
        )
        self.queue_limit = gauge(
            "asr_queue_limit_audio_seconds", "Audio-seconds the queue takes before it refuses."
        )
        self.segments_dropped = counter(
            "asr_segments_dropped_total", "Segments that are in no transcript, by reason.", "reason"
        )
        self.batch_size = histogram("asr_batch_size", "Segments per batch.", _BATCH_BUCKETS)
        self.batch_padding = histogram(
            "asr_batch_padding_ratio", "Share of a batch's samples that is padding.", _RATIO_BUCKETS
        )
        self.worker_busy = gauge(
            "asr_worker_busy_ratio",
            "Share of the workers' time spent on batches over the last 15 s.",
        )
        self.workers = gauge("asr_workers", "Inference workers, as calibrated.")
        self.worker_threads = gauge("asr_worker_threads", "Threads per worker, as calibrated.")
        self.max_batch = gauge("asr_max_batch_size", "Batch cap, as calibrated.")
        self.cpu_limit = gauge(
            "asr_cpu_limit_cores", "CPU cores the cgroup grants, which the threads follow."
        )

        # The process
        self.ready = gauge("asr_ready", "1 when the service takes requests; 0 while it starts and drains.")
        self.memory_limit = gauge(
            "asr_memory_limit_bytes",
            "Memory the cgroup grants; the machine's memory where there is no limit.",
        )
        self.trace_spans = counter("asr_trace_spans_total", "Spans by what became of them.", "result")
        self.build_info = gauge(
            "asr_build_info", "What runs, and as what.", "version", "commit", "python", "environment"
        )

        build = (version, commit or UNKNOWN, platform.python_version(), environment)
        self.build_info.labels(*build).set(1)
        self.memory_limit.set(memory_limit_bytes())
        self.ready.set(0)
        self._start_at_zero(UNKNOWN)
        for outcome in REFUSED_OUTCOMES:
            self.requests.labels(UNMATCHED_ROUTE, UNKNOWN, outcome)
        for route in TRANSCRIPTION_ROUTES:
            for status in FAILED_STATUSES:
                self.http_duration.labels("POST", route, status, status)
        for reason in REJECTION_REASONS:
            self.rejections.labels(reason)
        for reason in DROP_REASONS:
            self.segments_dropped.labels(reason)
        self.stages = {stage: self.stage_duration.labels(stage) for stage in STAGES}
        for protocol in PROTOCOLS:
            self.stream_sessions.labels(protocol)
        for protocol in LIVE_ROUTES:
            for end in SESSION_ENDS:
                self.stream_sessions_ended.labels(protocol, end)
        for result in ("exported", "failed", "dropped"):
            self.trace_spans.labels(result)

    # -- bounded labels

    def add_model(self, name: str, languages: Iterable[str]) -> None:
        """Make `name` and `languages` label values of their own."""
        self._models.add(name)
        self._languages.update(languages)
        self._start_at_zero(name)

    def _start_at_zero(self, model: str) -> None:
        """A rate sees the first event of a series only if the series was there before it."""
        self.compute.labels(model)
        self.audio_computed.labels(model)
        for route in (*TRANSCRIPTION_ROUTES, *LIVE_ROUTES.values()):
            self.request_duration.labels(route, model)
            for outcome in OUTCOMES:
                self.requests.labels(route, model, outcome)

    def model_label(self, name: str | None) -> str:
        """`name` if that model is loaded, else ``unknown``."""
        return name if name in self._models and name is not None else UNKNOWN

    def language_label(self, language: str | None) -> str:
        """`language` if a loaded model speaks it, else ``unknown``."""
        return language if language in self._languages and language is not None else UNKNOWN

    def reject(self, reason: str | None) -> None:
        """Count one refused file or request where `reason`, an error's code, is one of ours."""
        if reason in REJECTION_REASONS:
            self.rejections.labels(reason).inc()
