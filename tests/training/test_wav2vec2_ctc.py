"""wav2vec2 of the XLSR kind: parity with `transformers`, lengths, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)
from transformers import Wav2Vec2Config as TheirConfig

from training.config import load_config
from training.convert import wav2vec2_vocabulary
from training.errors import CheckpointError, ConfigError
from training.inference import compare, cpu_session, run_graph
from training.pretrained import fill
from training.recipes.rehearsal import tiny_wav2vec2
from training.recipes.wav2vec2_ctc.export import export_graph
from training.recipes.wav2vec2_ctc.model import Wav2Vec2Config, Wav2Vec2Ctc, from_published
from training.recipes.wav2vec2_ctc.recipe import Wav2Vec2Recipe
from training.stages.command import main
from training.transformer import EncoderLayer, key_bias
from training.transformer_quantize import dynamic, static

LENGTHS = (16_000, 23_456, 4_001, 400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wav2vec2(tmp_path_factory.mktemp("wav2vec2"))


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.normal(0.02, 0.1, length).astype(np.float32) for length in LENGTHS]


@pytest.fixture(scope="module")
def network(base: Path) -> Wav2Vec2Ctc:
    theirs = Wav2Vec2Model.from_pretrained(base)
    torch.manual_seed(1)
    made = Wav2Vec2Ctc(Wav2Vec2Config.from_transformers(theirs.config), 35, mask_share=0.3)
    fill(made, from_published(theirs.state_dict()), new=("head.",), optional=("masked",))
    return made.eval()


def padded(recordings: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    waveform = torch.full((len(recordings), max(LENGTHS) + 777), 0.5)
    for row, samples in enumerate(recordings):
        waveform[row, : len(samples)] = torch.from_numpy(samples)
    return waveform, torch.tensor(LENGTHS)


def ours(network: Wav2Vec2Ctc, recordings: list[np.ndarray]) -> list[np.ndarray]:
    with torch.inference_mode():
        log_probs, counts = network(*padded(recordings))
    return [row[:count].numpy() for row, count in zip(log_probs, counts.tolist(), strict=True)]


def test_is_transformers_network(base: Path, network: Wav2Vec2Ctc, recordings: list[np.ndarray]) -> None:
    theirs = Wav2Vec2Model.from_pretrained(base).eval()
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    batch = extractor(recordings, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = theirs(batch.input_values, attention_mask=batch.attention_mask).last_hidden_state
        expected = torch.log_softmax(network.head(hidden), dim=-1)
    found = ours(network, recordings)
    assert [len(row) for row in found] == [49, 73, 12, 1]
    trimmed = [row[: len(own)].numpy() for row, own in zip(expected, found, strict=True)]
    assert compare(trimmed, found).worst_log_prob < 1e-4


def test_reads_a_fine_tuned_checkpoint(base: Path, network: Wav2Vec2Ctc) -> None:
    theirs = Wav2Vec2ForCTC(TheirConfig.from_pretrained(base, vocab_size=35))
    state = from_published(theirs.state_dict())
    made = Wav2Vec2Ctc(network.config, 35)
    fill(made, state)
    assert torch.equal(made.head.weight, theirs.lm_head.weight)
    feed_forward = theirs.wav2vec2.encoder.layers[0].feed_forward
    assert torch.equal(made.layers[0].fc1.weight, feed_forward.intermediate_dense.weight)
    assert "head.weight" in state


def test_graph_agrees_and_batched_equals_alone(network: Wav2Vec2Ctc, recordings: list[np.ndarray]) -> None:
    graph = export_graph(network)
    onnx.checker.check_model(graph)
    session = cpu_session(graph.SerializeToString())
    batched = run_graph(session, recordings)
    alone = [run_graph(session, [samples])[0] for samples in recordings]
    assert compare(ours(network, recordings), batched).worst_log_prob < 1e-4
    assert compare(alone, batched).worst_log_prob < 1e-4


def test_int8_stays_close_and_static_is_exact_in_batches(
    network: Wav2Vec2Ctc, recordings: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(export_graph(network), path)
    expected = run_graph(cpu_session(path), recordings)
    sizes = [path.stat().st_size]
    for made in (dynamic(path, tmp_path / "d.onnx"), static(path, tmp_path / "s.onnx", recordings[:2])):
        session = cpu_session(made)
        found = run_graph(session, recordings)
        assert compare(expected, found).worst_posterior < 0.1
        operators = {node.op_type for node in onnx.load(made).graph.node}
        assert operators & {"MatMulInteger", "QuantizeLinear", "DynamicQuantizeLinear"}
        sizes.append(made.stat().st_size)
    alone = [run_graph(session, [samples])[0] for samples in recordings]
    assert compare(alone, found).worst_log_prob < 1e-4, "static scales do not see the neighbours"
    assert max(sizes[1:]) < sizes[0]


def test_training_keeps_no_attention_scores() -> None:
    """What a layer keeps for the backward pass grows with the frames, not with their square."""

    def kept_bytes(frames: int) -> int:
        layer = EncoderLayer(32, 4, 64)
        weights = {parameter.data_ptr() for parameter in layer.parameters()}
        sizes: dict[int, int] = {}
        alive = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(
                torch.randn(2, frames, 32, requires_grad=True), key_bias(torch.tensor([frames] * 2), frames)
            )
        return sum(sizes.values())

    assert kept_bytes(400) < 2.2 * kept_bytes(200)


def test_masks_while_training_only(network: Wav2Vec2Ctc, recordings: list[np.ndarray]) -> None:
    waveform, lengths = padded(recordings)
    with torch.inference_mode():
        first, second = (network(waveform, lengths)[0] for _ in range(2))
        network.train()
        masked = network(waveform, lengths)[0]
        network.eval()
    assert torch.equal(first, second)
    assert not torch.allclose(first, masked, atol=1e-3)


def test_published_shape() -> None:
    config = Wav2Vec2Config()
    assert (config.stride_samples, config.min_samples) == (320, 400)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm is False, not True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim is 16, not None"),
        ({"add_adapter": True}, "add_adapter is True, not False"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', not 'gelu'"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation is 'relu', not 'gelu'"),
    ],
)
def test_other_kinds_are_refused(base: Path, change: dict[str, object], problem: str) -> None:
    theirs = TheirConfig.from_pretrained(base, **change)
    with pytest.raises(CheckpointError, match=f"only the XLSR kind is known; of this checkpoint {problem}"):
        Wav2Vec2Config.from_transformers(theirs)


def test_tensors_without_a_place_are_refused_unless_pre_training_left_them(base: Path) -> None:
    """An adapter that is dropped makes another network, and PyTorch and ONNX would agree on it."""
    theirs = Wav2Vec2ForPreTraining(TheirConfig.from_pretrained(base))
    state = theirs.state_dict()
    assert {name.partition(".")[0] for name in state} > {"quantizer", "project_hid", "project_q"}
    kept = from_published(state)
    assert set(kept) == set(from_published(theirs.wav2vec2.state_dict()))
    adapter = "encoder.layers.0.adapter_layer.norm.weight"
    with pytest.raises(CheckpointError, match=f"{adapter}: the XLSR kind has no such tensor"):
        from_published({**state, f"wav2vec2.{adapter}": torch.zeros(1)})


def test_a_base_of_another_family_or_with_missing_weights_is_refused(base: Path, tmp_path: Path) -> None:
    """`transformers` would read it, and fill what it does not find with random numbers."""

    def problem(folder: Path) -> str:
        recipe = from_random(tmp_path, tmp_path / "manifest.jsonl", f"model={{base: {folder}}}")
        with pytest.raises(CheckpointError) as refused:
            recipe.network(recipe.codec())
        return str(refused.value).removeprefix(str(folder))

    shape = {**TheirConfig.from_pretrained(base).to_dict(), "vocab_size": 35}
    shape.pop("model_type")
    WavLMModel(WavLMConfig(**shape)).save_pretrained(tmp_path / "wavlm")
    assert problem(tmp_path / "wavlm") == ": config.json says model_type 'wavlm', expected 'wav2vec2'"
    HubertForCTC(HubertConfig(**shape)).save_pretrained(tmp_path / "hubert")
    assert ": its weights lack encoder.layer_norm.bias (" in problem(tmp_path / "hubert")
    half = shutil.copytree(base, tmp_path / "half")
    state = load_file(half / "model.safetensors")
    del state["encoder.layers.1.feed_forward.output_dense.weight"]
    save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    assert problem(half).endswith("lack encoder.layers.1.feed_forward.output_dense.weight (1 in all)")
    (half / "config.json").unlink()
    assert problem(half) == ": no config.json there"


def test_hubert_is_the_same_network(base: Path, tmp_path: Path) -> None:
    shape = TheirConfig.from_pretrained(base).to_dict()
    shape.pop("model_type")
    theirs = HubertModel(HubertConfig(**shape)).eval()
    theirs.save_pretrained(tmp_path / "hubert")
    changes = f"model={{base: {tmp_path / 'hubert'}}}"
    recipe = from_random(tmp_path, tmp_path / "manifest.jsonl", changes)
    network = recipe.network(recipe.codec()).eval()
    waveform = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (1, 16_000)).astype(np.float32))
    waveform = (waveform - waveform.mean()) / waveform.std(correction=0)
    with torch.inference_mode():
        expected = torch.log_softmax(network.head(theirs(waveform).last_hidden_state), dim=-1)
        found, _ = network(waveform, torch.tensor([16_000]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("vocabulary", "problem"),
    [
        ({"eng": {"<pad>": 0, "a": 1}, "kir": {"<pad>": 0, "a": 1}}, "'eng' has dict, no id; where it holds"),
        ({"<pad>": 0, "<s>": 1}, "names no character for any of the 3 outputs"),
    ],
)
def test_a_vocabulary_without_characters_is_refused(
    tmp_path: Path, vocabulary: dict[str, object], problem: str
) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match=rf"vocab\.json: {problem}"):
        wav2vec2_vocabulary(tmp_path, 3, {"pad_token_id": 0})


def test_missing_and_foreign_tensors_are_named(base: Path, network: Wav2Vec2Ctc) -> None:
    state = from_published(Wav2Vec2Model.from_pretrained(base).state_dict())
    fresh, new = Wav2Vec2Ctc(network.config, 35), ("head.",)
    with pytest.raises(CheckpointError, match=r"projection\.weight is missing"):
        fill(fresh, {name: value for name, value in state.items() if name != "projection.weight"}, new=new)
    with pytest.raises(CheckpointError, match=r"projection\.weight has shape \(1,\)"):
        fill(fresh, {**state, "projection.weight": torch.zeros(1)}, new=new)
    with pytest.raises(CheckpointError, match=r"layers\.2\.fc1\.bias: the network has no such tensor"):
        fill(fresh, {**state, "layers.2.fc1.bias": torch.zeros(1)}, new=new)


# --- from random weights -----------------------------------------------------------------------------

FROM_RANDOM = """
name: ru-from-random
language: ru
data: {{manifest: {manifest}, fractions: [0.6, 0.2, 0.2]}}
model:
  shape: {{width: 32, layers: 1, heads: 2, inner: 64, channels: [8, 8, 8, 8, 8, 8, 8], position_groups: 4}}
