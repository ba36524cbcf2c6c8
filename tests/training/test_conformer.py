"""Conformer and FastConformer: NeMo's archives, the graph against another implementation, and the bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import nn
from transformers import ParakeetFeatureExtractor

from api.bundle import load_bundle, sha256_of
from api.engine import Engine
from api.manifest import Source
from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from tests.training.conformers import (
    CONFIGS,
    FAST,
    FRONTEND,
    PIECES,
    archive_of,
    nemo_config,
    nemo_state,
    random_conformer,
)
from tests.training.networks import chirps, write_corpus
from training import convert
from training.bundle_writer import Card
from training.conformer_graph import MAX_WINDOW_S, export_graph
from training.errors import EmptyManifestError
from training.export import AGREEMENT_TOLERANCE
from training.frontend import FrontendConfig, LogMel, mel_filters
from training.graph import as_file, fits_one_file
from training.inference import compare, cpu_session, run_graph
from training.nemo import quartznet_of
from training.nemo_archive import NemoArchive, NemoError, read_archive
from training.nemo_conformer import conformer_of
from training.publish import Recordings, publish
from training.quantize import Gate
from training.torch_inference import run_torch
from training.transformer_quantize import dynamic
from training.vocabulary import casing_steps


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].upsample == 1])
def test_weights_arrive_where_they_belong(tmp_path: Path, name: str) -> None:
    model = random_conformer(CONFIGS[name])
    found = conformer_of(read_archive(archive_of(tmp_path / "model.nemo", model)))
    assert found.vocabulary == tuple(PIECES)
    assert (found.model.config, found.model.frontend.config) == (model.config, FRONTEND)
    (before,), (after,) = run_torch(model, chirps(1)), run_torch(found.model, chirps(1))
    assert np.array_equal(before, after)


def test_of_a_hybrid_model_the_ctc_head_is_taken(tmp_path: Path) -> None:
    model = random_conformer(FAST)
    config = nemo_config(FAST)
    config["aux_ctc"] = {"ctc_loss_weight": 0.3, "decoder": config["decoder"]}
    config["decoder"] = {"_target_": "nemo.collections.asr.modules.RNNTDecoder", "vocab_size": 8}
    state = nemo_state(model, "ctc_decoder")
    state |= {"decoder.prediction.embed.weight": torch.zeros(9, 4), "joint.enc.weight": torch.zeros(4, 32)}
    found = conformer_of(read_archive(archive_of(tmp_path / "model.nemo", model, config, state=state)))
    (before,), (after,) = run_torch(model, chirps(1)), run_torch(found.model, chirps(1))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_gives_what_the_network_gives(name: str, tables: bool) -> None:
    model = random_conformer(CONFIGS[name])
    session = cpu_session(export_graph(model, tables=tables).SerializeToString())
    longest = np.tile(chirps(1, seed=9)[0], 40)[: round(MAX_WINDOW_S * 16_000)]
    clips = [*chirps(4), chirps(1)[0][:160], longest]
    found = compare(run_torch(model, clips), run_graph(session, clips))
    assert found.worst_posterior < AGREEMENT_TOLERANCE
    assert found.worst_log_prob < 1e-4
    alone = [run_graph(session, [clip])[0] for clip in clips]
    assert compare(alone, run_graph(session, clips)).worst_log_prob < 1e-5


def test_a_clip_beyond_the_window_fails_instead_of_being_heard_wrongly() -> None:
    session = cpu_session(export_graph(random_conformer(FAST)).SerializeToString())
    with pytest.raises(Fail, match="scores"):
        run_graph(session, [np.zeros(round((MAX_WINDOW_S + 1.0) * 16_000), np.float32)])


def test_features_are_those_of_another_implementation() -> None:
    """Log-mel of 25 ms windows before its normalisation."""
    extractor = ParakeetFeatureExtractor()
    for clip in chirps(3):
        waveform = torch.from_numpy(clip)[None]
        delayed = torch.nn.functional.pad(waveform[:, :-1], (1, 0))
        expected = extractor._torch_extract_fbank_features(waveform - 0.97 * delayed)
        values, lengths = LogMel(FRONTEND).log_mel(waveform, torch.tensor([len(clip)]))
        assert lengths.tolist() == [expected.shape[1]]
        torch.testing.assert_close(values, expected, atol=2e-3, rtol=0)


def test_full_convolutions_subsample_by_the_textbook() -> None:
    subsampling = random_conformer(CONFIGS["conformer"]).network.encoder.subsampling
    features = torch.randn(1, 41, 80)
    first, _, second, _ = subsampling.layers
    values = torch.relu(nn.functional.conv2d(features[:, None], first.weight, first.bias, 2, 1))
    values = torch.relu(nn.functional.conv2d(values, second.weight, second.bias, 2, 1))
    expected = subsampling.linear(values.permute(0, 2, 1, 3).flatten(2))
    assert expected.shape == (1, 11, 32)
    torch.testing.assert_close(subsampling(features, torch.ones(1, 41, dtype=torch.bool)), expected)


@pytest.mark.parametrize(
    ("section", "name", "value", "problem"),
    [
        ("encoder", "self_attention_model", "abs_pos", "encoder.self_attention_model: 'abs_pos', only 'rel"),
        ("encoder", "att_context_size", [70, 13], r"encoder.att_context_size: \[70, 13\]"),
        ("encoder", "att_context_size", [[70, 13], [70, 0]], "encoder.att_context_size"),
        ("encoder", "att_context_style", "chunked_limited", "encoder.att_context_style"),
        ("encoder", "causal_downsampling", True, "encoder.causal_downsampling: True, only False"),
        ("encoder", "conv_context_size", "causal", "encoder.conv_context_size"),
        ("encoder", "conv_norm_type", "layer_norm", "encoder.conv_norm_type"),
        ("encoder", "conv_context_style", "dcc", "encoder.conv_context_style: 'dcc', only 'regular'"),
        ("encoder", "subsampling", "vggnet", "encoder.subsampling: 'vggnet', only 'striding' or 'dw_str"),
        ("encoder", "conv_kernel_size", 8, "kernel 8: expected an odd number"),
        ("encoder", "n_heads", 5, "32 is not a multiple of 5"),
        ("encoder", "feat_in", 64, "80 features for a network of 64"),
        ("encoder", "d_model", "wide", "model_config.yaml: invalid literal"),
        ("encoder", "n_layers", 3, "is missing"),
        ("encoder", "_target_", "nemo.modules.SqueezeformerEncoder", "SqueezeformerEncoder, expected Conf"),
        ("decoder", "vocabulary", PIECES[:-1], "ctc_head.weight has shape"),
        ("decoder", "vocabulary", [], "decoder.vocabulary: expected a list"),
        ("decoder", "multisoftmax", True, "decoder.multisoftmax: only one softmax"),
        ("preprocessor", "exact_pad", True, "preprocessor.exact_pad: True, only False"),
        ("preprocessor", "log_zero_guard_value", 1e-5, "preprocessor.log_zero_guard_value: 1e-05, only"),
    ],
)
def test_what_is_not_known_is_named(
    tmp_path: Path, section: str, name: str, value: object, problem: str
) -> None:
    model = random_conformer(FAST)
    config = nemo_config(FAST)
    config[section][name] = value
    with pytest.raises(NemoError, match=problem):
        conformer_of(read_archive(archive_of(tmp_path / "model.nemo", model, config)))


def test_a_transducer_alone_is_refused() -> None:
    state = {
        name: value for name, value in nemo_state(random_conformer(FAST)).items() if "decoder" not in name
    }
    with pytest.raises(NemoError, match="no CTC head"):
        conformer_of(NemoArchive("model.nemo", nemo_config(FAST), state))


@pytest.mark.parametrize(
    "name",
    [
        "prompt_kernel.0.weight",
        "joint.enc.weight",
        "decoder.adapter_layer.linear.weight",
        "encoder.layers.0.adapter_layer.linear.weight",
    ],
)
def test_tensors_that_would_change_the_answer_are_not_dropped(name: str) -> None:
    """A prompt between encoder and head, a transducer beside a plain CTC head, adapters."""
    state = nemo_state(random_conformer(FAST)) | {name: torch.zeros(2, 2)}
    with pytest.raises(NemoError, match=rf"{name.removeprefix('encoder.')}"):
        conformer_of(NemoArchive("model.nemo", nemo_config(FAST), state))


def test_a_telephone_model_hears_8_khz(tmp_path: Path) -> None:
    """A front end without n_fft has the next power of two, 256 for 25 ms; the bundle says the rate."""
    model = random_conformer(FAST)
    frontend = FrontendConfig(8_000, 80, 256, features=80, window_samples=200)
    config = nemo_config(FAST)
    config["preprocessor"] |= {"sample_rate": 8_000, "n_fft": None}
    state = nemo_state(model) | {"preprocessor.featurizer.fb": torch.tensor(mel_filters(frontend))[None]}
    archive = archive_of(tmp_path / "model.nemo", model, config, state=state)
    assert conformer_of(read_archive(archive)).model.frontend.config == frontend
    arguments = ["nemo", str(archive), "--name", "xx-8k", "--models-dir", str(tmp_path / "models")]
    assert convert.main([*arguments, "--language", "en"]) == 0
    manifest = load_bundle(tmp_path / "models", "xx-8k").manifest
    assert (manifest.sample_rate_hz, manifest.frame_stride_s) == (8_000, 0.08)


def test_pieces_of_two_languages_may_repeat(tmp_path: Path) -> None:
    """NeMo's aggregate tokenizer: one tokenizer's pieces behind another's, each with its `<unk>`."""
    config = nemo_config(FAST)
    config["decoder"]["vocabulary"] = ["<unk>", "\u2581a", "b", "\u2581c", "<unk>", "\u2581a", "b", "d"]
    archive = archive_of(tmp_path / "model.nemo", random_conformer(FAST), config)
    arguments = ["nemo", str(archive), "--name", "xx-two", "--models-dir", str(tmp_path / "models")]
    assert convert.main([*arguments, "--language", "en", "es"]) == 0
    vocabulary = load_bundle(tmp_path / "models", "xx-two").vocabulary
    assert vocabulary.decode([1, 2, 3, 4, 5, 7, 6]) == "ab c adb"


