"""Language models: texts in a model's spelling, weights chosen on validation, and a gate that refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from api.bundle import verify_bundle
from api.decoding import in_words
from api.vocabulary import Vocabulary
from tests.api.test_beam import LETTERS, spoken
from tests.tiny_bundle import make_bundle, sing, wav
from training import ngram
from training.errors import DataError
from training.kneser_ney import character_ngrams
from training.ngram import Fit, Trial, fit, read_texts
from training.text import alphabet, normaliser, plain_normaliser
from training.vocabulary import CharacterCodec

STEPS = ("nfc", "lowercase")


def test_texts_come_in_the_models_spelling_and_without_what_is_measured(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The Cat, sat\n\nHELD OUT!\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"audio_filepath": "1.wav", "text": "A  hat 7"}\n{"audio_filepath": "2.wav", "text": ""}\n',
        encoding="utf-8",
    )
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert read_texts(paths, LETTERS, STEPS, "en", without=["held out"]) == ["the cat sat", "a hat"]


CASED = Vocabulary(
    ("\u2581", "\u2581th", "e", "C", "a", "t", "T", ",", ".", "'", "<blank>"), blank_id=10, kind="wordpiece"
)
CAPITALS = Vocabulary(("\u2581", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'", "<blank>"), blank_id=28)


@pytest.mark.parametrize(
    ("vocabulary", "steps", "expected"),
    [
        (CASED, ("nfc",), "The Cat, the 'Cat'."),
        (LETTERS, ("nfc",), "the cat the 'cat'"),
        (CAPITALS, STEPS, "THE CAT THE 'CAT'"),
    ],
)
def test_texts_keep_the_capitals_that_a_vocabulary_has_and_lose_no_letter(
    tmp_path: Path, vocabulary: Vocabulary, steps: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "a.txt").write_text("The Cat, the ‘Cat’.", encoding="utf-8")
    assert read_texts([tmp_path / "a.txt"], vocabulary, steps, "en", without=[]) == [expected]


@pytest.mark.parametrize(
    ("language", "yo", "text", "expected"),
    [
        ("tr", True, "İstanbul’da Ali, IŞIK ile", "istanbul'da ali ışık ile"),
        ("az", True, "‘QARABAĞ’", "qarabağ"),
        ("ru", False, "Ещё ёлка: за́мок", "еще елка замок"),
        ("vi", True, "XIN CHÀO!", "xin chào"),
    ],
)
def test_texts_take_every_step_of_a_recipe(
    tmp_path: Path, language: str, yo: bool, text: str, expected: str
) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    letters = alphabet(language).replace("" if yo else "ё", "")
    steps = normaliser(language, yo=yo).steps
    found = read_texts([tmp_path / "a.txt"], CharacterCodec(letters).vocabulary, steps, language, without=[])
    assert found == [expected]


def test_what_is_measured_is_left_out_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Xin chào, các bạn!\nTạm biệt.\n", encoding="utf-8")
    vocabulary = Vocabulary(("\u2581", "a", "\u00c4", "<blank>"), blank_id=3, kind="bpe")
    found = read_texts([tmp_path / "a.txt"], vocabulary, ("nfc",), "vi", without=["xin chào các bạn"])
    assert [text.encode("latin-1").decode() for text in found] == ["Tạm biệt."]


def test_a_nemo_manifest_gives_its_texts_only(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"audio_filepath": "a.wav", "text": "The cat", "duration": 2}\n')
    assert read_texts([tmp_path / "train.json"], LETTERS, STEPS, "en", without=[]) == ["the cat"]


def test_texts_in_another_encoding_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("кот".encode("cp1251"))
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8"):
        read_texts([tmp_path / "a.txt"], LETTERS, STEPS, "ru", without=[])


def test_a_byte_level_vocabulary_reads_bytes(tmp_path: Path) -> None:
    vocabulary = Vocabulary(("\u2581", "a", "\u00c4", "<blank>"), blank_id=3, kind="bpe")
    (tmp_path / "a.txt").write_text("ı a\n", encoding="utf-8")
    (text,) = read_texts([tmp_path / "a.txt"], vocabulary, STEPS, "tr", without=[])
    assert text.encode("latin-1").decode() == "ı a"


def test_a_missing_file_of_texts_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.txt: no such file of texts"):
        read_texts([tmp_path / "none.txt"], LETTERS, STEPS, "en", without=[])


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_nothing_to_learn_from_is_said(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to learn from"):
        character_ngrams(texts)


def test_rare_n_grams_are_dropped() -> None:
    texts = ["the cat sat"] * 3 + ["quite another text"]
    assert len(character_ngrams(texts, 6, 2).edge_state) < len(character_ngrams(texts, 6, 1).edge_state)


def heard(near_miss: str, at: int, meant: str) -> np.ndarray:
    return spoken(near_miss, alternatives={at: {near_miss[at]: 0.6, meant: 0.38}})


def test_a_language_model_that_helps_is_kept_with_its_best_weights() -> None:
    log_probs = [heard("the cet sat", 5, "a"), heard("a het", 3, "a"), spoken("the cat")]
    references = ["the cat sat", "a hat", "the cat"]
    table = character_ngrams(["the cat ran", "the hat sat", "a cat", "the cat"], 5, 1)
    found = fit(table, LETTERS, log_probs, references, beam=8)
    assert found.greedy_wer == pytest.approx(2 / 7)
    assert found.best.wer == 0.0
    assert found.best.weight > 0
    assert found.earns_its_place
    assert "| beam 8, language model |" in found.markdown()


def test_a_language_model_that_does_not_help_is_left_out() -> None:
    log_probs = [spoken("the cat sat"), spoken("a hat")]
    found = fit(character_ngrams(["zzz"], 3, 1), LETTERS, log_probs, ["the cat sat", "a hat"], beam=8)
    assert not found.earns_its_place


def test_capitals_and_punctuation_are_no_errors_and_no_language_model_may_take_them_away() -> None:
    """A model that writes them, and texts without: they would teach it to write small letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ("\u2581", *letters, "'", "<blank>", ".", *letters.upper())
    vocabulary = Vocabulary(tokens, blank_id=28)

    def said(text: str, **doubts: float) -> np.ndarray:
        """(frames, vocabulary): each character, with the other case nearly as probable where doubted."""
        probabilities = np.full((2 * len(text), len(tokens)), 1e-6)
        probabilities[1::2, 28] = 1.0
        for at, character in enumerate(text.replace(" ", "\u2581")):
            other = doubts.get(character, 0.0)
            probabilities[2 * at, tokens.index(character)] = 1.0 - other
            if other:
                probabilities[2 * at, tokens.index(character.swapcase())] = other
        return np.log(probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32)

    plain = plain_normaliser("en", ("nfc",))
    texts = ["the cat sat", "the cat ran", "a cat"]
    log_probs = [said("The cat.", T=0.3), said("A cat sat.", A=0.3)]
    references = ["the cat", "a cat sat"]
    found = fit(character_ngrams(texts, 3, 1), vocabulary, log_probs, references, beam=8, plain=plain)
    assert found.greedy_wer == 0.0
    assert min(trial.written for trial in found.trials) < 1.0, "the texts do teach small letters"
    assert found.best.written == 1.0
    worse = Trial(8, 0.5, 0.5, 0.1, written=0.2)
    assert not Fit(found.table, 0.2, (Trial(8, 0.0, 0.0, 0.2), worse)).earns_its_place


