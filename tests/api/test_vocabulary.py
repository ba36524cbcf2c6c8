"""Tokens to text and words, for the three kinds of vocabulary."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.vocabulary import (
    BLANK_TOKEN,
    SPACE_MARK,
    Vocabulary,
    WordSpan,
    byte_of_character,
    spelling,
    words_of_units,
)

CHARS = Vocabulary((SPACE_MARK, *"abc'", BLANK_TOKEN), blank_id=5)
PIECES = Vocabulary((BLANK_TOKEN, "▁he", "llo", "▁", "▁world", "s"), blank_id=0, kind="wordpiece")


def encode_bytes(text: str) -> tuple[list[str], list[int]]:
    """One token per byte, and the ids that spell `text`."""
    character_of = {byte: character for character, byte in byte_of_character().items()}
    tokens = [character_of[byte] for byte in range(256)]
    return tokens, list(text.encode("utf-8"))


def test_characters_make_words_with_their_positions() -> None:
    ids = [1, 2, 0, 0, 3, 4, 1]
    assert CHARS.decode(ids) == "ab c'a"
    assert CHARS.words(ids) == [WordSpan("ab", 0, 2), WordSpan("c'a", 4, 7)]


def test_spaces_at_the_ends_make_no_words() -> None:
    assert CHARS.words([0, 0, 1, 0]) == [WordSpan("a", 2, 3)]
    assert CHARS.decode([]) == ""
    assert CHARS.decode([0, 0]) == ""


def test_pieces_begin_words_at_the_mark() -> None:
    ids = [1, 2, 4, 5]
    assert PIECES.decode(ids) == "hello worlds"
    assert PIECES.words(ids) == [WordSpan("hello", 0, 2), WordSpan("worlds", 2, 4)]


def test_a_lone_mark_belongs_to_no_word() -> None:
    assert PIECES.words([3, 1, 3, 5]) == [WordSpan("he", 1, 2), WordSpan("s", 3, 4)]


def test_blank_and_special_tokens_are_dropped_by_id() -> None:
    vocabulary = Vocabulary((BLANK_TOKEN, "<|en|>", "▁a", "b"), 0, "wordpiece", frozenset({1}))
    assert vocabulary.decode([1, 2, 0, 3, 1]) == "ab"


def test_bytes_join_across_tokens() -> None:
    tokens, ids = encode_bytes("naïve tiếng Việt")
    vocabulary = Vocabulary((*tokens, BLANK_TOKEN), 256, "bpe")
    assert vocabulary.decode(ids) == "naïve tiếng Việt"
    words = vocabulary.words(ids)
    assert [word.text for word in words] == ["naïve", "tiếng", "Việt"]
    assert (words[0].start, words[0].end) == (0, 6)


def test_broken_bytes_are_left_out() -> None:
    tokens, _ = encode_bytes("")
    vocabulary = Vocabulary((*tokens, BLANK_TOKEN), 256, "bpe")
    assert vocabulary.decode([0xC3, 0x20, 0x61]) == "a"


@given(st.text(max_size=30))
def test_bytes_give_back_any_text(text: str) -> None:
    tokens, ids = encode_bytes(text)
    vocabulary = Vocabulary((*tokens, BLANK_TOKEN), 256, "bpe")
    parts = [part.strip() for part in unicodedata.normalize("NFC", text).split(" ")]
    assert vocabulary.decode(ids) == " ".join(part for part in parts if part)


def test_text_is_composed() -> None:
    vocabulary = Vocabulary((BLANK_TOKEN, "e", "\u0301", "\u2581"), 0)
    assert vocabulary.decode([1, 2, 3, 1, 2]) == "\u00e9 \u00e9"


@pytest.mark.parametrize(
    ("tokens", "blank_id", "special", "problem"),
    [
        (("a", BLANK_TOKEN), 2, (), "blank_id = 2"),
        (("a", BLANK_TOKEN), 0, (), "expected '<blank>'"),
        (("a", BLANK_TOKEN), 1, (7,), "special_ids holds 7"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    tokens: tuple[str, ...], blank_id: int, special: tuple[int, ...], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        Vocabulary(tokens, blank_id, special_ids=frozenset(special))


def test_a_byte_token_must_stand_for_bytes() -> None:
    with pytest.raises(ValueError, match="stands for no byte"):
        Vocabulary((BLANK_TOKEN, "語"), 0, "bpe")


@given(
    st.lists(st.binary(max_size=4) | st.sampled_from([b" ", b"\xc3", b"\xa9", b"\xe1\xba", b"\xbf", b"."]))
)
def test_bytes_cut_anywhere_are_decoded_whole(units: list[bytes]) -> None:
    runs = (run.decode(errors="ignore") for run in b"".join(units).split(b" "))
    texts = [unicodedata.normalize("NFC", run).strip() for run in runs]
    assert [word.text for word in words_of_units(units)] == [text for text in texts if text]


class TestSilentTokens:
    """Tokens at a word's ends that write nothing a reader says."""

    @staticmethod
    def around(*units: str) -> tuple[int, int]:
        (word,) = words_of_units(units)
        assert words_of_units([unit.encode() for unit in units]) == [word]
        assert (word.start, word.end) == (0, len(units))
        return word.silent_before, word.silent_after

    @pytest.mark.parametrize(
        ("units", "silent"),
        [
            ((" silly", "."), (0, 1)),
            ((' "', "¿", "Qu", "é", "?", '"'), (2, 2)),
            ((" sil", "ly."), (0, 0)),
            ((" don", "'", "t"), (0, 0)),
            ((" 5", "0", "%", ","), (0, 1)),
            ((" -", "$", "5"), (1, 0)),
            ((" हिन्द", "ी", "।"), (0, 1)),
            ((" -", "-"), (0, 0)),
        ],
    )
    def test_are_counted(self, units: tuple[str, ...], silent: tuple[int, int]) -> None:
        assert self.around(*units) == silent

    def test_a_letter_stands_in_all_tokens_of_its_bytes(self) -> None:
        units = [b" caf", b"\xc3", b"\xa9", b".", b" \xc2", b"\xbf\xc3", b"\xa9"]
        assert words_of_units(units) == [WordSpan("café.", 0, 4, 0, 1), WordSpan("¿é", 4, 7, 1, 0)]


