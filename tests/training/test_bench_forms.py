"""Every form of a trained run in one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training.bench_forms import main
from training.evaluate import Utterance, wer_difference
from training.recipes.whisper_ctc.recipe import WhisperCtcRecipe
from training.stages.command import main as recipe

CONFIG = """
name: ru-forms
language: ru
data: {{manifest: {manifest}, fractions: [0.6, 0.2, 0.2]}}
model: {{shape: {{width: 32, layers: 1, heads: 2, inner: 64}}}}
benchmark: {{clip_s: 1, repeats: 1}}
bundle: {{licence: MIT}}
"""


def test_one_row_per_form_and_variant(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(manifest=corpus("ru")))
    where = ["--config", str(config), "--run", str(tmp_path / "run")]
    assert recipe(WhisperCtcRecipe, ["convert", *where]) == 0
    variants = ["--variant", 'model.length="true"', "--variant", "model.length=fixed30"]
    assert main(["whisper_ctc", *where, *variants]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [row["form"].partition(": ")[0] for row in rows] == ['model.length="true"'] * 5 + [
        "model.length=fixed30"
    ] * 5
    first, same, padded = rows[0], rows[1], rows[6]
    assert first["difference"] == {"wer": 0, "low": 0, "high": 0}
    assert (same["other_texts"], same["rates"]) == (0, first["rates"]), "ONNX hears what PyTorch hears"
    assert padded["latency_ms"] > 2 * same["latency_ms"], "30 s of frames cost more than one"
    assert not list(tmp_path.glob("run/export/*")), "the run is only read"


def test_needs_a_training(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(manifest=corpus("ru")))
    assert main(["whisper_ctc", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert "run the train stage first" in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "a mistyped folder is not made"


def test_difference_is_paired() -> None:
    """Hard utterances are hard for both: the interval of the difference does not see them."""
    easy, hard = Utterance("a b c d", "a b c d"), Utterance("a b c d", "x y z w")
    first = [easy, hard] * 50
    assert wer_difference(first, first).low == wer_difference(first, first).high == 0.0
    worse = [Utterance("a b c d", "a b c x"), hard] * 50
    found = wer_difference(first, worse)
    assert found.wer == pytest.approx(1 / 8)
    assert 0.09 < found.low < 1 / 8 < found.high < 0.16
    assert wer_difference(worse, first).wer == pytest.approx(-1 / 8)


def test_difference_needs_the_same_utterances() -> None:
    with pytest.raises(ValueError, match="same references"):
        wer_difference([Utterance("a", "a")], [Utterance("b", "a")])
    with pytest.raises(ValueError, match="at least one reference word"):
        wer_difference([Utterance("", "a")], [Utterance("", "a")])
