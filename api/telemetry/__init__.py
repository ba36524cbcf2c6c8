"""Telemetry: every metric, the tracer, the logs, and the ``stage()`` context manager.

    create_app()   telemetry = Telemetry(version=..., commit=..., environ=os.environ)
                   instrument(app, telemetry, on_error=...)       # after the other middleware
                   GET /metrics: metrics_response(telemetry, request)
                   exception handlers: current_record().failed(error.code, error.status)
                   stop: telemetry.shutdown(), last
    engine         telemetry.model_not_loaded(name) before loading, .model_loaded(name, ...) when warm,
                   telemetry.engine_configured(...), metrics.ready.set(1) when ready, 0 when draining
                   in the worker's thread: with telemetry.batch(model=, lengths_s=, requests=) as batch: ...;
                   telemetry.busy.begin(), .end() around it and its decoding
    batcher        metrics.queue_depth / queue_audio / queue_limit; telemetry.origin() when a segment
                   is submitted
    transcriber    telemetry.record_stage("queue", s), record_stage("inference", s, links=[batch]), ... when a
                   result is there; telemetry.transcribed(...) once per recording
    asr serve      configure_logging(...); uvicorn with log_config=None, access_log=False

Requests are counted in one place, the middleware, so that the sums on /metrics are the requests sent.
"""

from api.telemetry.core import Telemetry
from api.telemetry.http import instrument, metrics_response, request_id
from api.telemetry.logs import configure_logging
from api.telemetry.metrics import (
    OUTCOMES,
    REJECTION_REASONS,
    STAGES,
    TRANSCRIPTION_ROUTES,
    UNKNOWN,
    Metrics,
    is_transcription,
)
from api.telemetry.record import RequestRecord, current_record, outcome_of
from api.telemetry.spans import Origin
from api.telemetry.stages import Batch, Stage

__all__ = [
    "OUTCOMES",
    "REJECTION_REASONS",
    "STAGES",
    "TRANSCRIPTION_ROUTES",
    "UNKNOWN",
    "Batch",
    "Metrics",
    "Origin",
    "RequestRecord",
    "Stage",
    "Telemetry",
    "configure_logging",
    "current_record",
    "instrument",
    "is_transcription",
    "metrics_response",
    "outcome_of",
    "request_id",
]
