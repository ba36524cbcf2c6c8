"""Checkpoint -> verified bundle, on small random networks and synthetic sound; and error rates."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import soundfile
import torch

from api.bundle import load_bundle, sha256_of, verify_bundle
from api.decoding import in_words
from api.manifest import Source
from tests.tiny_bundle import make_bundle, sing, wav
from tests.training.conformers import FAST, random_conformer
from tests.training.networks import CONFIGS, VOCABULARY, chirps, random_checkpoint, write_corpus
from training import benchmark, evaluate
from training import publish as command
from training.bundle_writer import Card, Graphs, LanguageModel, write_bundle
from training.calibration import manifest_rows, manifest_waveforms, with_plain_texts
from training.checkpoint import Checkpoint, average_weights, load_checkpoint, save_checkpoint
from training.errors import CheckpointError, ConfigError, DataError, EmptyManifestError, ManifestError
from training.evaluate import Utterance, bundle_recogniser, error_rates, plainly
from training.export import export_graph
from training.frontend import FrontendConfig
from training.inference import compare, cpu_session, run_graph
from training.kneser_ney import character_ngrams
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc
from training.text import normaliser
from training.torch_inference import run_torch

CARD = {
    "title": "A random network",
    "languages": ["en"],
    "source": {"title": "tests", "url": "https://example.org"},
    "licence": "Apache-2.0",
    "training_data": [{"name": "chirps", "licence": "CC0-1.0", "hours": 0.1}],
    "limits": "It knows nothing.",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    before = random_checkpoint(name)
    save_checkpoint(tmp_path / "model.safetensors", before)
    after = load_checkpoint(tmp_path / "model.safetensors")
    assert after.model.config == before.model.config
    assert (after.frontend, after.vocabulary, after.meta) == (
        before.frontend,
        before.vocabulary,
        {"hours": 1.5},
    )
    features, lengths = torch.randn(1, 64, 40), torch.tensor([40])
    with torch.inference_mode():
        assert torch.equal(
            after.model(features, lengths).log_probs, before.model(features, lengths).log_probs
        )


def conformer_checkpoint() -> Checkpoint:
    """As distillation leaves it: characters, front end of QuartzNet."""
    frontend = FrontendConfig()
    shape = replace(FAST, features=frontend.features, subsampling_factor=4, upsample=2)
    return Checkpoint(random_conformer(shape, len(VOCABULARY), frontend), frontend, VOCABULARY)


def test_a_conformer_comes_back_as_it_was(tmp_path: Path) -> None:
    before = conformer_checkpoint()
    save_checkpoint(tmp_path / "model.safetensors", before)
    after = load_checkpoint(tmp_path / "model.safetensors")
    assert (after.model.config, after.frontend, after.vocabulary) == (
        before.model.config,
        before.frontend,
        before.vocabulary,
    )
    (expected,), (found,) = (run_torch(network.forward(), chirps(1)) for network in (before, after))
    assert np.array_equal(found, expected)


def test_a_conformer_becomes_a_bundle_whose_batches_are_exact(tmp_path: Path) -> None:
    """Ranges that are found anew for each batch are not for it; its graph hears clips of any length."""
    assert publish(tmp_path, "--keep-float", checkpoint=conformer_checkpoint()) == 0
    bundle = verify_bundle(tmp_path / "models", "en-random")
    assert bundle.manifest.frame_stride_s == 0.02
    tried = [line for line in (bundle.path / "README.md").read_text().splitlines() if "| INT8, " in line]
    assert [line.split(" |")[0] for line in tried if "static" not in line] == []
    assert len(tried) == 2
    clips = [*chirps(3), np.tile(chirps(1)[0], 40)[: 25 * 16_000]]
    for graph in bundle.manifest.graphs:
        session = cpu_session(bundle.graph_path(graph))
        alone = [run_graph(session, [clip])[0] for clip in clips]
        assert compare(alone, run_graph(session, clips)).worst_log_prob < 1e-4


def test_a_whisper_encoder_becomes_a_bundle_whose_batches_are_exact(tmp_path: Path) -> None:
    """Its positions are computed in the graph, not stored."""
    torch.manual_seed(0)
    model = WhisperCtc(EncoderConfig(width=64, layers=2, heads=1, inner=64), len(VOCABULARY))
    model.encoder.start_from_random()
    before = Checkpoint(model.eval(), FrontendConfig(), VOCABULARY)
    save_checkpoint(tmp_path / "model.safetensors", before)
    after = load_checkpoint(tmp_path / "model.safetensors")
    assert after.model.config == model.config
    (expected,), (found,) = (run_torch(network.forward(), chirps(1)) for network in (before, after))
    assert np.array_equal(found, expected)
    assert publish(tmp_path, "--keep-float", checkpoint=before) == 0
    bundle = verify_bundle(tmp_path / "models", "en-random")
    assert bundle.manifest.max_window_s == 20.0
    graph = onnx.load(bundle.graph_path("float32"))
    assert not any(list(tensor.dims) == [1500, 64] for tensor in graph.graph.initializer)
    clips = [*chirps(3), np.tile(chirps(1)[0], 40)[: 20 * 16_000]]
    for name in bundle.manifest.graphs:
        session = cpu_session(bundle.graph_path(name))
        alone = [run_graph(session, [clip])[0] for clip in clips]
        assert compare(alone, run_graph(session, clips)).worst_log_prob < 1e-4
        assert compare(alone, [run_torch(model, [clip])[0] for clip in clips]).worst_posterior < (
            1e-4 if name == "float32" else 1.0
        )


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(path)
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_whose_head_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint = random_checkpoint()
    save_checkpoint(path, checkpoint)
    with safetensors.safe_open(path, framework="pt") as stream:
        header = json.loads(stream.metadata()["checkpoint"])
    header["model"]["vocabulary_size"] = 7
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, path, metadata={"checkpoint": json.dumps(header)})
    with pytest.raises(CheckpointError, match="7 outputs for 6 tokens"):
        load_checkpoint(path)


def test_averaging_takes_the_mean(tmp_path: Path) -> None:
    first, second = random_checkpoint(), random_checkpoint()
    with torch.no_grad():
        first.model.head.bias.fill_(1.0)
        second.model.head.bias.fill_(4.0)
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path, checkpoint in zip(paths, (first, second), strict=True):
        save_checkpoint(path, checkpoint)
    mean = average_weights(paths)
    assert mean["head.bias"].tolist() == [2.5] * 6
    assert mean["blocks.0.layers.0.norm.num_batches_tracked"].dtype == torch.int64


def publish(tmp_path: Path, *more: str, checkpoint: Checkpoint | None = None) -> int:
    """Run the command on a random checkpoint; the gate is wide, since the network knows nothing."""
    save_checkpoint(tmp_path / "model.safetensors", checkpoint or random_checkpoint())
    (tmp_path / "card.json").write_text(json.dumps(CARD), encoding="utf-8")
    manifest = str(write_corpus(tmp_path, chirps(8)))
    arguments = [
        str(tmp_path / "model.safetensors"),
        "--name",
        "en-random",
        "--models-dir",
        str(tmp_path / "models"),
    ]
    arguments += ["--card", str(tmp_path / "card.json"), "--calibration", manifest, "--validation", manifest]
    arguments += ["--min-speed", "0", "--max-wer-increase", "9"]
    return command.main([*arguments, "--test", manifest, *more])


def test_the_forms_of_a_model_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(tmp_path) == 0
    arguments = [str(tmp_path / "model.safetensors"), "--bundle", str(tmp_path / "models" / "en-random")]
    arguments += ["--manifest", str(write_corpus(tmp_path, chirps(8))), "--rounds", "2"]
    assert benchmark.main(arguments) == 0
    *_, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["rows"]
    assert [row["form"] for row in rows] == ["PyTorch float32", "ONNX float32", "ONNX INT8"]
    assert rows[0]["speedup"] == 1
    assert rows[0]["rates"] == rows[1]["rates"], "torch and ONNX write the same texts"


def test_optional_fields_of_a_manifest_are_optional(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither source nor language, capitals and punctuation in the texts: as people's manifests are."""
    manifest = write_corpus(tmp_path, chirps(8))
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    plain = [{name: row[name] for name in ("audio_filepath", "duration")} for row in rows]
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps(row | {"text": "Ab, cd."}) + "\n" for row in plain)
    )
    assert publish(tmp_path, "--test", str(tmp_path / "test.jsonl")) == 0
    (found,) = load_bundle(tmp_path / "models", "en-random").manifest.evaluation
    assert (found.test_set, found.language, found.utterances) == ("test", "en", 8)
    arguments = [str(tmp_path / "model.safetensors"), "--bundle", str(tmp_path / "models" / "en-random")]
    assert benchmark.main([*arguments, "--manifest", str(tmp_path / "test.jsonl"), "--rounds", "1"]) == 0
    rates = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["rates"]
    assert benchmark.main([*arguments, "--manifest", str(manifest), "--rounds", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["rates"]["wer"] == rates["wer"]


@pytest.mark.parametrize(
    ("name", "language", "problem"),
    [("my model", "en", "name 'my model'"), ("fine", "english", r"languages\.0 'english'")],
)
def test_a_name_that_no_bundle_can_have_is_refused_before_the_work(
    name: str, language: str, problem: str
) -> None:
    source = Source(title="tests", url="none")
    card = Card(title="x", languages=(language,), source=source, licence="MIT")
    nowhere = Path("nowhere")
    with pytest.raises(ConfigError, match=problem):
        command.publish(random_checkpoint(), name, nowhere, card, command.Recordings(nowhere, nowhere))


def test_both_sides_are_compared_plainly() -> None:
    heard = [Utterance("The patients' CAFÉ, now!", "the patients' café now")]
    assert plainly(heard, normaliser("en")) == [Utterance("the patients café now", "the patients café now")]
    clips = [(np.zeros(1, np.float32), "Ilık, su.")]
    assert with_plain_texts(clips, "tr", ("nfc", "lowercase"))[0][1] == "ılık su"


def test_a_limit_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["models", "tiny", "--manifest", "a.jsonl", "--limit", "0"])
    assert caught.value.code == 2
    assert "--limit: 0: expected 1 or more" in capsys.readouterr().err


def test_a_model_that_folds_yo_is_measured_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught = normaliser("ru", yo=False).steps
    clips = [(np.zeros(1, np.float32), "Ещё, ёж.")]
    assert with_plain_texts(clips, "ru", taught)[0][1] == "еще еж"
    path = make_bundle(tmp_path / "models", languages=("ru",))
    vocabulary = path / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("b\n", "е\n"), encoding="utf-8")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["vocab.txt"] = sha256_of(vocabulary)
    manifest["text_normalisation"] = taught
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "1.wav").write_bytes(wav(sing("b")))
    rows = tmp_path / "manifest.jsonl"
    rows.write_text('{"audio_filepath": "1.wav", "text": "Ё!", "duration": 1}\n', encoding="utf-8")
    assert evaluate.main([str(tmp_path / "models"), "tiny", "--manifest", str(rows)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["wer"] == 0.0


def test_stretches_of_one_recording_in_a_shard(tmp_path: Path) -> None:
    ramp = np.arange(32_000, dtype=np.float32) / 64_000
    soundfile.write(tmp_path / "a.wav", ramp, 16_000, subtype="FLOAT")
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(tmp_path / "a.wav", "a.wav")
    (tmp_path / "a.wav").unlink()
    rows = [{"offset": 0.5, "duration": 0.25, "text": "b"}, {"offset": 1.5, "text": "d"}]
    path = {"shard": "s.tar", "audio_filepath": "a.wav"}
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row | path) + "\n" for row in rows))
    (second, b), (fourth, d) = manifest_waveforms(tmp_path / "m.jsonl", 16_000)
    assert (b, d) == ("b", "d")
    np.testing.assert_allclose(second, ramp[8_000:12_000])
    np.testing.assert_allclose(fourth, ramp[24_000:])
    gone = {"shard": "s.tar", "audio_filepath": "gone.wav", "text": "x"}
    (tmp_path / "m.jsonl").write_text(json.dumps(gone))
    with pytest.raises(DataError, match=r"s\.tar: has no gone\.wav"):
        manifest_waveforms(tmp_path / "m.jsonl", 16_000)


