"""Greedy decoding and forced alignment against plain Python, on random log-probabilities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import ctc
from api.ctc import Decoded, align, greedy, greedy_of
from api.frames import Frames
from api.vocabulary import Vocabulary
from api.words import words_of


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    batch, frames, vocabulary = draw(st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(2, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.normal(0, draw(st.sampled_from([0.5, 3.0, 8.0])), (batch, frames, vocabulary))
    if draw(st.booleans()):  # ties are decided, too
        scores = np.round(scores)
    lengths = np.array(draw(st.lists(st.integers(0, frames), min_size=batch, max_size=batch)), np.int64)
    return log_softmax(scores), lengths, draw(st.integers(0, vocabulary - 1))


def greedy_oracle(log_probs: np.ndarray, blank: int) -> list[tuple[int, int, int, float]]:
    """(token, start, end, mean log-posterior) of every run of one utterance."""
    runs = []
    best = [int(np.argmax(row)) for row in log_probs]
    for token, group in itertools.groupby(range(len(best)), key=lambda frame: best[frame]):
        places = list(group)
        if token != blank:
            mean = sum(float(log_probs[frame, token]) for frame in places) / len(places)
            runs.append((token, places[0], places[-1] + 1, mean))
    return runs


def check_against_oracle(decoded: Decoded, log_probs: np.ndarray, blank: int) -> None:
    expected = greedy_oracle(log_probs, blank)
    assert decoded.token_ids.tolist() == [run[0] for run in expected]
    assert decoded.start_frames.tolist() == [run[1] for run in expected]
    assert decoded.end_frames.tolist() == [run[2] for run in expected]
    assert decoded.token_confidences.tolist() == pytest.approx(
        [math.exp(run[3]) for run in expected], rel=1e-4
    )
    blank_sum = float(log_probs[:, blank].sum(dtype=np.float64))
    assert decoded.no_speech_prob == pytest.approx(min(1.0, math.exp(blank_sum)), rel=1e-4, abs=1e-12)
    if expected:
        total = sum(run[3] * (run[2] - run[1]) for run in expected)
        frames = sum(run[2] - run[1] for run in expected)
        assert decoded.confidence == pytest.approx(math.exp(total / frames), rel=1e-4)
    elif len(log_probs):
        assert decoded.confidence == pytest.approx(math.exp(blank_sum / len(log_probs)), rel=1e-4)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 12), frames=st.integers(0, 40))
def test_frames_that_are_equal_are_decoded_as_if_each_had_its_own_row(
    seed: int, rows: int, frames: int
) -> None:
    random = np.random.default_rng(seed)
    vocabulary = int(random.integers(2, 40))
    blank = int(random.integers(vocabulary))
    # Few values, so that there are ties.
    values = random.integers(-3, 0, (rows, vocabulary)).astype(np.float32)
    shared = Frames(values, random.integers(0, rows, frames))
    found, expected = greedy_of(shared, blank), greedy_of(Frames(shared.whole()), blank)
    for name in ("token_ids", "start_frames", "end_frames", "token_log_probs"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    assert (found.frames, found.score) == (expected.frames, expected.score)
    assert found.empty_log_prob == expected.empty_log_prob
    np.testing.assert_array_equal(shared.of_token(blank), shared.whole()[:, blank])
    np.testing.assert_array_equal(shared.different().whole(), shared.whole())


@given(batches())
def test_greedy_is_the_oracle_on_every_item(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    log_probs, lengths, blank = case
    for item, decoded in enumerate(greedy(log_probs, lengths, blank)):
        check_against_oracle(decoded, log_probs[item, : lengths[item]], blank)


@given(batches())
def test_large_vocabularies_take_the_other_road_to_the_same_answer(
    case: tuple[np.ndarray, np.ndarray, int],
) -> None:
    log_probs, lengths, blank = case
    padding = np.full((*log_probs.shape[:2], ctc.FUSED_ARGMAX_MAX_VOCABULARY), -80.0, np.float32)
    wide = np.concatenate([log_probs, padding], axis=2)
    for narrow_item, wide_item in zip(
        greedy(log_probs, lengths, blank), greedy(wide, lengths, blank), strict=True
    ):
        assert narrow_item.token_ids.tolist() == wide_item.token_ids.tolist()
        assert narrow_item.start_frames.tolist() == wide_item.start_frames.tolist()
        assert narrow_item.token_log_probs.tolist() == wide_item.token_log_probs.tolist()


def test_an_item_does_not_depend_on_its_neighbours_or_its_padding() -> None:
    rng = np.random.default_rng(1)
    log_probs = log_softmax(rng.normal(0, 4, (3, 40, 8)))
    lengths = np.array([40, 17, 3])
    together = greedy(log_probs, lengths, 7)
    for item, length in enumerate(lengths):
        alone = greedy(log_probs[item : item + 1, :length], lengths[item : item + 1], 7)[0]
        assert alone.token_ids.tolist() == together[item].token_ids.tolist()
        assert alone.score == pytest.approx(together[item].score)


def test_no_frames_give_the_empty_text_with_certainty() -> None:
    decoded = greedy(np.zeros((1, 0, 3), np.float32), np.array([0]), 2)[0]
    assert decoded.token_ids.tolist() == []
    assert (decoded.confidence, decoded.no_speech_prob, decoded.frames) == (1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("shape", "lengths", "blank"),
    [
        ((1, 4, 3), [5], 0),
        ((1, 4, 3), [-1], 0),
        ((1, 4, 3), [4, 4], 0),
        ((1, 4, 3), [4], 3),
        ((4, 3), [4], 0),
    ],
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], lengths: list[int], blank: int) -> None:
    with pytest.raises(ValueError, match=r"frame|blank|match"):
        greedy(np.zeros(shape, np.float32), np.array(lengths), blank)


def collapse(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 2**32 - 1), st.data())
def test_alignment_is_the_best_of_all_paths(
    frames: int, vocabulary: int, seed: int, data: st.DataObject
) -> None:
    log_probs = log_softmax(np.random.default_rng(seed).normal(0, 2, (frames, vocabulary)))
    blank = vocabulary - 1
    paths: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(vocabulary), repeat=frames):
        text = collapse(path, blank)
        score = float(sum(log_probs[frame, token] for frame, token in enumerate(path)))
        paths[text] = max(paths.get(text, -math.inf), score)
    text = data.draw(st.sampled_from(sorted(paths)))
    aligned = align(log_probs, np.array(text, np.int32), blank)
    assert aligned.score == pytest.approx(paths[text], abs=1e-4)
    # The spans it returns spell the text, in order, and earn that score.
    spelled = [blank] * frames
    for token, start, end in zip(aligned.token_ids, aligned.start_frames, aligned.end_frames, strict=True):
        assert start < end
        spelled[start:end] = [int(token)] * int(end - start)
    assert collapse(tuple(spelled), blank) == text
    assert sum(log_probs[frame, token] for frame, token in enumerate(spelled)) == pytest.approx(
        aligned.score, abs=1e-4
    )


def viterbi_oracle(log_probs: np.ndarray, tokens: np.ndarray, blank: int) -> float:
    """Score of the best path over all states, without leaving any out."""
    labels = np.full(2 * len(tokens) + 1, blank)
    labels[1::2] = tokens
    may_skip = np.zeros(len(labels), bool)
    may_skip[3::2] = labels[3::2] != labels[1:-2:2]
    score = np.full(len(labels), -np.inf)
    score[:2] = log_probs[0, labels[:2]]
    for row in log_probs[1:].astype(float):
        stepped = np.append(-np.inf, score[:-1])
        skipped = np.where(may_skip, np.append([-np.inf, -np.inf], score)[: len(labels)], -np.inf)
        score = np.maximum(np.maximum(score, stepped), skipped) + row[labels]
    return float(score[-2:].max())


@pytest.mark.parametrize("cost", [3.0, 15.0, 60.0, 1000.0])
@pytest.mark.parametrize("vocabulary", [4, 90])
def test_alignment_leaves_out_no_state_of_the_best_path(cost: float, vocabulary: int) -> None:
    rng = np.random.default_rng(int(cost))
    for _ in range(150):
        frames = int(rng.integers(1, 60))
        blank = int(rng.integers(vocabulary))
        others = np.delete(np.arange(vocabulary), blank)[:4]
        text = rng.choice(others, int(rng.integers(frames // 2 + 1))).astype(np.int32)
        # Few tokens are probable at a time, so that paths fall behind one another and catch up.
        scores = np.where(
            rng.random((frames, vocabulary)) < 0.4, 0.0, -cost * rng.random((frames, vocabulary))
        )
        log_probs = log_softmax(scores)
        aligned = align(log_probs, text, blank)
        assert aligned.score == pytest.approx(viterbi_oracle(log_probs, text, blank), rel=1e-6, abs=1e-3)
        path = np.full(frames, blank)
        for token, start, end in zip(text, aligned.start_frames, aligned.end_frames, strict=True):
            path[start:end] = token
        assert log_probs[np.arange(frames), path].sum(dtype=float) == pytest.approx(aligned.score, abs=1e-3)


@given(batches())
def test_aligning_the_greedy_text_gives_the_greedy_path(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    log_probs, lengths, blank = case
    for item, decoded in enumerate(greedy(log_probs, lengths, blank)):
        aligned = align(log_probs[item, : lengths[item]], decoded.token_ids, blank)
        assert aligned.score == pytest.approx(decoded.score, abs=1e-3)
        assert aligned.empty_log_prob == pytest.approx(decoded.empty_log_prob)


def test_alignment_refuses_what_does_not_fit() -> None:
    log_probs = log_softmax(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="do not fit"):
        align(log_probs, np.array([0, 0, 1], np.int32), 3)
    impossible = np.full((3, 4), -np.inf, np.float32)
    impossible[:, 3] = 0.0
    with pytest.raises(ValueError, match="impossible"):
        align(impossible, np.array([0], np.int32), 3)


def spike(vocabulary: int, blank: int, tokens: dict[int, tuple[int, float]], frames: int) -> np.ndarray:
    """Log-probabilities with one token of a given posterior per named frame, the blank elsewhere."""
    probabilities = np.full((frames, vocabulary), 1e-6)
    for frame in range(frames):
        token, value = tokens.get(frame, (blank, 0.99))
        probabilities[frame, token] = value
    return np.log(probabilities).astype(np.float32)


def test_words_carry_the_times_and_confidence_of_their_tokens() -> None:
    vocabulary = Vocabulary(("\u2581", "a", "b", "c", "<blank>"), blank_id=4)
    frames = {2: (1, 0.9), 3: (1, 0.4), 6: (2, 0.8), 9: (0, 0.5), 12: (3, 0.25)}
    decoded = greedy(spike(5, 4, frames, 15)[None], np.array([15]), 4)[0]
    first, second = words_of(decoded, vocabulary.words(decoded.token_ids.tolist()), 0.02, offset_s=10.0)
    assert (first.text, second.text) == ("ab", "c")
    assert (first.start_s, first.end_s) == pytest.approx((10.04, 10.14))
    assert (second.start_s, second.end_s) == pytest.approx((10.24, 10.26))
    assert first.confidence == pytest.approx((0.9 * 0.4 * 0.8) ** (1 / 3), rel=1e-4)
    assert second.confidence == pytest.approx(0.25, rel=1e-4)
    assert decoded.confidence == pytest.approx((0.9 * 0.4 * 0.8 * 0.5 * 0.25) ** (1 / 5), rel=1e-4)


def test_words_of_byte_level_pieces_join_characters_split_over_tokens() -> None:
    from api.vocabulary import byte_of_character

    character = {byte: text for text, byte in byte_of_character().items()}
    first, second = "".join(character[byte] for byte in "ế".encode()[:2]), character["ế".encode()[2]]
    vocabulary = Vocabulary(("\u2581t", first, second, "<blank>"), blank_id=3, kind="bpe")
    frames = {1: (0, 0.9), 4: (1, 0.9), 5: (2, 0.9)}
    decoded = greedy(spike(4, 3, frames, 8)[None], np.array([8]), 3)[0]
    (word,) = words_of(decoded, vocabulary.words(decoded.token_ids.tolist()), 0.02)
    assert (word.text, word.start_s, word.end_s) == ("tế", pytest.approx(0.02), pytest.approx(0.12))
