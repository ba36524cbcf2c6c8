"""Whisper with its decoder: what reading a large corpus costs, greedy search, how the experiment scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from onnx import TensorProto, helper
from torch import Tensor

from api.ctc import greedy
from training.config import load_config
from training.data.manifest import read_manifest
from training.errors import ConfigError
from training.graph import GraphBuilder
from training.inference import compare, cpu_session, run_graph
from training.recipes.rehearsal import tiny_whisper
from training.recipes.whisper_seq2seq.model import Repeats, WhisperSeq2Seq, least_repeats
from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe
from training.recipes.whisper_seq2seq.scoring import score
from training.recipes.whisper_seq2seq.searching import _add_mostly_alike
from training.torch_inference import run_torch

CONFIG = """
name: az-tiny
language: az
data: {{manifest: {manifest}}}
model: {{base: {base}}}
training: {{max_batch_s: 90, workers: 0, device: cpu}}
bundle: {{licence: Apache-2.0}}
"""


@pytest.fixture
def recipe(corpus: Callable[[str], Path], tmp_path: Path) -> WhisperSeq2SeqRecipe:
    base = tiny_whisper(tmp_path / "base", "az")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(manifest=corpus("az"), base=base))
    return WhisperSeq2SeqRecipe(load_config(config))


def test_the_base_is_read_once(recipe: WhisperSeq2SeqRecipe, tmp_path: Path) -> None:
    """Room is asked for every recording of a corpus; the hub must not be."""
    room = recipe.room(160_000)
    (tmp_path / "base" / "config.json").unlink()
    assert recipe.room(160_000) == room


def test_greedy_search_takes_the_logits_after_the_last_token(recipe: WhisperSeq2SeqRecipe) -> None:
    network = recipe.network(recipe.codec()).eval()
    tokens, audio = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.randn(2, 10, 64)
    with torch.inference_mode():
        every = network.decoder(tokens, audio, None)
        last = network.decoder(tokens, audio, None, last=True)
    assert last.shape == (2, 1, every.shape[-1])
    torch.testing.assert_close(last[:, 0], every[:, -1])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_encoders_sinusoids_do_not_learn(recipe: WhisperSeq2SeqRecipe, frozen: bool) -> None:
    """As in transformers, whose encoder keeps its positions as they are."""
    settings = recipe.settings.model_copy(update={"frozen_encoder": frozen, "dropout": 0.5})
    recipe.settings = settings
    network = recipe.network(recipe.codec()).train()
    assert network.decoder.training
    assert network.encoder.training is not frozen, "a frozen one hears without dropout"
    learns = {name for name, parameter in network.encoder.named_parameters() if parameter.requires_grad}
    assert "embed_positions.weight" not in learns
    assert bool(learns) is not frozen
    assert network.decoder.embed_positions.weight.requires_grad, "the decoder's positions are learned ones"


def heard(network: WhisperSeq2Seq) -> list[list[int]]:
    """What greedy search finds in two noises; the graph has to find the same."""
    noises = [
        np.random.default_rng(seed).normal(0, 0.1, 16_000 + 8_000 * seed).astype("f4") for seed in (0, 1)
    ]
    batch = [torch.from_numpy(noise) for noise in noises]
    lengths = torch.tensor([len(noise) for noise in noises])
    with torch.inference_mode():
        steps, found, _ = network.generate(torch.nn.utils.rnn.pad_sequence(batch, batch_first=True), lengths)
    graph = run_graph(cpu_session(WhisperSeq2SeqRecipe.export(None, network)), noises)  # type: ignore[arg-type]
    assert compare(run_torch(network, noises), graph).worst_posterior < 1e-4
    said = [item[:count] for item, count in zip(steps.argmax(-1).tolist(), found.tolist(), strict=True)]
    collapsed = [greedy(item[None], np.array([len(item)]), network.prompt.end)[0] for item in graph]
    assert [one.token_ids.tolist() for one in collapsed] == said
    return said


def say(folder: Path, **values: object) -> None:
    """Change the checkpoint's generation configuration."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def prefer(network: WhisperSeq2Seq, token: int) -> None:
    """Make it the likeliest token everywhere."""
    row = network.decoder.embed_tokens.weight.data[token]
    network.decoder.layer_norm.bias.data += 100 * row / row.square().sum()


def test_what_a_checkpoint_suppresses_is_not_said(recipe: WhisperSeq2SeqRecipe, tmp_path: Path) -> None:
    token = recipe.codec().encode("a")[0]

    def with_token_likeliest() -> list[int]:
        network = recipe.network(recipe.codec()).eval()
        prefer(network, token)
        return heard(network)[0]

    assert set(with_token_likeliest()) == {token}
    beyond = 60_000  # as in a configuration for a larger vocabulary
    say(tmp_path / "base", begin_suppress_tokens=[token, beyond])
    first, *others = with_token_likeliest()
    assert first != token
    assert set(others) == {token}
    say(tmp_path / "base", suppress_tokens=[token, beyond])
    assert token not in with_token_likeliest()


def test_a_text_that_goes_round_in_a_loop_ends(recipe: WhisperSeq2SeqRecipe) -> None:
    """In the network and in the graph alike, each item of a batch by itself."""
    network = recipe.network(recipe.codec()).eval()
    prefer(network, recipe.codec().encode("a")[0])
    assert [len(item) for item in heard(network)] == [1, 1], "25 and 37 frames have room for 12 and 18"


