"""The back-off automaton against plain definitions: probabilities, files, and what it does to the search."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.beam import EXACT, MAX_BEAM, beam_search
from api.hotwords import build_hotwords, symbols_of
from api.ngram import NgramTable, load_table, weigh
from api.vocabulary import Vocabulary
from tests.api.test_beam import LETTERS, TINY, all_texts, log_softmax, spoken
from training.ngram import character_ngrams

TEXTS = ["the cat sat", "the cat ran", "a hat", "the hat sat on the cat"]


def symbols_in(text: str, vocabulary: Vocabulary) -> np.ndarray:
    ids = symbols_of(vocabulary).ids
    return np.array([ids[character] for character in text], np.int32)


def log_probability(table: NgramTable, text: str, vocabulary: Vocabulary = LETTERS) -> float:
    return weigh(table, vocabulary, 1.0, 0.0).score(symbols_in(text, vocabulary))


def kneser_ney(texts: list[str], order: int, text: str) -> float:
    """Straight from the definition, by counting in strings: no automaton, no back-off weights."""
    lines = [f" {line} " for line in texts]
    alphabet = sorted(set("".join(lines)))

    def counted(length: int) -> Counter[tuple[str, str]]:
        """(context, character): how often for the longest context, else after how many neighbours."""
        places = [
            (line[at - length - 1] if at > length else "start", line[at - length : at], line[at])
            for line in lines
            for at in range(max(1, length), len(line))
        ]
        whole = length == order - 1
        return Counter((context, last) for _, context, last in (places if whole else set(places)))

    counts = [counted(length) for length in range(order)]

    def discount(length: int, times: int) -> float:
        if times == 0:
            return 0.0
        times = min(times, 3)
        n = Counter(counts[length].values())
        share = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.5
        exact = times - (times + 1) * share * (n[times + 1] / n[times] if n[times] else 0.0)
        return min(max(exact, 0.05), 0.95 * times)

    def probability(context: str, character: str) -> float:
        below = probability(context[1:], character) if context else 1.0 / len(alphabet)
        after = {c: counts[len(context)][context, c] for c in alphabet}
        total = sum(after.values())
        if not total:
            return below
        left = sum(discount(len(context), times) for times in after.values())
        kept = after[character] - discount(len(context), after[character])
        return (kept + left * below) / total

    line = f" {text} "
    return sum(
        math.log(probability(line[max(0, at - order + 1) : at], line[at])) for at in range(1, len(line))
    )


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("text", ["the cat sat", "on a hat", "the ran", "tttt", "c"])
def test_scores_are_those_of_the_definition(order: int, text: str) -> None:
    table = character_ngrams(TEXTS, order, min_count=1)
    assert log_probability(table, text) == pytest.approx(kneser_ney(TEXTS, order, text), abs=1e-4)


def test_scores_do_not_depend_on_where_the_vocabulary_has_its_symbols() -> None:
    """A look-up finds 64 symbols in a word of bits; these are spread over three."""
    others = [chr(0x4E00 + index) for index in range(130)]
    spread = ["<blank>", "▁"]
    for letter, index in zip("acehnorst", itertools.count(0, 14), strict=False):
        spread += [*others[index : index + 14], letter]
    vocabulary = Vocabulary(tuple(spread), blank_id=0)
    assert symbols_of(vocabulary).count > 128
    table = character_ngrams(TEXTS, 5, min_count=1)
    for text in ["the cat sat", "on a hat", "tttt", "scorn"]:
        assert log_probability(table, text, vocabulary) == pytest.approx(
            log_probability(table, text), abs=1e-6
        )


def test_no_symbol_multiplies_by_more_than_its_state_reaches() -> None:
    table = character_ngrams(TEXTS, 4, min_count=1)
    weight, bonus = 0.8, 1.5
    reach = weigh(table, LETTERS, weight, bonus).reach
    edges = {(int(s), int(c)): i for i, (s, c) in enumerate(zip(table.edge_state, table.edge_symbol))}  # noqa: B905
    for state, symbol in itertools.product(range(len(table.fail)), range(len(table.symbols))):
        factor, at = 1.0, state
        while (at, symbol) not in edges:
            factor *= math.exp(weight * float(table.backoff[at]))
            at = int(table.fail[at])
        factor *= math.exp(weight * float(table.edge_log_prob[edges[at, symbol]]) + bonus)
        assert factor <= reach[state]
    assert reach.max() < math.exp(bonus), "a bound that bounds nothing"


@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_probabilities_after_every_context_sum_to_one(min_count: int) -> None:
    """Also where rare n-grams were dropped: the back-off weights make up for them."""
    table = character_ngrams(TEXTS, 5, min_count)
    alphabet = [chr(code) for code in table.symbols]
    contexts = {line[at:end] for line in TEXTS for at in range(len(line)) for end in range(at, at + 5)}
    for context in sorted(contexts):
        before = _path(table, context)
        total = sum(math.exp(_path(table, context + character) - before) for character in alphabet)
        assert total == pytest.approx(1.0, abs=1e-4), context


def _path(table: NgramTable, text: str) -> float:
    """Log-probability of a text's characters, without the space that ends it."""
    states = {(int(s), int(c)): i for i, (s, c) in enumerate(zip(table.edge_state, table.edge_symbol))}  # noqa: B905
    symbol_of = {int(code): index for index, code in enumerate(table.symbols)}
    state, total = int(table.edge_next[states[0, 0]]), 0.0
    for character in text:
        while (state, symbol_of[ord(character)]) not in states:
            total += float(table.backoff[state])
            state = int(table.fail[state])
        edge = states[state, symbol_of[ord(character)]]
        total += float(table.edge_log_prob[edge])
        state = int(table.edge_next[edge])
    return total


