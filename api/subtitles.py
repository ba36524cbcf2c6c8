"""Transcript -> SubRip (srt) and WebVTT (vtt), in cues that a reader can follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from api.transcript import Transcript
from api.words import Word

# Common subtitle practice (BBC and Netflix guidelines): two lines of 42 characters, at most 7 seconds; where
# the pause behind leaves room, at least 5/6 of a second, and no more than 17 characters in each.
MAX_LINE_CHARACTERS = 42
MAX_LINES = 2
MAX_CUE_S = 7.0
MIN_CUE_S = 5 / 6
MAX_CHARACTERS_PER_S = 17.0


@dataclass(frozen=True, slots=True)
class Cue:
    """Lines shown from ``start_s`` to ``end_s``."""

    start_s: float
    end_s: float
    lines: tuple[str, ...]


def to_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues, comma before the milliseconds."""
    blocks = []
    for number, cue in enumerate(cues(transcript), start=1):
        times = f"{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}"
        blocks.append(f"{number}\n{times}\n" + "\n".join(cue.lines) + "\n")
    return "\n".join(blocks)


def to_vtt(transcript: Transcript) -> str:
    """WebVTT: header, cues, point before the milliseconds; markup characters are escaped."""
    blocks = ["WEBVTT\n"]
    for cue in cues(transcript):
        times = f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}"
        blocks.append(f"{times}\n" + "\n".join(_escape(line) for line in cue.lines) + "\n")
    return "\n".join(blocks)


def cues(transcript: Transcript) -> list[Cue]:
    """Cues in order, none overlapping; each stays inside one segment."""
    groups = [group for segment in transcript.segments for group in _groups(segment.words)]
    result = []
    for index, group in enumerate(groups):
        start_s, end_s = group[0].start_s, group[-1].end_s
        following_s = groups[index + 1][0].start_s if index + 1 < len(groups) else transcript.duration_s
        lines = tuple(_lines(group))
        reading_s = max(MIN_CUE_S, sum(map(len, lines)) / MAX_CHARACTERS_PER_S)
        end_s = max(end_s, min(start_s + reading_s, following_s))
        result.append(Cue(start_s, end_s, lines))
    return result


def _groups(words: Sequence[Word]) -> Iterator[list[Word]]:
    """Runs of words that fit one cue."""
    group: list[Word] = []
    for word in words:
        too_long = bool(group) and (
            word.end_s - group[0].start_s > MAX_CUE_S or len(_lines([*group, word])) > MAX_LINES
        )
        if too_long:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _lines(words: Sequence[Word]) -> list[str]:
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word.text) <= MAX_LINE_CHARACTERS:
            lines[-1] += " " + word.text
        else:
            lines.append(word.text)
    return lines


def _clock(time_s: float, point: str) -> str:
    total_ms = round(max(0.0, time_s) * 1000)
    hours, rest_ms = divmod(total_ms, 3_600_000)
    minutes, rest_ms = divmod(rest_ms, 60_000)
    seconds, milliseconds = divmod(rest_ms, 1000)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}{point}{milliseconds:03d}"


def _escape(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
