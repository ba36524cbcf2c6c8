"""CTC decoding of log-probabilities: greedy collapse and forced alignment, both with times and confidence.

Source: Graves et al., "Connectionist Temporal Classification" (ICML 2006). ``beam.py`` holds the prefix beam
search, ``words.py`` turns tokens into words. All heavy loops are compiled (``api.compiled``).

What the numbers mean, the same for greedy and beam:

- A token's **confidence** is the geometric mean of its posterior over the frames it occupies.
- A word's confidence is the geometric mean over the frames of all its tokens.
- The text's confidence is the geometric mean over the frames of all tokens; for an empty text, over every
  frame's blank. ``avg_logprob`` is its natural logarithm.
- ``no_speech_prob`` is the probability the model gives to the empty text: the product of the blank's
  posterior over all frames (only one CTC path spells the empty text).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from api.compiled import compiled, inner
from api.frames import Frames

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

# From this vocabulary size on numpy's argmax (SIMD over the vocabulary) beats the fused loop.
FUSED_ARGMAX_MAX_VOCABULARY = 512

# What an alignment may be behind the likeliest token of every frame before more of the states are looked at.
SLACK_NATS = 32.0


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tokens of one utterance.

    ``token_ids``, ``start_frames``, ``end_frames`` (exclusive): int32 ``(tokens,)``.
    ``token_log_probs``: float32 ``(tokens,)``, sum of the token's log-posterior over its frames.
    ``frames``: valid frames of the utterance. ``empty_log_prob``: log-probability of the empty text.
    ``score``: what the search ranked by; the log-probability of the best path (greedy) or of the text summed
    over all alignments in the beam, with boosts (beam).
    """

    token_ids: IntArray
    start_frames: IntArray
    end_frames: IntArray
    token_log_probs: FloatArray
    frames: int
    empty_log_prob: float
    score: float

    @property
    def token_confidences(self) -> FloatArray:
        """float32 ``(tokens,)`` in [0, 1]: geometric mean of each token's posterior over its frames."""
        widths = (self.end_frames - self.start_frames).astype(np.float32)
        confidences: FloatArray = np.exp(self.token_log_probs / widths)
        return confidences

    @property
    def avg_logprob(self) -> float:
        """Mean log-posterior per frame of the tokens; of the blank when there is no token."""
        if len(self.token_ids):
            frames = int((self.end_frames - self.start_frames).sum())
            return float(self.token_log_probs.sum(dtype=np.float64)) / frames
        return self.empty_log_prob / self.frames if self.frames else 0.0

    @property
    def confidence(self) -> float:
        """Confidence of the whole text in [0, 1]; see the top of this file."""
        return min(1.0, math.exp(self.avg_logprob))

    @property
    def no_speech_prob(self) -> float:
        """Probability of the empty text in [0, 1]."""
        return min(1.0, math.exp(self.empty_log_prob))


def greedy(log_probs: FloatArray, frame_lengths: NDArray[np.int64], blank_id: int) -> list[Decoded]:
    """Best path of every utterance in a padded batch, repeats collapsed and blanks removed.

    ``log_probs`` float32 ``(batch, frames, vocabulary)``, ``frame_lengths`` int64 ``(batch,)``; frames from
    the length on are ignored. Ties go to the lower token id. Raises ValueError for wrong shapes.
    """
    _check(log_probs, frame_lengths, blank_id)
    lengths = np.ascontiguousarray(frame_lengths, dtype=np.int64)
    log_probs = np.ascontiguousarray(log_probs, dtype=np.float32)
    batch, frames, vocabulary = log_probs.shape
    if vocabulary <= FUSED_ARGMAX_MAX_VOCABULARY:
        winners = np.empty((batch, frames), np.int32)
        _argmax(log_probs, lengths, winners)
    else:
        winners = log_probs.argmax(axis=2).astype(np.int32)
    counts, totals = np.empty(batch, np.int64), np.empty((batch, 2), np.float64)
    tokens, starts, ends = (np.empty((batch, frames), np.int32) for _ in range(3))
    sums = np.empty((batch, frames), np.float32)
    _collapse(log_probs, winners, lengths, blank_id, counts, tokens, starts, ends, sums, totals)
    return [
        Decoded(
            token_ids=tokens[item, :count].copy(),
            start_frames=starts[item, :count].copy(),
            end_frames=ends[item, :count].copy(),
            token_log_probs=sums[item, :count].copy(),
            frames=int(lengths[item]),
            empty_log_prob=float(totals[item, 0]),
            score=float(totals[item, 1]),
        )
        for item, count in enumerate(counts.tolist())
    ]


