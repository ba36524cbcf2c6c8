"""Times of words: where the letters stand, whatever tokens of punctuation stand before and after them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.ctc import Decoded
from api.vocabulary import words_of_units
from api.words import Word, words_of

STRIDE_S = 0.04


def placed(*tokens: tuple[str, int, int], log_prob: float = -0.1) -> list[Word]:
    """Words of tokens with their first frame and the one after their last; ``log_prob`` per frame."""
    units, starts, ends = zip(*tokens, strict=True)
    starts, ends = np.array(starts, np.int32), np.array(ends, np.int32)
    sums = ((ends - starts) * log_prob).astype(np.float32)
    decoded = Decoded(np.zeros(len(units), np.int32), starts, ends, sums, int(ends[-1]), -1.0, -1.0)
    return words_of(decoded, words_of_units(units), STRIDE_S)


def times(words: list[Word]) -> list[tuple[float, float]]:
    return [(word.start_s, word.end_s) for word in words]


def test_a_full_stop_in_the_pause_does_not_lengthen_its_word() -> None:
    silly, you = placed((" sil", 10, 12), ("ly", 14, 16), (".", 65, 67), (" You", 75, 77))
    assert (silly.text, you.text) == ("silly.", "You")
    assert times([silly, you]) == [(0.4, 0.64), (3.0, 3.08)]


def test_a_quote_in_the_pause_before_does_not_lengthen_its_word() -> None:
    (word,) = placed((' "', 10, 12), ("¿", 14, 16), ("Qu", 40, 42), ("é", 44, 46), ("?", 60, 62))
    assert times([word]) == [(1.6, 1.84)]


def test_punctuation_within_a_word_and_tokens_with_a_letter_count() -> None:
    (word,) = placed((" don", 0, 2), ("'", 4, 6), ("t,", 8, 10))
    assert times([word]) == [(0.0, 0.4)]


def test_a_word_of_punctuation_has_the_times_of_all_its_tokens() -> None:
    (word,) = placed((" -", 10, 12), ("-", 20, 22))
    assert times([word]) == [(0.4, 0.88)]


def test_punctuation_counts_in_the_confidence() -> None:
    units = (" no", 0, 2), (".", 20, 22)
    (word,) = placed(*units, log_prob=-0.5)
    assert word.confidence == pytest.approx(np.exp(-0.5))
    decoded = Decoded(
        np.zeros(2, np.int32),
        np.array([0, 20], np.int32),
        np.array([2, 22], np.int32),
        np.array([-0.2, -1.0], np.float32),
        22,
        -1.0,
        -1.0,
    )
    (word,) = words_of(decoded, words_of_units([" no", "."]), STRIDE_S)
    assert word.confidence == pytest.approx(np.exp(-1.2 / 4))


@given(
    st.lists(
        st.tuples(st.text("a.' ¿", min_size=1, max_size=3), st.integers(0, 30), st.integers(1, 4)),
        min_size=1,
        max_size=20,
    )
)
def test_words_are_never_empty_and_never_overlap(tokens: list[tuple[str, int, int]]) -> None:
    """Unless one token writes the end of a word and the beginning of the next."""
    at, spread = 0, []
    for unit, gap, width in tokens:
        spread.append((unit, at + gap, at + gap + width))
        at += gap + width
    words = placed(*spread)
    spans = words_of_units([unit for unit, _, _ in spread])
    assert [word.text for word in words] == "".join(unit for unit, _, _ in spread).split()
    for word, span in zip(words, spans, strict=True):
        assert spread[span.start][1] * STRIDE_S <= word.start_s < word.end_s
        assert word.end_s <= spread[span.end - 1][2] * STRIDE_S
    for (word, span), (after, after_span) in pairwise(zip(words, spans, strict=True)):
        assert word.end_s <= after.start_s or after_span.start < span.end