def test_a_conformer_is_no_quartznet() -> None:
    with pytest.raises(NemoError, match="ConformerEncoder, expected ConvASREncoder"):
        quartznet_of(NemoArchive("model.nemo", nemo_config(FAST), {}))


def test_an_archive_becomes_a_bundle_in_its_own_casing(tmp_path: Path) -> None:
    model = random_conformer(FAST)
    archive = archive_of(tmp_path / "model.nemo", model)
    arguments = ["nemo", str(archive), "--name", "xx-random", "--models-dir", str(tmp_path / "models")]
    assert convert.main([*arguments, "--language", "ru"]) == 0
    bundle = load_bundle(tmp_path / "models", "xx-random")
    assert bundle.vocabulary.tokens == (*PIECES, BLANK_TOKEN)
    assert (bundle.vocabulary.kind, bundle.vocabulary.special_ids) == ("wordpiece", {0})
    assert (bundle.manifest.frame_stride_s, bundle.manifest.default_graph) == (0.08, "float32")
    assert bundle.manifest.text_normalisation == ("nfc",), "it writes capitals"
    assert bundle.manifest.source.title == "model.nemo"
    assert bundle.manifest.source.revision == sha256_of(archive), "which weights these are"
    session = cpu_session(bundle.graph_path("float32"))
    assert (
        compare(run_torch(model, chirps(2)), run_graph(session, chirps(2))).worst_posterior
        < AGREEMENT_TOLERANCE
    )


