"""A transcript as files to take away: text, SubRip, WebVTT, JSON, and one ZIP for many.

The service writes the same formats; the page writes them itself so that a corrected text keeps its times and
nothing is computed twice.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from ui.transcript import Transcript, Word

LINE_CHARACTERS = 42  # two lines of 42 characters: BBC subtitle guidelines, Netflix timed text style guide
CUE_S = 7.0
SHORTEST_CUE_S = 0.5  # the service's own; a CTC model's word can be as short as one frame


@dataclass(frozen=True)
class Cue:
    """One subtitle and when it stands on the screen."""

    start_s: float
    end_s: float
    text: str


def cues(transcript: Transcript) -> list[Cue]:
    """Subtitles of at most 84 characters and 7 seconds, cut between words, never across segments."""
    if not transcript.words:
        parts = [Cue(part.start_s, part.end_s, part.text) for part in transcript.segments if part.text]
        whole = [Cue(0.0, transcript.duration_s, transcript.text)] if transcript.text else []
        return parts or whole
    groups = [group for part in _by_segment(transcript) for group in _cut(part)]
    limits_s = [*(group[0].start_s for group in groups[1:]), transcript.duration_s]
    return [
        Cue(group[0].start_s, _end_s(group, limit_s), _lines(group))
        for group, limit_s in zip(groups, limits_s, strict=True)
    ]


def _end_s(words: list[Word], limit_s: float) -> float:
    """When the last word ends, or later where nobody could read it in that time; never past ``limit_s``."""
    start_s = words[0].start_s
    readable_s = min(start_s + SHORTEST_CUE_S, limit_s)
    return max(words[-1].end_s, readable_s, start_s + 0.001)


def _by_segment(transcript: Transcript) -> Iterator[list[Word]]:
    starts = [segment.start_s for segment in transcript.segments[1:]]
    part: list[Word] = []
    for word in transcript.words:
        middle_s = (word.start_s + word.end_s) / 2
        crossed = False
        while starts and middle_s >= starts[0]:
            starts.pop(0)
            crossed = True
        if crossed and part:
            yield part
            part = []
        part.append(word)
    if part:
        yield part


def _cut(words: list[Word]) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        # Measured on the lines themselves: 84 characters do not always break into two lines of 42.
        too_wide = max(map(len, _lines([*group, word]).split("\n"))) > LINE_CHARACTERS
        if group and (too_wide or word.end_s - group[0].start_s > CUE_S):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _lines(words: list[Word]) -> str:
    """One line where it fits, else two of about the same length."""
    text = " ".join(word.text for word in words)
    if len(text) <= LINE_CHARACTERS or " " not in text:
        return text
    spaces = [found.start() for found in re.finditer(" ", text)]
    cut = min(spaces, key=lambda place: abs(place - len(text) / 2))
    return f"{text[:cut]}\n{text[cut + 1 :]}"


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{separator}{rest % 1000:03}"


def to_txt(transcript: Transcript) -> str:
    """The text, one line per segment where there are several."""
    lines = [segment.text for segment in transcript.segments if segment.text]
    return "\n".join(lines or [transcript.text]) + "\n"


def to_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues, a comma before the milliseconds."""
    return "\n".join(
        f"{number}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{cue.text}\n"
        for number, cue in enumerate(cues(transcript), 1)
    )


def to_vtt(transcript: Transcript) -> str:
    """WebVTT (W3C): the three characters that have a meaning there are escaped."""

    def escaped(text: str) -> str:
        return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

    body = [
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{escaped(cue.text)}\n"
        for cue in cues(transcript)
    ]
    return "\n".join(["WEBVTT\n", *body])


def to_json(transcript: Transcript) -> str:
    """The service's own JSON form."""
    return json.dumps(transcript.to_json(), ensure_ascii=False, indent=2) + "\n"


FORMATS: Mapping[str, tuple[str, Callable[[Transcript], str]]] = {
    "txt": ("text/plain; charset=utf-8", to_txt),
    "srt": ("application/x-subrip; charset=utf-8", to_srt),
    "vtt": ("text/vtt; charset=utf-8", to_vtt),
    "json": ("application/json", to_json),
}


def stem(name: str) -> str:
    """A file name without folder, ending or characters that some system refuses."""
    plain = PurePath(name.replace("\\", "/")).stem
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", plain).strip(" .") or "transcript"


def to_zip(named: Iterable[tuple[str, Transcript]]) -> bytes:
    """All formats of all transcripts; files of the same name get a number."""
    used: set[str] = set()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, transcript in named:
            base = stem(name)
            unique, number = base, 1
            while unique.casefold() in used:
                number += 1
                unique = f"{base}-{number}"
            used.add(unique.casefold())
            for ending, (_, write) in FORMATS.items():
                archive.writestr(f"{unique}.{ending}", write(transcript))
    return out.getvalue()