def test_a_file_that_was_taken_out_of_its_shard_needs_none(tmp_path: Path) -> None:
    ramp = np.arange(1_600, dtype=np.float32) / 3_200
    soundfile.write(tmp_path / "a.wav", ramp, 16_000, subtype="FLOAT")
    row = {"shard": "elsewhere.tar", "audio_filepath": "a.wav", "text": "a"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    ((waveform, _),) = manifest_waveforms(tmp_path / "m.jsonl", 16_000)
    np.testing.assert_allclose(waveform, ramp)


def test_publishing_makes_a_verified_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(tmp_path, "--keep-float") == 0
    bundle = verify_bundle(tmp_path / "models", "en-random")
    manifest = bundle.manifest
    assert set(manifest.graphs) == {"int8", "float32"}
    assert manifest.default_graph == "int8"
    assert manifest.frame_stride_s == pytest.approx(0.02)
    assert {entry.test_set for entry in manifest.evaluation} == {"first", "second"}
    assert {entry.graph for entry in manifest.speed} == {"int8", "float32"}
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# A random network\n")
    assert "| chirps | CC0-1.0 | 0.1 |" in card
    assert "INT8, mean of extremes" in card
    assert "verified" in capsys.readouterr().out
    assert isinstance(bundle_recogniser(bundle)(chirps(1)[0]), str)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"audio_filepath": "gone.wav"}, "gone.wav: no such recording"),
        ({"audio_filepath": "a.wav", "shard": "gone.tar"}, "gone.tar: no such recording"),
        ({}, ":1: not a manifest row: audio_filepath is missing"),
    ],
)
def test_a_test_set_that_is_not_there_is_said_before_a_bundle_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, str], said: str
) -> None:
    """It is measured last, and left a bundle without its numbers."""
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "text": "ab"}), encoding="utf-8")
    assert publish(tmp_path, "--test", str(tmp_path / "test.jsonl")) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_language_model_that_does_not_help_is_reported_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("ab cd\nba dc\n", encoding="utf-8")
    assert publish(tmp_path, "--texts", str(tmp_path / "texts.txt")) == 0
    bundle = verify_bundle(tmp_path / "models", "en-random")
    assert bundle.manifest.language_model is None
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "## Language model" in card
    assert "left out" in card


