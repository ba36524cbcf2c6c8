"""Token ids of a CTC model: what training encodes with, decodes with and writes into `vocab.txt`.

Decoding is the service's own (`api.vocabulary`), so the validation error of a run is that of its bundle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary


class TokenCodec(Protocol):
    """What the training loop needs: text to ids, and the vocabulary that turns ids into text."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The bundle's vocabulary: tokens, blank, special ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a normalised text. Raises UnknownCharacterError."""
        ...

    def outside(self, text: str) -> list[str]:
        """Characters of `text` that cannot be encoded, each once."""
        ...


class UnknownCharacterError(ValueError):
    """A text holds a character that the vocabulary does not have."""

    def __init__(self, characters: Sequence[str]) -> None:
        listed = " ".join(f"{character!r} (U+{ord(character):04X})" for character in characters[:10])
        super().__init__(f"characters outside the vocabulary: {listed}")
        self.characters = tuple(characters)


@dataclass(frozen=True)
class CharacterCodec:
    """The space first, then the letters, the blank last: the layout of NeMo's character models."""

    letters: str
    vocabulary: Vocabulary = field(init=False, repr=False, compare=False)
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(set(self.letters)) != len(self.letters) or " " in self.letters or not self.letters:
            raise ValueError("an alphabet lists each letter once and does not list the space")
        tokens = (SPACE_MARK, *self.letters, BLANK_TOKEN)
        object.__setattr__(self, "vocabulary", Vocabulary(tokens, blank_id=len(tokens) - 1))
        object.__setattr__(self, "_ids", {token: index for index, token in enumerate(" " + self.letters)})

    def outside(self, text: str) -> list[str]:
        """Characters of `text` that have no id, each once, in order of appearance."""
        return list(dict.fromkeys(character for character in text if character not in self._ids))

    def encode(self, text: str) -> list[int]:
        """Token ids of a normalised text. Raises UnknownCharacterError."""
        if unknown := self.outside(text):
            raise UnknownCharacterError(unknown)
        return [self._ids[character] for character in text]


def casing_steps(vocabulary: Vocabulary) -> tuple[str, ...]:
    """How a text is brought into a published model's own casing, judged by the letters of its tokens.

    For the bundle's `text_normalisation`, by which the service spells hotwords.
    """
    texts = (unit if isinstance(unit, str) else unit.decode("utf-8", "ignore") for unit in vocabulary.units)
    letters = "".join(texts)
    capitals, small = any(map(str.isupper, letters)), any(map(str.islower, letters))
    if capitals and small:
        return ("nfc",)
    return ("nfc", "uppercase") if capitals else ("nfc", "lowercase")


def ctc_frames_needed(ids: Sequence[int]) -> int:
    """Fewest output frames that can spell `ids`: one each, and a blank between equal neighbours."""
    return len(ids) + sum(1 for left, right in itertools.pairwise(ids) if left == right)
