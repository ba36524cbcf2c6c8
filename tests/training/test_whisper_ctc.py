"""Whisper with a CTC head: parity with `transformers`, true lengths, the published checkpoint's form."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperFeatureExtractor, WhisperModel, WhisperProcessor

from api.bundle import load_bundle, verify_bundle
from training import convert
from training.config import load_config
from training.data.manifest import Utterance, write_manifest
from training.errors import CheckpointError, ConfigError
from training.inference import compare, cpu_session, run_graph
from training.loop.run_folder import RunFolder
from training.recipes.rehearsal import tiny_wav2vec2, tiny_whisper
from training.recipes.whisper_ctc.export import export_graph
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc, read_openai, sinusoids
from training.recipes.whisper_ctc.recipe import WhisperCtcRecipe
from training.restricted_pickle import Inert, load_state_dict
from training.stages.command import main
from training.stages.prepare import prepare
from training.tokenizer import ByteLevelCodec, load_tokenizer

LENGTHS = (16_000, 23_456, 4_001, 400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper"), "vi")


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(0, 0.1, length).astype(np.float32) for length in LENGTHS]


def padded(recordings: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    waveform = torch.full((len(recordings), max(LENGTHS) + 777), 0.5)
    for row, samples in enumerate(recordings):
        waveform[row, : len(samples)] = torch.from_numpy(samples)
    return waveform, torch.tensor(LENGTHS)


def network(base: Path, *, fixed: bool) -> tuple[WhisperCtc, Any]:
    model = WhisperModel.from_pretrained(base).eval()
    torch.manual_seed(1)
    made = WhisperCtc(EncoderConfig.from_transformers(model.config), 50, fixed=fixed).eval()
    made.encoder.load_state_dict(model.encoder.state_dict())
    return made, model


@pytest.mark.parametrize("fixed", [True, False])
def test_features_are_whispers(base: Path, recordings: list[np.ndarray], fixed: bool) -> None:
    made, _ = network(base, fixed=fixed)
    expected = WhisperFeatureExtractor()(recordings, sampling_rate=16_000, return_tensors="np").input_features
    features, counts = made.frontend(*padded(recordings))
    assert counts.tolist() == [100, 147, 26, 3]
    for row, count in enumerate(counts.tolist()):
        own = 3_000 if fixed else count
        np.testing.assert_allclose(features[row, :own].numpy(), expected[row].T[:own], atol=1e-4)


def test_fixed_mode_is_whispers_encoder(base: Path, recordings: list[np.ndarray]) -> None:
    made, model = network(base, fixed=True)
    features = WhisperFeatureExtractor()(recordings, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.inference_mode():
        expected = model.encoder(features).last_hidden_state
        found, _ = made.encoder(*made.frontend(*padded(recordings)), fixed=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fixed", [True, False])
def test_graph_agrees_and_batched_equals_alone(base: Path, recordings: list[np.ndarray], fixed: bool) -> None:
    made, _ = network(base, fixed=fixed)
    graph = export_graph(made)
    onnx.checker.check_model(graph)
    session = cpu_session(graph.SerializeToString())
    with torch.inference_mode():
        log_probs, counts = made(*padded(recordings))
    expected = [row[:count].numpy() for row, count in zip(log_probs, counts.tolist(), strict=True)]
    batched = run_graph(session, recordings)
    alone = [run_graph(session, [samples])[0] for samples in recordings]
    assert compare(expected, batched).worst_log_prob < 1e-4
    assert compare(alone, batched).worst_log_prob < 1e-4
    assert [len(row) for row in alone] == [50, 74, 13, 2]


def test_true_length_costs_less(base: Path, recordings: list[np.ndarray]) -> None:
    made, _ = network(base, fixed=False)
    with torch.inference_mode():
        log_probs, _ = made(*padded(recordings))
    assert log_probs.shape[1] < 100, "1.5 s of frames, not 30"


class Processor:
    """Pickled inside the published checkpoint; running it would leave a file."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (self.trace,)


def published(base: Path, path: Path, extra: Any) -> dict[str, torch.Tensor]:
    """A Lightning checkpoint in the form of `best-val_wer=0.3986.ckpt`."""
    made, model = network(base, fixed=False)
    size = len(load_tokenizer(str(base)))
    made = WhisperCtc(EncoderConfig.from_transformers(model.config), size, hidden=40)
    made.encoder.load_state_dict(model.encoder.state_dict())
    state = {k: v for k, v in made.state_dict().items() if k.startswith(("encoder.", "ctc_head."))}
    content = {
        "epoch": 11,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "hyper_parameters": {"processor": extra, "lr": 1e-4},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3986)}},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4}]}],
    }
    torch.save(content, path)
    return state


