"""Text into the form a model was trained on: ``text_normalisation`` of the bundle, casing by language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

_TURKIC = frozenset({"az", "tr"})
_TURKIC_CAPITALS = str.maketrans({"I": "ı", "\u0130": "i"})
_DOTTED_TWICE = re.compile("i\u0307+")
APOSTROPHES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "`": "'", "\u00b4": "'"})
_LOOSE_APOSTROPHE = re.compile(r"(?<![^\W_])'+|'+(?![^\W_])")  # not \w: it has the underscore, which goes
_STRESS = "\u0301"


def normalise(text: str, steps: Sequence[str], language: str) -> str:
    """Apply the steps in order; steps this function does not know (punctuation, digits) leave text alone.

    Lower-casing follows the language: in Turkish and Azerbaijani, I becomes ı and İ becomes i.
    """
    for step in steps:
        if step in STEPS:
            text = STEPS[step](text)
        elif step == "lowercase":
            text = lower(text, language)
        elif step == "uppercase":
            text = upper(text, language)
    return " ".join(text.split())


def lower(text: str, language: str) -> str:
    """Lower case by the language's rules."""
    return lowercase_turkic(text) if language in _TURKIC else text.lower()


def upper(text: str, language: str) -> str:
    """Upper case by the language's rules."""
    if language in _TURKIC:
        text = text.replace("i", "İ").replace("ı", "I")
    return text.upper()


def nfc(text: str) -> str:
    """Composed form (Unicode NFC): one code point per Vietnamese vowel with its tone, per ё and й."""
    return unicodedata.normalize("NFC", text)


def lowercase_turkic(text: str) -> str:
    """Lower case with I -> ı and İ -> i, as Turkish and Azerbaijani have it.

    What a program without these rules made of İ, an i with a combining dot above, becomes i as well.
    """
    return nfc(_DOTTED_TWICE.sub("i", nfc(text.translate(_TURKIC_CAPITALS).lower())))


def drop_stress(text: str) -> str:
    """Remove the combining acute that dictionaries put on stressed Russian vowels."""
    return text.replace(_STRESS, "")


def fold_yo(text: str) -> str:
    """ё -> е, for corpora that write both for the same sound."""
    return text.replace("ё", "е").replace("Ё", "Е")


def apostrophes(text: str) -> str:
    """Typographic apostrophes as the plain one; quotes around words are dropped."""
    return _LOOSE_APOSTROPHE.sub(" ", text.translate(APOSTROPHES))


STEPS: dict[str, Callable[[str], str]] = {
    "nfc": nfc,
    "lowercase_turkic": lowercase_turkic,
    "drop_stress": drop_stress,
    "fold_yo": fold_yo,
    "apostrophes": apostrophes,
}
"""Steps that are the same in every language; training uses these very functions."""
