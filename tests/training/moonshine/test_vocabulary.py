"""Llama's tokens as a bundle's vocabulary, whole and cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.vocabulary import BLANK_TOKEN
from tests.training.moonshine.conftest import CONTROL, SILENT, TEXTS, TOKENS
from training.errors import CheckpointError, ConfigError
from training.moonshine import vocabulary
from training.moonshine.checkpoint import Published
from training.moonshine.vocabulary import (
    Tokens,
    cut_tokens,
    in_bytes,
    read_tokenizer,
    written_as_before,
)

SAID = [(text, 1.0) for text in TEXTS.splitlines()]
FEW = 270
"""Hardly more than bytes and letters."""


@pytest.fixture
def described(base: Path) -> dict[str, object]:
    return read_tokenizer(base / "tokenizer.json")


@pytest.fixture(params=["whole", "cut", "few"])
def tokens(request: pytest.FixtureRequest, published: Published, monkeypatch: pytest.MonkeyPatch) -> Tokens:
    monkeypatch.setattr(vocabulary, "FEWEST", FEW)
    if request.param == "whole":
        return published.tokens
    return cut_tokens(published.tokens.described, SAID, FEW if request.param == "few" else TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        "good morning",
        "Déjà vu: é or e\u0301?",
        "北京 is Beijing",
        "so 🙂👩‍👩‍👧 it goes",
        "I'm o'clock’s",
        "a < b > c </ s>",
        "1 + 2 = 3; ~100 % {x} [y] `z`",
        "Çığ öğüt",
        "đường phố",
    ],
)
def test_every_text_is_written_and_read_again(tokens: Tokens, text: str) -> None:
    """By the service's own vocabulary; nothing that it drops is used."""
    ids = tokens.encode(text)
    assert not {tokens.start, tokens.end} & set(ids)
    assert not set(tokens.prompt().suppressed) & set(ids)
    read = tokens.vocabulary()
    assert read.decode(ids) == read.decode([tokens.start, *ids, tokens.end]) == _composed(text)
    assert tokens.tokenizer().decode(ids) == text


def _composed(text: str) -> str:
    return text.replace("e\u0301", "é")


def test_tokens_of_a_bundle_are_distinct(tokens: Tokens) -> None:
    """And every byte is among them, but for those that are letters."""
    read = tokens.vocabulary()
    assert len(set(read.tokens)) == len(read.tokens) == len(tokens.ids)
    assert read.tokens[tokens.end] == BLANK_TOKEN
    assert read.kind == "bpe"
    alone = {unit for unit in read.units if len(unit) == 1}
    assert alone == {bytes([byte]) for byte in range(256)}
    assert read.special_ids == set(tokens.prompt().suppressed)
    assert tokens.start in read.special_ids
    assert tokens.end not in read.special_ids


def test_what_a_published_network_writes_nothing_with_is_silent(published: Published) -> None:
    tokens = published.tokens
    outputs = len(tokens.ids)
    assert (tokens.start, tokens.end) == (1, 2)
    assert tokens.prompt().ids == (1,)
    letters = {tokens.described["model"]["vocab"][f"<0x{ord(letter):02X}>"] for letter in "A~!"}
    assert letters | {0, 1} | set(range(outputs - SILENT, outputs)) < set(tokens.prompt().suppressed)


def test_kept_tokens_are_merged_from_kept_ones(
    described: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "FEWEST", FEW)
    whole = described["model"]
    assert isinstance(whole, dict)
    parts = {left + right: (left, right) for left, right in whole["merges"]}
    for size in (FEW, 300, 320, TOKENS):
        cut = cut_tokens(described, SAID, size)
        kept = cut.described["model"]["vocab"]
        assert len(kept) <= size
        assert set(kept.values()) == set(range(len(kept)))
        assert (cut.end, cut.start) == (len(kept), len(kept) + 1)
        assert {cut.ids[index] for index in kept.values()} == {whole["vocab"][token] for token in kept}
        assert all(whole["vocab"][token] == cut.ids[index] for token, index in kept.items())
        assert [cut.ids[cut.end], cut.ids[cut.start]] == [2, 1]
        for token in kept:
            assert set(parts.get(token, ())) <= kept.keys(), token
        merged = {left + right for left, right in cut.described["model"]["merges"]}
        assert merged == kept.keys() & parts.keys(), "no token without its merge, and no merge without both"


