"""Columns made alike: no answer changes, and rounding loses less."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.networks import chirps
from training.dynamic_int8 import graphs_of
from training.equalise import behind_norm, behind_values, equalise, sizes
from training.four_bits import rounded
from training.inference import compare, cpu_session, run_graph
from training.recipes.whisper_ctc.model import EncoderConfig
from training.recipes.whisper_seq2seq.export import export_graph
from training.recipes.whisper_seq2seq.model import DecoderConfig, Prompt, WhisperSeq2Seq
from training.torch_inference import run_torch
from training.transformer import Attention

WIDTH = 128


def uneven(seed: int) -> WhisperSeq2Seq:
    """A random Whisper with a few inputs that weigh thirty times as much as others, as in published ones."""
    torch.manual_seed(seed)
    encoder = EncoderConfig(bands=80, width=WIDTH, layers=2, heads=2, inner=2 * WIDTH)
    decoder = DecoderConfig(vocabulary=300, width=WIDTH, layers=2, heads=2, inner=2 * WIDTH, positions=40)
    network = WhisperSeq2Seq(encoder, decoder, Prompt((297, 298), 299, (297, 298))).eval()
    network.encoder.start_from_random()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 2.0)
                module.bias.uniform_(-0.5, 0.5)
            elif (
                isinstance(module, nn.Linear | nn.Embedding) and module is not network.encoder.embed_positions
            ):
                module.weight[:, torch.randperm(module.weight.shape[1])[:3]] *= 30.0
                module.weight.mul_(0.2)
    return network


def test_sizes_are_roots_of_what_columns_have_together() -> None:
    first, second = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    np.testing.assert_allclose(sizes([first, second]), [1.5**0.5, 0.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(sizes([torch.tensor([[2.0, 0.0, 2.0]])]), [1, 1, 1])
    assert sizes([torch.zeros(2, 3)]).eq(1).all()


@torch.no_grad()
def test_what_follows_a_normalisation_is_given_the_same() -> None:
    torch.manual_seed(0)
    norm, one, other = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 30), nn.Linear(WIDTH, 50)
    norm.weight.uniform_(0.5, 2.0)
    norm.bias.uniform_(-1.0, 1.0)
    one.weight[:, 5] *= 40.0
    values = torch.randn(7, WIDTH)
    before = one(norm(values)), other(norm(values))
    behind_norm(norm, [one, other])
    for module, wanted in zip((one, other), before, strict=True):
        torch.testing.assert_close(module(norm(values)), wanted, atol=1e-4, rtol=1e-4)
    spread = one.weight.square().mean(dim=0).sqrt()
    assert spread.max() / spread.median() < 10


@torch.no_grad()
def test_what_an_attention_carries_is_the_same() -> None:
    torch.manual_seed(0)
    attention = Attention(WIDTH, 2)
    attention.out_proj.weight[:, 3] *= 40.0
    values = torch.randn(2, 9, WIDTH)
    before = attention(values, None)
    behind_values(attention)
    torch.testing.assert_close(attention(values, None), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("times", [1, 2])
def test_a_network_answers_as_before_in_torch_and_as_a_graph(times: int) -> None:
    network, clips = uneven(0), chirps(3)
    before = run_torch(network, clips)
    for _ in range(times):
        equalise(network)
    assert compare(before, run_torch(network, clips)).worst_posterior < 1e-3
    graph = export_graph(network, company=True)
    assert compare(before, run_graph(cpu_session(graph), clips)).worst_posterior < 1e-3
    products = [node for inner in graphs_of(graph.graph) for node in inner.node if node.op_type == "Mul"]
    assert "decoder.embed_scale" in {name for node in products for name in node.input}


@torch.no_grad()
def test_rounding_loses_a_fraction_of_what_it_lost() -> None:
    """Rows of tokens, as inputs and as outputs."""
    network = uneven(1)
    alike = copy.deepcopy(network)
    equalise(alike)
    tokens, states = torch.arange(297), torch.randn(20, WIDTH)

    def answers(one: WhisperSeq2Seq) -> tuple[torch.Tensor, torch.Tensor]:
        decoder = one.decoder
        return decoder.rows_of(tokens), decoder.layer_norm(states) @ decoder.embed_tokens.weight.T

    wanted = answers(network)
    lost = []
    for one in (network, alike):
        one.decoder.embed_tokens.weight.copy_(rounded(one.decoder.embed_tokens.weight))
        lost.append([float((a - b).square().mean()) for a, b in zip(answers(one), wanted, strict=True)])
    for before, after in zip(*lost, strict=True):
        assert after < 0.4 * before
