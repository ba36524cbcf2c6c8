"""A Moonshine's weights in four bits: rounded layer by layer, averaged with others, and in the graph."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.training.networks import chirps
from training.compression import rounding as layers
from training.compression.network import coarse_weights, evaluating, round_into
from training.compression.rounding import divergence, round_layers
from training.dynamic_int8 import graphs_of
from training.equalise import equalise
from training.four_bits import as_matrix, rounded
from training.inference import cpu_session, run_graph
from training.moonshine import publish, rounding, train
from training.moonshine.corpus import MoonshineCorpus, SampleMaker
from training.moonshine.export import export_graph
from training.moonshine.model import Moonshine
from training.moonshine.train import MoonshineConfig, new_network
from training.torch_inference import run_torch


@pytest.fixture(autouse=True)
def _exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on every processor, and judged in little time."""
    monkeypatch.setattr(train, "working_dtype", lambda: torch.float32)
    monkeypatch.setattr(layers, "JUDGED_BATCHES", 1)


def test_every_matrix_of_whole_groups_is_coarse(small: Moonshine) -> None:
    """Those of the first layer, too, which a Whisper keeps; a tap of samples fills no group."""
    coarse = coarse_weights(small)
    matrices = {name for name, value in small.named_parameters() if value.ndim > 1}
    assert matrices - coarse == {"encoder.conv1.weight"}
    assert coarse < matrices
    assert "encoder.layers.0.self_attn.v_proj.weight" in coarse


def test_a_network_answers_nearly_as_before(small: Moonshine, corpus: MoonshineCorpus) -> None:
    """Convolutions, layers and the output are all rounded, each as it is served."""
    maker = SampleMaker(corpus, 8.0, 9, 60, masked=False)
    drawn = [maker(step) for step in range(8)]
    unheard = [maker(8 + step) for step in range(2)]
    coarse = coarse_weights(small)
    by_itself, together = copy.deepcopy(small), copy.deepcopy(small)
    round_into(by_itself, small, coarse)
    told: list[str] = []
    round_layers(together, [(one.features, one.lengths, one.tokens) for one in drawn], told.append)
    assert len(told) == 1 + 2 + 2 + 1, "convolutions, layers of both sides, output"
    served = copy.deepcopy(together)
    round_into(served, together, coarse)
    for name, value in together.named_parameters():
        assert torch.equal(value, served.get_parameter(name)), name
        assert torch.equal(value, small.get_parameter(name)) == (name not in coarse), name

    def error(other: Moonshine) -> float:
        with evaluating(small), evaluating(other):
            found, wanted = (train.answers(one, unheard[0]) for one in (other, small))
        return float((found - wanted).square().mean())

    assert error(together) < 0.8 * error(by_itself)
    lost = [divergence(small, other, unheard, train.answers) for other in (small, together, by_itself)]
    assert lost[0] == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < lost[1] < lost[2]


@pytest.mark.parametrize("name", ["conv2", "conv3"])
def test_a_convolution_is_rounded_for_what_it_multiplies(small: Moonshine, name: str) -> None:
    convolution = getattr(small.encoder, name)
    values = torch.randn(2, convolution.in_channels, 31)
    rows = layers._inputs(convolution, values)
    with torch.inference_mode():
        expected = convolution(values).permute(0, 2, 1).flatten(0, 1) - convolution.bias
        torch.testing.assert_close(rows @ as_matrix(convolution.weight).T, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("alike", [False, True], ids=["as it is", "columns made alike"])
def test_the_graph_of_four_bits_says_what_the_rounded_network_says(small: Moonshine, alike: bool) -> None:
    if alike:
        equalise(small)
    coarse = coarse_weights(small)
    round_into(small, small, coarse)
    graph = export_graph(small, company=True)
    before = graph.SerializeToString()
    made = publish.four_bit_graph(graph, small)
    assert graph.SerializeToString() == before, "a copy"
    operators = Counter(node.op_type for inner in graphs_of(made.graph) for node in inner.node)
    assert operators["MatMulNBits"] == len(coarse)
    assert operators["GatherBlockQuantized"] == 1
    assert len(made.SerializeToString()) < 0.5 * len(before)
    floats = [t for t in made.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(t.dims)) for t in floats) < 2_000, "nothing large is left in float32"
    clips = chirps(3)
    for ours, theirs in zip(run_graph(cpu_session(made), clips), run_torch(small, clips), strict=True):
        assert ours.shape == theirs.shape
        first = np.flatnonzero(theirs.argmax(axis=1) != small.prompt.end)[0]
        spoken = np.flatnonzero(ours.argmax(axis=1) != small.prompt.end)[0]
        assert np.abs(np.exp(ours[spoken]) - np.exp(theirs[first])).max() < 0.1


