"""Feed-forwards with fewer neurons: which go, what makes up for them, and what learns on from there."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.networks import chirps
from training.compression import rounding as layers
from training.compression.network import coarse_weights, evaluating, round_into
from training.compression.train import read_state
from training.errors import ConfigError
from training.inference import cpu_session, run_graph
from training.moonshine import prune, publish, train
from training.moonshine.checkpoint import Published
from training.moonshine.corpus import MoonshineCorpus, SampleMaker
from training.moonshine.export import export_graph
from training.moonshine.model import DecoderLayer, Moonshine
from training.moonshine.prune import STEP, Worth, heard_by, layers_of, shares, thin, without, worths
from training.moonshine.train import network_of, small_network
from training.rounding import DAMPING
from training.torch_inference import run_torch
from training.torch_state import save_state


@pytest.fixture(autouse=True)
def _exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on every processor, and judged in little time."""
    monkeypatch.setattr(train, "working_dtype", lambda: torch.float32)
    for module in (layers, prune):
        monkeypatch.setattr(module, "JUDGED_BATCHES", 1)


def products_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs


def test_an_input_that_others_give_as_well_costs_nothing() -> None:
    """Three of nine are sums of others; nothing else is as cheap."""
    torch.manual_seed(3)
    own = torch.randn(4_000, 6)
    doubled = own @ torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [0, -1, 0]])
    inputs = torch.cat([own, doubled], dim=1)
    weight = torch.randn(5, 9)
    stays, found, errors = without(weight, products_of(inputs), 6)
    assert stays.tolist() == sorted(stays.tolist())
    difference = inputs[:, stays] @ found.T - inputs @ weight.T
    assert float(difference.square().mean()) < 1e-2 * float((inputs @ weight.T).square().mean())
    *_, more = without(weight, products_of(inputs), 3)
    assert more[:3] == errors
    assert more[3] - more[2] > 5 * errors[2]


def test_what_stays_is_the_least_squares_solution() -> None:
    torch.manual_seed(4)
    inputs = torch.randn(500, 12) @ torch.randn(12, 12)
    weight, products = torch.randn(3, 12), products_of(inputs)
    stays, found, errors = without(weight, products, 7)
    steady = products.double() + DAMPING * products.diagonal().mean() * torch.eye(12)
    wanted = weight.double() @ steady[:, stays] @ torch.linalg.inv(steady[stays][:, stays])
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)
    filled = torch.zeros(3, 12, dtype=torch.float64)
    filled[:, stays] = wanted
    apart = filled - weight
    assert errors[-1] == pytest.approx(float(torch.trace(apart @ steady @ apart.T)), rel=1e-3)
    assert errors == sorted(errors)
    assert len(errors) == 5


@pytest.mark.parametrize("name", ["encoder.layers.1", "decoder.layers.0"])
def test_neurons_that_say_nothing_go_first(small: Moonshine, corpus: MoonshineCorpus, name: str) -> None:
    """And nothing is said otherwise: a gate goes with what it gates."""
    layer = layers_of(small)[name]
    silent = torch.randperm(128, generator=torch.Generator().manual_seed(0))[: 2 * STEP]
    with torch.no_grad():
        layer.fc2.weight[:, silent] = 0.0
    before = copy.deepcopy(small)
    batch = SampleMaker(corpus, 8.0, 9, 60, masked=False)(0)
    thin(layer, heard_by(small, [name], [batch])[name], 128 - 2 * STEP)
    halves = 2 if isinstance(layer, DecoderLayer) else 1
    assert (layer.fc1.out_features, layer.fc2.in_features) == (halves * 64, 64)
    with evaluating(small), evaluating(before):
        torch.testing.assert_close(
            train.answers(small, batch), train.answers(before, batch), rtol=1e-3, atol=1e-3
        )


def test_the_rest_makes_up_for_what_goes(small: Moonshine, corpus: MoonshineCorpus) -> None:
    """Better than the same neurons as they were, and on what was not heard."""
    maker = SampleMaker(corpus, 8.0, 9, 60, masked=False)
    batches, unheard = [maker(step) for step in range(6)], maker(6)
    name = "decoder.layers.1"
    made_up, cut = copy.deepcopy(small), copy.deepcopy(small)
    products = heard_by(small, [name], batches)[name]
    thin(layers_of(made_up)[name], products, 96)
    stays, _, _ = without(layers_of(small)[name].fc2.weight, products, 96)
    thin(layers_of(cut)[name], products, 96)
    with torch.no_grad():
        layers_of(cut)[name].fc2.weight.copy_(layers_of(small)[name].fc2.weight[:, stays])
    lost = [layers.divergence(small, other, [unheard], train.answers) for other in (made_up, cut)]
    assert 0.0 < lost[0] < 0.9 * lost[1]


def worth(neurons: int, cost: int, each: float) -> Worth:
    return Worth(neurons, cost, tuple(each * number for number in range(1, neurons - STEP + 1)), 1.0)


