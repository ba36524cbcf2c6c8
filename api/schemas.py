"""Bodies of our own routes (pydantic only at this edge). OpenAI's bodies are in ``openai_format.py``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from api.transcript import Transcript


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

_OTHER_FORMS = ("text/plain", "application/x-subrip", "text/vtt", "text/event-stream")
TRANSCRIPTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {form: {"schema": {"type": "string"}} for form in _OTHER_FORMS}}
}
"""What a transcription answers beside JSON, where the request asks for it; also for the document."""


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
    warnings: list[str] | None = Field(
        None, description="Of files that are only partly readable, and of hotwords."
    )


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
    decoder: bool = Field(description="Whether it writes with a decoder, which hotwords change little.")
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


def transcription_body(
    transcript: Transcript, *, request_id: str, timestamp: str, timestamps: bool
) -> dict[str, Any]:
    """The answer for one file as JSON takes it, with the fields of TranscriptionBody.

    Words and segments are there with ``timestamps``, warnings where there are any. Times are rounded to the
    millisecond, confidences to four digits. Plain values, because building the models costs as much as the
    rest of the answer; the tests hold them against the OpenAPI document.
    """
    confidence = transcript.confidence
    body: dict[str, Any] = {
        "id": request_id,
        "text": transcript.text,
        "duration": round(transcript.duration_s, 6),
        "processing_time": round(transcript.processing_s, 6),
        "real_time_factor": round(transcript.real_time_factor, 6),
        "language": transcript.language,
        "model": transcript.model,
        "timestamp": timestamp,
        "confidence": round(confidence, 4) if confidence is not None else None,
    }
    if timestamps:
        body["words"] = [
            {
                "word": word.text,
                "start": round(word.start_s, 3),
                "end": round(word.end_s, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in transcript.words
        ]
        body["segments"] = [
            {
                "id": index,
                "start": round(segment.start_s, 3),
                "end": round(segment.end_s, 3),
                "text": segment.text,
                "confidence": round(segment.confidence, 4),
            }
            for index, segment in enumerate(transcript.segments)
        ]
    if transcript.warnings:
        body["warnings"] = list(transcript.warnings)
    return body
