"""Bodies of our own routes (pydantic only at this edge). OpenAI's bodies are in ``openai_format.py``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from api.transcript import Segment, Transcript
from api.words import Word


class ErrorDetail(BaseModel):
    """What went wrong, for people (message) and for programs (type, param, code)."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The envelope of every error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""What every route may answer, for the OpenAPI document."""


class WordBody(BaseModel):
    """One word; times in seconds from the start of the file."""

    word: str
    start: float
    end: float
    confidence: float


class SegmentBody(BaseModel):
    """A stretch of speech between two pauses."""

    id: int
    start: float
    end: float
    text: str
    confidence: float


class TranscriptionBody(BaseModel):
    """Answer of ``POST /transcribe``."""

    id: str = Field(description="The request's id, as in the x-request-id header.")
    text: str
    duration: float = Field(description="True length of the audio in seconds.")
    processing_time: float = Field(description="Seconds from the end of the upload to the text.")
    real_time_factor: float = Field(description="processing_time / duration.")
    language: str
    model: str
    timestamp: str = Field(description="When the answer was made, ISO 8601 in UTC.")
    confidence: float | None = Field(
        description="Geometric mean of the winning posteriors; null where there is no text."
    )
    words: list[WordBody] | None = None
    segments: list[SegmentBody] | None = None
    warnings: list[str] | None = Field(None, description="Set where a file was only partly readable.")


class BatchItem(BaseModel):
    """One file of a batch: its transcription, or its error in the same place."""

    index: int
    filename: str
    transcription: TranscriptionBody | None = None
    error: ErrorDetail | None = None


class BatchBody(BaseModel):
    """Answer of ``POST /transcribe/batch``: one entry per file, in the order they were sent."""

    id: str
    results: list[BatchItem]
    succeeded: int
    failed: int


class ModelBody(BaseModel):
    """One loaded model."""

    name: str
    version: str
    default: bool
    languages: list[str]
    sample_rate_hz: int
    max_window_s: float
    graph: str
    provider: str
    parameters: int
    licence: str
    source: dict[str, Any]
    evaluation: list[dict[str, Any]]
    engine: dict[str, Any] = Field(description="What calibration chose, and what it measured.")


class ModelsBody(BaseModel):
    """Answer of ``GET /models``."""

    models: list[ModelBody]
    default: str
    aliases: dict[str, str]


class LanguageBody(BaseModel):
    """A language and the models that transcribe it."""

    code: str
    models: list[str]


class LanguagesBody(BaseModel):
    """Answer of ``GET /languages``."""

    languages: list[LanguageBody]


def word_body(word: Word) -> WordBody:
    """Times to the millisecond, confidence to four digits."""
    return WordBody(
        word=word.text,
        start=round(word.start_s, 3),
        end=round(word.end_s, 3),
        confidence=round(word.confidence, 4),
    )


def segment_body(index: int, segment: Segment) -> SegmentBody:
    """See SegmentBody."""
    return SegmentBody(
        id=index,
        start=round(segment.start_s, 3),
        end=round(segment.end_s, 3),
        text=segment.text,
        confidence=round(segment.confidence, 4),
    )


def transcription_body(
    transcript: Transcript, *, request_id: str, timestamp: str, timestamps: bool
) -> TranscriptionBody:
    """The answer for one file; without ``timestamps`` words and segments stay out."""
    confidence = transcript.confidence
    return TranscriptionBody(
        id=request_id,
        text=transcript.text,
        duration=round(transcript.duration_s, 6),
        processing_time=round(transcript.processing_s, 6),
        real_time_factor=round(transcript.real_time_factor, 6),
        language=transcript.language,
        model=transcript.model,
        timestamp=timestamp,
        confidence=round(confidence, 4) if confidence is not None else None,
        words=[word_body(word) for word in transcript.words] if timestamps else None,
        segments=[segment_body(i, s) for i, s in enumerate(transcript.segments)] if timestamps else None,
        warnings=list(transcript.warnings) or None,
    )