class TestSpelling:
    @pytest.mark.parametrize(
        ("units", "text", "contents"),
        [
            (["a", "b", " ", "c"], "ab c", ["a", "b", " ", "c"]),
            ([" ", "a", " ", " ", "b", " "], "a b", ["", "a", "", " ", "b", ""]),
            ([" he", "llo", ",", " you"], "hello, you", ["he", "llo", ",", " you"]),
            ([" he", " ", " you", "s"], "he yous", ["he", "", " you", "s"]),
            (["a b", "c d"], "a bc d", ["a b", "c d"]),
            (["e", "\u0301", "t", "e", "\u0301", "."], "été.", ["", "é", "t", "", "é", "."]),
        ],
    )
    def test_of_tokens_that_write_text(self, units: list[str], text: str, contents: list[str]) -> None:
        assert " ".join(word.text for word in words_of_units(units)) == text
        assert spelling(units) == [content.encode() for content in contents]
        assert spelling([unit.encode() for unit in units]) == spelling(units)

    def test_of_bytes_that_are_parts_of_letters(self) -> None:
        assert spelling([b" caf", b"\xc3", b"\xa9", b" \xc3"]) == [b"caf", b"\xc3", b"\xa9", b""]

    def test_of_a_letter_that_is_never_finished(self) -> None:
        assert spelling([b" a\xc3", b"b", b"\xe1\xba", b"\n"]) == [b"a", b"b", b"", b""]

    def test_the_space_before_the_first_word_is_written_by_a_token_or_goes_to_the_words_first(self) -> None:
        assert spelling([" he", "y"], after_other_text=True) == [b" he", b"y"]
        assert spelling([" ", "h", "e"], after_other_text=True) == [b" ", b"h", b"e"]
        assert spelling(["h", "e", " "], after_other_text=True) == [b" h", b"e", b""]
        assert spelling([" ", ""], after_other_text=True) == [b"", b""]

    @given(
        st.lists(st.text("ab \u0301\u0327é.\n\u00a0\u2000", max_size=4))
        | st.lists(st.binary(max_size=3) | st.sampled_from([b" ", b"\xc3", b"\xa9", b"\xcc", b"\x81", b"e"])),
        st.booleans(),
    )
    def test_joins_to_the_text(self, units: list[str] | list[bytes], after_other_text: bool) -> None:
        words = words_of_units(units)
        text = " ".join(word.text for word in words)
        contents = spelling(units, after_other_text=after_other_text)
        assert len(contents) == len(units)
        assert b"".join(contents).decode() == (" " + text if after_other_text and words else text)
