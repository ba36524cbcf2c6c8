"""Configurations, stages and the transfer of an encoder to another alphabet; bad data ends with a message."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from api.bundle import load_bundle
from training.config import load_config
from training.data.manifest import Utterance, read_manifest, spread, write_manifest
from training.errors import CheckpointError, ConfigError, DiskFullError, QualityGateError
from training.evaluate import greedy_text
from training.inference import compare, cpu_session, run_graph
from training.loop.dataset import UtteranceDataset, collate
from training.loop.run_folder import RunFolder, read_metrics
from training.recipes.conformer_ctc.recipe import ConformerRecipe
from training.recipes.quartznet_ctc.architectures import citrinet
from training.recipes.quartznet_ctc.model import QuartzNet
from training.recipes.quartznet_ctc.network import QuartzNetCtc, transferred
from training.recipes.quartznet_ctc.recipe import QuartzNetRecipe
from training.recipes.wav2vec2_ctc.recipe import Wav2Vec2Recipe
from training.recipes.whisper_ctc.recipe import WhisperCtcRecipe
from training.recipes.whisper_seq2seq.model import Prompt
from training.recipes.whisper_seq2seq.recipe import IGNORED, WhisperSeq2SeqRecipe, teacher_tokens
from training.stages.benchmark import benchmark
from training.stages.command import convert, main
from training.stages.export import export, load_part
from training.stages.prepare import prepare
from training.stages.publish import publish
from training.stages.quantize import Candidate, choose, quantize
from training.stages.train import fits_one_file
from training.text import alphabet, normaliser
from training.vocabulary import CharacterCodec

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "quartznet_ctc": QuartzNetRecipe,
    "whisper_ctc": WhisperCtcRecipe,
    "wav2vec2_ctc": Wav2Vec2Recipe,
    "whisper_seq2seq": WhisperSeq2SeqRecipe,
    "conformer_ctc": ConformerRecipe,
}

TINY = """
name: tiny
language: ru
data: {manifest: MANIFEST, fractions: [0.6, 0.2, 0.2]}
model:
  options: {groups: [[32, 5]], blocks_per_group: 1, repeat: 1, stem: [32, 5], tail: [32, 5], last_filters: 32}
