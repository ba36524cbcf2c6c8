"""What a transcription is: frozen values between the transcriber and the formats it is written in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np

from api.ctc import Decoded
from api.frames import Frames
from api.vocabulary import Vocabulary, WordSpan
from api.words import Word, words_of

PAUSE_S = 0.8  # a gap between words that begins a new segment
LONG_SEGMENT_S = 10.0  # from this length on a shorter gap will do
SHORT_PAUSE_S = 0.3


NOWHERE = 0.3
"""Share of the doubtful confidence below which nothing was said, 0.15 at the default of 0.5; twice that for a
word by itself. Of 300 clips of swelling noise en-whisper-tiny-ctc makes 9 short words of 0.17 to 0.29; of
580 segments of speech none has less than 0.2, and four lone words have less than 0.3, all of them wrong.
"""


@dataclass(frozen=True, slots=True)
class Token:
    """One emitted token: what it adds to the text, its id and log-posterior per frame (nats, their mean).

    ``unit`` is bytes where the vocabulary is of bytes: a token may end within a letter.
    """

    unit: str | bytes
    id: int
    logprob: float


class Tokens(Sequence[Token]):
    """Tokens ``first`` to ``after`` of a decoded window, made when somebody asks: most answers name none."""

    __slots__ = ("_decoded", "_range", "_vocabulary")

    def __init__(self, decoded: Decoded, vocabulary: Vocabulary, first: int, after: int) -> None:
        self._decoded = decoded
        self._vocabulary = vocabulary
        self._range = range(first, after)

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> Token: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Token]: ...
    def __getitem__(self, index: int | slice) -> Token | Sequence[Token]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        decoded, position = self._decoded, self._range[index]
        token_id = int(decoded.token_ids[position])
        frames = int(decoded.end_frames[position] - decoded.start_frames[position])
        return Token(
            self._vocabulary.units[token_id], token_id, float(decoded.token_log_probs[position]) / frames
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech between two pauses; times in seconds from the start of the file.

    ``avg_logprob``: mean log-posterior per frame of the tokens. ``no_speech_prob``: probability the model
    gives to the empty text over the segment's frames. ``window_start_s``: start of the window it was decoded
    in. ``token_frames``: frames the tokens occupy, the weight of this segment in an average.
    """

    start_s: float
    end_s: float
    text: str
    words: tuple[Word, ...]
    tokens: Sequence[Token]
    avg_logprob: float
    no_speech_prob: float
    window_start_s: float
    token_frames: int

    @property
    def confidence(self) -> float:
        """Geometric mean of the winning posteriors, in [0, 1]."""
        return math.exp(self.avg_logprob)

    def is_like_noise(self, below_confidence: float) -> bool:
        """Whether this looks like what a CTC model makes of noise: doubtful letters, or words out of nowhere.

        A word by itself is judged by itself: where nobody speaks, a model that spells its spaces is sure of
        them, and those around the word would vouch for it. A language model turns letters into words, whose
        confidence still is the acoustic model's.
        """
        letters = sum(len(word.text) for word in self.words)
        alone = len(self.words) == 1
        heard = self.words[0].confidence if alone else self.confidence
        if heard < (2 if alone else 1) * NOWHERE * below_confidence:
            return True
        return heard < below_confidence and letters < 2 * len(self.words)


@dataclass(frozen=True, slots=True)
class Transcript:
    """The text of one file. ``confidence`` is None where there is no text to be sure of.

    ``duration_s`` is the audio's true length; ``processing_s`` the time from the decoded file's first byte to
    the last word, waiting included.
    """

    text: str
    segments: tuple[Segment, ...]
    duration_s: float
    processing_s: float
    model: str
    language: str
    warnings: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[Word, ...]:
        """All words in order."""
        return tuple(word for segment in self.segments for word in segment.words)

    @property
    def confidence(self) -> float | None:
        """Geometric mean of the winning posteriors over all tokens' frames."""
        frames = sum(segment.token_frames for segment in self.segments)
        if not frames:
            return None
        total = sum(segment.avg_logprob * segment.token_frames for segment in self.segments)
        return math.exp(total / frames)

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time."""
        return self.processing_s / self.duration_s if self.duration_s else 0.0


def join_text(segments: Sequence[Segment]) -> str:
    """Text of segments in order, separated by one space."""
    return " ".join(segment.text for segment in segments if segment.text)


def segments_of(
    decoded: Decoded,
    frames: Frames,
    vocabulary: Vocabulary,
    *,
    frame_stride_s: float,
    window_start_s: float,
    window_s: float,
) -> list[Segment]:
    """Cut one decoded window into segments at its pauses; no words, no segments.

    Times never leave the window: a model's last frame may reach a
    stride past the audio's end.
    """
    spans = vocabulary.words(decoded.token_ids.tolist())
    words = words_of(decoded, spans, frame_stride_s, window_start_s, window_start_s + window_s)
    if not words:
        return []
    widths = decoded.end_frames - decoded.start_frames
    blank_log_probs = frames.of_token(vocabulary.blank_id)
    segments = []
    bounds = [0, *_breaks(words, spans), len(words)]
    for first, after in pairwise(bounds):
        token_from = spans[first].start if first else 0
        token_to = spans[after].start if after < len(spans) else len(decoded.token_ids)
        frame_from = _boundary(decoded, token_from)
        frame_to = _boundary(decoded, token_to)
        log_prob = float(decoded.token_log_probs[token_from:token_to].sum(dtype=np.float64))
        token_frames = int(widths[token_from:token_to].sum())
        part = tuple(words[first:after])
        segments.append(
            Segment(
                start_s=part[0].start_s,
                end_s=part[-1].end_s,
                text=" ".join(word.text for word in part),
                words=part,
                tokens=Tokens(decoded, vocabulary, token_from, token_to),
                avg_logprob=min(0.0, log_prob / token_frames),
                no_speech_prob=min(1.0, math.exp(float(blank_log_probs[frame_from:frame_to].sum()))),
                window_start_s=window_start_s,
                token_frames=token_frames,
            )
        )
    return segments


def _breaks(words: Sequence[Word], spans: Sequence[WordSpan]) -> list[int]:
    """Indices of the words that begin a new segment, the first one not among them.

    No word does whose first token also ends the word before: a segment's tokens write its own text.
    """
    breaks: list[int] = []
    start_s = words[0].start_s
    for index in range(1, len(words)):
        gap_s = words[index].start_s - words[index - 1].end_s
        long = words[index - 1].end_s - start_s >= LONG_SEGMENT_S
        apart = spans[index].start >= spans[index - 1].end
        if apart and (gap_s >= PAUSE_S or (long and gap_s >= SHORT_PAUSE_S)):
            breaks.append(index)
            start_s = words[index].start_s
    return breaks


def _boundary(decoded: Decoded, token: int) -> int:
    """Frame between the token before and this one; the window's ends for the first and after the last."""
    if token == 0:
        return 0
    if token >= len(decoded.token_ids):
        return decoded.frames
    return int(decoded.end_frames[token - 1] + decoded.start_frames[token]) // 2
