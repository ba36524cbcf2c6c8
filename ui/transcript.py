"""What the service answers, as frozen values: models, state, transcripts.

Every ``from_json`` takes decoded JSON and raises ``ApiProtocolError`` naming the field that is missing or of
the wrong type; unknown fields are passed over, so that a newer service keeps working with an older page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ui.errors import ApiProtocolError


@dataclass(frozen=True)
class Word:
    """One word, its times in seconds from the start of the audio, and the model's confidence in [0, 1]."""

    text: str
    start_s: float
    end_s: float
    confidence: float | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of speech between two pauses."""

    text: str
    start_s: float
    end_s: float
    confidence: float | None = None


@dataclass(frozen=True)
class Transcript:
    """The answer for one file. ``duration_s`` is the audio's length, ``stages_s`` where the time went."""

    text: str
    duration_s: float
    processing_s: float
    real_time_factor: float
    language: str
    model: str
    id: str = ""
    timestamp: str = ""
    confidence: float | None = None
    words: tuple[Word, ...] = ()
    segments: tuple[Segment, ...] = ()
    warnings: tuple[str, ...] = ()
    stages_s: Mapping[str, float] = field(default_factory=dict)
    request_id: str = ""
    trace_id: str = ""

    @classmethod
    def from_json(cls, body: object) -> Transcript:
        """Read the answer of ``POST /transcribe`` (or of a verbose stream's last event)."""
        data = _object(body, "transcript")
        return cls(
            text=_text(data, "text"),
            duration_s=_number(data, "duration"),
            processing_s=_number(data, "processing_time", 0.0),
            real_time_factor=_number(data, "real_time_factor", 0.0),
            language=_text(data, "language", ""),
            model=_text(data, "model", ""),
            id=_text(data, "id", ""),
            timestamp=str(data.get("timestamp") or ""),
            confidence=_optional_number(data, "confidence"),
            words=tuple(_word(item) for item in _list(data, "words")),
            segments=tuple(_segment(item) for item in _list(data, "segments")),
            warnings=tuple(str(item) for item in _list(data, "warnings")),
            stages_s=_stages(data),
        )

    def with_trace(self, *, request_id: str, trace_id: str, stages_s: Mapping[str, float]) -> Transcript:
        """The same transcript with what the answer's headers said."""
        return replace(
            self, request_id=request_id, trace_id=trace_id, stages_s=dict(self.stages_s) or dict(stages_s)
        )

    def to_json(self) -> dict[str, Any]:
        """The project's own JSON form, as ``POST /transcribe`` writes it."""
        return {
            "id": self.id,
            "text": self.text,
            "duration": self.duration_s,
            "processing_time": self.processing_s,
            "real_time_factor": self.real_time_factor,
            "language": self.language,
            "model": self.model,
            "timestamp": self.timestamp,
            "confidence": self.confidence,
            "words": [
                {"word": word.text, "start": word.start_s, "end": word.end_s, "confidence": word.confidence}
                for word in self.words
            ],
            "segments": [
                {
                    "id": index,
                    "start": segment.start_s,
                    "end": segment.end_s,
                    "text": segment.text,
                    "confidence": segment.confidence,
                }
                for index, segment in enumerate(self.segments)
            ],
            "warnings": list(self.warnings) or None,
        }


@dataclass(frozen=True)
class Model:
    """A model the service has loaded."""

    name: str
    languages: tuple[str, ...] = ()
    is_default: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, body: object) -> Model:
        """Read one entry of ``GET /models``."""
        data = _object(body, "model")
        return cls(
            name=_text(data, "name" if "name" in data else "id"),
            languages=tuple(str(item) for item in _list(data, "languages")),
            is_default=bool(data.get("default") or data.get("is_default") or False),
            details=data,
        )


@dataclass(frozen=True)
class Language:
    """A language and the loaded models that speak it."""

    code: str
    name: str
    models: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, body: object) -> Language:
        """Read one entry of ``GET /languages``."""
        if isinstance(body, str):
            return cls(code=body, name=body)
        data = _object(body, "language")
        code = _text(data, "code" if "code" in data else "language")
        return cls(code, _text(data, "name", code), tuple(str(item) for item in _list(data, "models")))


@dataclass(frozen=True)
class Health:
    """The service's own summary. ``state`` is ready, starting, draining, or what else it says."""

    state: str
    ready: bool
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """A piece of text from the stream, with its times when the service tells them."""

    text: str
    end_s: float | None = None


def _object(body: object, what: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiProtocolError(f"The service's {what} is not a JSON object.")
    return body


def _text(data: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = data.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ApiProtocolError(f"The service's answer has no text in its field “{key}”.")
    return value


def _number(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = data.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ApiProtocolError(f"The service's answer has no number in its field “{key}”.")
    return float(value)


def _optional_number(data: Mapping[str, Any], key: str) -> float | None:
    return None if data.get(key) is None else _number(data, key)


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ApiProtocolError(f"The service's answer has no list in its field “{key}”.")
    return value


def _word(item: object) -> Word:
    data = _object(item, "word")
    return Word(
        _text(data, "word"),
        _number(data, "start"),
        _number(data, "end"),
        _optional_number(data, "confidence"),
    )


def _segment(item: object) -> Segment:
    data = _object(item, "segment")
    return Segment(
        _text(data, "text").strip(),
        _number(data, "start"),
        _number(data, "end"),
        _optional_number(data, "confidence"),
    )


def _stages(data: Mapping[str, Any]) -> dict[str, float]:
    stages = data.get("timings") or data.get("stages")
    if not isinstance(stages, dict):
        return {}
    return {str(name): float(value) for name, value in stages.items() if isinstance(value, int | float)}