training: {epochs: 1, max_batch_s: 20, workers: 0, device: cpu}
bundle: {licence: Apache-2.0}
"""


def tiny_config(folder: Path, manifest: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(TINY.replace("MANIFEST", str(manifest)))
    return path


def run(config: Path, folder: Path, stage: str, *changes: str) -> int:
    arguments = [stage, "--config", str(config), "--run", str(folder)]
    for change in changes:
        arguments += ["--set", change]
    return main(QuartzNetRecipe, arguments)


# --- configurations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("training/recipes/*/configs/*.yaml")), ids=lambda path: path.stem
)
def test_the_command_in_a_configuration_writes_its_manifest(path: Path) -> None:
    """Paths in the file are relative to it, those of the command to the project."""
    head = "".join(line[1:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    for written in re.findall(r"--out (\S+)", head):
        assert ROOT / written == load_config(path).data.manifest


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("training/recipes/*/configs/*.yaml")), ids=lambda path: path.stem
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    recipe = RECIPES[path.parent.parent.name](config)
    assert recipe.facts().frame_stride_s <= 0.04
    assert config.language == path.stem or path.stem == "tiny"


def test_defaults_of_the_published_recipes() -> None:
    whisper = load_config(ROOT / "training/recipes/whisper_ctc/configs/vi.yaml").training
    assert (whisper.epochs, whisper.learning_rate, whisper.weight_decay, whisper.max_items) == (
        64,
        1e-4,
        0.1,
        24,
    )
    wav2vec2 = load_config(ROOT / "training/recipes/wav2vec2_ctc/configs/tr.yaml").training
    assert (wav2vec2.epochs, wav2vec2.learning_rate, wav2vec2.max_items, wav2vec2.accumulation) == (
        5,
        3e-4,
        4,
        4,
    )
    assert load_config(ROOT / "training/recipes/whisper_seq2seq/configs/az.yaml").data.fractions == (
        0.8,
        0.1,
        0.1,
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [", "not YAML"),
        ("- 1", "expected sections"),
        ("name: a b", "name: String should match"),
        (TINY + "extra: 1\n", "extra: Extra inputs"),
        *(
            (TINY + f"augment: {{{section}: {{{field}}}}}\n", rf"augment\.{section}\.{problem}")
            for section, field, problem in (
                ("waveform", "speeds: [0]", r"speeds\.0: .* greater than or equal to 0\.25, not 0"),
                ("waveform", "speeds: [1, -1]", r"speeds\.1: .* 0\.25, not -1"),
                ("waveform", "noise_probability: 50", "noise_probability: .* equal to 1, not 50"),
                ("waveform", "reverberation_probability: .nan", "reverberation_probability"),
                ("waveform", "reverberation_s: [0, 0]", r"reverberation_s\.0: .* greater than 0, not 0"),
                ("waveform", "noise_snr_db: [25, 5]", r"noise_snr_db: .*\[25\.0, 5\.0\]"),
                ("features", "time_share: 5", "time_share: .* less than or equal to 1, not 5"),
                ("features", "time_masks: -2", "time_masks: .* greater than or equal to 0, not -2"),
                ("features", "frequency_masks: -2", "frequency_masks: .* or equal to 0, not -2"),
                ("features", "frequency_width: -1", "frequency_width: .* or equal to 0, not -1"),
            )
        ),
        (TINY.replace("epochs: 1", "epochs: 0"), r"training\.epochs"),
        (TINY.replace("manifest: MANIFEST", "train: a"), "give either `manifest`, or all of"),
    ],
)
def test_bad_configuration_names_the_field(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config(path)


def test_a_configuration_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("name: имя\n".encode("cp1251"))
    with pytest.raises(ConfigError, match=r"config\.yaml: not UTF-8"):
        load_config(path)


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    path = tiny_config(tmp_path, Path("manifest.jsonl"))
    config = load_config(path, ["training.epochs=7", "data.limit=3", "name=other"])
    assert (config.training.epochs, config.data.limit, config.name) == (7, 3, "other")
    assert config.data.manifest == tmp_path / "manifest.jsonl"
    for change in ("training.epochs", "name.first=1", "name=["):
        with pytest.raises(ConfigError, match="--set"):
            load_config(path, [change])


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tiny_config(tmp_path, Path("manifest.jsonl"))
    (tmp_path / "base").mkdir()
    changes = ["model={base: base}", "augment={waveform: {noise_folder: noise}}"]
    config = load_config(path, changes)
    assert config.augment is not None
    assert config.augment.waveform is not None
    assert config.augment.waveform.noise_folder == tmp_path / "noise"
    assert config.model["base"] == str(tmp_path / "base")
    assert load_config(path, ["model={base: openai/whisper-small}"]).model["base"] == "openai/whisper-small"


def test_what_no_file_can_hold_is_refused_before_training() -> None:
    with torch.device("meta"):
        large, small = torch.nn.Linear(24_000, 24_000), torch.nn.Linear(20_000, 20_000)
    fits_one_file(small)
    with pytest.raises(ConfigError, match=r"2\.3 GB of weights.*choose a smaller base"):
        fits_one_file(large)


def test_a_language_may_have_three_letters_only(tmp_path: Path) -> None:
    """Of some 7,000 languages 184 have a code of two, and those few are served already."""
    path = tiny_config(tmp_path, Path("manifest.jsonl"))
    assert load_config(path, ["language=crh"]).language == "crh"
    with pytest.raises(ConfigError, match="language: String should match pattern"):
        load_config(path, ["language=english"])
    with pytest.raises(ConfigError, match=r"language: .*a bare no for false"):
        load_config(path, ["language=no"])
    assert load_config(path, ['language="no"']).language == "no"


def test_a_language_without_an_alphabet_needs_letters(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_config(tmp_path, corpus("ru"))
    assert run(path, tmp_path / "none", "prepare", "language=kk") == 2
    assert "list the letters of the language there" in capsys.readouterr().err
    assert run(path, tmp_path / "twice", "prepare", "language=kk", "letters=аа") == 2
    assert "each letter once" in capsys.readouterr().err
    letters = f"letters={alphabet('ru')}"
    assert run(path, tmp_path / "run", "prepare", "language=kk", letters) == 0


def test_letters_with_an_apostrophe_keep_it_in_words(tmp_path: Path) -> None:
    path = tiny_config(tmp_path, Path("manifest.jsonl"))
    recipe = QuartzNetRecipe(load_config(path, ["language=uk", 'letters="абвгпятьї\'"']))
    assert recipe.normaliser()("П’ять!") == "п'ять"


def test_measures_on_rows_from_everywhere() -> None:
    rows = [Utterance(Path(f"{index}.wav"), "a", speaker=f"s{index // 100}") for index in range(1000)]
    assert len({row.speaker for row in spread(rows, 200)}) == 10
    assert spread(rows[:3], 200) == rows[:3]
    assert spread([], 200) == []


def test_unknown_options_of_a_network(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_config(tmp_path, corpus("ru"))
    assert run(path, tmp_path / "run", "prepare", "model.options.colour=red") == 2
    assert "model.options" in capsys.readouterr().err


# --- bad data ----------------------------------------------------------------------------------------


def test_bad_data_ends_with_a_message(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_manifest(corpus("ru"))
    (tmp_path / "empty.jsonl").write_text("")
    one = write_manifest(tmp_path / "one.jsonl", rows[:1])
    gone = [row.__class__(tmp_path / f"{index}.wav", row.text) for index, row in enumerate(rows)]
    missing = write_manifest(tmp_path / "missing.jsonl", gone)
    turkish = corpus("tr")
    problems = {
        tmp_path / "none.jsonl": "no such manifest",
        tmp_path / "empty.jsonl": "the manifest is empty",
        one: "at least 3 speakers, the data has 1 (1 utterances)",
        missing: "24 missing_file",
        turkish: "characters outside the vocabulary",
    }
    for number, (manifest, problem) in enumerate(problems.items()):
        assert run(tiny_config(tmp_path, manifest), tmp_path / f"run{number}", "prepare") == 2
        message = capsys.readouterr().err
        assert message.count("error: ") == 1
        assert problem in message
        assert "Traceback" not in message


def test_mended_data_goes_on_in_the_same_run(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", read_manifest(corpus("ru"))[:1])
    config = tiny_config(tmp_path, manifest)
    assert run(config, tmp_path / "run", "prepare") == 2
    write_manifest(manifest, read_manifest(corpus("ru")))
    assert run(config, tmp_path / "run", "prepare") == 0


def test_a_sample_has_the_speakers_of_the_whole_manifest(
    corpus: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = sorted(read_manifest(corpus("ru")), key=lambda row: row.speaker)
    config = tiny_config(tmp_path, write_manifest(tmp_path / "manifest.jsonl", rows))
    parts = prepare(QuartzNetRecipe(load_config(config, ["data.limit=8"])), RunFolder(tmp_path / "run"))
    sampled = [row for part in parts.values() for row in part]
    assert len(sampled) == 8
    assert len({row.speaker for row in sampled}) == 6


def test_a_corrected_manifest_is_prepared_again_until_something_was_learned(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_manifest(corpus("ru"))
    manifest = write_manifest(tmp_path / "manifest.jsonl", rows)
    config, folder = tiny_config(tmp_path, manifest), tmp_path / "run"

    def texts() -> set[str]:
        return {row.text for part in (folder / "data").glob("*.jsonl") for row in read_manifest(part)}

    assert run(config, folder, "prepare") == 0
    write_manifest(manifest, [replace(row, text="исправлено") for row in rows])
    assert run(config, folder, "prepare") == 0
    assert texts() == {"исправлено"}
    assert run(config, folder, "convert") == 0
    capsys.readouterr()
    write_manifest(manifest, [replace(row, text="снова") for row in rows])
    assert run(config, folder, "export") == 0
    assert texts() == {"исправлено"}
    assert "the manifests have changed" in capsys.readouterr().out
    manifest.unlink()
    assert run(config, folder, "export") == 0
    assert "the manifests have changed" not in capsys.readouterr().out, (
        "what was prepared goes where it is taken"
    )


def test_a_mended_configuration_goes_on_in_the_same_run_until_something_was_learned(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, corpus("ru"))
    letters = alphabet("ru")
    assert run(config, tmp_path / "run", "prepare", "letters=abc") == 2
    assert run(config, tmp_path / "run", "prepare", f"letters={letters.replace('ы', '')}") == 0
    few = sum(len(read_manifest(path)) for path in (tmp_path / "run" / "data").glob("*.jsonl"))
    assert run(config, tmp_path / "run", "train", f"letters={letters}") == 0
    rows = sum(len(read_manifest(path)) for path in (tmp_path / "run" / "data").glob("*.jsonl"))
    assert few < rows == 24, "what the first alphabet dropped is there again"
    assert run(config, tmp_path / "run", "export", "letters=abc") == 2
    assert "trained with another configuration (letters changed)" in capsys.readouterr().err
    changes = (f"letters={letters}", "bundle.licence=MIT", "name=other")
    assert run(config, tmp_path / "run", "export", *changes) == 0


def test_a_card_says_what_was_done(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    rows = read_manifest(corpus("ru"))
    nameless = write_manifest(tmp_path / "nameless.jsonl", [replace(row, speaker="") for row in rows])
    cards = {}
    for name, manifest, stage in (
        ("trained", corpus("ru"), "train"),
        ("nameless", nameless, "train"),
        ("converted", corpus("ru"), "convert"),
    ):
        (tmp_path / name).mkdir()
        config = tiny_config(tmp_path / name, manifest)
        for step in (stage, "export", "benchmark", "publish"):
            assert run(config, tmp_path / name / "run", step) == 0
        cards[name] = (tmp_path / name / "run" / "bundle" / "tiny" / "README.md").read_text(encoding="utf-8")
    assert "utterances." in cards["trained"]
    assert "own recordings, held-out speakers" in cards["trained"]
    assert "own recordings, held-out recordings" in cards["nameless"]
    split = json.loads((tmp_path / "nameless" / "run" / "split.json").read_text())
    assert [part["speakers"] for part in split.values()] == [0, 0, 0]
    assert "Converted by the recipe `quartznet_ctc`" in cards["converted"]
    assert "own recordings, test part" in cards["converted"]
    assert "Training data" not in cards["converted"]
    taught = {
        name: load_bundle(tmp_path / name / "run" / "bundle", "tiny").manifest.text_normalisation
        for name in cards
    }
    assert taught["trained"] == normaliser("ru").steps
    assert taught["converted"] == ("nfc", "lowercase"), "as its letters are, no text taught it anything"


def test_a_part_may_be_empty_where_the_split_says_so(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, corpus("ru"))
    split = "data.fractions=[0.8, 0.2, 0.0]"
    for stage in ("prepare", "convert", "export", "publish"):
        assert run(config, tmp_path / "run", stage, split) == 0
    assert run(config, tmp_path / "run", "benchmark", split) == 2
    assert "the test part is empty" in capsys.readouterr().err


def test_hypotheses_are_normalised_as_references_are(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    """A converted model may write capitals: they are no errors, neither to the gate nor in the benchmark."""

    class Shouting(QuartzNetRecipe):
        def codec(self) -> CharacterCodec:
            return CharacterCodec(alphabet("ru").upper())

    recipe = Shouting(load_config(tiny_config(tmp_path, corpus("ru"))))
    folder = RunFolder(tmp_path / "run")
    lower = CharacterCodec(alphabet("ru"))
    whispering = QuartzNetRecipe(recipe.config)
    torch.manual_seed(0)
    rows = prepare(whispering, folder)
    convert(whispering, rows, folder)
    export(recipe, rows, folder)
    session = cpu_session(folder.path / "export" / "model.onnx")
    heard = {}
    for part in rows:
        answers = [run_graph(session, [clip])[0] for clip, _ in load_part(rows[part], 16_000)]
        heard[part] = [greedy_text(answer, lower.vocabulary) or "а" for answer in answers]
    said = {
        part: [replace(row, text=text) for row, text in zip(rows[part], heard[part], strict=True)]
        for part in rows
    }
    quantize(recipe, said, folder)
    benchmark(recipe, said, folder)
    silent = sum(text == "а" for text in heard["validation"])
    assert silent < len(heard["validation"])
    assert folder.read_json("quantize.json")["float32"]["wer"] < 0.5
    assert all(row["wer"] < 0.5 for row in folder.read_json("benchmark.json")["rows"][:2])


def test_a_bundle_is_made_of_one_training_only(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tiny_config(tmp_path, corpus("ru")), tmp_path / "run"
    for stage in ("train", "export"):
        assert run(config, folder, stage) == 0
    shutil.copyfile(folder / "export" / "model.onnx", folder / "export" / "model.int8.onnx")
    assert run(config, folder, "export") == 0
    assert not (folder / "export" / "model.int8.onnx").exists(), "it came from an earlier graph"
    (folder / "benchmark.json").write_text("{}")
    assert run(config, folder, "quantize") == 0
    assert not (folder / "benchmark.json").exists(), "it was measured on an earlier INT8 graph"
    assert run(config, folder, "train", "training.epochs=2") == 0
    assert run(config, folder, "publish", "training.epochs=2") == 2
    assert "run the export stage first" in capsys.readouterr().err


def test_a_graph_that_disagrees_is_not_published(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    class Wrong(QuartzNetRecipe):
        def export(self, network: torch.nn.Module) -> onnx.ModelProto:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(2.0)
            model = super().export(network)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.mul_(0.5)
            return model

    recipe, folder = Wrong(load_config(tiny_config(tmp_path, corpus("ru")))), RunFolder(tmp_path / "run")
    rows = prepare(recipe, folder)
    convert(recipe, rows, folder)
    with pytest.raises(QualityGateError, match="torch_against_onnx"):
        export(recipe, rows, folder)
    with pytest.raises(CheckpointError, match="run the export stage first"):
        publish(recipe, rows, folder)


def test_answers_that_are_not_numbers_are_not_published(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tiny_config(tmp_path, corpus("ru")), tmp_path / "run"
    assert run(config, folder, "convert") == 0
    weights = load_file(folder / "weights.safetensors")
    save_file(
        {
            name: torch.full_like(value, torch.nan) if "head" in name else value
            for name, value in weights.items()
        },
        folder / "weights.safetensors",
    )
    assert run(config, folder, "export") == 2
    assert "torch_against_onnx" in capsys.readouterr().err
    # a float32 graph of the same kind, from before the gate
    (folder / "export" / "model.onnx.partial").rename(folder / "export" / "model.onnx")
    assert run(config, folder, "quantize", "benchmark.max_wer_loss=1") == 0
    tried = json.loads((folder / "quantize.json").read_text())["candidates"]
    assert {candidate["reason"] for candidate in tried} == {"its log-probabilities are not numbers"}


def test_speakers_in_two_given_parts_are_refused(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(TINY)
    values["data"] = {part: str(corpus("ru")) for part in ("train", "validation", "test")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    assert run(config, tmp_path / "run", "prepare") == 2
    assert "speakers are in train and in validation" in capsys.readouterr().err


@pytest.mark.parametrize("shared", [("train", "test"), ("validation", "test")])
def test_recordings_in_two_given_parts_are_refused(
    shared: tuple[str, str],
    corpus: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [replace(row, speaker="") for row in read_manifest(corpus("ru"))]
    parts = {"train": rows[:8], "validation": rows[8:16], "test": rows[16:]}
    parts[shared[1]] = [*parts[shared[1]], parts[shared[0]][0]]
    values = yaml.safe_load(TINY)
    values["data"] = {
        part: str(write_manifest(tmp_path / f"{part}.jsonl", given)) for part, given in parts.items()
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    assert run(config, tmp_path / "run", "prepare") == 2
    assert f"1 recordings are in {shared[0]} and in {shared[1]}" in capsys.readouterr().err


def test_a_full_disk_leaves_no_half_graph_and_no_candidates(
    corpus: Callable[[str], Path], tmp_path: Path
) -> None:
    class Full(QuartzNetRecipe):
        def quantized(
            self, graph: Path, out: Path, calibration: Sequence[np.ndarray]
        ) -> Iterator[tuple[str, Path]]:
            shutil.copyfile(graph, out / "first.onnx")
            yield "first", out / "first.onnx"
            Path("/dev/full").write_bytes(b"second")

    recipe, folder = Full(load_config(tiny_config(tmp_path, corpus("ru")))), RunFolder(tmp_path / "run")
    rows = prepare(recipe, folder)
    convert(recipe, rows, folder)
    graphs = folder.path / "export"
    graphs.mkdir()
    no_room = graphs / ".model.onnx.partial.partial"
    no_room.symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"model\.onnx\.partial: the disk is full: about \d\.\d MB"):
        export(recipe, rows, folder)
    assert not list(graphs.iterdir())
    export(recipe, rows, folder)
    with pytest.raises(DiskFullError, match="candidates: the disk is full"):
        quantize(recipe, rows, folder)
    assert [path.name for path in graphs.iterdir()] == ["model.onnx"]


def test_weights_that_are_cut_off_are_one_line(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder = tiny_config(tmp_path, corpus("ru")), tmp_path / "run"
    assert run(config, folder, "convert") == 0
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert run(config, folder, "export") == 2
    assert "weights.safetensors: no weights can be read" in capsys.readouterr().err


def test_stages_in_the_wrong_order_say_what_is_missing(
    corpus: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, corpus("ru"))
    assert run(config, tmp_path / "run", "export") == 2
    assert "run the train stage first" in capsys.readouterr().err
    assert run(config, tmp_path / "run", "quantize") == 2
    assert "run the export stage first" in capsys.readouterr().err
    assert run(config, tmp_path / "run", "publish") == 2
    assert "run the export stage first" in capsys.readouterr().err


def test_the_command_itself(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "none.jsonl")
    command = [sys.executable, "-m", "training.recipes.quartznet_ctc", "all"]
    answer = subprocess.run(
        [*command, "--config", str(config), "--run", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert answer.returncode == 2
    assert answer.stderr.strip().endswith("no such manifest")


# --- the INT8 gate -----------------------------------------------------------------------------------


def test_gate_takes_the_best_of_the_fast() -> None:
    def tried(how: str, speedup: float, wer: float, accepted: bool = True) -> Candidate:
        return Candidate(how, 1, 1.0, speedup, wer, 0.0, 0.0, accepted, "")

    fast, exact = tried("fast", 3.0, 0.12), tried("exact", 2.8, 0.10)
    slow, refused = tried("slow", 1.2, 0.09), tried("refused", 9.0, 0.9, accepted=False)
    assert choose([fast, exact, slow, refused]) is exact
    assert choose([fast, slow]) is fast
    assert choose([refused]) is None


# --- transfer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["ru", "vi"])
def test_english_encoder_carries_over(
    language: str, teacher_archive: Path, corpus: Callable[[str], Path], tmp_path: Path
) -> None:
    """The encoder is the archive's, the decoder is new, a few steps teach both, the graph agrees."""
    torch.manual_seed(0)  # of the new decoder; the first steps depend on it
    codec = CharacterCodec(alphabet(language))
    outputs = len(codec.vocabulary)
    model, frontend = transferred(teacher_archive, outputs)
    assert model.head.weight.shape[0] == outputs
    english, _ = transferred(teacher_archive, 29)
    kept = model.blocks.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in english.blocks.state_dict().items())
    network = QuartzNetCtc(model, frontend, frozen_norms=True).train()
    rows = read_manifest(corpus(language))[:2]
    dataset = UtteranceDataset(rows, lambda text: codec.encode(normaliser(language)(text)))
    batch = collate([dataset[index] for index in range(2)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    losses = []
    for _ in range(4):
        log_probs, frames = network(batch["waveform"], batch["lengths"])
        targets = (batch["targets"].clamp(min=0), frames, batch["target_lengths"])
        loss = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), *targets, blank=outputs - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    network.eval()
    recordings = [dataset[index].samples for index in range(2)]
    with torch.inference_mode():
        log_probs, frames = network(batch["waveform"], batch["lengths"])
    expected = [row[:count].numpy() for row, count in zip(log_probs, frames.tolist(), strict=True)]
    graph = QuartzNetRecipe.export(object.__new__(QuartzNetRecipe), network)
    found = run_graph(cpu_session(graph.SerializeToString()), recordings)
    assert compare(expected, found).worst_posterior < 1e-4


def test_an_archive_that_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "a.nemo").write_bytes(b"no tar")
    with pytest.raises(CheckpointError, match=r"model\.transfer_from"):
        transferred(tmp_path / "a.nemo", 30)