def greedy_of(frames: Frames, blank_id: int) -> Decoded:
    """Best path of one utterance, as `greedy`."""
    if frames.of_frame is None:
        return greedy(frames.rows[None], np.array([len(frames)], np.int64), blank_id)[0]
    frames = frames.different()
    # Tokens that are nowhere the best are on no best path.
    kept = np.unique(np.append(frames.rows.argmax(axis=1), blank_id))
    blank = int(np.searchsorted(kept, blank_id))
    best = Frames(frames.rows[:, kept], frames.of_frame).whole()
    decoded = greedy(best[None], np.array([len(best)], np.int64), blank)[0]
    return replace(decoded, token_ids=kept[decoded.token_ids].astype(np.int32))


def align(log_probs: FloatArray, token_ids: IntArray, blank_id: int, score: float | None = None) -> Decoded:
    """Most probable placement (Viterbi) of known tokens on the frames.

    ``log_probs`` float32 ``(frames, vocabulary)``, ``token_ids`` int32 ``(tokens,)`` without blanks.
    ``score`` is passed through; without one it is the path's log-probability.
    Raises ValueError when the tokens do not fit: n tokens with r adjacent repeats need n + r frames.
    """
    _check(log_probs[None], np.array([len(log_probs)]), blank_id)
    log_probs = np.ascontiguousarray(log_probs, dtype=np.float32)
    tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
    repeats = int(np.count_nonzero(tokens[1:] == tokens[:-1])) if len(tokens) else 0
    if len(tokens) + repeats > len(log_probs):
        raise ValueError(f"{len(tokens)} tokens do not fit into {len(log_probs)} frames")
    states = 2 * len(tokens) + 1
    starts, ends = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.int32)
    sums = np.zeros(len(tokens), np.float32)
    path_scores, steps = np.zeros(states), np.zeros((len(log_probs), states), np.uint8)
    # Of a large vocabulary, only what the text is made of can be on its path.
    possible = log_probs if log_probs.shape[1] <= states else log_probs[:, np.append(tokens, blank_id)]
    likeliest = possible.max(axis=1)
    path = _viterbi(log_probs, tokens, blank_id, likeliest, path_scores, steps, starts, ends, sums)
    if path == -math.inf:
        raise ValueError("the tokens are impossible under these log-probabilities")
    empty = float(log_probs[:, blank_id].sum(dtype=np.float64))
    return Decoded(tokens, starts, ends, sums, len(log_probs), empty, path if score is None else score)


def _check(log_probs: FloatArray, frame_lengths: NDArray[np.int64], blank_id: int) -> None:
    if log_probs.ndim != 3 or frame_lengths.shape != log_probs.shape[:1]:
        raise ValueError(f"log_probs {log_probs.shape} and frame_lengths {frame_lengths.shape} do not match")
    if len(frame_lengths) and not 0 <= frame_lengths.min() <= frame_lengths.max() <= log_probs.shape[1]:
        raise ValueError(f"frame lengths reach outside 0..{log_probs.shape[1]}")
    if not 0 <= blank_id < log_probs.shape[2]:
        raise ValueError(f"blank id {blank_id} is outside the vocabulary of {log_probs.shape[2]}")


@compiled("int64(float32[:,:,::1], int64[::1], int32[:,::1])")
def _argmax(log_probs, lengths, winners):  # type: ignore[no-untyped-def]
    """The most probable token of every frame; ties go to the lower id."""
    for item in range(len(lengths)):
        for frame in range(lengths[item]):
            best = 0
            best_value = log_probs[item, frame, 0]
            for token in range(1, log_probs.shape[2]):
                value = log_probs[item, frame, token]
                if value > best_value:
                    best_value = value
                    best = token
            winners[item, frame] = best
    return 0


@compiled(
    "int64(float32[:,:,::1], int32[:,::1], int64[::1], int64, int64[::1], int32[:,::1], int32[:,::1], "
    "int32[:,::1], float32[:,::1], float64[:,::1])"
)
def _collapse(log_probs, winners, lengths, blank, counts, tokens, starts, ends, sums, totals):  # type: ignore[no-untyped-def]
    """Runs of equal non-blank winners: ids, first and last frame, sum of log-posteriors.

    ``totals``: log-probability of the empty text and of the best path.
    """
    for item in range(len(lengths)):
        count = 0
        previous = blank
        run = 0.0
        empty = 0.0
        path = 0.0
        for frame in range(lengths[item]):
            token = np.int64(winners[item, frame])
            value = log_probs[item, frame, token]
            empty += log_probs[item, frame, blank]
            path += value
            if token == blank:
                previous = blank
                continue
            if token == previous:
                run += value
            else:
                tokens[item, count] = token
                starts[item, count] = frame
                count += 1
                run = np.float64(value)
            ends[item, count - 1] = frame + 1
            sums[item, count - 1] = run
            previous = token
        counts[item] = count
        totals[item, 0] = empty
        totals[item, 1] = path
    return 0