def test_neurons_go_where_they_are_worth_least_for_their_weights() -> None:
    cheap, dear = worth(128, 100, 1.0), worth(128, 100, 3.0)
    assert shares([cheap, dear], 1.0) == [128, 128]
    assert shares([cheap, dear], 0.8) == [64, 128]
    assert shares([cheap, dear], 0.6) == [32, 96]
    assert shares([worth(128, 100, 1.0), worth(128, 300, 2.0)], 0.8) == [128, 64], "more weights for it"
    with pytest.raises(ConfigError, match=r"--keep 0.2: that is less than 32 neurons per layer"):
        shares([cheap, dear], 0.2)


def test_what_a_layer_is_worth_is_asked_of_the_answers(
    small: Moonshine, corpus: MoonshineCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone; a layer of which nothing is heard costs nothing."""
    monkeypatch.setattr(prune, "tqdm", lambda items, **_: items)
    with torch.no_grad():
        silent = layers_of(small)["encoder.layers.0"]
        silent.fc2.weight.mul_(1e-4)
    before = copy.deepcopy(small.state_dict())
    maker = SampleMaker(corpus, 8.0, 9, 60, masked=False)
    found = worths(small, [maker(0), maker(1)], [maker(2)])
    assert list(found) == [f"{side}.layers.{index}" for side in ("encoder", "decoder") for index in range(2)]
    assert [one.cost for one in found.values()] == [2 * 64] * 2 + [3 * 64] * 2
    assert all(one.lost(128) == 0.0 and one.lost(64) >= one.lost(96) for one in found.values())
    lost = {name: one.lost(64) for name, one in found.items()}
    assert lost["encoder.layers.0"] < 0.01 * min(lost["encoder.layers.1"], lost["decoder.layers.1"])
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def pruned(given: list[str], out: Path) -> Path:
    assert prune.main([*given, "--batches", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def given(cache: Path, labels: Path) -> list[str]:
    return ["--cache", str(cache), "--labels", str(labels)]


def test_training_goes_on_with_what_is_left_and_it_is_served(
    base: Path,
    given: list[str],
    corpus: MoonshineCorpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = pruned(
        [*given, "--base", str(base), "--layers", "0", "1", "--keep", "0.6"], tmp_path / "p" / "x.pt"
    )
    said = capsys.readouterr().out
    found = re.search(r"neurons: encoder (\(.*?\)), decoder (\(.*?\))\n0\.\d+ nats", said)
    shape = read_state(out)["shape"]
    assert found
    assert (str(shape["encoder_inner"]), str(shape["decoder_inner"])) == found.groups()
    inner = [*shape["encoder_inner"], *shape["decoder_inner"]]
    weights = sum(count * cost for count, cost in zip(inner, (2, 2, 3, 3), strict=True))
    assert 0.4 < weights / (128 * 10) <= 0.6
    more = ["--batch-s", "8", "--workers", "1", "--steps", "1", "--init-from", str(out)]
    assert train.main([*given, *more, "--run", str(tmp_path / "run")]) == 0
    state = read_state(tmp_path / "run" / "last.pt")
    assert state["shape"] == shape
    network = network_of(state, corpus.cut)
    round_into(network, network, coarse_weights(network))
    graph = export_graph(network, company=True)
    clips = chirps(2)
    wanted = run_torch(network, clips)
    for ours, theirs in zip(run_graph(cpu_session(graph), clips), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), rtol=1e-4, atol=1e-3)
    whole = small_network(Published(str(base)).network, [0, 1], corpus.cut)
    small, large = (publish.four_bit_graph(export_graph(one, company=True), one) for one in (network, whole))
    assert len(small.SerializeToString()) < len(large.SerializeToString()) - 0.4 * 128 * 10 * 64 / 4


def test_a_run_with_more_tokens_is_cut_to_those_of_the_labels(
    base: Path, given: list[str], corpus: MoonshineCorpus, published: Published, tmp_path: Path
) -> None:
    whole = published.tokens
    run = tmp_path / "run"
    run.mkdir()
    whole.save(run / "tokens.json")
    network = small_network(published.network, [0, 1], whole)
    state = {"shape": vars(network.shape), "average": network.state_dict(), "config": {"layers": (0, 1)}}
    save_state(state, run / "last.pt")
    out = pruned([*given, "--init-from", str(run / "last.pt"), "--keep", "1"], tmp_path / "same.pt")
    found = network_of(read_state(out), corpus.cut)
    wanted = small_network(published.network, [0, 1], corpus.cut)
    assert found.shape == wanted.shape
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())


def test_tokens_that_a_run_does_not_have_are_refused(
    base: Path, given: list[str], corpus: MoonshineCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.pt"
    steps = ["--batch-s", "8", "--workers", "1", "--steps", "1", "--base", str(base)]
    assert train.main([*given, *steps, "--layers", "0", "1", "--run", str(run)]) == 0
    another = next(token for token in range(10_000) if token not in corpus.cut.ids)
    replace(corpus.cut, ids=(another, *corpus.cut.ids[1:])).save(run / "tokens.json")
    assert prune.main([*given, "--init-from", str(run / "last.pt"), "--out", str(out)]) == 2
    said = f"1 of {len(corpus.cut.ids)} kept tokens are none of what the network writes with"
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("keep", ["0", "1.5", "-1"])
def test_a_share_is_a_part(given: list[str], keep: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prune.main([*given, "--base", "x", "--keep", keep, "--out", "y"])
    assert "expected more than 0 and at most 1" in capsys.readouterr().err
