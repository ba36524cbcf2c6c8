"""What a person takes away: each format read back by its own rules."""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ui.service import TRANSCRIPT
from ui.exports import (
    CUE_S,
    LINE_CHARACTERS,
    cues,
    stem,
    to_json,
    to_srt,
    to_txt,
    to_vtt,
    to_zip,
)
from ui.transcript import Segment, Transcript, Word

FIRST = Transcript.from_json(TRANSCRIPT)
SRT_CUE = re.compile(r"(\d+)\n(\d\d:\d\d:\d\d,\d{3}) --> (\d\d:\d\d:\d\d,\d{3})\n((?:.+\n)+)")


def test_srt_is_exact() -> None:
    assert to_srt(FIRST) == "1\n00:00:00,100 --> 00:00:01,900\nthe quick brown fox\n"


def test_vtt_is_exact_and_escapes() -> None:
    words = (Word("a<b", 3661.5, 3662.0), Word("&", 3662.0, 3662.25))
    text = replace(FIRST, text="a<b &", words=words, segments=())
    assert to_vtt(text) == "WEBVTT\n\n01:01:01.500 --> 01:01:02.250\na&lt;b &amp;\n"


def test_a_short_word_stays_long_enough_to_be_read_but_not_into_the_next_cue_or_past_the_end() -> None:
    words = (Word("a", 1.0, 1.02), Word("the", 2.0, 2.04), Word("end", 2.3, 2.32))
    parts = tuple(Segment(word.text, word.start_s, word.end_s) for word in words)
    made = cues(replace(FIRST, text="a the end", words=words, segments=parts, duration_s=2.5))
    assert [(cue.start_s, cue.end_s) for cue in made] == [(1.0, 1.5), (2.0, 2.3), (2.3, 2.5)]


def test_txt_has_a_line_per_segment_and_json_reads_back() -> None:
    assert to_txt(replace(FIRST, segments=(Segment("one", 0, 1), Segment("two", 1, 2)))) == "one\ntwo\n"
    assert Transcript.from_json(json.loads(to_json(FIRST))) == FIRST


def test_without_word_times_segments_become_cues() -> None:
    text = replace(FIRST, words=(), segments=(Segment("one", 0.0, 1.0), Segment("", 1.0, 2.0)))
    assert [cue.text for cue in cues(text)] == ["one"]
    assert [cue.end_s for cue in cues(replace(text, segments=()))] == [2.5]
    assert cues(replace(text, segments=(), text="")) == []


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    lengths = draw(
        st.lists(st.tuples(st.integers(1, 12), st.integers(0, 900), st.integers(0, 900)), max_size=60)
    )
    words, now_s = [], 0.0
    for size, pause_ms, word_ms in lengths:
        start_s = now_s + pause_ms / 1000
        now_s = start_s + word_ms / 1000
        words.append(Word("w" * size, start_s, now_s))
    edges = sorted({0, len(words), *draw(st.lists(st.integers(0, len(words)), max_size=5))})
    segments = tuple(
        Segment(" ".join(word.text for word in words[a:b]), words[a].start_s, words[b - 1].end_s)
        for a, b in pairwise(edges)
    )
    return replace(FIRST, text=" ".join(word.text for word in words), words=tuple(words), segments=segments)


@given(transcripts())
def test_subtitles_lose_nothing_and_fit_the_screen(transcript: Transcript) -> None:
    made = cues(transcript)
    assert " ".join(cue.text.replace("\n", " ") for cue in made) == transcript.text
    for cue in made:
        assert cue.end_s > cue.start_s
        lines = cue.text.split("\n")
        assert len(lines) <= 2
        assert max(map(len, lines)) <= LINE_CHARACTERS
        assert cue.end_s - cue.start_s <= CUE_S + 0.001
    starts = [cue.start_s for cue in made]
    assert starts == sorted(starts)
    found = SRT_CUE.findall(to_srt(transcript))
    assert [int(number) for number, *_ in found] == list(range(1, len(made) + 1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("talk.wav", "talk"),
        ("../../etc/passwd", "passwd"),
        ("C:\\me\\a:b?.mp3", "a_b_"),
        ("…", "…"),
        (".wav", "wav"),
        ("", "transcript"),
        ("lời nói.m4a", "lời nói"),
    ],
)
def test_file_names_are_safe(name: str, expected: str) -> None:
    assert stem(name) == expected


def test_zip_holds_every_format_and_keeps_files_of_one_name_apart() -> None:
    archive = zipfile.ZipFile(io.BytesIO(to_zip([("a.wav", FIRST), ("A.mp3", FIRST), ("b.wav", FIRST)])))
    assert sorted(archive.namelist()) == sorted(
        f"{name}.{ending}" for name in ("a", "A-2", "b") for ending in ("txt", "srt", "vtt", "json")
    )
    assert archive.read("b.srt").decode() == to_srt(FIRST)
