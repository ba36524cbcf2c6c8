"""Prefix beam search against the exact sum over all alignments; hotwords against a plain definition."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import hotwords as hotwords_module
from api.beam import EXACT, MAX_BEAM, beam_search, search_steps
from api.ctc import greedy, greedy_of
from api.frames import Frames
from api.hotwords import MAX_BOOST, MOST_CREDITS, MOST_NATS, build_hotwords
from api.vocabulary import Vocabulary

LETTERS = Vocabulary(("\u2581", *"abcdefghijklmnopqrstuvwxyz'", "<blank>"), blank_id=28)
TINY = Vocabulary(("\u2581", "a", "b", "<blank>"), blank_id=3)


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


def all_texts(log_probs: np.ndarray, blank: int) -> dict[tuple[int, ...], float]:
    """Exact probability of every text: the sum over all its alignments."""
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = tuple(token for token, _ in itertools.groupby(path) if token != blank)
        total[text] += math.exp(sum(float(log_probs[frame, token]) for frame, token in enumerate(path)))
    return total


def spoken(text: str, *, alternatives: dict[int, dict[str, float]] | None = None) -> np.ndarray:
    """Three frames per letter that say ``text``; ``alternatives``: other posteriors at a position."""
    probabilities = np.full((3 * len(text), len(LETTERS)), 1e-5)
    for position, letter in enumerate(text.replace(" ", "\u2581")):
        probabilities[3 * position :: 1][:3, 28] = 0.999
        row = probabilities[3 * position + 1]
        row[28] = 0.01
        for other, value in (alternatives or {}).get(position, {letter: 0.98}).items():
            row[LETTERS.tokens.index(other)] = value
    return np.log(probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32)


def best_text(log_probs: np.ndarray, hotwords: list[str], boost: float = 1.5, beam: int = 16) -> str:
    automaton = build_hotwords(hotwords, LETTERS, boost)
    return LETTERS.decode(beam_search(log_probs, 28, beam, automaton)[0].token_ids.tolist())


@given(st.integers(1, 6), st.integers(2, 4), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1.0, 4.0]))
def test_a_wide_beam_finds_every_text_with_its_exact_probability(
    frames: int, vocabulary: int, seed: int, spread: float
) -> None:
    log_probs = log_softmax(np.random.default_rng(seed).normal(0, spread, (frames, vocabulary)))
    blank = seed % vocabulary
    exact = all_texts(log_probs, blank)
    found = beam_search(log_probs, blank, beam=MAX_BEAM, n_best=MAX_BEAM, pruning=EXACT)
    scores = {tuple(entry.token_ids.tolist()): entry.score for entry in found}
    assert scores.keys() == exact.keys()
    for text, probability in exact.items():
        assert scores[text] == pytest.approx(math.log(probability), abs=1e-4)
    assert [entry.score for entry in found] == sorted(scores.values(), reverse=True)


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.5, 3.0]))
def test_hotwords_add_their_credits_to_the_exact_probability(frames: int, seed: int, boost: float) -> None:
    log_probs = log_softmax(np.random.default_rng(seed).normal(0, 2.0, (frames, len(TINY))))
    automaton = build_hotwords(["ab", "b", "a b"], TINY, boost)
    assert automaton is not None
    found = beam_search(log_probs, 3, MAX_BEAM, automaton, n_best=MAX_BEAM, pruning=EXACT)
    exact = all_texts(log_probs, 3)
    assert {tuple(entry.token_ids.tolist()) for entry in found} == exact.keys()
    for entry in found:
        text = "".join(TINY.tokens[token] for token in entry.token_ids).replace("\u2581", " ")
        expected = math.log(exact[tuple(entry.token_ids.tolist())]) + boost * automaton.credits_of(text)
        assert entry.score == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=6), st.text("abc ", max_size=20))
def test_credits_of_words_are_the_letters_of_the_hotwords_in_the_text(hotwords: list[str], text: str) -> None:
    automaton = build_hotwords(hotwords, LETTERS)
    credits = automaton.credits_of(text) if automaton else 0
    assert credits == sum(len(word) for word in text.split() if word in hotwords)


@pytest.mark.parametrize(
    ("hotwords", "text", "credits"),
    [
        (["new york"], "in new york city", 8),
        (["new york"], "in new jersey", 0),
        (["new york", "new"], "new jersey", 3),
        (["new york", "jersey"], "new jersey", 6),
        (["new york city", "york"], "new york state", 4),
        (["new york city", "new york"], "new york", 8),
        (["a b c", "b c d"], "a b c d", 10),
        (["cat"], "concatenate cats cat", 3),
        (["new york"], "new  york", 0),
        ([30 * "ab"], f"{30 * 'ab'} cd", 32),
        ([30 * "ab"], f"{30 * 'ab'}cd", 0),
        ([f"q {20 * 'a'} {20 * 'b'} c", 20 * "a", 20 * "b"], f"q {20 * 'a'} {20 * 'b'} d", 40),
        ([f"q {20 * 'a'} {20 * 'b'} c", 20 * "a", 20 * "b"], f"q {20 * 'a'} {20 * 'b'} c", 40),
    ],
)
def test_credits_of_phrases(hotwords: list[str], text: str, credits: int) -> None:
    automaton = build_hotwords(hotwords, LETTERS)
    assert automaton is not None
    assert automaton.credits_of(text) == credits


def test_the_default_pruning_agrees_with_no_pruning_on_speech() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores = rng.normal(0, 1.0, (80, 29))
        scores[np.arange(80), np.where(rng.random(80) < 0.4, rng.integers(0, 28, 80), 28)] += 6.0
        log_probs = log_softmax(scores)
        pruned = beam_search(log_probs, 28, beam=16)[0]
        exact = beam_search(log_probs, 28, beam=16, pruning=EXACT)[0]
        assert pruned.token_ids.tolist() == exact.token_ids.tolist()
        assert pruned.score == pytest.approx(exact.score, abs=0.05)


def test_summing_alignments_beats_the_best_path() -> None:
    """The textbook case: the best path is empty, but 'a' has more probability over all its alignments."""
    log_probs = np.log(np.array([[0.0001, 0.4, 0.0001, 0.5998]] * 2)).astype(np.float32)
    assert greedy(log_probs[None], np.array([2]), 3)[0].token_ids.tolist() == []
    best = beam_search(log_probs, 3, beam=8)[0]
    assert best.token_ids.tolist() == [1]
    assert math.exp(best.score) == pytest.approx(0.4 * 0.4 + 2 * 0.4 * 0.5998, rel=1e-3)


def test_times_and_confidence_are_those_of_greedy_where_the_text_is_the_same() -> None:
    log_probs = spoken("the cat sat")
    from_greedy = greedy(log_probs[None], np.array([len(log_probs)]), 28)[0]
    from_beam = beam_search(log_probs, 28, beam=16)[0]
    assert from_beam.token_ids.tolist() == from_greedy.token_ids.tolist()
    assert from_beam.start_frames.tolist() == from_greedy.start_frames.tolist()
    assert from_beam.end_frames.tolist() == from_greedy.end_frames.tolist()
    assert from_beam.confidence == pytest.approx(from_greedy.confidence)


def test_a_hotword_turns_a_near_miss() -> None:
    heard = spoken("call nguyan now", alternatives={9: {"a": 0.8, "e": 0.18}})
    assert best_text(heard, []) == "call nguyan now"
    assert best_text(heard, ["nguyen"]) == "call nguyen now"
    assert best_text(heard, ["nguyenx", "uyen"]) == "call nguyan now"


def test_a_hotword_gets_into_a_beam_that_others_fill() -> None:
    log_probs = spoken("?", alternatives={0: {"a": 0.4, "c": 0.35, "b": 0.24}})
    assert best_text(log_probs, [], beam=2) == "a"
    assert best_text(log_probs, ["b"], boost=1.0, beam=2) == "b"


def test_a_hotword_is_a_whole_word() -> None:
    heard = spoken("cats", alternatives={1: {"a": 0.55, "o": 0.43}})
    assert best_text(heard, ["cot"]) == "cats"
    assert best_text(heard, ["cots"]) == "cots"


def test_a_phrase_counts_only_as_a_whole() -> None:
    heard = spoken("saint pial", alternatives={7: {"i": 0.6, "a": 0.35}, 8: {"a": 0.6, "u": 0.35}})
    assert best_text(heard, []) == "saint pial"
    assert best_text(heard, ["saint paul"]) == "saint paul"
    assert best_text(heard, ["saint paula"]) == "saint pial"


SAID = "he has been in the band for a long time"


@pytest.mark.parametrize(
    "phrase",
    [
        "he has been in the bakery",
        "he has been in the band for years",
        "in the band for a long career",
        "has been in the bandage",
        "he has been in the band for a long time and",
    ],
)
@pytest.mark.parametrize("boost", [1.0, MAX_BOOST])
@pytest.mark.parametrize("beam", [2, 16])
def test_a_phrase_that_begins_like_what_is_said_changes_nothing(phrase: str, boost: float, beam: int) -> None:
    assert best_text(spoken(SAID), [phrase], boost, beam) == SAID


def test_many_phrases_that_begin_like_what_is_said_change_nothing() -> None:
    words = SAID.split()
    phrases = [
        " ".join([*words[first:last], other])
        for first in range(len(words))
        for last in range(first + 1, len(words) + 1)
        for other in ("bakery", "xylophone", "no")
    ]
    assert best_text(spoken(SAID), phrases, 1.0) == SAID


def test_phrases_that_the_sound_rules_out_drive_out_no_better_text() -> None:
    """What the search finds beside them has all the probability of what it finds without, or more."""
    rng = np.random.default_rng(11)
    for _ in range(20):
        scores = rng.normal(0, 1.5, (120, 29))
        scores[np.arange(120), np.where(rng.random(120) < 0.4, rng.integers(0, 26, 120), 28)] += 5.0
        scores[:, LETTERS.tokens.index("z")] = -200.0
        log_probs = log_softmax(scores)
        without = beam_search(log_probs, 28)[0]
        text = LETTERS.decode(without.token_ids.tolist())
        phrases = [f"{text[start : start + 30]}z" for start in range(0, len(text), 3)]
        beside = beam_search(log_probs, 28, hotwords=build_hotwords(phrases, LETTERS))[0]
        assert beside.score > without.score - 0.01


def test_a_long_phrase_that_is_said_wins() -> None:
    """Its first letters cost more than the search would forgive without it."""
    heard = {at: {letter: 0.95, SAID[at]: 0.02} for at, letter in zip((1, 4, 8, 19), "axob", strict=True)}
    log_probs = spoken(SAID, alternatives=heard)
    without = best_text(log_probs, [])
    assert len(without) == len(SAID)
    assert sum(one != other for one, other in zip(without, SAID, strict=True)) == 3
    assert best_text(log_probs, ["he has been in the band"], 1.0) == SAID
    assert best_text(log_probs, ["he has been in the band", "he has been in the bakery"], 1.0) == SAID
    assert best_text(log_probs, ["he has been in the bandage"], 1.0) == without


def test_a_phrase_longer_than_any_that_is_worth_more() -> None:
    """However long its beginning was, nothing of it is left when it ends otherwise."""
    phrase = " ".join(["committee", "hospital", "northern", "counties", "agreed", "nothing"] * 4)
    said = phrase[:-3] + "xyz"
    assert len(phrase) > 2 * MOST_CREDITS + 64
    log_probs = spoken(said, alternatives={8: {"x": 0.97, phrase[8]: 0.02}})
    without = best_text(log_probs, [])
    assert without == f"{said[:8]}x{said[9:]}"
    assert best_text(log_probs, [phrase], 1.0) == without
    said_so = spoken(phrase, alternatives={8: {"x": 0.97, phrase[8]: 0.02}})
    assert best_text(said_so, [phrase], 1.0) == phrase
    for boost in (0.01, 1.0, MAX_BOOST):
        automaton = build_hotwords([phrase], LETTERS, boost)
        assert automaton is not None
        assert boost * automaton.credits_of(phrase) <= MOST_NATS
        assert automaton.credits_of(said) == 0


@pytest.mark.parametrize("boost", [1.5, MAX_BOOST])
def test_hotwords_are_not_invented_where_nothing_is_said(boost: float) -> None:
    rng = np.random.default_rng(5)
    silence = rng.normal(0, 1.0, (500, 29))
    silence[:, 28] += 12.0
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(1000)]
    assert best_text(log_softmax(silence), words, boost) == ""


def test_hotwords_are_not_invented_on_noise_that_says_nothing_without_them() -> None:
    rng = np.random.default_rng(6)
    noise = rng.normal(0, 1.0, (500, 29))
    noise[:, 28] += 9.0
    assert best_text(log_softmax(noise), []) == ""
    assert best_text(log_softmax(noise), ["a", "is", "nguyen", "machine learning"], MAX_BOOST) == ""


def test_hotwords_the_vocabulary_cannot_spell_are_named_and_left_out() -> None:
    automaton = build_hotwords(["naïve", "plain"], LETTERS)
    assert automaton is not None
    assert automaton.unknown == ("naïve",)
    assert automaton.credits_of("plain") == 5


def test_hotwords_work_on_pieces_however_a_word_is_cut() -> None:
    pieces = Vocabulary(
        ("\u2581new", "\u2581n", "ew", "\u2581y", "ork", "\u2581yolk", "<blank>"), 6, kind="wordpiece"
    )
    probabilities = np.full((7, 7), 1e-5)
    probabilities[::2, 6] = 0.99
    probabilities[1, [1, 0]] = [0.6, 0.05]
    probabilities[3, [2, 6]] = [0.7, 0.05]
    probabilities[5, [5, 3]] = [0.6, 0.39]
    log_probs = np.log(probabilities).astype(np.float32)
    tail = np.log(np.array([[1e-5, 1e-5, 1e-5, 1e-5, 0.7, 1e-5, 0.3]])).astype(np.float32)
    log_probs = np.concatenate([log_probs, tail])
    plain = pieces.decode(beam_search(log_probs, 6)[0].token_ids.tolist())
    boosted = build_hotwords(["new york"], pieces)
    assert plain == "new yolkork"
    assert pieces.decode(beam_search(log_probs, 6, 16, boosted)[0].token_ids.tolist()) == "new york"


WRITTEN = Vocabulary(
    (" the", " engine", " is", " loud", " louder", "er", " lord", " Luther", "<blank>"), 8, kind="wordpiece"
)


def written(*steps: dict[str, float], repeats: int = 5) -> Frames:
    """Frames of a decoder that wrote these tokens: each in a few equal frames, certain blanks between."""
    rows = np.full((len(steps) + 1, len(WRITTEN)), 1e-6)
    rows[0] = 1e-30
    rows[0, 8] = 1.0
    for row, step in zip(rows[1:], steps, strict=True):
        for token, value in step.items():
            row[WRITTEN.tokens.index(token)] = value
    of_frame = [row for step in range(1, len(rows)) for row in (*[step] * repeats, 0)]
    return Frames(np.log(rows).astype(np.float32), np.array(of_frame, np.int64))


LOUD = written({" the": 0.9}, {" engine": 0.9}, {" is": 0.8}, {" loud": 0.5, " louder": 0.4, " lord": 0.05})


@pytest.mark.parametrize("frames", [LOUD, Frames(LOUD.whole())], ids=["rows", "whole"])
def test_one_token_is_taken_of_a_decoders_equal_frames(frames: Frames) -> None:
    greedily = greedy_of(frames, 8)
    found = search_steps(frames, 8, 16)
    assert WRITTEN.decode(found.token_ids.tolist()) == "the engine is loud"
    for name in ("token_ids", "start_frames", "end_frames", "token_log_probs"):
        mine, theirs = getattr(found, name), getattr(greedily, name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    assert (found.frames, found.empty_log_prob) == (greedily.frames, greedily.empty_log_prob)


@pytest.mark.parametrize(
    ("hotwords", "text"),
    [
        (["louder"], "the engine is louder"),
        (["lord"], "the engine is loud"),  # five letters with the space, and 4.6 nats behind
        (["the engine is Luther"], "the engine is loud"),
        (["the engine is a lord"], "the engine is loud"),
        (["the engine is lord"], "the engine is lord"),
    ],
)
def test_hotwords_choose_among_what_a_decoder_found(hotwords: list[str], text: str) -> None:
    found = search_steps(LOUD, 8, 16, build_hotwords(hotwords, WRITTEN))
    assert WRITTEN.decode(found.token_ids.tolist()) == text


def test_a_decoder_that_wrote_nothing() -> None:
    assert search_steps(written(), 8).token_ids.tolist() == []
    assert search_steps(Frames(np.zeros((0, 9), np.float32)), 8).token_ids.tolist() == []


def test_no_frames_and_nothing_possible_give_the_empty_text() -> None:
    assert beam_search(np.zeros((0, 4), np.float32), 3)[0].token_ids.tolist() == []
    flat = np.full((5, 4), -1000.0, np.float32)
    assert beam_search(flat, 3)[0].token_ids.tolist() == []


@pytest.mark.parametrize(
    ("beam", "blank", "match"), [(0, 3, "beam"), (MAX_BEAM + 1, 3, "beam"), (4, 9, "blank")]
)
def test_values_out_of_range_are_refused(beam: int, blank: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        beam_search(np.zeros((3, 4), np.float32), blank, beam)


def test_boosts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="boost"):
        build_hotwords(["a"], LETTERS, MAX_BOOST + 1)
    assert build_hotwords([], LETTERS) is None
    assert build_hotwords(["  "], LETTERS) is None


def test_short_lists_are_kept_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest lists take megabytes, and callers may send as many different ones as they like."""
    monkeypatch.setattr(hotwords_module, "_MOST_KEPT_CHARACTERS", 4)
    assert build_hotwords(["abab"], LETTERS) is build_hotwords(["abab"], LETTERS)
    assert build_hotwords(["ababa"], LETTERS) is not build_hotwords(["ababa"], LETTERS)