def test_what_is_likely_scores_more_than_what_is_not() -> None:
    table = character_ngrams(TEXTS, 5, 1)
    assert log_probability(table, "the cat") > log_probability(table, "teh cat")


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([(0.3, 0.0), (1.0, 1.5)]))
def test_the_search_adds_the_models_score_to_the_exact_probability(
    frames: int, seed: int, weights: tuple[float, float]
) -> None:
    log_probs = log_softmax(np.random.default_rng(seed).normal(0, 2.0, (frames, len(TINY))))
    model = weigh(character_ngrams(["ab ba", "a b"], 3, 1), TINY, *weights)
    found = beam_search(log_probs, 3, MAX_BEAM, n_best=MAX_BEAM, pruning=EXACT, guide=model)
    exact = all_texts(log_probs, 3)
    assert {tuple(entry.token_ids.tolist()) for entry in found} == exact.keys()
    for entry in found:
        tokens = tuple(entry.token_ids.tolist())
        text = "".join(TINY.tokens[token] for token in tokens).replace("▁", " ")
        expected = math.log(exact[tokens]) + model.score(symbols_in(text, TINY))
        assert entry.score == pytest.approx(expected, abs=1e-3)


def test_a_near_miss_becomes_a_word_and_clear_speech_stays() -> None:
    table = character_ngrams(TEXTS, 5, 1)
    guide = weigh(table, LETTERS, 0.6, 0.8)
    heard = spoken("the cet sat", alternatives={5: {"e": 0.6, "a": 0.38}})
    assert _text(heard, None) == "the cet sat"
    assert _text(heard, guide) == "the cat sat"
    assert _text(spoken("xyz"), guide) == "xyz"


def test_silence_stays_empty() -> None:
    silence = np.full((50, len(LETTERS)), math.log(0.1 / 28), np.float32)
    silence[:, 28] = math.log(0.9)
    guide = weigh(character_ngrams(TEXTS, 5, 1), LETTERS, 1.0, 3.0)
    assert _text(silence, guide) == ""


def test_hotwords_and_the_language_model_work_together() -> None:
    guide = weigh(character_ngrams(TEXTS, 5, 1), LETTERS, 0.3, 0.5)
    heard = spoken("the cet sat", alternatives={5: {"e": 0.5, "o": 0.3, "a": 0.18}})
    hotwords = build_hotwords(["cot"], LETTERS, 2.0)
    found = beam_search(heard, 28, 32, hotwords, guide=guide)[0]
    assert LETTERS.decode(found.token_ids.tolist()) == "the cot sat"


