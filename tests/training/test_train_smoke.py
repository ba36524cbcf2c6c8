"""`make train-smoke`: each recipe from raw recordings to a bundle that a live API serves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api.vocabulary import Vocabulary
from loadtest.processes import api_server
from tests.training.conformers import FAST, archive_of, random_conformer
from training.data.manifest import read_manifest
from training.inference import LogProbs, cpu_session, run_graph
from training.loop.run_folder import FLOAT32, INT8
from training.recipes.conformer_ctc.recipe import ConformerRecipe
from training.recipes.quartznet_ctc.recipe import QuartzNetRecipe
from training.recipes.rehearsal import tiny_wav2vec2, tiny_whisper
from training.recipes.wav2vec2_ctc.recipe import Wav2Vec2Recipe
from training.recipes.whisper_ctc.recipe import WhisperCtcRecipe
from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe
from training.stages.command import main
from training.stages.export import load_part
from training.stages.recipe import Recipe

COMMON = """
data: {{manifest: {manifest}, fractions: [0.6, 0.2, 0.2]}}
training: {{epochs: 2, learning_rate: 0.002, max_batch_s: 30, workers: 0, early_stopping: 0, device: cpu}}
benchmark: {{clip_s: 1, repeats: 2, max_wer_loss: 0.2}}
bundle: {{licence: Apache-2.0, data_name: synthetic rehearsal, data_licence: CC0-1.0}}
"""

RECIPES: dict[str, tuple[type[Recipe], str, str]] = {
    "quartznet_ctc": (
        QuartzNetRecipe,
        "ru",
        "{options: {groups: [[48, 11], [48, 13]], blocks_per_group: 1, repeat: 2, stem: [48, 11],"
        " tail: [64, 15], last_filters: 96}}",
    ),
    "whisper_ctc": (WhisperCtcRecipe, "vi", "{{base: {base}, length: 'true'}}"),
    "wav2vec2_ctc": (Wav2Vec2Recipe, "tr", "{{base: {base}}}"),
    "conformer_ctc": (
        ConformerRecipe,
        "az",
        "{{transfer_from: {base}, shape: {{width: 32, layers: 2, heads: 4, inner: 128,"
        " subsampling_channels: 16, upsample: 4}}}}",
    ),
    "whisper_seq2seq": (WhisperSeq2SeqRecipe, "az", "{{base: {base}, length: 'true'}}"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bundles of all recipes end up."""
    return tmp_path_factory.mktemp("models")


def write_config(recipe: str, folder: Path, manifest: Path) -> Path:
    _, language, model = RECIPES[recipe]
    base = folder / "base"
    if recipe.startswith("whisper"):
        tiny_whisper(base, language)
    elif recipe == "wav2vec2_ctc":
        tiny_wav2vec2(base)
    elif recipe == "conformer_ctc":
        archive_of(base, random_conformer(FAST))
    lines = [
        f"name: {recipe}-tiny",
        f"language: {language}",
        f"model: {model.format(base=base) if '{{' in model else model}",
    ]
    path = folder / "config.yaml"
    path.write_text("\n".join(lines) + COMMON.format(manifest=manifest))
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_recordings_become_a_bundle(
    recipe: str, corpus: Callable[[str], Path], models: Path, tmp_path: Path
) -> None:
    recipe_type, language, _ = RECIPES[recipe]
    config, run = write_config(recipe, tmp_path, corpus(language)), tmp_path / "run"
    assert main(recipe_type, ["all", "--config", str(config), "--run", str(run)]) == 0
    assert {
        "config.json",
        "environment.json",
        "metrics.csv",
        "export.json",
        "quantize.json",
        "benchmark.json",
    } <= {path.name for path in run.iterdir()}
    tried = json.loads((run / "quantize.json").read_text())
    assert len(tried["candidates"]) >= 2
    assert (run / INT8).is_file() == (tried["chosen"] is not None)
    table = json.loads((run / "benchmark.json").read_text())["rows"]
    assert [row["graph"] for row in table][:2] == ["pytorch", "onnx"]
    assert table[0]["wer"] == table[1]["wer"], "torch and ONNX write the same texts"
    bundle = run / "bundle" / f"{recipe}-tiny"
    bundle.rename(models / bundle.name)
    (models / f"{recipe}.run").symlink_to(run)


@pytest.fixture(scope="module")
def service(models: Path) -> Iterator[str]:
    """A real `asr serve` over every bundle that was made."""
    names = sorted(path.name for path in models.iterdir() if (path / "manifest.json").is_file())
    if not names:
        pytest.skip("no bundle was made: run the whole file")
    settings = {
        "graph": "float32",
        "workers": 1,
        "calibrate": "false",
        "noise_confidence": 0,  # two epochs make nobody confident
    }
    with api_server(",".join(names), models, **settings) as running:
        yield running.url


def plain_text(log_probs: LogProbs, vocabulary: Vocabulary) -> str:
    """CTC's best path (Graves et al. 2006): repeats merged, then blanks removed."""
    runs = [token for token, _ in itertools.groupby(log_probs.argmax(axis=1).tolist())]
    return vocabulary.decode(token for token in runs if token != vocabulary.blank_id)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_live_api_serves_it(recipe: str, models: Path, service: str) -> None:
    """What the service answers is what the graph says, decoded in plain Python, on every test recording."""
    recipe_type, language, _ = RECIPES[recipe]
    run = models / f"{recipe}.run"
    rows = read_manifest(run / "data" / "test.jsonl")
    made = _recipe(recipe_type, run)
    session, vocabulary = cpu_session(run / FLOAT32), made.codec().vocabulary
    clips = [clip for clip, _ in load_part(rows, 16_000)]
    expected = [plain_text(run_graph(session, [clip])[0], vocabulary) for clip in clips]
    answers = []
    for row in rows:
        form = {"model": f"{recipe}-tiny", "language": language}
        answer = httpx.post(
            f"{service}/transcribe", data=form, files={"file": row.audio.read_bytes()}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        answers.append(answer.json()["text"])
    assert answers == expected
    blanks_only = ("wav2vec2_ctc", "conformer_ctc")  # after two epochs
    assert any(expected) or recipe in blanks_only


def _recipe(recipe_type: type[Recipe], run: Path) -> Recipe:
    from training.config import RunConfig, check

    values = json.loads((run / "config.json").read_text())
    values.pop("recipe")
    return recipe_type(check(RunConfig, values, "config.json"))