def test_the_texts_choose_the_tokens(described: dict[str, object]) -> None:
    for text, word in (("evening", "\u2581evening"), ("weather", "\u2581weather")):
        assert word in cut_tokens(described, [(text, 1.0)], TOKENS).described["model"]["vocab"]
    without = cut_tokens(described, [("zzzz", 1.0)], TOKENS).described["model"]["vocab"]
    assert "\u2581evening" not in without
    capital = cut_tokens(described, [("good", 1.0)], TOKENS).encode("Good")
    assert len(capital) == 1, "a sentence begins with it"


@pytest.mark.parametrize("often", [5.0, 0.2])
def test_how_often_a_text_is_said_counts(
    described: dict[str, object], monkeypatch: pytest.MonkeyPatch, often: float
) -> None:
    """Room for one token more than there always are."""
    monkeypatch.setattr(vocabulary, "FEWEST", 1)
    always = cut_tokens(described, [], TOKENS).described["model"]["vocab"]
    model = described["model"]
    assert isinstance(model, dict)
    pairs = [left + right for left, right in model["merges"] if {left, right} < always.keys()]
    first, second = [pair for pair in pairs if pair.isalpha() and pair.islower()][:2]
    said = [(f"~{first}~", 1.0), (f"~{second}~", often)]
    found = cut_tokens(described, said, len(always) + 1).described["model"]["vocab"]
    assert found.keys() - always.keys() == {second if often > 1 else first}


def test_too_few_tokens_are_refused(described: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="499 tokens: expected 500 at least"):
        cut_tokens(described, SAID, 499)
    monkeypatch.setattr(vocabulary, "FEWEST", 1)
    always = len(cut_tokens(described, [], TOKENS).described["model"]["vocab"])
    with pytest.raises(ConfigError, match=f"{always - 1} tokens: expected {always} at least"):
        cut_tokens(described, SAID, always - 1)


def test_control_tokens_in_a_text_are_not_kept_as_words(described: dict[str, object]) -> None:
    """Lists of words for language models have them."""
    cut = cut_tokens(described, [("<unk> <s> </s> <<ST_0>>", 9.0)], TOKENS)
    assert not {*CONTROL, "<<ST_0>>"} & cut.described["model"]["vocab"].keys()
    assert cut.vocabulary().decode(cut.encode("<s> good")) == "<s> good", "in letters"


def test_words_in_other_pieces_are_told(described: dict[str, object], published: Published) -> None:
    whole = published.tokens.tokenizer()
    cut = cut_tokens(described, [("good evening", 1.0)], TOKENS)
    ours = cut.tokenizer()
    told = written_as_before(whole, ours, "good morning evening")
    pieces = [len(cut.encode(word)) for word in ("good", "morning", "evening")]
    assert pieces[0] == pieces[2] == 1
    assert pieces[1] > 1
    assert told == [True, *[False] * pieces[1], True]
    assert len(told) == len(cut.encode("good morning evening"))
    assert written_as_before(whole, ours, "") == []
    for text in ("good\nmorning evening", "good\u00a0evening good"):  # a network may write any byte
        assert len(written_as_before(whole, ours, text)) == len(cut.encode(text))
    assert all(written_as_before(whole, whole, "good morning evening"))


def test_tokens_are_read_as_they_were_written(described: dict[str, object], tmp_path: Path) -> None:
    cut = cut_tokens(described, SAID, TOKENS)
    cut.save(tmp_path / "tokens.json")
    again = Tokens.load(tmp_path / "tokens.json")
    assert again == cut
    assert again.vocabulary() == cut.vocabulary()
    assert again.encode("déjà vu") == cut.encode("déjà vu")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"ids": [1]}'])
def test_broken_tokens_are_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokens.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokens\.json: no tokens"):
        Tokens.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "no tokenizer"),
        ("not JSON", "no tokenizer"),
        ("[]", "no tokenizer"),
        ("{}", "no tokenizer"),
        ("byte_fallback", "not the tokenizer of a Moonshine, which has <s>, </s> and bytes"),
        ("start", "not the tokenizer of a Moonshine, which has <s>, </s> and bytes"),
    ],
)
def test_another_tokenizer_is_refused(
    described: dict[str, object], tmp_path: Path, change: str | None, said: str
) -> None:
    path, model = tmp_path / "tokenizer.json", described["model"]
    assert isinstance(model, dict)
    if change == "byte_fallback":
        model["byte_fallback"] = False
    if change == "start":
        del model["vocab"]["<s>"]
    if change is not None:
        path.write_text(json.dumps(described) if change in ("byte_fallback", "start") else change)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {said}"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    ("token", "written"),
    [("<0x41>", "A"), ("<0x20>", "\u2581"), ("\u2581a", "\u2581a"), ("é", "Ã©"), ("<0xC3>", "Ã")],
)
def test_a_token_in_bytes(token: str, written: str) -> None:
    assert in_bytes(token) == written