def test_citrinet_has_three_halvings_and_gates() -> None:
    config = citrinet(50, channels=16, repeat=2, tail_channels=24, blocks=2, upsample=4)
    assert config.stride == 2
    model = QuartzNet(config).eval()
    out = model(torch.randn(1, 80, 100), torch.tensor([100]))
    assert out.log_probs.shape == (1, 52, 50)
    assert all(block.squeeze is not None for block in model.blocks)


# --- details -----------------------------------------------------------------------------------------


def test_teacher_forcing_learns_text_and_end_only() -> None:
    prompt = Prompt((90, 91, 92), end=99, suppressed=(90, 91, 92))
    tokens, labels = teacher_tokens(torch.tensor([[1, 2, -100], [3, 4, 5]]), torch.tensor([2, 3]), prompt)
    assert tokens.tolist() == [[90, 91, 92, 1, 2, 99], [90, 91, 92, 3, 4, 5]]
    skip = IGNORED
    assert labels.tolist() == [[skip, skip, 1, 2, 99, skip], [skip, skip, 3, 4, 5, 99]]


def test_a_finished_training_is_not_repeated(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, corpus("ru"))
    assert run(config, tmp_path / "run", "train") == 0
    weights = tmp_path / "run" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    assert run(config, tmp_path / "run", "train") == 0
    assert weights.stat().st_mtime_ns == before
    assert run(config, tmp_path / "run", "train", "training.epochs=2") == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")) == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["epochs"] == 2


def test_a_conversion_is_not_taken_for_a_training(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, corpus("ru"))
    weights = []
    for stage in ("train", "convert", "train"):
        assert run(config, tmp_path / "run", stage) == 0
        weights.append((tmp_path / "run" / "weights.safetensors").read_bytes())
    assert weights[0] == weights[2] != weights[1]


def test_prepared_parts_share_no_speaker(corpus: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = QuartzNetRecipe(load_config(tiny_config(tmp_path, corpus("ru"))))
    parts = prepare(recipe, RunFolder(tmp_path / "run"))
    heard = [{row.speaker for row in rows} for rows in parts.values()]
    assert sum(map(len, heard)) == len(set().union(*heard)) == 6
    summary = json.loads((tmp_path / "run" / "split.json").read_text())
    assert sum(part["utterances"] for part in summary.values()) == 24