@pytest.mark.parametrize(
    ("said", "loop"),
    [
        ([1, 2, 3, 4, 5, 6], 0),
        ([7] * 10, 0),
        ([7] * 11, 10),
        ([9, 8, *[1, 2] * 5], 0),
        ([9, 8, *[1, 2] * 6], 10),
        ([5, *list(range(20)) * 2], 0),
        ([5, *list(range(20)) * 3], 40),
        ([*list(range(33)) * 4], 0),
    ],
    ids=[
        "none",
        "ten equal",
        "eleven",
        "a pair five times",
        "six",
        "twice",
        "three times",
        "too long a phrase",
    ],
)
def test_what_is_a_loop(said: list[int], loop: int) -> None:
    repeats = Repeats.none(1, torch.device("cpu"))
    found = 0
    for token in said:
        repeats, length = repeats.after(torch.tensor([token]), least_repeats(torch.tensor([100])))
        found = int(length)
    assert found == loop


@pytest.mark.parametrize(("tokens", "loop"), [(6, 0), (7, 6)], ids=["six", "seven"])
def test_a_short_clip_has_no_time_for_many_repeats(tokens: int, loop: int) -> None:
    """A second holds twelve tokens; six of them being said again is a loop."""
    repeats, found = Repeats.none(1, torch.device("cpu")), 0
    for _ in range(tokens):
        repeats, length = repeats.after(torch.tensor([7]), least_repeats(torch.tensor([12])))
        found = int(length)
    assert found == loop


def test_english_only_checkpoints_get_no_language_and_no_task(
    corpus: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_whisper(tmp_path / "base", "en")
    say(base, is_multilingual=False)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(manifest=corpus("ru"), base=base))
    recipe = WhisperSeq2SeqRecipe(load_config(config, ["language=en"]))
    known = recipe.codec().tokenizer.get_vocab()
    start, quiet = known["<|startoftranscript|>"], known["<|notimestamps|>"]
    network = recipe.network(recipe.codec()).eval()
    assert network.prompt.ids == (start, quiet)
    assert all(heard(network))
    other = WhisperSeq2SeqRecipe(load_config(config, ["language=ru"]))
    codec = other.codec()
    with pytest.raises(ConfigError, match="English only, not ru"):
        other.network(codec)
    say(base, is_multilingual=True)
    assert recipe.network(recipe.codec()).prompt.ids == (
        start,
        known["<|en|>"],
        known["<|transcribe|>"],
        quiet,
    )


def test_published_weights_hear_padded_audio_unless_told_otherwise(recipe: WhisperSeq2SeqRecipe) -> None:
    """On their own lengths they repeat themselves: 179 % word errors in place of 28."""
    assert recipe.network(recipe.codec()).fixed


def test_scoring_normalises_and_keeps_the_order(
    recipe: WhisperSeq2SeqRecipe, corpus: Callable[[str], Path]
) -> None:
    rows = read_manifest(corpus("az"))
    codec = recipe.codec()
    network = recipe.network(codec).eval()
    by_length = {len(batch): text for batch, text in ((_samples(row.audio), row.text) for row in rows)}
    sizes = []

    def generate(waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the base would write: the right words with capitals and punctuation."""
        sizes.append(len(lengths))
        ids = [codec.encode(_as_published(by_length[length])) for length in lengths.tolist()]
        steps = torch.zeros(len(ids), max(map(len, ids)), len(codec.vocabulary))
        for item, own in enumerate(ids):
            steps[item, range(len(own)), own] = 1.0
        return steps, torch.tensor([len(own) for own in ids]), lengths

    network.generate = generate  # type: ignore[method-assign]
    rates, texts = score(recipe, network, rows)
    assert max(sizes) > 1, "recordings are scored in batches"
    assert texts == [by_length[len(_samples(row.audio))] for row in rows]
    assert rates["utterances"] == len(rows)


def _samples(path: Path) -> Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def _as_published(text: str) -> str:
    """Capital letters by Azerbaijani's rules, a comma and a full stop."""
    capital = text.replace("ı", "I").replace("i", "İ").upper()
    return capital.replace(" ", ", ", 1) + "."


@pytest.mark.parametrize(
    "values",
    [np.full(5, -1e9, np.float32), np.array([[0, 0, -1e9, 0], [-1e9, 0, -1e9, 0]], np.float32), np.eye(2)],
    ids=["all the same", "some differ", "as many as not"],
)
def test_what_is_mostly_alike_is_stored_as_what_differs(values: npt.NDArray[np.float32]) -> None:
    graph = GraphBuilder()
    name = _add_mostly_alike(graph, "constant", values.astype(np.float32))
    shown = helper.make_tensor_value_info(name, TensorProto.FLOAT, list(values.shape))
    made = helper.make_graph(graph.nodes, "constant", [], [shown], list(graph._constants.values()))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (found,) = cpu_session(model.SerializeToString()).run(None, {})
    np.testing.assert_array_equal(found, values)
    floats = sum(np.prod(t.dims) for t in made.initializer if t.data_type == TensorProto.FLOAT)
    assert floats <= np.sum(values != values.flat[1])