def test_a_graph_too_large_for_one_file_runs_with_its_weights_beside_it() -> None:
    model = export_graph(random_conformer(FAST))
    clips = chirps(2)
    before, size = run_graph(cpu_session(model), clips)[0], len(model.SerializeToString())
    with as_file(model, most_bytes=0) as path:
        assert {file.name for file in path.parent.iterdir()} == {"graph.onnx", "weights"}
        session = cpu_session(path)
        small = dynamic(path, path.with_name("int8.onnx"))
        quantized = onnx.load(small, load_external_data=False)
    assert np.array_equal(run_graph(session, clips)[0], before)
    assert np.array_equal(run_graph(cpu_session(model), clips)[0], before), "it has its weights back"
    assert not any(tensor.external_data for tensor in quantized.graph.initializer)
    assert (fits_one_file(model), fits_one_file(model, size)) == (True, False)


def test_recordings_give_it_an_int8_graph(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "model.nemo", random_conformer(FAST))
    manifest = write_corpus(tmp_path, chirps(8))
    made = convert.exported_nemo(archive)
    card = Card("A random network", ("en",), Source(title="tests", url=""), "Apache-2.0")
    recordings = Recordings(manifest, manifest)
    gate = Gate(min_speed=0.0, max_wer_increase=9.0)
    bundle = publish(made, "en-random", tmp_path / "models", card, recordings, keep_float=True, gate=gate)
    assert (bundle.manifest.default_graph, set(bundle.manifest.graphs)) == ("int8", {"int8", "float32"})
    small, large = (bundle.graph_path(name).stat().st_size for name in ("int8", "float32"))
    assert small < large
    said = (bundle.path / "README.md").read_text(encoding="utf-8")
    clip = chirps(1)[0]
    (served,) = Engine(bundle).run([clip], alone=False)
    (alone,) = run_graph(cpu_session(bundle.graph_path("int8")), [clip])
    np.testing.assert_allclose(served.whole(), alone, atol=1e-6)
    for way in ("dynamic MatMul per channel", "ends float32", "static QDQ MatMul per channel"):
        assert way in said