def test_a_mean_of_several_runs_is_rounded(
    base: Path,
    cache: Path,
    corpus: MoonshineCorpus,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one that learned, of another, and of what both began with."""
    given = ["--cache", str(cache), "--labels", str(labels)]
    more = ["--layers", "1", "--batch-s", "8", "--workers", "1", "--base", str(base)]
    for number in range(2):
        run = ["--run", str(tmp_path / str(number)), "--seed", str(number)]
        assert train.main([*given, *run, *more, "--steps", "2", "--learning-rate", "0.1"]) == 0
    others = ["--mean-with", str(tmp_path / "1" / "last.pt"), "0.3", "--mean-with", str(base), "0.2"]
    ours = [*given, "--run", str(tmp_path / "0"), "--batches", "1"]
    heard: list[Moonshine] = []
    with monkeypatch.context() as patched:
        patched.setattr(layers, "round_layers", lambda network, *_: heard.append(copy.deepcopy(network)))
        assert rounding.main([*ours, *others]) == 0
    exact = heard[0].state_dict()
    averages = [torch.load(tmp_path / n / "last.pt", weights_only=True)["average"] for n in "01"]
    wanted = new_network(str(base), MoonshineConfig(layers=(1,)), corpus.cut)
    begun = wanted.state_dict()
    wanted.load_state_dict({n: 0.5 * averages[0][n] + 0.3 * averages[1][n] + 0.2 * begun[n] for n in begun})
    equalise(wanted)
    assert wanted.state_dict().keys() == exact.keys()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(exact[name], value, msg=name, rtol=1e-3, atol=1e-4)
    capsys.readouterr()
    assert rounding.main([*ours, *others]) == 0
    assert re.search(r"\d\.\d{4} nats per token", capsys.readouterr().out)
    network, _ = publish.load_run(tmp_path / "0")
    weight = network.decoder.embed_tokens.weight
    assert torch.equal(rounded(weight), weight)
    assert not torch.equal(weight, rounded(exact["decoder.embed_tokens.weight"])), "made up for"


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (("0.7", "0.4"), r"shares \[0.7, 0.4\], expected 1 in all at most"),
        (("half",), "'half' is no number"),
    ],
)
def test_shares_that_are_no_part_of_one_are_refused(
    base: Path,
    cache: Path,
    labels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    others: tuple[str, ...],
    said: str,
) -> None:
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(tmp_path)]
    more = ["--layers", "1", "--batch-s", "8", "--workers", "1", "--base", str(base), "--steps", "1"]
    assert train.main([*given, *more]) == 0
    shares = [word for share in others for word in ("--mean-with", str(tmp_path / "last.pt"), share)]
    assert rounding.main([*given, *shares]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "rounded.pt").exists()


def test_a_network_of_another_shape_is_no_part_of_the_mean(
    base: Path, cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cache", str(cache), "--labels", str(labels)]
    more = ["--batch-s", "8", "--workers", "1", "--base", str(base), "--steps", "1"]
    for name, kept in (("one", ["1"]), ("two", ["0", "1"])):
        assert train.main([*given, *more, "--run", str(tmp_path / name), "--layers", *kept]) == 0
    other = ["--mean-with", str(tmp_path / "two" / "last.pt"), "0.5"]
    assert rounding.main([*given, "--run", str(tmp_path / "one"), *other]) == 2
    assert re.search(
        r"two/last\.pt: .*decoder_inner=\(\d+, \d+\).* has .*decoder_inner=\(\d+,\)", capsys.readouterr().err
    )


def test_nothing_to_round_is_said(
    cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(tmp_path)]
    assert rounding.main(given) == 2
    assert "last.pt: no such checkpoint" in capsys.readouterr().err