def test_a_language_model_has_not_read_what_is_said_in_the_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test").mkdir()
    test = write_corpus(tmp_path / "test", chirps(2), "dd cc")
    (tmp_path / "texts.txt").write_text("Dd, cc!\nAb cd.\n", encoding="utf-8")
    assert publish(tmp_path, "--texts", str(tmp_path / "texts.txt"), "--test", str(test)) == 2
    assert "no text to learn from" in capsys.readouterr().err


def test_a_language_model_is_written_into_the_bundle(tmp_path: Path) -> None:
    graph = export_graph(random_checkpoint().model, random_checkpoint().frontend)
    graphs = Graphs({"float32": graph.SerializeToString()}, "float32", 17, 1, 0.02, 20.0, 160)
    card = Card("t", ("en",), Source(title="t", url=""), "Apache-2.0")
    language_model = LanguageModel(character_ngrams(["ab cd"], 3, 1), 3, 0.5, 1.0, 12)
    bundle = write_bundle(tmp_path, "en-random", graphs, VOCABULARY, card, language_model=language_model)
    assert bundle.guide is not None
    assert in_words(bundle, bundle.default_beam) == "beam 12 with language model"
    assert isinstance(bundle_recogniser(bundle)(chirps(1)[0]), str)


def test_publishing_again_replaces_the_bundle(tmp_path: Path) -> None:
    assert publish(tmp_path, "--keep-float") == 0
    assert publish(tmp_path) == 0
    assert set(load_bundle(tmp_path / "models", "en-random").manifest.graphs) == {"int8"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["en-random"]


def test_a_refused_graph_leaves_the_old_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(tmp_path) == 0
    before = (tmp_path / "models" / "en-random" / "manifest.json").read_bytes()
    assert publish(tmp_path, "--min-speed", "1e9") == 2
    assert "INT8 is refused: speed" in capsys.readouterr().err
    assert (tmp_path / "models" / "en-random" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"title": None}, "title"), ({"training_data": [{"name": "x"}]}, "training_data.0.licence")],
)
def test_a_wrong_card_names_its_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], problem: str
) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(CARD | change), encoding="utf-8")
    assert publish(tmp_path, "--card", str(path)) == 2
    assert problem in capsys.readouterr().err


