"""Transcript -> the bodies of OpenAI's ``POST /v1/audio/transcriptions``.

``language`` is the English name, as OpenAI answers (``english`` where the request says ``en``) and clients
expect. Where each value of a verbose segment comes from:

- ``seek``: start of the decoded window in units of 10 ms, as Whisper counts.
- ``tokens``: ids of the emitted tokens in the model's own vocabulary.
- ``temperature``: 0, because decoding takes the most probable text and never samples.
- ``avg_logprob``: mean log-posterior per frame of the tokens (``exp`` of it is the confidence).
- ``compression_ratio``: bytes of the text over bytes of its zlib compression, as Whisper defines it.
- ``no_speech_prob``: probability the model gives to the empty text over the segment's frames, the product of
  the blank's posteriors.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from api.transcript import Segment, Transcript
from api.vocabulary import spelling
from api.words import Word

_LANGUAGES = """
af:afrikaans ar:arabic az:azerbaijani be:belarusian bg:bulgarian bs:bosnian ca:catalan cs:czech cy:welsh
da:danish de:german el:greek en:english es:spanish et:estonian fa:persian fi:finnish fr:french gl:galician
he:hebrew hi:hindi hr:croatian hu:hungarian hy:armenian id:indonesian is:icelandic it:italian ja:japanese
kk:kazakh kn:kannada ko:korean lt:lithuanian lv:latvian mi:maori mk:macedonian mr:marathi ms:malay ne:nepali
nl:dutch no:norwegian pl:polish pt:portuguese ro:romanian ru:russian sk:slovak sl:slovenian sr:serbian
sv:swedish sw:swahili ta:tamil th:thai tl:tagalog tr:turkish uk:ukrainian ur:urdu vi:vietnamese zh:chinese
"""
_LANGUAGE_NAMES = dict(pair.split(":") for pair in _LANGUAGES.split())
"""ISO 639-1 code -> name, of the languages in OpenAI's speech-to-text guide."""


def json_body(transcript: Transcript, *, logprobs: bool) -> dict[str, Any]:
    """``response_format=json``."""
    body: dict[str, Any] = {"text": transcript.text, "usage": usage(transcript.duration_s)}
    if logprobs:
        body["logprobs"] = logprob_list(transcript.segments)
    return body


def verbose_body(transcript: Transcript, granularities: Sequence[str], *, logprobs: bool) -> dict[str, Any]:
    """``response_format=verbose_json``."""
    body: dict[str, Any] = {
        "task": "transcribe",
        "language": _LANGUAGE_NAMES.get(transcript.language, transcript.language),
        "duration": round(transcript.duration_s, 6),
        "text": transcript.text,
        "segments": [_segment(index, segment) for index, segment in enumerate(transcript.segments)],
        "usage": usage(transcript.duration_s),
    }
    if "segment" not in granularities:
        del body["segments"]
    if "word" in granularities:
        body["words"] = [_word(word) for word in transcript.words]
    if logprobs:
        body["logprobs"] = logprob_list(transcript.segments)
    return body


def usage(duration_s: float) -> dict[str, Any]:
    """What is billed elsewhere: seconds of audio."""
    return {"type": "duration", "seconds": round(duration_s, 6)}


def logprob_list(segments: Sequence[Segment], *, first: bool = True) -> list[dict[str, Any]]:
    """One entry per token; the bytes of all of them, one after the other, are the text.

    ``first``: nothing comes before these segments; otherwise their text begins with the space that separates
    it from what does. A token that the text has nothing of, such as a space at its end, has no bytes.
    """
    entries = []
    for segment in segments:
        contents = spelling([token.unit for token in segment.tokens], after_other_text=not first)
        for token, content in zip(segment.tokens, contents, strict=True):
            entries.append(
                {
                    "token": content.decode(errors="replace"),
                    "logprob": round(min(0.0, token.logprob), 6),
                    "bytes": list(content),
                }
            )
        first = False
    return entries


def delta_event(segment: Segment, *, first: bool, logprobs: bool) -> dict[str, Any]:
    """``transcript.text.delta``: deltas joined give the text, and so do the bytes of their tokens."""
    event: dict[str, Any] = {
        "type": "transcript.text.delta",
        "delta": segment.text if first else " " + segment.text,
    }
    if logprobs:
        event["logprobs"] = logprob_list([segment], first=first)
    return event


def done_event(transcript: Transcript, *, logprobs: bool) -> dict[str, Any]:
    """``transcript.text.done``."""
    return {"type": "transcript.text.done", **json_body(transcript, logprobs=logprobs)}


def _segment(index: int, segment: Segment) -> dict[str, Any]:
    text = segment.text.encode()
    return {
        "id": index,
        "seek": round(segment.window_start_s * 100),
        "start": round(segment.start_s, 3),
        "end": round(segment.end_s, 3),
        "text": segment.text,
        "tokens": [token.id for token in segment.tokens],
        "temperature": 0.0,
        "avg_logprob": round(segment.avg_logprob, 6),
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 4),
        "no_speech_prob": round(segment.no_speech_prob, 6),
    }


def _word(word: Word) -> dict[str, Any]:
    return {
        "word": word.text,
        "start": round(word.start_s, 3),
        "end": round(word.end_s, 3),
        "confidence": round(word.confidence, 4),
    }
