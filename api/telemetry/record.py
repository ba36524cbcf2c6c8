"""What one transcription request has to tell: filled on its way, written out once at its end."""

from __future__ import annotations

import time
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass, field

from api.telemetry.journal import Note
from api.telemetry.spans import Origin

# Error codes whose outcome is not the one their status alone would give.
_OUTCOME_OF_CODE = {
    "rate_limit_exceeded": "limited",
    "client_disconnected": "cancelled",
    "deadline_exceeded": "timeout",
}


def outcome_of(status: int, code: str | None = None) -> str:
    """The outcome of a request that was answered with `status` and, where it failed, error `code`."""
    if code in _OUTCOME_OF_CODE:
        return _OUTCOME_OF_CODE[code]
    if status < 400:
        return "ok"
    if status in (401, 403):
        return "unauthorized"
    if status in (408, 499):
        return "cancelled"
    if status in (429, 503):
        return "rejected"
    if status == 504:
        return "timeout"
    return "invalid" if status < 500 else "error"


@dataclass(slots=True)
class RequestEnd:
    """How an HTTP request of any route ended.

    `answered` is the status that was sent, 0 for none; `status` the one that counts: 499 where the caller
    left (`cancelled`), 500 where the answer broke off. `end_ns` since the epoch. `error` is what nobody
    handled; `cut_off` that it came after the answer had begun. `origin` leads to the request's span.
    """

    method: str
    route: str
    status: int
    answered: int
    elapsed_s: float
    end_ns: int
    cancelled: bool
    error: Exception | None
    cut_off: bool
    origin: Origin | None


@dataclass(slots=True)
class RequestRecord:
    """One transcription request. Routes and the transcriber fill it; the middleware writes it out.

    `stages_s` adds up per stage: the segments of a long file run side by side, so its sum can exceed the
    request's duration. `error_code` is set for failures, also those that come after the first byte of a
    stream. `caller` is the name of the key, or the address where no keys are configured; it is not written
    out. `origin` leads to the request's own span. `notes` wait to be written with the request, at the latest;
    what comes after it has `ended` is written by itself.
    """

    request_id: str
    route: str
    transport: str = "http"
    origin: Origin | None = None
    caller: str | None = None
    model: str | None = None
    language: str | None = None
    audio_s: float = 0.0
    real_time_factor: float = 0.0
    outcome: str = ""
    error_code: str | None = None
    error_status: int | None = None
    start_s: float = field(default_factory=time.perf_counter)
    first_result_s: float | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    batch_size: int = 0
    notes: deque[Note] = field(default_factory=deque)
    ended: bool = False

    def add_stage(self, stage: str, elapsed_s: float) -> None:
        """Add `elapsed_s` to `stage`."""
        self.stages_s[stage] = self.stages_s.get(stage, 0.0) + elapsed_s

    def failed(self, code: str, status: int) -> None:
        """The request failed with `code`, even if its answer began with status 200."""
        self.error_code, self.error_status = code, status

    def first_result(self) -> None:
        """The first text is about to be written; later calls change nothing."""
        if self.first_result_s is None:
            self.first_result_s = time.perf_counter() - self.start_s

    def server_timing(self) -> str:
        """The stages so far as a ``Server-Timing`` header (W3C), milliseconds."""
        return ", ".join(
            [f"{stage};dur={elapsed_s * 1000:.2f}" for stage, elapsed_s in self.stages_s.items()]
        )


request_id_in_logs: ContextVar[str | None] = ContextVar("asr_request_id", default=None)
_current: ContextVar[RequestRecord | None] = ContextVar("asr_request_record", default=None)


def current_record() -> RequestRecord | None:
    """The record of the transcription request this code runs for, or None outside of one."""
    return _current.get()