def _text(log_probs: np.ndarray, guide: object) -> str:
    found = beam_search(log_probs, 28, 32, guide=guide)[0]  # type: ignore[arg-type]
    return LETTERS.decode(found.token_ids.tolist())


def test_a_character_that_the_texts_never_had_can_still_be_said() -> None:
    table = character_ngrams(["aaa bbb"], 3, 1)
    assert math.isfinite(log_probability(table, "z"))
    assert log_probability(table, "z") < log_probability(table, "a")


def test_bytes_of_a_byte_level_vocabulary() -> None:
    vocabulary = Vocabulary(("▁", "a", "Ä", "±", "<blank>"), blank_id=4, kind="bpe")  # ı is C4 B1
    table = character_ngrams(["ı a".encode().decode("latin-1")], 3, 1)
    ids = symbols_of(vocabulary).ids
    model = weigh(table, vocabulary, 1.0, 0.0)
    likely, odd = ([ids[byte] for byte in text.encode()] for text in ("ı a", "a ı"))
    assert model.score(np.array(likely, np.int32)) > model.score(np.array(odd, np.int32))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    table = character_ngrams(TEXTS, 4, 1)
    table.save(tmp_path / "ngram.npz")
    back = load_table(tmp_path / "ngram.npz")
    assert log_probability(back, "the hat") == log_probability(table, "the hat")


def _broken(table: NgramTable, name: str) -> dict[str, np.ndarray]:
    values = {field: getattr(table, field).copy() for field in table.__dataclass_fields__}
    if name == "fail":
        values["fail"][1] = 1  # a circle: the search would never end
    elif name == "edge_next":
        values["edge_next"][0] = len(table.fail)
    elif name == "edge_symbol":
        values["edge_symbol"][0] = -1
    elif name == "edge_log_prob":
        values["edge_log_prob"][0] = np.nan
    elif name == "backoff":
        values["backoff"] = values["backoff"][:-1]
    elif name == "symbols":
        values["symbols"] = values["symbols"].astype(np.int64)
    elif name == "edge_state":
        values["edge_state"][values["edge_state"] == 0] = 1
    return values


@pytest.mark.parametrize(
    "name", ["fail", "edge_next", "edge_symbol", "edge_log_prob", "backoff", "symbols", "edge_state"]
)
def test_a_table_that_lies_is_refused_by_name(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "ngram.npz", **_broken(character_ngrams(TEXTS, 4, 1), name))
    with pytest.raises(ValueError, match=name):
        load_table(tmp_path / "ngram.npz")


@pytest.mark.parametrize(("name", "value"), [("fail", -1), ("edge_log_prob", 0.5), ("backoff", 101.0)])
def test_one_wrong_value_is_enough(name: str, value: float) -> None:
    table = character_ngrams(TEXTS, 4, 1)
    values = getattr(table, name).copy()
    values[1] = value
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(table, **{name: values})


def test_a_missing_array_and_a_foreign_file_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "ngram.npz", symbols=np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="backoff: missing"):
        load_table(tmp_path / "ngram.npz")
    (tmp_path / "text.npz").write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match=r"not an n-gram file|pickle"):
        load_table(tmp_path / "text.npz")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    np.savez(tmp_path / "ngram.npz", symbols=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"missing|pickle"):
        load_table(tmp_path / "ngram.npz")


@pytest.mark.parametrize(("weight", "bonus"), [(0.0, 0.0), (5.1, 0.0), (1.0, -0.1), (1.0, 11.0)])
def test_weights_out_of_range_are_refused(weight: float, bonus: float) -> None:
    with pytest.raises(ValueError, match=r"weight|bonus"):
        weigh(character_ngrams(TEXTS, 3, 1), LETTERS, weight, bonus)


def test_every_path_through_the_automaton_ends() -> None:
    """Any sequence of symbols, likely or not, has a finite score."""
    table = character_ngrams(TEXTS, 4, 2)
    for letters in itertools.product("tz a", repeat=4):
        assert math.isfinite(log_probability(table, "".join(letters)))