def test_recordings_beyond_the_window_neither_calibrate_nor_stop_the_measurement(tmp_path: Path) -> None:
    """Whose rows are up to 30 s long, as many corpora's are: a test set's are cut, the others left out."""
    made = convert.exported_nemo(archive_of(tmp_path / "model.nemo", random_conformer(FAST)))
    longer = np.tile(chirps(1)[0], 40)[: round((MAX_WINDOW_S + 5.0) * 16_000)]
    manifest = write_corpus(tmp_path, [longer, *chirps(3)])
    card = Card("A random network", ("en",), Source(title="tests", url=""), "Apache-2.0")
    gate = Gate(min_speed=0.0, max_wer_increase=9.0)
    recordings = Recordings(manifest, manifest, test=manifest)
    bundle = publish(made, "en-random", tmp_path / "models", card, recordings, gate=gate)
    assert [found.utterances for found in bundle.manifest.evaluation] == [2, 2]
    (tmp_path / "long.jsonl").write_text(manifest.read_text(encoding="utf-8").splitlines()[0])
    with pytest.raises(EmptyManifestError, match="no recording of at most 20 s"):
        publish(made, "en-none", tmp_path, card, Recordings(tmp_path / "long.jsonl", manifest), gate=gate)


def test_the_gate_holds_for_it_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small random network is not faster in INT8, so the command refuses and writes nothing."""
    archive = archive_of(tmp_path / "model.nemo", random_conformer(FAST))
    manifest = str(write_corpus(tmp_path, chirps(4)))
    arguments = ["nemo", str(archive), "--name", "en-random", "--models-dir", str(tmp_path / "models")]
    assert convert.main([*arguments, "--language", "en", "--calibration", manifest]) == 2
    said = capsys.readouterr().err
    assert "INT8 is refused" in said
    assert "Without --calibration it is converted in float32." in said
    assert not (tmp_path / "models" / "en-random").exists()
    assert convert.main([*arguments, "--language", "en", "--calibration", str(tmp_path / "none")]) == 2
    assert "no such manifest" in capsys.readouterr().err
    assert convert.main(["nemo", str(tmp_path), "--name", "en-random", "--language", "en"]) == 2
    assert f"{tmp_path}: no such file of weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--test", "M"], ["--validation", "M"], ["--texts", "M"], ["--no-float"], ["--four-bits"]]
)
def test_what_needs_recordings_is_not_ignored_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    archive = archive_of(tmp_path / "model.nemo", random_conformer(FAST))
    arguments = ["nemo", str(archive), "--name", "en-random", "--models-dir", str(tmp_path / "models")]
    assert convert.main([*arguments, "--language", "en", *options]) == 2
    assert f"{options[0]} needs --calibration" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_texts_that_are_not_there_are_named_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = archive_of(tmp_path / "model.nemo", random_conformer(FAST))
    manifest = str(write_corpus(tmp_path, chirps(1)))
    given = ["nemo", str(archive), "--name", "en-random", "--models-dir", str(tmp_path), "--language", "en"]
    assert convert.main([*given, "--calibration", manifest, "--texts", str(tmp_path / "none.txt")]) == 2
    said = capsys.readouterr()
    assert "none.txt: no such manifest or text" in said.err
    assert said.out == "", "nothing was exported"


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [
        ((SPACE_MARK, "a", "b"), ("nfc", "lowercase")),
        ((SPACE_MARK, "A", "B"), ("nfc", "uppercase")),
        (("\u2581да", "\u2581Нет", "."), ("nfc",)),
        (("1", "2"), ("nfc", "lowercase")),
        (("<unk>", "\u2581A"), ("nfc", "uppercase")),
    ],
)
def test_casing_is_that_of_the_tokens(tokens: tuple[str, ...], steps: tuple[str, ...]) -> None:
    special = frozenset(index for index, token in enumerate(tokens) if token == "<unk>")
    vocabulary = Vocabulary((*tokens, BLANK_TOKEN), len(tokens), "wordpiece", special)
    assert casing_steps(vocabulary) == steps
