"""Token ids -> text and words.

`vocab.txt` has one token per line, the line number is the id. The space is written as U+2581 in every kind:

    chars       each token is one character; U+2581 alone stands between words
    wordpiece   each token is a piece of text; U+2581 at its start begins a word
    bpe         byte-level pieces: each character stands for one byte (GPT-2's table, Radford et al. 2019),
                except that U+2581 stands for the space byte
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

BLANK_TOKEN = "<blank>"  # noqa: S105 - a symbol, not a secret
SPACE_MARK = "\u2581"

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
    """A word and the half-open range of positions in the token sequence that spell it."""

    text: str
    start: int
    end: int


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
        if self.kind == "bpe":
            return self._words_of_bytes(ids)
        words: list[WordSpan] = []
        letters: list[str] = []
        start = end = 0
        for position, index in enumerate(ids):
            unit = self._units[index]
            assert isinstance(unit, str)  # noqa: S101 - narrows the type; kind decides it
            for character in unit:
                if character != " ":
                    if not letters:
                        start = position
                    letters.append(character)
                    end = position + 1
                elif letters:
                    words.append(WordSpan(_nfc("".join(letters)), start, end))
                    letters = []
        if letters:
            words.append(WordSpan(_nfc("".join(letters)), start, end))
        return words

    def _words_of_bytes(self, ids: Sequence[int]) -> list[WordSpan]:
        """A character's bytes may be spread over tokens, so words are cut first and decoded whole."""
        words: list[WordSpan] = []
        buffer = bytearray()
        start = end = 0

        def close() -> None:
            text = _nfc(buffer.decode("utf-8", errors="ignore")).strip()
            if text:
                words.append(WordSpan(text, start, end))
            buffer.clear()

        for position, index in enumerate(ids):
            unit = self._units[index]
            assert isinstance(unit, bytes)  # noqa: S101 - narrows the type; kind decides it
            for byte in unit:
                if byte != 0x20:
                    if not buffer:
                        start = position
                    buffer.append(byte)
                    end = position + 1
                else:
                    close()
        close()
        return words


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
