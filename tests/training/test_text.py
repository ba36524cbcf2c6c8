"""Normalisers and alphabets."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api.normalise import normalise
from training.text import ALPHABETS, STEPS, Normaliser, alphabet, normaliser
from training.vocabulary import CharacterCodec, UnknownCharacterError, ctc_frames_needed


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("tr", "IĞDIR'da İstanbul, ILIK!", "ığdır'da istanbul ılık"),
        ("az", "İŞIQ Qarabağ’da ƏLA", "işıq qarabağ'da əla"),
        ("tr", unicodedata.normalize("NFD", "İzmir"), "izmir"),
        ("tr", "İzmir'i".lower(), "izmir'i"),
        ("az", "QIRMIZI İŞIQ".replace("İ", "i\u0307"), "qırmızı işıq"),
        ("en", "I DON’T know — “really”?", "i don't know really"),
        ("ru", "Ещё ЁЛКА, зелё́ная; бо́льшая", "ещё ёлка зелёная большая"),
        ("ru", unicodedata.normalize("NFD", "Ёж й"), "ёж й"),
        ("vi", unicodedata.normalize("NFD", "Tiếng VIỆT, Đẹp!"), "tiếng việt đẹp"),
        ("de", "Straße  GROẞ", "straße groß"),
    ],
)
def test_normalises(language: str, text: str, expected: str) -> None:
    assert normaliser(language)(text) == expected


def test_english_i_is_not_turkish() -> None:
    assert normaliser("en")("I") == "i"
    assert normaliser("tr")("I") == "ı"


def test_yo_can_be_folded() -> None:
    assert normaliser("ru", yo=False)("Ещё Ёж") == "еще еж"


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("uk", "П’ять «слів»", "п'ять слів"),
        ("uz", "G‘alaba, 'ha'", "g'alaba ha"),
        ("fr", "L'eau", "l'eau"),
    ],
)
def test_apostrophes_stay_where_the_alphabet_has_them(language: str, text: str, expected: str) -> None:
    assert normaliser(language, letters="abc'")(text) == expected
    assert "'" not in normaliser(language, letters="abc")(text)


def test_numbers_are_left_to_the_user() -> None:
    text = normaliser("tr")("Saat 10:30")
    assert "10" in text
    assert CharacterCodec(alphabet("tr")).outside(text) == ["1", "0", "3"]


@given(st.sampled_from(sorted(ALPHABETS)), st.text(max_size=60))
@example("az", "0\u00b4_")  # the underscore holds the apostrophe, and goes
def test_normalising_twice_changes_nothing(language: str, text: str) -> None:
    once = normaliser(language)(text)
    assert normaliser(language)(once) == once


@given(st.sampled_from(sorted(ALPHABETS)), st.booleans(), st.data())
def test_the_service_spells_hotwords_as_training_spells_texts(
    language: str, yo: bool, data: st.DataObject
) -> None:
    letters = [*ALPHABETS[language], *ALPHABETS[language].upper(), " ", "\u2019", "\u0301"]
    text = data.draw(st.text(letters))
    if "'" not in ALPHABETS[language]:
        text = text.replace("\u2019", "").replace("'", "")
    taught = normaliser(language, yo=yo)
    assert normalise(text, taught.steps, language) == taught(text)


@given(st.sampled_from(sorted(ALPHABETS)), st.data())
def test_letters_survive_and_round_trip(language: str, data: st.DataObject) -> None:
    letters = [letter for letter in ALPHABETS[language] if letter != "'"]
    text = " ".join(data.draw(st.lists(st.text(letters, min_size=1, max_size=8), max_size=4)))
    assert normaliser(language)(text) == text
    codec = CharacterCodec(alphabet(language))
    assert codec.vocabulary.decode(codec.encode(text)) == text


def test_vietnamese_has_every_vowel_with_every_tone() -> None:
    assert len(ALPHABETS["vi"]) == 93
    assert all(unicodedata.is_normalized("NFC", letter) and len(letter) == 1 for letter in ALPHABETS["vi"])


def test_unknown_language_collects_its_letters() -> None:
    assert alphabet("de", ["größe", "maß"]) == "aegmrßö"
    with pytest.raises(ValueError, match="no alphabet"):
        alphabet("de")


def test_unknown_step_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown text steps"):
        Normaliser(("nfc", "uppercase"))
    assert "nfc" in STEPS


def test_unknown_characters_are_named() -> None:
    codec = CharacterCodec(alphabet("ru"))
    with pytest.raises(UnknownCharacterError, match=r"'q' \(U\+0071\)"):
        codec.encode("да q")


def test_frames_needed() -> None:
    assert ctc_frames_needed([1, 1, 2, 2, 2]) == 8
    assert ctc_frames_needed([]) == 0


def test_alphabet_may_not_repeat() -> None:
    with pytest.raises(ValueError, match="each letter once"):
        CharacterCodec("aba")
