"""A network rounded layer by layer, and the way from a float32 run to a bundle."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from api.engine import Engine
from api.manifest import Source
from tests.training.compression.conftest import LANGUAGE
from tests.training.networks import chirps, write_corpus
from training import convert
from training.bundle_writer import Card
from training.compression import publish as publish_small
from training.compression import rounding, train
from training.compression.corpus import BatchMaker, LabelledCorpus
from training.compression.label import Large
from training.compression.network import coarse_weights, evaluating, round_into, small_network
from training.compression.rounding import divergence, round_layers
from training.compression.train import TrainConfig, Trainer, new_network
from training.equalise import equalise
from training.errors import CheckpointError
from training.four_bits import as_matrix, rounded
from training.publish import Recordings, publish
from training.quantize import Gate
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq
from training.transformer import key_bias


@pytest.fixture
def network(base: Path, corpus: LabelledCorpus) -> WhisperSeq2Seq:
    return small_network(Large(str(base), LANGUAGE).network, [0, 1], corpus.cut)


def answers(network: WhisperSeq2Seq, corpus: LabelledCorpus) -> Callable[[int], Tensor]:
    maker = BatchMaker(corpus, 8.0, 5, 60)

    def of(step: int) -> Tensor:
        batch = maker(step)
        with evaluating(network):
            audio, counts = network.encoder(batch.features, batch.lengths)
            said: Tensor = network.decoder(batch.tokens, audio, key_bias(counts, audio.shape[1]))
        return said

    return of


def test_a_network_answers_nearly_as_before(network: WhisperSeq2Seq, corpus: LabelledCorpus) -> None:
    """Convolutions, layers and the output are all rounded, each as it is served."""
    before = answers(network, corpus)(7)
    coarse = coarse_weights(network)
    by_itself, together = copy.deepcopy(network), copy.deepcopy(network)
    round_into(by_itself, network, coarse)
    maker, told = BatchMaker(corpus, 8.0, 9, 60), list[str]()
    drawn = [maker(step) for step in range(8)]
    round_layers(together, [(one.features, one.lengths, one.tokens) for one in drawn], told.append)
    assert len(told) == 1 + 2 + 2 + 1, "convolution, layers of both sides, output"
    served = copy.deepcopy(together)
    round_into(served, together, coarse)
    for name, value in together.named_parameters():
        assert torch.equal(value, dict(served.named_parameters())[name]), name
        assert torch.equal(value, dict(network.named_parameters())[name]) == (name not in coarse), name

    def error(other: WhisperSeq2Seq) -> float:
        return float((answers(other, corpus)(7) - before).square().mean())

    assert error(together) < 0.6 * error(by_itself)
    unheard = [maker(8 + step) for step in range(2)]
    lost = [divergence(network, other, unheard, train.answers) for other in (network, together, by_itself)]
    assert lost[0] == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < lost[1] < lost[2]


def test_a_convolution_is_rounded_for_what_it_multiplies(network: WhisperSeq2Seq) -> None:
    convolution = network.encoder.conv2
    values = torch.randn(2, convolution.in_channels, 31)
    rows = rounding._inputs(convolution, values)
    expected = convolution(values).permute(0, 2, 1).flatten(0, 1)
    expected = expected - convolution.bias
    torch.testing.assert_close(rows @ as_matrix(convolution.weight).T, expected)


def test_an_exact_run_hears_through_its_own_weights(network: WhisperSeq2Seq, corpus: LabelledCorpus) -> None:
    """And nothing of what it leaves is rounded."""
    student = Trainer(TrainConfig(rounded=False, workers=1, batch_s=8.0, warmup_steps=1), network, corpus)
    before = {name: value.clone() for name, value in student.network.named_parameters()}
    heard = student.rounded
    student.train_step(student.batches(0), 0.0)
    moved = dict(heard.named_parameters())
    assert all(value is moved[name] for name, value in student.network.named_parameters())
    assert sum(not torch.equal(value, before[name]) for name, value in moved.items()) > len(moved) / 2
    for name, value in student.served().named_parameters():
        assert torch.equal(value, student.average.get_parameter(name)), name


def test_an_exact_run_is_rounded_before_it_is_published(
    base: Path, cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(run)]
    more = ["--layers", "1", "--batch-s", "8", "--workers", "1", "--exact"]
    assert train.main([*given, *more, "--base", str(base), "--steps", "1"]) == 0
    assert json.loads((run / "config.json").read_text())["rounded"] is False
    with pytest.raises(
        CheckpointError, match=r"learned in float32, to be rounded first: .*compression\.round"
    ):
        publish_small.load_run(run)
    assert rounding.main([*given, "--batches", "2"]) == 0
    assert re.search(r"\d\.\d{4} nats per token", capsys.readouterr().out)
    network, _ = publish_small.load_run(run)
    weight = network.decoder.embed_tokens.weight
    learned = torch.load(run / "last.pt", weights_only=True)["average"]["decoder.embed_tokens.weight"]
    assert torch.equal(rounded(weight), weight)
    assert not torch.equal(weight, rounded(learned)), "made up for, not rounded one by one"
    assert train.main([*given, *more, "--steps", "2"]) == 0
    with pytest.raises(CheckpointError, match="learned in float32"):
        publish_small.load_run(run)


def test_a_mean_of_several_runs_is_rounded(
    base: Path,
    cache: Path,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one that learned, of another, and of what both began with."""
    cut = LabelledCorpus(cache, labels).cut
    given = ["--cache", str(cache), "--labels", str(labels)]
    more = ["--layers", "1", "--batch-s", "8", "--workers", "1", "--exact", "--base", str(base)]
    for number in range(2):
        run = ["--run", str(tmp_path / str(number)), "--seed", str(number)]
        assert train.main([*given, *run, *more, "--steps", "2", "--learning-rate", "0.1"]) == 0
    others = ["--mean-with", str(tmp_path / "1" / "last.pt"), "0.3", "--mean-with", str(base), "0.2"]
    ours = [*given, "--run", str(tmp_path / "0"), "--batches", "1"]
    rounded_network: list[WhisperSeq2Seq] = []
    monkeypatch.setattr(
        rounding, "round_layers", lambda network, *_: rounded_network.append(copy.deepcopy(network))
    )
    assert rounding.main([*ours, *others]) == 0
    exact = rounded_network[0].state_dict()
    state = torch.load(tmp_path / "1" / "last.pt", weights_only=True)
    whole = small_network(Large(str(base), LANGUAGE).network, [0, 1], cut)
    shape = dataclasses.asdict(whole.decoder.config)

    state |= {"shape": state["shape"] | {"decoder": shape}, "average": whole.state_dict()}
    torch.save(state, tmp_path / "larger.pt")
    assert rounding.main([*ours, "--mean-with", str(tmp_path / "larger.pt"), "0.1"]) == 2
    assert (
        f"larger.pt: a network of another shape, with 2 layers in its decoder; that of {tmp_path / '0'} has 1"
        in (capsys.readouterr().err)
    )
    averages = [torch.load(tmp_path / n / "last.pt", weights_only=True)["average"] for n in "01"]
    config = TrainConfig(layers=(1,))
    wanted = new_network(str(base), LANGUAGE, config, cut)
    begun = wanted.state_dict()
    means = {n: 0.5 * averages[0][n] + 0.3 * averages[1][n] + 0.2 * begun[n] for n in begun}
    wanted.load_state_dict(means)
    equalise(wanted)
    assert wanted.state_dict().keys() == exact.keys()
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(exact[name], value, msg=name, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (("0.7", "0.4"), r"shares \[0.7, 0.4\], expected 1 in all at most"),
        (("-0.1",), r"-0.1"),
        (("nan",), "nan"),
        (("half",), "'half'"),
    ],
)
def test_shares_that_are_no_part_of_one_are_refused(
    base: Path,
    cache: Path,
    labels: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shares: tuple[str, ...],
    said: str,
) -> None:
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(tmp_path)]
    more = [
        "--layers",
        "1",
        "--batch-s",
        "8",
        "--workers",
        "1",
        "--exact",
        "--base",
        str(base),
        "--steps",
        "1",
    ]
    assert train.main([*given, *more]) == 0
    others = [word for share in shares for word in ("--mean-with", str(tmp_path / "last.pt"), share)]
    assert rounding.main([*given, *others]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_nothing_to_round_is_said(
    cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(tmp_path)]
    assert rounding.main(given) == 2
    assert "last.pt: no such checkpoint" in capsys.readouterr().err


def test_a_published_whisper_becomes_a_bundle_in_four_bits(base: Path, tmp_path: Path) -> None:
    """On 30 padded seconds as it is published, told what it writes itself."""
    manifest = write_corpus(tmp_path, chirps(3))
    given = ["whisper", str(base / "model.safetensors"), "--name", "en-random", "--language", "en"]
    given += ["--models-dir", str(tmp_path / "models"), "--four-bits"]
    assert convert.main(given) == 2, "needs recordings"
    made = convert.from_whisper_with_decoder(base / "model.safetensors", ["en"]).in_four_bits()
    card = Card("A random network", ("en",), Source(title="tests", url=""), "MIT")
    gate = Gate(min_speed=0.0, max_wer_increase=9.0)
    bundle = publish(made, "en-random", tmp_path / "models", card, Recordings(manifest, manifest), gate=gate)
    assert bundle.manifest.default_graph == "int4"
    (served,) = Engine(bundle).run(chirps(1), alone=True)
    assert served.whole().shape[1] == bundle.manifest.vocabulary.size
    assert bundle.graph_path().stat().st_size < 0.4 * len(made.graph.SerializeToString())
