"""The notebooks run from the first cell to the last, at tiny scale."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from training.data.manifest import Utterance, read_manifest
from training.recipes.rehearsal import tiny_wav2vec2, tiny_whisper

NOTEBOOKS = Path(__file__).resolve().parents[2] / "training" / "notebooks"

CONFIG = """
name: {language}-notebook
language: {language}
data: {{manifest: {manifest}, fractions: [0.6, 0.2, 0.2]}}
model: {{base: {base}}}
training: {{epochs: 1, max_batch_s: 30, workers: 0, threads: 1, device: cpu}}
benchmark: {{clip_s: 1, repeats: 1, max_wer_loss: 1}}
bundle: {{licence: Apache-2.0}}
"""


def run(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, manifest: Path, language: str, base: Path
) -> str:
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(language=language, manifest=manifest, base=base))
    monkeypatch.setenv("ASR_NOTEBOOK_CONFIG", str(config))
    monkeypatch.setenv("ASR_NOTEBOOK_RUN", str(folder / "run"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return str(notebook.cells[-1].outputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wav2vec2(corpus: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_wav2vec2(tmp_path / "base")
    shown = run("wav2vec2_turkish", tmp_path, monkeypatch, corpus("tr"), "tr", base)
    assert "held-out speakers" in shown
    assert (tmp_path / "run" / "bundle" / "tr-notebook" / "manifest.json").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whisper_experiment_leaves_everything(
    corpus: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_whisper(tmp_path / "base", "az")
    shown = run("whisper_azerbaijani", tmp_path, monkeypatch, corpus("az"), "az", base)
    assert "az-notebook" in shown
    out = tmp_path / "run"
    assert {path.name for path in (out / "charts").iterdir()} == {
        "durations.png",
        "text_lengths.png",
        "loss.png",
        "validation_wer.png",
        "results.png",
    }
    assert {path.name for path in (out / "artifacts").iterdir()} == {
        "environment.json",
        "config.json",
        "device.json",
        "validation.json",
        "split.json",
        "data_summary.json",
        "tokenizer.json",
        "model.json",
        "history.json",
        "history.csv",
        "results.json",
        "sample_predictions.csv",
    }
    report = (out / "outputs" / "report.md").read_text(encoding="utf-8")
    assert "| fine-tuned |" in report
    assert "int8" in report or "none passed the gate" in report
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(out / "outputs" / "model")
    assert model.config.vocab_size == model.proj_out.weight.shape[0]
    assert (out / "outputs" / "model" / "README.md").is_file()


def test_a_sample_is_not_taken_for_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(language="az", manifest="manifest.jsonl", base="base"))
    monkeypatch.setattr(
        "training.data.importers.from_hugging_face",
        lambda *_, limit, **__: [Utterance(tmp_path / "a.wav", "bir")] * (limit or 500),
    )
    cells = nbformat.read(NOTEBOOKS / "whisper_azerbaijani.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if "from_hugging_face" in cell.source)
    for mode, count in (("sample", 200), ("full", 500)):
        names = {"MODE": mode, "config": config}
        exec(source, names)
        assert len(read_manifest(names["manifest"])) == count


@pytest.mark.parametrize("name", ["wav2vec2_turkish", "whisper_azerbaijani"])
def test_the_example_is_not_taken_for_another_language(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And three manifests, split already, need no import."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("imported")

    monkeypatch.setattr("training.data.importers.from_hugging_face", refused)
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    (source,) = (cell.source for cell in cells if "from_hugging_face" in cell.source)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(language="ru", manifest="manifest.jsonl", base="base"))
    with pytest.raises(SystemExit, match=r"manifest.*\.jsonl: no such manifest.* import ru first"):
        exec(source, {"MODE": "sample", "config": config})
    split = "{train: a.jsonl, validation: b.jsonl, test: c.jsonl}"
    given = CONFIG.replace("{{manifest: {manifest}, fractions: [0.6, 0.2, 0.2]}}", "{split}")
    config.write_text(given.format(language="tr", split=split, base="base"))
    names = {"MODE": "sample", "config": config}
    exec(source, names)
    assert names["manifest"] is None


@pytest.mark.parametrize("name", ["wav2vec2_turkish", "whisper_azerbaijani"])
def test_the_first_cell_runs_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Colab: git refuses to clone into a folder that is there."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    called: list[str] = []

    def done(command: list[str], check: bool) -> None:
        called.append("clone" if "clone" in command else "install")
        (tmp_path / "asr").mkdir(exist_ok=True)
        (tmp_path / "asr" / "pyproject.toml").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASR_REPOSITORY", "https://example.org/asr")
    monkeypatch.setattr("subprocess.run", done)
    monkeypatch.setattr("sys.path", list(sys.path))
    for _ in range(2):
        names: dict[str, object] = {}
        exec(first, names)
        assert names["root"] == tmp_path / "asr"
    assert called == ["clone", "install", "install"]


def test_notebooks_are_kept_without_outputs() -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None), path.name
            assert "def " not in cell.source, "code belongs into training/, not into a notebook"
