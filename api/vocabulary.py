"""Token ids -> text and words.

`vocab.txt` has one token per line, the line number is the id. The space is written as U+2581 in every kind:

    chars       each token is one character; U+2581 alone stands between words
    wordpiece   each token is a piece of text; U+2581 at its start begins a word
    bpe         byte-level pieces: each character stands for one byte (GPT-2's table, Radford et al. 2019),
                except that U+2581 stands for the space byte
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, takewhile
from typing import Literal

BLANK_TOKEN = "<blank>"  # noqa: S105 - a symbol, not a secret
SPACE_MARK = "\u2581"

_SIGNS_THAT_ARE_SAID = frozenset("%‰&@#§°+=×÷±")
_CATEGORIES_THAT_ARE_SAID = frozenset({"Mc", "Me", "Mn", "Sc"})
"""Of Unicode, beside letters and numbers: marks, which are vowels in many scripts, and currencies."""

VocabularyKind = Literal["chars", "wordpiece", "bpe"]


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's reversible table: printable bytes stand for themselves, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + index): byte for index, byte in enumerate(hidden)})
    table[SPACE_MARK] = 0x20
    return table


@dataclass(frozen=True)
class WordSpan:
    """A word and the half-open range of positions in the token sequence that spell it.

    ``silent_before``, ``silent_after``: how many of these tokens, at the beginning and at the end, write only
    what nobody says, such as quotes and full stops; 0 where all of them do.
    """

    text: str
    start: int
    end: int
    silent_before: int = 0
    silent_after: int = 0


@dataclass(frozen=True)
class Vocabulary:
    """What the graph's outputs mean.

    Args:
        tokens: one per output; `BLANK_TOKEN` at `blank_id`.
        special_ids: tokens that are dropped from text, such as a tokenizer's control tokens.
    """

    tokens: tuple[str, ...]
    blank_id: int
    kind: VocabularyKind = "chars"
    special_ids: frozenset[int] = frozenset()
    word_separator: str = SPACE_MARK
    _units: tuple[str | bytes, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.blank_id < len(self.tokens):
            raise ValueError(f"blank_id = {self.blank_id}: expected 0 to {len(self.tokens) - 1}")
        if self.tokens[self.blank_id] != BLANK_TOKEN:
            raise ValueError(
                f"token {self.blank_id} = {self.tokens[self.blank_id]!r}: expected {BLANK_TOKEN!r}, the blank"
            )
        if outside := [index for index in self.special_ids if not 0 <= index < len(self.tokens)]:
            raise ValueError(f"special_ids holds {outside[0]}: expected 0 to {len(self.tokens) - 1}")
        units = tuple(self._unit(index, token) for index, token in enumerate(self.tokens))
        object.__setattr__(self, "_units", units)

    def __len__(self) -> int:
        return len(self.tokens)

    def _unit(self, index: int, token: str) -> str | bytes:
        """What a token adds to the text, with a space for the mark; nothing for the blank and the special."""
        dropped = index == self.blank_id or index in self.special_ids
        if self.kind == "bpe":
            table = byte_of_character()
            if dropped:
                return b""
            try:
                return bytes(table[character] for character in token)
            except KeyError as error:
                raise ValueError(
                    f"token {index} = {token!r}: {error.args[0]!r} stands for no byte"
                ) from error
        return "" if dropped else token.replace(self.word_separator, " ")

    @property
    def units(self) -> tuple[str | bytes, ...]:
        """What each token adds to the text, a space for the mark; bytes where the kind is bpe."""
        return self._units

    def decode(self, ids: Iterable[int]) -> str:
        """Text of collapsed token ids, words separated by one space, NFC."""
        return " ".join(word.text for word in self.words(list(ids)))

    def words(self, ids: Sequence[int]) -> list[WordSpan]:
        """Words of collapsed token ids, with the positions that spell each; NFC, never empty."""
        return words_of_units([self._units[index] for index in ids])


def words_of_units(units: Sequence[str | bytes]) -> list[WordSpan]:
    """Words that tokens spell, given what each adds to the text; NFC, never empty, no white space around."""
    words: list[WordSpan] = []
    pieces: list[_Piece] = []
    for text, first, last in _pieces(units):
        if " " not in text:
            pieces.append((text, first, last))
            continue
        for index, part in enumerate(text.split(" ")):
            if index and pieces:
                words += _word(pieces)
                pieces = []
            if part:
                pieces.append((part, first, last))
    return words + _word(pieces)


def spelling(units: Sequence[str | bytes], *, after_other_text: bool = False) -> list[bytes]:
    """The bytes that each token has in the text, ``words_of_units`` separated by one space; joined, the text.

    They are the token's own unit where the text has it as it is. Spaces that the text has not are left out.
    With ``after_other_text`` it has one before the first word as well: where no token writes that, the word's
    first token has it. Of a word that is not in the text as its tokens write it (NFC, broken bytes), each
    token has the letters that are certain with it.
    """
    written = [unit if isinstance(unit, bytes) else unit.encode() for unit in units]
    contents = [b""] * len(written)
    free = 0
    for index, word in enumerate(words_of_units(units)):
        if index or after_other_text:
            places = range(word.start, free - 1, -1)
            contents[next((place for place in places if b" " in written[place]), word.start)] += b" "
        parts = written[word.start : word.end]
        parts[0] = parts[0].rpartition(b" ")[2]
        parts[-1] = parts[-1].partition(b" ")[0]
        for place, share in enumerate(_shares(parts, word.text), start=word.start):
            contents[place] += share
        free = word.end - 1  # a token may end one word and begin the next
    return contents


_Piece = tuple[str, int, int]
"""Characters, and the positions of the tokens that have their first and their last byte."""


def _pieces(units: Sequence[str | bytes]) -> list[_Piece]:
    """What tokens write, in order, each piece within one token or a single character; no broken bytes."""
    pieces: list[_Piece] = []
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    first = 0
    for position, unit in enumerate(units):
        if not unit:
            continue
        if isinstance(unit, str):
            pieces.append((unit, position, position))
        elif unit.isascii():
            pieces.append((unit.decode(), position, position))
            decoder.reset()
        else:
            for byte in unit:
                if byte & 0xC0 != 0x80:  # no byte that goes on with a character
                    first = position
                if character := decoder.decode(bytes((byte,))):
                    pieces.append((character, first, position))
    return pieces


def _word(pieces: Sequence[_Piece]) -> list[WordSpan]:
    """The word that these make; none where they are white space."""
    text = _text("".join([text for text, _, _ in pieces]))
    if not text:
        return []
    start, end = pieces[0][1], pieces[-1][2] + 1
    if pieces[0][0].isalnum() and pieces[-1][0].isalnum():
        return [WordSpan(text, start, end)]
    said = [piece for piece in pieces if _is_said(piece[0])] or pieces
    return [WordSpan(text, start, end, said[0][1] - start, end - 1 - said[-1][2])]


def _shares(parts: Sequence[bytes], text: str) -> Sequence[bytes]:
    """``text`` cut into as many pieces as there are parts: the parts where they join to it."""
    if b"".join(parts) == text.encode():
        return parts
    ends = [0]
    for after in range(1, len(parts)):
        so_far = _text(b"".join(parts[:after]).decode(errors="ignore"))
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(so_far, text, strict=False))
        ends.append(max(ends[-1], len(list(alike))))
    return [text[end:after].encode() for end, after in pairwise([*ends, len(text)])]


def _text(written: str) -> str:
    return unicodedata.normalize("NFC", written).strip()


def _is_said(text: str) -> bool:
    """Whether a reader says any of it: letters with their marks, numbers, signs that stand for words."""
    return any(
        character.isalnum()
        or character in _SIGNS_THAT_ARE_SAID
        or unicodedata.category(character) in _CATEGORIES_THAT_ARE_SAID
        for character in text
    )
