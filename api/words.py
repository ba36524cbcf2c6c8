"""Decoded tokens -> words with times and confidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from api.ctc import Decoded
from api.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Word:
    """One word, in NFC. ``confidence`` in [0, 1] is defined at the top of ``ctc.py``."""

    text: str
    start_s: float
    end_s: float
    confidence: float


def words_of(
    decoded: Decoded, vocabulary: Vocabulary, frame_stride_s: float, offset_s: float = 0.0
) -> list[Word]:
    """Words of one utterance, in order.

    A word starts with the first frame of its first token and ends with the last frame of its last token,
    ``frame_stride_s`` seconds per frame, moved by ``offset_s`` (where the segment starts in the file).
    """
    starts = decoded.start_frames.tolist()
    ends = decoded.end_frames.tolist()
    sums = decoded.token_log_probs.tolist()
    words = []
    for span in vocabulary.words(decoded.token_ids.tolist()):
        tokens = range(span.start, span.end)
        frames = sum(ends[token] - starts[token] for token in tokens)
        mean = sum(sums[token] for token in tokens) / frames
        words.append(
            Word(
                text=span.text,
                start_s=offset_s + starts[span.start] * frame_stride_s,
                end_s=offset_s + ends[span.end - 1] * frame_stride_s,
                confidence=min(1.0, math.exp(mean)),
            )
        )
    return words
