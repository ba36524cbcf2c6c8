"""Whisper with its decoder: what reading a large corpus costs, greedy search, how the experiment scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from training.config import load_config
from training.data.manifest import read_manifest
from training.recipes.rehearsal import tiny_whisper
from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe
from training.recipes.whisper_seq2seq.scoring import score

CONFIG = """
name: az-tiny
language: az
data: {{manifest: {manifest}}}
model: {{base: {base}}}
training: {{max_batch_s: 10, workers: 0, device: cpu}}
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
    settings = recipe.settings.model_copy(update={"frozen_encoder": frozen})
    recipe.settings = settings
    network = recipe.network(recipe.codec())
    learns = {name for name, parameter in network.encoder.named_parameters() if parameter.requires_grad}
    assert "embed_positions.weight" not in learns
    assert bool(learns) is not frozen
    assert network.decoder.embed_positions.weight.requires_grad, "the decoder's positions are learned ones"


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