@inner()
def _forward(log_probs, tokens, blank, likeliest, slack, score, step):  # type: ignore[no-untyped-def]
    """Viterbi over the 2n+1 states blank, t0, blank, t1, ...; only states that can still reach the end.

    In place (states from high to low); ``step`` remembers how far back each state came from (0 to 2). States
    at both ends that are behind the likeliest tokens of all frames so far by more than ``slack`` are left
    out: no path through one of them ends less far behind.
    """
    frames = log_probs.shape[0]
    count = len(tokens)
    states = 2 * count + 1
    score[:] = -np.inf
    score[0] = log_probs[0, blank]
    if count > 0:
        score[1] = log_probs[0, tokens[0]]
    first, end = 0, 2  # of the states that are not left out
    least = likeliest[0] - slack
    for frame in range(1, frames):
        least += likeliest[frame]
        left = max(first, states - 2 * (frames - frame))
        right = min(states - 1, end + 1)
        blank_value = log_probs[frame, blank]
        if right & 1 == 0:  # a blank whose token is out of reach, or the last one
            best = score[right]
            back = 0
            if right > 0 and score[right - 1] > best:
                best = score[right - 1]
                back = 1
            score[right] = best + blank_value
            step[frame, right] = back
        for index in range((right - 1) >> 1, (left >> 1) - 1, -1):
            token = tokens[index]
            state = 2 * index
            below = score[state - 1] if index > 0 else -np.inf
            best = score[state + 1]
            back = 0
            if score[state] > best:
                best = score[state]
                back = 1
            if index > 0 and below > best and tokens[index - 1] != token:
                best = below
                back = 2
            score[state + 1] = best + log_probs[frame, token]
            step[frame, state + 1] = back
            best = score[state]
            back = 0
            if below > best:
                best = below
                back = 1
            score[state] = best + blank_value
            step[frame, state] = back
        first = 2 * (left >> 1)
        end = right + 1
        while end > first and score[end - 1] < least:
            end -= 1
            score[end] = -np.inf
        while first < end and score[first] < least:
            score[first] = -np.inf
            first += 1
        if first == end:
            return False
    return max(score[states - 1], score[states - 2] if count > 0 else -np.inf) >= least


@compiled(
    "float64(float32[:,::1], int32[::1], int64, float32[::1], float64[::1], uint8[:,::1], "
    "int32[::1], int32[::1], float32[::1])"
)
def _viterbi(log_probs, tokens, blank, likeliest, score, step, starts, ends, sums):  # type: ignore[no-untyped-def]
    """The best path: its log-probability, and where its tokens are.

    ``likeliest``: per frame, no state of the text has more. ``ends`` and ``sums`` come filled with zeros.
    """
    frames = log_probs.shape[0]
    count = len(tokens)
    states = 2 * count + 1
    path = 0.0
    if frames > 0:
        slack = SLACK_NATS
        while not _forward(log_probs, tokens, blank, likeliest, slack, score, step) and slack < np.inf:
            slack = 4.0 * slack if slack < 500.0 else np.inf
        state = states - 1
        if count > 0 and score[states - 2] > score[states - 1]:
            state = states - 2
        path = score[state]
        for frame in range(frames - 1, -1, -1):
            if state & 1:
                index = state >> 1
                if ends[index] == 0:
                    ends[index] = frame + 1
                starts[index] = frame
                sums[index] += log_probs[frame, tokens[index]]
            state -= step[frame, state]
    return path


def warm_up(vocabulary: int, blank_id: int) -> None:
    """Have what decoding a model of this vocabulary needs compiled, or loaded from numba's cache."""
    log_probs = np.zeros((1, 4, vocabulary), np.float32)
    log_probs[0, 1, (blank_id + 1) % vocabulary] = 1.0
    decoded = greedy(log_probs, np.array([4], np.int64), blank_id)[0]
    align(log_probs[0], decoded.token_ids, blank_id)
