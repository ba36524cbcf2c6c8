"""A rounded network that learns to answer what it answered before it was rounded."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.compression.conftest import LANGUAGE
from training.compression import publish, rounding, train, tune
from training.compression.corpus import BatchMaker, LabelledCorpus
from training.compression.label import Large
from training.compression.network import coarse_weights, round_into, small_network
from training.compression.rounding import round_layers
from training.compression.tune import Levels, TuneConfig, Tuner
from training.four_bits import GROUP, integers, rounded


@pytest.fixture(scope="module")
def corpus(cache: Path, labels: Path) -> LabelledCorpus:
    return LabelledCorpus(cache, labels, validation_fraction=0.4)


@pytest.fixture
def tuner(base: Path, corpus: LabelledCorpus) -> Tuner:
    """Of a random network, its output three times as sure of itself: otherwise nothing diverges."""
    exact = small_network(Large(str(base), LANGUAGE).network, [0, 1], corpus.cut)
    with torch.no_grad():
        exact.decoder.embed_tokens.weight.mul_(3.0)
    network = copy.deepcopy(exact)
    maker = BatchMaker(corpus, 8.0, 9, 60)
    drawn = [maker(step) for step in range(2)]
    round_layers(network, [(one.features, one.lengths, one.tokens) for one in drawn])
    return Tuner(TuneConfig(workers=1, batch_s=8.0, warmup_steps=1, ema_steps=8), exact, network, corpus)


@pytest.mark.parametrize("shape", [(5, 2 * GROUP), (5, GROUP + 40), (4, 64, 3)])
def test_levels_begin_with_what_was_rounded(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = rounded(torch.randn(shape))
    served = torch.zeros(shape)
    Levels(weight).serve(served)
    assert torch.equal(served, weight)


def test_what_moved_is_still_what_rounding_leaves_alone() -> None:
    """Whatever the levels learn, the largest of a group stays the largest."""
    torch.manual_seed(0)
    levels = Levels(rounded(torch.randn(6, 3 * GROUP)))
    with torch.no_grad():
        levels.places += 5 * torch.randn_like(levels.places)
        levels.growth += 0.3 * torch.randn_like(levels.growth)
    served = torch.zeros(6, 3 * GROUP)
    levels.serve(served)
    assert torch.equal(rounded(served), served)
    assert torch.equal(integers(served)[1], levels.whole()[1])


def test_gradients_are_those_of_level_times_scale() -> None:
    """Against torch's own, through whole numbers that may vary."""
    torch.manual_seed(0)
    weight = rounded(torch.randn(3, 2 * GROUP))
    levels, wanted = Levels(weight), torch.randn(3, 2 * GROUP)
    levels.follow(wanted)
    whole = levels.places.detach().clone().requires_grad_()
    growth = torch.zeros_like(levels.growth).requires_grad_()
    value = (whole * (levels.scales * growth.exp())).flatten(1)
    (value * wanted).sum().backward()  # type: ignore[no-untyped-call]
    assert whole.grad is not None
    torch.testing.assert_close(levels.growth.grad, growth.grad)
    torch.testing.assert_close(levels.places.grad, whole.grad * ~levels.pinned)
    assert levels.pinned.sum(dim=-1).eq(1).all(), "one of a group does not learn its level"


def test_a_group_of_nothing_stays_nothing() -> None:
    weight = torch.zeros(2, GROUP)
    levels = Levels(weight)
    levels.follow(torch.ones(2, GROUP))
    levels.serve(weight)
    assert not weight.any()
    assert not levels.growth.grad.any()  # type: ignore[union-attr]


def test_answers_come_back_to_what_they_were(tuner: Tuner) -> None:
    drawn = tuner.batches(1_000)
    found = [tuner.train_step(drawn, 0.0)["divergence"] for _ in range(40)]
    assert np.mean(found[-5:]) < 0.5 * found[0]
    served = tuner.served()
    again = copy.deepcopy(served)
    coarse = coarse_weights(served)
    round_into(again, served, coarse)
    learned = dict(tuner.network.named_parameters())
    for name, value in served.named_parameters():
        assert torch.equal(value, dict(again.named_parameters())[name]), f"{name}: has values of four bits"
        assert torch.isfinite(learned[name]).all()
    exact, bias = dict(tuner.exact.named_parameters()), "decoder.layers.0.fc1.bias"
    assert not torch.equal(dict(served.named_parameters())[bias], exact[bias])


def test_a_resumed_run_equals_an_uninterrupted_one(tuner: Tuner, corpus: LabelledCorpus) -> None:
    other = Tuner(tuner.config, copy.deepcopy(tuner.exact), copy.deepcopy(tuner.network), corpus)
    for step in range(2):
        tuner.train_step(tuner.batches(step), step / 4)
    other.restore(copy.deepcopy(tuner.state()))
    for step in range(2, 4):
        for each in (tuner, other):
            each.train_step(each.batches(step), step / 4)
    for ours, theirs in zip(tuner.learned, other.learned, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_from_an_exact_run_to_what_is_published(
    base: Path, cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(run)]
    more = ["--batch-s", "8", "--workers", "1"]
    assert tune.main([*given, "--steps", "1"]) == 2
    assert "rounded.pt: no such checkpoint" in capsys.readouterr().err
    ours = [*more, "--layers", "1", "--exact", "--base", str(base), "--steps", "1"]
    assert train.main([*given, *ours]) == 0
    assert rounding.main([*given, "--batches", "2"]) == 0
    assert tune.main([*given, *more, "--steps", "1"]) == 0
    assert tune.main([*given, *more, "--steps", "2"]) == 0
    assert torch.load(run / "tuned" / "last.pt", weights_only=True)["counters"][0] == 2
    network, cut = publish.load_run(run / "tuned")
    again = copy.deepcopy(network)
    round_into(again, network, coarse_weights(network))
    assert all(map(torch.equal, again.parameters(), network.parameters()))
    assert len(cut.ids) == network.decoder.config.vocabulary