def test_pickled_objects_are_not_run(base: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    path = tmp_path / "best-val_wer=0.3986.ckpt"
    state = published(base, path, Processor(str(trace)))
    loaded = load_state_dict(path)
    assert not trace.exists()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    torch.load(path, weights_only=False)
    assert trace.exists(), "the same file does run code when it is loaded carelessly"


def test_a_real_processor_inside_is_inert(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    processor = WhisperProcessor(WhisperFeatureExtractor(), load_tokenizer(str(base)))
    state = published(base, path, processor)
    assert set(load_state_dict(path)) == set(state)


@pytest.mark.filterwarnings("ignore:.*TorchScript")
def test_a_program_in_place_of_weights_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.ckpt"
    published(base, path, None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("best/constants.pkl", pickle.dumps(()))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(CheckpointError, match=r"best\.ckpt: .*which is a program"):
        load_state_dict(path)


def test_placeholder_takes_everything() -> None:
    thing = Inert(1, two=2)
    thing[0] = thing
    thing.append(1)
    thing.extend([1])
    thing.add(1)
    assert isinstance(thing("call"), Inert)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"state_dict": 3})])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        load_state_dict(path)


def test_special_tokens_are_dropped_by_id(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    codec = ByteLevelCodec(tokenizer)
    vocabulary = codec.vocabulary
    text = "một đỏ hai"
    ids = codec.encode(text)
    control = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|vi|>", "<|notimestamps|>"])
    assert vocabulary.decode([*control, *ids, control[0]]) == text
    assert vocabulary.blank_id == tokenizer.pad_token_id
    assert vocabulary.tokens[vocabulary.blank_id] == "<blank>"
    assert vocabulary.decode(codec.encode("<")) == "<", "nothing is cut by characters"


def test_more_outputs_than_tokens(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    vocabulary = ByteLevelCodec(tokenizer, outputs=len(tokenizer) + 3).vocabulary
    assert len(vocabulary) == len(tokenizer) + 3
    assert vocabulary.decode([len(tokenizer) + 1]) == ""
    with pytest.raises(CheckpointError, match="blank id"):
        ByteLevelCodec(tokenizer, outputs=100)


def test_a_folder_without_its_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    """`transformers` makes an empty tokenizer of it, and training would learn from empty texts."""
    folder = shutil.copytree(base, tmp_path / "base")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"base: the tokenizer lacks 256 of 256 bytes; tokenizer\.json"):
        ByteLevelCodec(load_tokenizer(str(folder)))


CONFIG = """
name: vi-published
language: vi
data: {{manifest: {manifest}, fractions: [0.6, 0.2, 0.2]}}
model: {{base: {base}, checkpoint: {checkpoint}}}
benchmark: {{clip_s: 1, repeats: 1, max_wer_loss: 1}}
bundle: {{licence: BSD-3-Clause}}
"""


def test_published_checkpoint_becomes_a_bundle(
    base: Path, tmp_path: Path, corpus: Callable[[str], Path]
) -> None:
    checkpoint = tmp_path / "best-val_wer=0.3986.ckpt"
    state = published(base, checkpoint, Processor(str(tmp_path / "was_run")))
    config, folder = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG.format(manifest=corpus("vi"), base=base, checkpoint=checkpoint))
    for stage in ("convert", "export", "publish"):
        assert main(WhisperCtcRecipe, [stage, "--config", str(config), "--run", str(folder)]) == 0
    bundle = verify_bundle(folder / "bundle", "vi-published")
    assert bundle.manifest.vocabulary.size == state["ctc_head.3.weight"].shape[0]
    assert not (tmp_path / "was_run").exists()


