"""The word error rate benchmark and the side-by-side benchmark, on random networks and synthetic sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.manifest import Source
from tests.training.networks import VOCABULARY, chirps, random_checkpoint, write_corpus
from training import bench_wer, benchmark, evaluate
from training.bundle_writer import Card, Graphs, write_bundle
from training.checkpoint import save_checkpoint
from training.export import export_graph


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder with the random bundle `en-random`, float32 only, and its checkpoint beside it."""
    checkpoint = random_checkpoint()
    save_checkpoint(tmp_path / "model.safetensors", checkpoint)
    graph = export_graph(checkpoint.model, checkpoint.frontend).SerializeToString()
    graphs = Graphs({"float32": graph}, "float32", 17, checkpoint.model.parameter_count(), 0.02, 20.0, 160)
    card = Card("random", ("en",), Source(title="tests", url=""), "Apache-2.0")
    write_bundle(tmp_path / "models", "en-random", graphs, VOCABULARY, card)
    return tmp_path / "models"


def last_json(output: str) -> dict[str, object]:
    values: dict[str, object] = json.loads(output.strip().splitlines()[-1])
    return values


def test_each_system_is_scored_on_each_set(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_corpus(tmp_path, chirps(6))
    arguments = ["--models-dir", str(models), "--models", "en-random", "absent", "--systems", "bundles"]
    assert bench_wer.main([*arguments, "--manifest", str(manifest), "--jobs", "1"]) == 0
    captured = capsys.readouterr()
    scores = last_json(captured.out)["scores"]
    assert isinstance(scores, list)
    assert [(entry["system"], entry["test_set"]) for entry in scores] == [
        ("en-random (float32)", "first"),
        ("en-random (float32)", "second"),
    ]
    assert all(entry["rates"]["utterances"] == 3 for entry in scores)
    assert "first (3) | second (3)" in captured.out
    assert f"absent: not in {models}" in captured.err


class Whisper(bench_wer.System):
    """Writes capitals and punctuation; the references of the test sets have neither."""

    def recogniser(self) -> evaluate.Recogniser:
        return lambda _: "It's one, Two."


def test_a_set_without_a_source_has_its_manifests_name(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_corpus(tmp_path, chirps(4))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    bare = [{name: value for name, value in row.items() if name != "source"} for row in rows[:2]]
    mixed = tmp_path / "mine.jsonl"
    mixed.write_text("\n".join(json.dumps(row) for row in [*bare, *rows[2:]]))
    arguments = ["--models-dir", str(models), "--models", "en-random", "--systems", "bundles", "--jobs", "1"]
    assert bench_wer.main([*arguments, "--manifest", str(mixed)]) == 0
    scores = last_json(capsys.readouterr().out)["scores"]
    assert isinstance(scores, list)
    assert {entry["test_set"]: entry["rates"]["utterances"] for entry in scores} == {
        "mine": 2,
        "first": 1,
        "second": 1,
    }


def test_capitals_and_punctuation_are_no_errors() -> None:
    clips = [(chirps(1)[0], "it's one two")]
    assert bench_wer.score(Whisper("whisper", taught=("nfc",)), "first", clips, jobs=1).rates.wer == 0


def test_a_missing_manifest_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_wer.main(["--manifest", str(tmp_path / "none.jsonl")]) == 2
    assert "no such manifest" in capsys.readouterr().err


def test_evaluation_of_what_is_not_there_is_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (next(models.iterdir()).name, "none"):
        assert evaluate.main([str(models), name, "--manifest", str(tmp_path / "none.jsonl")]) == 2
        assert capsys.readouterr().err.startswith("evaluate: ")


@pytest.mark.parametrize("beam", ["-1", "1025"])
def test_a_beam_out_of_range_is_refused(beam: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["models", "none", "--manifest", "none.jsonl", "--beam", beam])
    assert f"--beam: {beam}: expected 0 to 1024" in capsys.readouterr().err


def test_pocketsphinx_words_are_made_comparable() -> None:
    assert bench_wer.plain_words("a.(2) B. the(3) o.k. mister") == "a b the o.k mister"


def test_pocketsphinx_answers() -> None:
    pytest.importorskip("pocketsphinx")
    text = bench_wer.pocketsphinx_text(chirps(1)[0])
    assert text == bench_wer.plain_words(text)


def test_torch_and_onnx_stand_side_by_side(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_corpus(tmp_path, chirps(4))
    arguments = [str(tmp_path / "model.safetensors"), "--bundle", str(models / "en-random")]
    assert benchmark.main([*arguments, "--manifest", str(manifest), "--rounds", "1"]) == 0
    rows = last_json(capsys.readouterr().out)["rows"]
    assert isinstance(rows, list)
    assert [row["form"] for row in rows] == ["PyTorch float32", "ONNX float32"]
    assert rows[0]["rates"] == rows[1]["rates"], "the same network hears the same"
    assert all(row["latency_ms"] > 0 and row["size_bytes"] > 0 for row in rows)
