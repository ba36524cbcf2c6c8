"""Hotwords in a model's spelling: the steps that recipes name in a manifest."""

from __future__ import annotations

import pytest

from api.normalise import normalise

TURKIC = ("nfc", "lowercase_turkic", "apostrophes", "drop_punctuation_but_apostrophe", "collapse_spaces")
RUSSIAN = ("drop_stress", "nfc", "lowercase", "drop_punctuation", "fold_yo", "collapse_spaces")


@pytest.mark.parametrize(
    ("steps", "language", "word", "expected"),
    [
        (TURKIC, "tr", "Ankara", "ankara"),
        (TURKIC, "tr", "IŞIK İzmir’de", "ışık izmir'de"),
        (TURKIC, "tr", "İzmir".lower(), "izmir"),
        (TURKIC, "az", "‘Bakı’", "bakı"),
        (RUSSIAN, "ru", "Е\u0301лка Ёж", "елка еж"),
        (("nfc", "lowercase"), "ru", "Ёж", "ёж"),
        (("uppercase",), "tr", "ışık i", "IŞIK İ"),
    ],
)
def test_a_hotword_is_spelled_as_the_model_was_taught(
    steps: tuple[str, ...], language: str, word: str, expected: str
) -> None:
    assert normalise(word, steps, language) == expected
