"""Words against words: error rate, differences to show, and times carried over to a corrected text.

Levenshtein distance with unit costs (Levenshtein 1966); the word error rate is (S + D + I) / N over the
reference's N words, as in NIST's sclite.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ui.transcript import Segment, Transcript, Word

MAX_CELLS = 400_000_000
_TURKIC_CAPITALS = str.maketrans({"I": "ı", "\u0130": "i"})

Kind = Literal["equal", "changed", "missing", "extra"]


class TextTooLongError(ValueError):
    """Both texts are so long, and so different, that comparing them would take too much memory."""


@dataclass(frozen=True)
class Step:
    """One step of an alignment. ``missing``: only in the reference; ``extra``: only in the hypothesis."""

    kind: Kind
    reference: int | None
    hypothesis: int | None


@dataclass(frozen=True)
class ErrorRate:
    """Counts of one comparison; ``rate`` may pass 1 where much was added."""

    changed: int
    missing: int
    extra: int
    reference_words: int

    @property
    def rate(self) -> float:
        """Errors per word of the reference; 0 for two empty texts, infinite for extras against nothing."""
        errors = self.changed + self.missing + self.extra
        if not self.reference_words:
            return float("inf") if errors else 0.0
        return errors / self.reference_words


def comparable(text: str, language: str = "") -> list[str]:
    """Words as they are compared: NFC, folded case, without punctuation; apostrophes inside words stay.

    ``language``: ISO 639-1; Turkish and Azerbaijani have two letters i, which folding would mix up.
    """
    composed = unicodedata.normalize("NFC", text)
    if language in ("tr", "az"):
        composed = composed.translate(_TURKIC_CAPITALS)
    folded = unicodedata.normalize("NFC", composed.casefold())
    kept = "".join(
        letter if letter in "'’" or unicodedata.category(letter)[0] not in "PS" else " " for letter in folded
    ).replace("’", "'")
    return [word for part in kept.split() if (word := part.strip("'"))]


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Step]:
    """The steps of one cheapest alignment, in order.

    Raises:
        TextTooLongError: see the class.
    """
    head = 0
    while head < min(len(reference), len(hypothesis)) and reference[head] == hypothesis[head]:
        head += 1
    tail = 0
    while (
        tail < min(len(reference), len(hypothesis)) - head
        and reference[len(reference) - 1 - tail] == hypothesis[len(hypothesis) - 1 - tail]
    ):
        tail += 1
    middle = _align(reference[head : len(reference) - tail], hypothesis[head : len(hypothesis) - tail], head)
    return [
        *(Step("equal", i, i) for i in range(head)),
        *middle,
        *(Step("equal", len(reference) - tail + i, len(hypothesis) - tail + i) for i in range(tail)),
    ]


def _align(reference: Sequence[str], hypothesis: Sequence[str], offset: int) -> list[Step]:
    rows, columns = len(reference), len(hypothesis)
    if (rows + 1) * (columns + 1) > MAX_CELLS:
        raise TextTooLongError("The two texts are too long to be compared.")
    ids = {word: number for number, word in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    wanted = np.array([ids[word] for word in hypothesis], np.int64)
    error = rows + columns + 1  # fewest errors first; among those, a match earns 1: most words kept
    ramp = np.arange(columns + 1) * error
    # choice: 0 diagonal, 1 up (the reference's word is missing), 2 left (a word is extra)
    choices = np.full((rows + 1, columns + 1), 2, np.uint8)
    choices[:, 0] = 1
    before = ramp.copy()
    for row, word in enumerate(reference, 1):
        diagonal = before[:-1] + np.where(wanted == ids[word], -1, error)
        up = before + error
        best = up.copy()
        best[1:] = np.minimum(diagonal, up[1:])
        best = np.minimum.accumulate(best - ramp) + ramp  # a run of extra words
        choices[row][best == up] = 1
        choices[row, 1:][best[1:] == diagonal] = 0
        before = best
    return list(reversed(list(_walk(choices, reference, hypothesis, offset))))


def _walk(
    choices: np.ndarray, reference: Sequence[str], hypothesis: Sequence[str], offset: int
) -> Iterator[Step]:
    row, column = len(reference), len(hypothesis)
    while row or column:
        choice = choices[row, column]
        if choice == 0:
            row, column = row - 1, column - 1
            kind: Kind = "equal" if reference[row] == hypothesis[column] else "changed"
            yield Step(kind, row + offset, column + offset)
        elif choice == 1:
            row -= 1
            yield Step("missing", row + offset, None)
        else:
            column -= 1
            yield Step("extra", None, column + offset)


def error_rate(steps: Sequence[Step]) -> ErrorRate:
    """Count the steps of an alignment."""
    count = {kind: sum(step.kind == kind for step in steps) for kind in ("changed", "missing", "extra")}
    reference_words = sum(step.reference is not None for step in steps)
    return ErrorRate(count["changed"], count["missing"], count["extra"], reference_words)


def corrected(transcript: Transcript, text: str) -> Transcript:
    """The transcript with ``text`` in place of its own, times carried over word by word.

    A word that stayed keeps its confidence; a changed or new one has none, because a person wrote it. New
    words share the gap they stand in. Words are what stands between spaces, punctuation included.
    """
    typed = text.split()
    language = transcript.language
    before = [_key(word.text, language) for word in transcript.words]
    steps = align(before, [_key(word, language) for word in typed])
    words: list[Word | None] = [None] * len(typed)
    for step in steps:
        if step.hypothesis is not None and step.reference is not None:
            old = transcript.words[step.reference]
            same = step.kind == "equal"
            words[step.hypothesis] = replace(
                old, text=typed[step.hypothesis], confidence=old.confidence if same else None
            )
    timed = _fill_gaps(words, typed, transcript.duration_s)
    return replace(
        transcript,
        text=" ".join(typed),
        words=tuple(timed),
        segments=tuple(_segments(timed, transcript.segments)),
    )


def _key(word: str, language: str) -> str:
    return " ".join(comparable(word, language)) or word


def _fill_gaps(words: Sequence[Word | None], typed: Sequence[str], duration_s: float) -> list[Word]:
    timed: list[Word] = []
    index = 0
    while index < len(words):
        word = words[index]
        if word is not None:
            timed.append(word)
            index += 1
            continue
        after = index
        while after < len(words) and words[after] is None:
            after += 1
        follower = words[after] if after < len(words) else None
        start_s = timed[-1].end_s if timed else 0.0
        end_s = max(start_s, follower.start_s if follower else duration_s)
        edges = np.linspace(start_s, end_s, after - index + 1)
        timed += [Word(typed[index + i], float(edges[i]), float(edges[i + 1])) for i in range(after - index)]
        index = after
    return timed


def _segments(words: Sequence[Word], old: Sequence[Segment]) -> Iterator[Segment]:
    """Group the words as before: a word belongs to the last segment that began by its middle."""
    groups: dict[int, list[Word]] = {}
    for word in words:
        middle_s = (word.start_s + word.end_s) / 2
        home = max((i for i, part in enumerate(old) if part.start_s <= middle_s), default=0)
        groups.setdefault(home, []).append(word)
    for home, group in groups.items():
        text = " ".join(word.text for word in group)
        untouched = bool(old) and text == old[home].text
        confidence = old[home].confidence if untouched else None
        yield Segment(text, group[0].start_s, group[-1].end_s, confidence)
