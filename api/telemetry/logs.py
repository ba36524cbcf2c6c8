"""Structured logs: JSON in production, readable lines on a terminal, to standard error.

Every line carries ``request_id``, ``trace_id`` and ``span_id`` where there are any. What people said, the
audio they sent and the keys they hold do not reach a log: values are replaced by the name of their field,
before they are rendered. The text of the speech is logged only with ``ASR_LOG_TEXT=true``; audio and keys
never are.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

from api.telemetry.record import request_id_in_logs

LogFormat = Literal["auto", "json", "console"]

_REMOVED = "[removed]"
_NUMBERS = (int, float)
_SPEECH_KEYS = frozenset(
    {
        "text",
        "texts",
        "transcript",
        "transcripts",
        "words",
        "segments",
        "delta",
        "hotwords",
        "keywords",
        "prompt",
    }
)
_SECRET_KEYS = frozenset({"authorization", "apikey", "key", "keys", "token", "secret", "password", "cookie"})
_SECRET_ENDINGS = ("_key", "_keys", "_token", "_secret", "_password", "_authorization", "_cookie")
_AUDIO_KEYS = frozenset({"audio", "waveform", "samples", "body", "content", "data", "file_bytes"})
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]+")
_CREDENTIAL_PAIR = re.compile(
    r"(?i)\b(api[-_]?key|token|secret|password)([\"']?\s*[=:]\s*[\"']?)[^\s&,;\"']+"
)
_USER_INFO = re.compile(r"://[^\s/@]+@")


_threshold = logging.NOTSET


def is_logged(level: int) -> bool:
    """Whether lines of this level are written; making a logger to ask it takes ten times as long."""
    return level >= _threshold


def add_trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the ids of the current span, in the hexadecimal form that trace backends search for."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event


class Redactor:
    """Takes speech, audio and secrets out of an event, at any depth."""

    def __init__(self, *, log_text: bool, secrets: Iterable[str] = ()) -> None:
        self._removed_keys = _SECRET_KEYS if log_text else _SECRET_KEYS | _SPEECH_KEYS
        known = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None
        words = ("bearer", "basic", "api[-_]?key", "token", "secret", "password", "://")
        suspects = [*words, *map(re.escape, known)]
        self._suspicious = re.compile("|".join(suspects), re.IGNORECASE)

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        for key in event:
            if not key.startswith("_"):  # structlog's own fields
                event[key] = self._value(key, event[key])
        return event

    def _value(self, key: str, value: Any) -> Any:
        if value is None or isinstance(value, _NUMBERS):
            return value
        name = key.lower().replace("-", "_")
        if name in self._removed_keys or name.endswith(_SECRET_ENDINGS):
            return _REMOVED
        if isinstance(value, str):
            return self.scrub(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return f"<{len(value)} bytes>"
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return f"<array {tuple(value.shape)} {value.dtype}>"
        if name in _AUDIO_KEYS:
            return _REMOVED
        if isinstance(value, Mapping):
            return {str(inner): self._value(str(inner), item) for inner, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._value(key, item) for item in value]
        return self.scrub(str(value))

    def scrub(self, text: str) -> str:
        """`text` without credentials: known keys, authorisation headers, ``key=value``, user:password@."""
        if self._suspicious.search(text) is None:
            return text
        if self._known is not None:
            text = self._known.sub(_REMOVED, text)
        text = _BEARER.sub(rf"\1 {_REMOVED}", text)
        text = _USER_INFO.sub(f"://{_REMOVED}@", text)
        return _CREDENTIAL_PAIR.sub(rf"\1\2{_REMOVED}", text)


def configure_logging(
    *,
    log_format: LogFormat = "auto",
    level: str = "INFO",
    log_text: bool = False,
    secrets: Iterable[str] = (),
    environment: str = "development",
    stream: TextIO | None = None,
) -> None:
    """Send every log line of the process, ours and the libraries', through one set of processors.

    `secrets` are the configured API keys: wherever one appears, in any field, it is replaced. Call it once
    per process, from ``asr serve``; a second call replaces the first. Start uvicorn with ``log_config=None``
    and ``access_log=False``: the request line is ours.
    """
    global _threshold
    target = stream if stream is not None else sys.stderr
    console = log_format == "console" or (log_format == "auto" and target.isatty())
    _threshold = threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        _add_request_id,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        add_trace_ids,
        structlog.processors.StackInfoRenderer(),
    ]
    if not console:
        shared.append(_add_environment(environment))
    shared += [_plain_exception, Redactor(log_text=log_text, secrets=secrets)]
    renderer: Processor
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=target.isatty())
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=target),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True
    # An HTTP client logs whole URLs at this level; ours never needs them.
    logging.getLogger("httpx").setLevel(max(threshold, logging.WARNING))


def _add_request_id(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    request_id = request_id_in_logs.get()
    if request_id is not None:
        event["request_id"] = request_id
    return event


def _add_environment(environment: str) -> Processor:
    def add(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["env"] = environment
        return event

    return add


def _plain_exception(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """The traceback as text, without the values of local variables (they hold audio and speech)."""
    return structlog.processors.format_exc_info(logger, name, event)


def _add_logger_name(_: WrappedLogger, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    record = event.get("_record")
    if isinstance(record, logging.LogRecord):
        event["logger"] = record.name
    return event
