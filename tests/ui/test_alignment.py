"""Word alignment against a plain oracle; error rates by hand; times carried to corrected texts."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ui.service import TRANSCRIPT
from ui.alignment import TextTooLongError, align, comparable, corrected, error_rate
from ui.transcript import Segment, Transcript

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=9)


def distance(left: tuple[str, ...], right: tuple[str, ...]) -> int:
    """The definition of Levenshtein's distance, word for word."""

    @cache
    def between(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(
            between(i - 1, j) + 1,
            between(i, j - 1) + 1,
            between(i - 1, j - 1) + (left[i - 1] != right[j - 1]),
        )

    return between(len(left), len(right))


@given(WORDS, WORDS)
def test_alignment_is_cheapest_and_complete(reference: list[str], hypothesis: list[str]) -> None:
    steps = align(reference, hypothesis)
    rate = error_rate(steps)
    assert rate.changed + rate.missing + rate.extra == distance(tuple(reference), tuple(hypothesis))
    assert [s.reference for s in steps if s.reference is not None] == list(range(len(reference)))
    assert [s.hypothesis for s in steps if s.hypothesis is not None] == list(range(len(hypothesis)))
    for step in steps:
        both = step.reference is not None and step.hypothesis is not None
        assert both == (step.kind in ("equal", "changed"))
        if step.reference is not None and step.hypothesis is not None:
            assert (reference[step.reference] == hypothesis[step.hypothesis]) == (step.kind == "equal")


def test_error_rate_by_hand() -> None:
    reference = ["the", "cat", "sat", "on", "the", "mat"]
    hypothesis = ["the", "cat", "sit", "on", "mat", "today"]
    rate = error_rate(align(reference, hypothesis))
    assert (rate.changed, rate.missing, rate.extra, rate.reference_words) == (1, 1, 1, 6)
    assert rate.rate == pytest.approx(0.5)
    assert error_rate(align([], [])).rate == 0
    assert error_rate(align([], ["x"])).rate == float("inf")


def test_comparison_ignores_case_punctuation_and_composition() -> None:
    assert comparable("Hello, WORLD! It’s me.") == ["hello", "world", "it's", "me"]
    assert comparable("tie\u0302\u0301ng Vie\u0323\u0302t") == comparable("TIẾNG VIỆT")
    assert comparable("'quoted' rock-n-roll – 50%") == ["quoted", "rock", "n", "roll", "50"]


def test_comparison_ignores_the_case_of_both_turkish_letters() -> None:
    for language in ("tr", "az"):
        said = comparable("İstanbul'da IŞIK yandı. İyi!", language)
        assert said == comparable("istanbul'da ışık yandı iyi", language)
    assert comparable("IT IS", "en") == ["it", "is"]


def test_a_turkish_capital_that_is_put_right_keeps_its_confidence() -> None:
    word = {"word": "istanbul", "start": 0.0, "end": 0.5, "confidence": 0.9}
    answer = TRANSCRIPT | {"language": "tr", "text": "istanbul", "words": [word]}
    right = corrected(Transcript.from_json(answer), "İstanbul")
    assert [(each.text, each.confidence) for each in right.words] == [("İstanbul", 0.9)]


def test_texts_that_would_take_too_much_memory_are_refused() -> None:
    with pytest.raises(TextTooLongError):
        align([f"a{i}" for i in range(30_000)], [f"b{i}" for i in range(30_000)])
    same = [f"a{i}" for i in range(30_000)]
    assert len(align(same, same)) == 30_000


def test_a_correction_keeps_times_and_drops_confidence_only_where_changed() -> None:
    first = Transcript.from_json(TRANSCRIPT)  # the quick brown fox
    text = corrected(first, "The quick, lazy brown dog")
    words = {word.text: word for word in text.words}
    assert text.text == "The quick, lazy brown dog"
    assert words["The"].confidence == 0.99  # punctuation and case are not a change of the word
    assert (words["quick,"].start_s, words["quick,"].end_s, words["quick,"].confidence) == (0.4, 0.8, 0.8)
    assert (words["dog"].start_s, words["dog"].end_s, words["dog"].confidence) == (1.4, 1.9, None)
    assert (words["lazy"].start_s, words["lazy"].end_s, words["lazy"].confidence) == (0.8, 0.9, None)


def test_a_segment_that_nobody_touched_keeps_its_confidence() -> None:
    parts = [("the quick", 0.1, 0.8, 0.85), ("brown fox", 0.9, 1.9, 0.7)]
    segments = tuple(Segment(*part) for part in parts)
    first = replace(Transcript.from_json(TRANSCRIPT), segments=segments)
    kept, changed = corrected(first, "the quick brown dog").segments
    assert kept == segments[0]
    assert (changed.text, changed.confidence) == ("brown dog", None)


@given(st.lists(st.sampled_from(["the", "quick", "brown", "fox", "new", "words"]), max_size=12))
def test_corrected_times_never_run_backwards(typed: list[str]) -> None:
    text = corrected(Transcript.from_json(TRANSCRIPT), " ".join(typed))
    assert [word.text for word in text.words] == typed
    assert " ".join(segment.text for segment in text.segments) == " ".join(typed)
    moments = [moment for word in text.words for moment in (word.start_s, word.end_s)]
    assert moments == sorted(moments)
    assert all(0 <= moment <= 2.5 for moment in moments)