def test_a_gain_too_small_does_not_earn_its_place() -> None:
    table = character_ngrams(["a b"], 2, 1)
    trials = (Trial(8, 0.0, 0.0, 0.20), Trial(8, 0.5, 0.5, 0.196))
    assert not Fit(table, 0.2, trials).earns_its_place
    assert Fit(table, 0.2, (*trials, Trial(8, 0.5, 1.0, 0.19))).earns_its_place


def test_the_command_writes_what_earns_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tones at once, the wrong one a little louder: only the texts tell which was meant."""
    path = make_bundle(tmp_path / "models")
    audio = sing("bac", amplitude=0.3) + sing("bad", amplitude=0.29)
    (tmp_path / "1.wav").write_bytes(wav(audio))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"audio_filepath": "1.wav", "text": "bad", "duration": 1}\n', encoding="utf-8")
    (tmp_path / "texts.txt").write_text("bad dad\na bad head\nbad bed\n", encoding="utf-8")
    arguments = [
        str(tmp_path / "models"),
        "tiny",
        "--validation",
        str(manifest),
        "--beam",
        "4",
        "--order",
        "3",
    ]
    arguments += ["--texts", str(tmp_path / "texts.txt")]
    assert ngram.main(arguments) == 0
    assert verify_bundle(tmp_path / "models", "tiny").guide is None
    assert ngram.main([*arguments, "--write"]) == 0
    assert ngram.main([*arguments, "--write"]) == 0
    bundle = verify_bundle(tmp_path / "models", "tiny")
    assert in_words(bundle, bundle.default_beam) == "beam 4 with language model"
    card = (path / "README.md").read_text(encoding="utf-8")
    assert card.count("| greedy |  |  | 100.00% |") == 1
    assert '"wer": 0.0' in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--limit", "--order", "--beam"])
def test_nothing_of_something_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["models", "tiny", "--texts", "a.txt", "--validation", "b.jsonl"]
    with pytest.raises(SystemExit) as caught:
        ngram.main([*given, option, "0"])
    assert caught.value.code == 2
    assert f"{option}: 0: expected 1 or more" in capsys.readouterr().err


def test_the_shortest_language_model_counts_letters() -> None:
    assert len(character_ngrams(["ab ba"], order=1).fail) == 1


def test_the_command_measures_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_bundle(tmp_path / "models")
    (tmp_path / "1.wav").write_bytes(wav(sing("bad")))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"audio_filepath": "1.wav", "text": "bad", "duration": 1}\n', encoding="utf-8")
    (tmp_path / "texts.txt").write_text("bad\na bed\n", encoding="utf-8")
    arguments = [str(tmp_path / "models"), "tiny", "--validation", str(manifest), "--beam", "4", "--texts"]
    assert ngram.main([*arguments, str(tmp_path / "texts.txt")]) == 0
    assert "| greedy |  |  | 0.00% |" in capsys.readouterr().out
    assert ngram.main([*arguments, str(tmp_path / "none.txt")]) == 2
    assert "no such file of texts" in capsys.readouterr().err
    assert verify_bundle(tmp_path / "models", "tiny").guide is None
