"""Transcripts as training wants them: one normaliser per language and the alphabet that goes with it.

A normaliser is a short list of named steps, so that a bundle's manifest can say what was done to the text.
Letters that a language does not have are left alone, and so are digits: the validation report names them,
and it is for the owner of the data to spell numbers out or to drop the line.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from api.normalise import STEPS as SHARED_STEPS
from api.normalise import nfc

TONES = ("", "\u0300", "\u0309", "\u0303", "\u0301", "\u0323")
"""Vietnamese tones as combining marks: level, falling, dipping, rising glottal, rising, low glottal."""

_VIETNAMESE_VOWELS = "aăâeêioôơuưy"
_VIETNAMESE = "".join(
    sorted({unicodedata.normalize("NFC", vowel + tone) for vowel in _VIETNAMESE_VOWELS for tone in TONES})
)

ALPHABETS: dict[str, str] = {
    "en": "abcdefghijklmnopqrstuvwxyz'",
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "vi": "bcdđghklmnpqrstvx" + "fjwz" + _VIETNAMESE,
    "tr": "abcçdefgğhıijklmnoöprsştuüvyzâîû'",
    "az": "abcçdeəfgğhxıijkqlmnoöprsştuüvyz'",
}
"""Letters (and the apostrophe where it spells words) per ISO-639-1 language; the space is not listed."""


def lowercase(text: str) -> str:
    """Unicode's lower case, then composed again (a capital can lower to two code points)."""
    return nfc(text.lower())


def drop_punctuation(text: str) -> str:
    """Punctuation and symbols (Unicode P*, S*) become spaces."""
    return "".join(" " if unicodedata.category(character)[0] in "PS" else character for character in text)


def drop_punctuation_but_apostrophe(text: str) -> str:
    """The same for languages whose words hold apostrophes: run `apostrophes` before."""
    return "'".join(drop_punctuation(part) for part in text.split("'"))


def collapse_spaces(text: str) -> str:
    """Runs of white space as one space, none at the ends."""
    return " ".join(text.split())


STEPS: dict[str, Callable[[str], str]] = {
    **SHARED_STEPS,
    "lowercase": lowercase,
    "drop_punctuation": drop_punctuation,
    "drop_punctuation_but_apostrophe": drop_punctuation_but_apostrophe,
    "collapse_spaces": collapse_spaces,
}
"""Those that the service runs on hotwords are its own."""

_WITH_APOSTROPHE = ("apostrophes", "drop_punctuation_but_apostrophe", "collapse_spaces")
_PLAIN = ("nfc", "lowercase", "drop_punctuation", "collapse_spaces")
_LANGUAGE_STEPS: dict[str, tuple[str, ...]] = {
    "en": ("nfc", "lowercase", *_WITH_APOSTROPHE),
    "tr": ("nfc", "lowercase_turkic", *_WITH_APOSTROPHE),
    "az": ("nfc", "lowercase_turkic", *_WITH_APOSTROPHE),
    "ru": ("drop_stress", *_PLAIN),
    "vi": _PLAIN,
}


@dataclass(frozen=True)
class Normaliser:
    """Named steps, applied in order. Idempotent: a normalised text stays as it is."""

    steps: tuple[str, ...]

    def __post_init__(self) -> None:
        if unknown := [step for step in self.steps if step not in STEPS]:
            raise ValueError(f"unknown text steps {unknown}; known: {sorted(STEPS)}")

    def __call__(self, text: str) -> str:
        """The normalised text."""
        for step in self.steps:
            text = STEPS[step](text)
        return text


def normaliser(language: str, *, yo: bool = True, letters: str | None = None) -> Normaliser:
    """The normaliser of a language (ISO-639-1); any language without rules of its own gets the plain one.

    Args:
        language: two letters, for example "tr".
        yo: False folds the Russian ё into е.
        letters: the alphabet where it is given; an apostrophe in it stays in the words of languages without
            rules of their own (Ukrainian, Uzbek, French).
    """
    spelled = "'" in (letters or "")
    steps = _LANGUAGE_STEPS.get(language, ("nfc", "lowercase", *_WITH_APOSTROPHE) if spelled else _PLAIN)
    if language == "ru" and not yo:
        steps = (*steps[:-1], "fold_yo", steps[-1])
    return Normaliser(steps)


def plain_normaliser(language: str, taught: Iterable[str]) -> Normaliser:
    """What texts are measured with where the model was taught with these steps (a bundle's manifest).

    Capitals and punctuation are errors of no model; ё and apostrophes are as this one was taught them.
    """
    steps = tuple(taught)
    letters = "'" if "apostrophes" in steps else None
    return normaliser(language, yo="fold_yo" not in steps, letters=letters)


def alphabet(language: str, texts: Iterable[str] = ()) -> str:
    """Letters of a language without the space, in a fixed order.

    For a language that is not in ALPHABETS the letters are collected from `texts` (already normalised).
    Raises ValueError where there is neither.
    """
    if language in ALPHABETS:
        return ALPHABETS[language]
    found = sorted({character for text in texts for character in text if not character.isspace()})
    if not found:
        raise ValueError(f"language {language!r} has no alphabet here and no texts to collect one from")
    return "".join(found)