def test_a_checkpoint_that_is_not_there_is_one_line(
    base: Path, tmp_path: Path, corpus: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(manifest=corpus("vi"), base=base, checkpoint="none.ckpt"))
    assert main(WhisperCtcRecipe, ["convert", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert "none.ckpt: no such checkpoint" in capsys.readouterr().err


def test_recordings_beyond_30_seconds_are_dropped(base: Path, tmp_path: Path) -> None:
    """Whisper has no positions for them, whatever the configuration allows."""
    rows = []
    for index, seconds in enumerate((1.0, 1.0, 1.0, 31.0)):
        audio = tmp_path / f"{index}.wav"
        soundfile.write(audio, np.random.default_rng(index).normal(0, 0.1, int(seconds * 16_000)), 16_000)
        rows.append(Utterance(audio, "một"))
    config = tmp_path / "config.yaml"
    manifest = write_manifest(tmp_path / "manifest.jsonl", rows)
    config.write_text(CONFIG.format(manifest=manifest, base=base, checkpoint="none.ckpt"))
    changes = ["data.max_duration_s=60", "model.checkpoint=null"]
    parts = prepare(WhisperCtcRecipe(load_config(config, changes)), RunFolder(tmp_path / "run"))
    assert sum(len(part) for part in parts.values()) == 3


def test_a_checkpoint_of_another_network_is_refused(
    base: Path, tmp_path: Path, corpus: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, config = tmp_path / "other.ckpt", tmp_path / "config.yaml"
    torch.save({"state_dict": {"decoder.weight": torch.zeros(1)}}, checkpoint)
    config.write_text(CONFIG.format(manifest=corpus("vi"), base=base, checkpoint=checkpoint))
    assert main(WhisperCtcRecipe, ["convert", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert "ctc_head.0.weight is missing" in capsys.readouterr().err


def test_a_converted_checkpoint_keeps_the_capitals_of_hotwords(base: Path, tmp_path: Path) -> None:
    """Its bytes spell both cases, and nobody says that it was taught one of them."""
    folder = shutil.copytree(base, tmp_path / "base")
    published(base, folder / "best.ckpt", None)
    arguments = ["whisper", str(folder / "best.ckpt"), "--name", "vi-converted", "--language", "vi"]
    assert convert.main([*arguments, "--models-dir", str(tmp_path / "models")]) == 0
    manifest = load_bundle(tmp_path / "models", "vi-converted").manifest
    assert manifest.text_normalisation == ("nfc",)


def test_a_configuration_of_a_smaller_network_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half an encoder would make a bundle that hears nothing, and PyTorch and ONNX would agree on it."""
    folder = shutil.copytree(base, tmp_path / "base")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "encoder_layers": 1}))
    published(base, folder / "best.ckpt", None)
    arguments = ["whisper", str(folder / "best.ckpt"), "--name", "half", "--language", "vi"]
    assert convert.main([*arguments, "--models-dir", str(tmp_path / "models")]) == 2
    assert "encoder.layers.1.self_attn.q_proj.weight: the network has no such" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("missing", "fits"), [("encoder.layers.1.fc2.weight", False), ("decoder.layers.0.fc1.weight", True)]
)
def test_a_base_that_lacks_a_weight_of_the_encoder_is_refused(
    base: Path, tmp_path: Path, missing: str, fits: bool
) -> None:
    """`transformers` would fill it with random numbers."""
    folder, config = shutil.copytree(base, tmp_path / "base"), tmp_path / "config.yaml"
    state = load_file(folder / "model.safetensors")
    del state[f"model.{missing}"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.write_text(CONFIG.format(manifest="none", base=folder, checkpoint="null"))
    recipe = WhisperCtcRecipe(load_config(config))
    codec = recipe.codec()
    with nullcontext() if fits else pytest.raises(CheckpointError, match=f"base: its weights lack {missing}"):
        recipe.network(codec)


def test_a_base_of_another_family_is_one_line(
    tmp_path: Path, corpus: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = tiny_wav2vec2(tmp_path / "base"), tmp_path / "config.yaml"
    config.write_text(CONFIG.format(manifest=corpus("vi"), base=folder, checkpoint="null"))
    assert main(WhisperCtcRecipe, ["prepare", "--config", str(config), "--run", str(tmp_path / "run")]) == 2
    assert f"error: {folder}: no AutoTokenizer there" in capsys.readouterr().err


# --- from random weights -----------------------------------------------------------------------------

FROM_RANDOM = """
name: ru-from-random
language: ru
data: {{manifest: {manifest}, fractions: [0.6, 0.2, 0.2]}}
model: {{shape: {{width: 32, layers: 1, heads: 2, inner: 64}}}}
training: {{epochs: 1, workers: 0, threads: 1}}
benchmark: {{clip_s: 1, repeats: 1, max_wer_loss: 1}}
bundle: {{licence: MIT}}
"""


def from_random(folder: Path, manifest: Path, *changes: str) -> WhisperCtcRecipe:
    path = folder / "random.yaml"
    path.write_text(FROM_RANDOM.format(manifest=manifest))
    return WhisperCtcRecipe(load_config(path, changes))


def test_positions_are_whispers(base: Path) -> None:
    theirs = WhisperModel.from_pretrained(base).encoder.embed_positions.weight
    torch.testing.assert_close(sinusoids(*theirs.shape), theirs, atol=2e-4, rtol=0)
    assert torch.equal(WhisperCtc(EncoderConfig(), 5).encoder.embed_positions.weight, sinusoids(1500, 384))


def test_a_shape_starts_from_random_weights_that_all_learn(tmp_path: Path) -> None:
    recipe = from_random(tmp_path, tmp_path / "manifest.jsonl")
    codec = recipe.codec()
    assert codec.vocabulary.kind == "chars"
    network = recipe.network(codec)
    still = {name for name, value in network.named_parameters() if not value.requires_grad}
    assert still == {"encoder.embed_positions.weight"}


def test_a_shape_goes_from_recordings_to_a_bundle_and_on_in_another_run(
    tmp_path: Path, corpus: Callable[[str], Path]
) -> None:
    from_random(tmp_path, corpus("ru"))
    arguments = ["--config", str(tmp_path / "random.yaml"), "--run", str(tmp_path / "first")]
    assert main(WhisperCtcRecipe, ["all", *arguments]) == 0
    trained = load_file(tmp_path / "first" / "weights.safetensors")
    changes = ("model.checkpoint=first/weights.safetensors", "model.length=fixed30")
    padded = from_random(tmp_path, corpus("ru"), *changes)
    network = padded.network(padded.codec())
    assert all(torch.equal(value, trained[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("model.shape.heads=3", "width 32 is not a multiple of 3 heads"),
        ("model.shape.kernel=3", r"model: shape\.kernel"),
    ],
)
def test_a_shape_that_cannot_be_is_named(tmp_path: Path, change: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_random(tmp_path, tmp_path / "manifest.jsonl", change)


def test_weights_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    changes = ["model.checkpoint=weights.safetensors"]
    recipe = from_random(tmp_path, tmp_path / "manifest.jsonl", *changes)
    with pytest.raises(CheckpointError, match="no weights can be read"):
        recipe.network(recipe.codec())


OPENAI = {
    "layers": "blocks",
    "embed_positions.weight": "positional_embedding",
    "self_attn_layer_norm": "attn_ln",
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "final_layer_norm": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
}


def openai_checkpoint(path: Path, encoder: dict[str, torch.Tensor]) -> Path:
    """A file in the form of OpenAI's: half precision, other names, a decoder, shapes under `dims`."""
    state = {"decoder.ln.weight": torch.ones(2)}
    for name, value in encoder.items():
        theirs = "ln_post" + name[len("layer_norm") :] if name.startswith("layer_norm.") else name
        for ours, other in OPENAI.items():
            theirs = theirs.replace(ours, other)
        state[f"encoder.{theirs}"] = value.half()
    torch.save({"dims": {"n_audio_state": 128}, "model_state_dict": state}, path)
    return path


def test_openais_own_file_is_a_base_whose_outputs_are_characters(
    tmp_path: Path, corpus: Callable[[str], Path]
) -> None:
    config = EncoderConfig(bands=80, width=128, layers=3, heads=2, inner=96, positions=1500)
    encoder = WhisperCtc(config, 5).encoder.state_dict()
    openai_checkpoint(tmp_path / "small.pt", encoder)
    text = FROM_RANDOM.format(manifest=corpus("ru"))
    (tmp_path / "openai.yaml").write_text(
        re.sub("(?m)^model: .*$", "model: {base: small.pt, frozen_encoder: false}", text)
    )
    recipe = WhisperCtcRecipe(load_config(tmp_path / "openai.yaml", []))
    network = recipe.network(recipe.codec())
    assert isinstance(network, WhisperCtc)
    assert network.encoder.config == config
    assert recipe.codec().vocabulary.kind == "chars"
    for name, value in network.encoder.state_dict().items():
        exact = name == "embed_positions.weight"  # sinusoids, whatever the file rounded them to
        assert torch.equal(value, encoder[name] if exact else encoder[name].half().float()), name
    arguments = ["--config", str(tmp_path / "openai.yaml"), "--run", str(tmp_path / "run")]
    assert main(WhisperCtcRecipe, ["all", *arguments]) == 0


@pytest.mark.parametrize(
    ("model", "fixed"),
    [
        ("base: any", True),
        ("base: any, frozen_encoder: false", False),
        ("shape: {width: 32, layers: 1, heads: 2, inner: 64}", False),
        ("base: any, length: 'true'", False),
        ("base: any, frozen_encoder: false, length: fixed30", True),
    ],
)
def test_a_frozen_encoder_hears_what_it_was_trained_on(tmp_path: Path, model: str, fixed: bool) -> None:
    text = FROM_RANDOM.format(manifest=tmp_path / "manifest.jsonl")
    (tmp_path / "config.yaml").write_text(re.sub("(?m)^model: .*$", f"model: {{{model}}}", text))
    assert WhisperCtcRecipe(load_config(tmp_path / "config.yaml", [])).settings.fixed is fixed


def test_a_file_of_another_kind_is_no_base(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {"encoder.conv1.weight": torch.ones(4, 3, 3)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: not a Whisper checkpoint of OpenAI's"):
        read_openai(tmp_path / "other.pt")
