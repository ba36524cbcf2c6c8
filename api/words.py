"""Decoded tokens -> words with times and confidence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from api.ctc import Decoded
from api.vocabulary import WordSpan


@dataclass(frozen=True, slots=True)
class Word:
    """One word, in NFC. ``confidence`` in [0, 1] is defined at the top of ``ctc.py``."""

    text: str
    start_s: float
    end_s: float
    confidence: float


def words_of(
    decoded: Decoded,
    spans: Iterable[WordSpan],
    frame_stride_s: float,
    offset_s: float = 0.0,
    limit_s: float = math.inf,
) -> list[Word]:
    """Words of one utterance, in order; ``spans`` as ``Vocabulary.words`` gives them for its tokens.

    A word starts with the first frame of its first token and ends with the last frame of its last token, of
    those that hold something said: a decoder writes a full stop where it hears the pause, seconds later
    maybe. Without any, all its tokens count, as they do for the confidence. Times are ``frame_stride_s``
    seconds per frame, moved by ``offset_s`` (where the segment starts in the file), but never after
    ``limit_s``.
    """
    starts = decoded.start_frames.tolist()
    ends = decoded.end_frames.tolist()
    sums = decoded.token_log_probs.tolist()
    words = []
    for span in spans:
        first, after = span.start, span.end
        frames = sum(ends[first:after]) - sum(starts[first:after])
        words.append(
            Word(
                text=span.text,
                start_s=min(limit_s, offset_s + starts[first + span.silent_before] * frame_stride_s),
                end_s=min(limit_s, offset_s + ends[after - 1 - span.silent_after] * frame_stride_s),
                confidence=min(1.0, math.exp(sum(sums[first:after]) / frames)),
            )
        )
    return words