training: {{epochs: 1, workers: 0, threads: 1}}
benchmark: {{clip_s: 1, repeats: 1, max_wer_loss: 1}}
bundle: {{licence: MIT}}
"""


def from_random(folder: Path, manifest: Path, *changes: str) -> Wav2Vec2Recipe:
    path = folder / "random.yaml"
    path.write_text(FROM_RANDOM.format(manifest=manifest))
    return Wav2Vec2Recipe(load_config(path, changes))


def test_a_shape_goes_from_random_weights_to_a_bundle_and_on_in_another_run(
    tmp_path: Path, corpus: Callable[[str], Path]
) -> None:
    recipe = from_random(tmp_path, corpus("ru"))
    network = recipe.network(recipe.codec())
    assert all(value.requires_grad for value in network.parameters())
    arguments = ["all", "--config", str(tmp_path / "random.yaml"), "--run", str(tmp_path / "run")]
    assert main(Wav2Vec2Recipe, arguments) == 0
    assert (tmp_path / "run" / "bundle" / "ru-from-random" / "model.onnx").is_file()
    further = from_random(
        tmp_path, corpus("ru"), "model.checkpoint=run/weights.safetensors", "model.dropout=0"
    )
    trained = load_file(tmp_path / "run" / "weights.safetensors")
    state = further.network(further.codec()).state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.items())


def test_facts_are_those_of_the_shape(tmp_path: Path) -> None:
    strides = "model.shape.strides=[5, 2, 2, 2, 2, 2, 4]"
    facts = from_random(tmp_path, tmp_path / "manifest.jsonl", strides).facts()
    assert facts.frame_stride_s == pytest.approx(0.04)


def test_a_recording_has_room_for_as_many_tokens_as_it_has_frames(tmp_path: Path) -> None:
    recipe = from_random(tmp_path, tmp_path / "manifest.jsonl")
    network = recipe.network(recipe.codec())
    lengths = list(range(400, 1500, 7))
    assert [recipe.room(length) for length in lengths] == network.frame_lengths(
        torch.tensor(lengths)
    ).tolist()
    assert recipe.room(399) == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("model.shape.heads=3", "width 32 is not a multiple of 3 heads"),
        ("model.shape.position_groups=5", "width 32 is not a multiple of 5 position_groups"),
        ("model.shape.channels=[8, 8]", "one number per convolution each"),
        ("model.shape.kernel=3", r"model: shape\.kernel"),
        ("model={checkpoint: weights.safetensors}", "checkpoint needs the shape it has"),
    ],
)
def test_a_shape_that_cannot_be_is_named(tmp_path: Path, change: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        from_random(tmp_path, tmp_path / "manifest.jsonl", change)