def test_a_bundle_that_does_not_hold_is_never_written(tmp_path: Path) -> None:
    graph = export_graph(random_checkpoint().model, random_checkpoint().frontend)
    graphs = Graphs({"float32": graph.SerializeToString()}, "float32", 17, 1, 0.08, 20.0, 160)
    card = Card("t", ("en",), Source(title="t", url=""), "Apache-2.0")
    with pytest.raises(Exception, match="frame_stride_s"):
        write_bundle(tmp_path, "en-random", graphs, VOCABULARY, card)
    assert list(tmp_path.iterdir()) == []


def test_error_rates_count_words_and_characters() -> None:
    rates = error_rates(
        [Utterance("a b c d", "a x c"), Utterance("e f", "e f"), Utterance("", "g"), Utterance("h", "")]
    )
    assert (rates.utterances, rates.words) == (4, 7)
    assert rates.wer == pytest.approx(4 / 7)  # substitution, deletion; insertion; deletion
    assert rates.cer == pytest.approx((1 + 2 + 1 + 1) / (7 + 3 + 1))
    assert rates.wer_low <= rates.wer <= rates.wer_high


def test_the_interval_shrinks_with_more_utterances() -> None:
    few = [Utterance("a b", "a b"), Utterance("a b", "a x")] * 4
    narrow, wide = error_rates(few * 16), error_rates(few)
    assert narrow.wer_high - narrow.wer_low < wide.wer_high - wide.wer_low


def test_error_rates_need_words() -> None:
    with pytest.raises(ValueError, match="at least one reference word"):
        error_rates([Utterance("", "a")])


def test_manifest_rows_are_filtered_and_spread(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, chirps(8))
    assert len(manifest_rows(manifest, source="first")) == 4
    spread = manifest_rows(manifest, 3)
    assert [row["audio_filepath"] for row in spread] == ["0.wav", "4.wav", "7.wav"]
    clip, text = manifest_waveforms(manifest, 16_000, 1)[0]
    assert (clip.dtype, text) == (np.float32, "ab cd")
    with pytest.raises(EmptyManifestError):
        manifest_rows(manifest, source="third")


def test_a_broken_manifest_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('{"audio_filepath": "a.wav"}\n[1]\n', encoding="utf-8")
    with pytest.raises(ManifestError, match=":2: not a manifest row: expected an object"):
        manifest_rows(path)
