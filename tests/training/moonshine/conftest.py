"""A tiny random Moonshine as `transformers` stores it, a cache of generated noise, and what it writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import MoonshineConfig, MoonshineForConditionalGeneration

from tests.training.noise_cache import noise_cache
from training.data.synthetic import WORDS
from training.moonshine import label
from training.moonshine.checkpoint import Published
from training.moonshine.corpus import MoonshineCorpus
from training.moonshine.model import Moonshine
from training.moonshine.train import small_network

TEXTS = "good morning the weather is fine today\nplease call me back this evening\n"
TOKENS = 500
SILENT = 8
"""Outputs that no text has, as the published networks have some."""
CONTROL = ("<unk>", "<s>", "</s>")


def write_tokenizer(path: Path) -> int:
    """``tokenizer.json`` in Llama's form; returns how many outputs a network with it has."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE(unk_token=CONTROL[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    letters = [chr(code) for code in range(0x21, 0x7F)]
    trainer = BpeTrainer(
        vocab_size=800,
        special_tokens=[*CONTROL, *bytes_],
        initial_alphabet=[*letters, "\u2581"],
        show_progress=False,
    )
    words = [word for word in TEXTS.split() for _ in range(4)]
    words += [word for several in WORDS.values() for text in several for word in text.split()]
    tokenizer.train_from_iterator([*words, *map(str.capitalize, words), "déjà", "vu"], trainer)
    described = json.loads(tokenizer.to_str())
    outputs = len(described["model"]["vocab"]) + SILENT
    added = {name: index for index, name in enumerate(CONTROL)} | {"<<ST_0>>": outputs - SILENT}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    described["added_tokens"] = [{"id": index, "content": name} | plain for name, index in added.items()]
    path.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    return outputs


def tiny_moonshine(folder: Path, **changes: Any) -> Path:
    """In `folder`, with all that the published ones have; gains and biases are not ones and zeros."""
    outputs = write_tokenizer(folder / "tokenizer.json")
    sizes: dict[str, Any] = {
        "vocab_size": outputs,
        "hidden_size": 64,
        "intermediate_size": 128,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 2,
        "decoder_num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = MoonshineForConditionalGeneration(MoonshineConfig(**(sizes | changes)))
    with torch.no_grad():
        model.get_decoder().embed_tokens.weight[CONTROL.index("</s>")] *= 1.6  # so that some texts end
        for module in model.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module, nn.Linear | nn.Conv1d | nn.GroupNorm) and module.bias is not None:
                module.bias.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Moonshine of one layer more than is kept."""
    return tiny_moonshine(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def published(base: Path) -> Published:
    """The same, read; who changes its network takes a copy."""
    return Published(str(base))


@pytest.fixture(scope="session")
def theirs(base: Path) -> MoonshineForConditionalGeneration:
    """And as `transformers` runs it."""
    return MoonshineForConditionalGeneration.from_pretrained(base).eval()


@pytest.fixture
def network(published: Published) -> Moonshine:
    """A copy of our own, to be changed."""
    return copy.deepcopy(published.network)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten utterances of six speakers, two of which are held out; a text for four of five."""
    texts = ["good morning" if number % 5 else "" for number in range(10)]
    return noise_cache(tmp_path_factory.mktemp("noise"), texts)


@pytest.fixture(scope="session")
def labels(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1, by its command."""
    out = tmp_path_factory.mktemp("labels")
    (out / "texts.txt").write_text(TEXTS, encoding="utf-8")
    given = ["--base", str(base), "--cache", str(cache), "--texts", str(out / "texts.txt")]
    assert label.main([*given, "--tokens", str(TOKENS), "--workers", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def corpus(cache: Path, labels: Path) -> MoonshineCorpus:
    """Cache and labels, two of six speakers held out."""
    return MoonshineCorpus(cache, labels, validation_fraction=0.4)


@pytest.fixture
def small(published: Published, corpus: MoonshineCorpus) -> Moonshine:
    """All layers, and the tokens that the labels keep."""
    return small_network(published.network, [0, 1], corpus.cut).eval()
