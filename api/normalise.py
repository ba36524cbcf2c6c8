"""Text into the form a model was trained on: ``text_normalisation`` of the bundle, casing by language."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_TURKIC = frozenset({"az", "tr"})


def normalise(text: str, steps: Sequence[str], language: str) -> str:
    """Apply the steps in order; steps this function does not know (punctuation, digits) leave text alone.

    Lower-casing follows the language: in Turkish and Azerbaijani, I becomes ı and İ becomes i.
    """
    for step in steps:
        if step == "nfc":
            text = unicodedata.normalize("NFC", text)
        elif step == "lowercase":
            text = lower(text, language)
        elif step == "uppercase":
            text = upper(text, language)
    return " ".join(text.split())


def lower(text: str, language: str) -> str:
    """Lower case by the language's rules."""
    if language in _TURKIC:
        text = text.replace("I", "ı").replace("İ", "i")
    return text.lower()


def upper(text: str, language: str) -> str:
    """Upper case by the language's rules."""
    if language in _TURKIC:
        text = text.replace("i", "İ").replace("ı", "I")
    return text.upper()
