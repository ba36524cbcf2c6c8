"""Moonshine's network and its graph: what `transformers` answers, alone and in company."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import Tensor
from transformers import MoonshineForConditionalGeneration

from api.ctc import greedy as collapsed
from tests.training.moonshine.conftest import tiny_moonshine
from tests.training.networks import chirps
from training.equalise import equalise
from training.errors import CheckpointError
from training.inference import compare, cpu_session, run_graph
from training.moonshine import search
from training.moonshine.checkpoint import Published
from training.moonshine.corpus import padded
from training.moonshine.export import export_graph
from training.moonshine.model import MIN_SAMPLES, Moonshine, Shape, frames_of
from training.torch_inference import run_torch


def clips() -> list[npt.NDArray[np.float32]]:
    """Of several lengths, and the shortest that there may be."""
    shortest = np.random.default_rng(0).normal(0, 0.1, MIN_SAMPLES).astype(np.float32)
    return [*chirps(6), shortest]


def batch(waveforms: list[npt.NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    return padded([torch.from_numpy(waveform) for waveform in waveforms])


def said(network: Moonshine, waveforms: list[npt.NDArray[np.float32]]) -> list[list[int]]:
    with torch.inference_mode():
        steps, found, _ = network.generate(*batch(waveforms))
    return [item[:count] for item, count in zip(steps.argmax(-1).tolist(), found.tolist(), strict=True)]


def prefer(network: Moonshine, token: int) -> None:
    """Make it the likeliest token everywhere: every state gets what only its row has much of."""
    with torch.no_grad():
        rows = network.decoder.embed_tokens.weight
        for layer in network.decoder.layers:
            layer.fc2.bias.copy_(100 * rows[token])  # type: ignore[union-attr, operator]
        network.decoder.layer_norm.weight.fill_(1.0)


@torch.inference_mode()
@pytest.mark.parametrize("samples", [MIN_SAMPLES, 5_000, 23_456])
def test_our_network_is_that_of_transformers(
    published: Published, theirs: MoonshineForConditionalGeneration, samples: int
) -> None:
    waveform = torch.from_numpy(np.random.default_rng(samples).normal(0, 0.1, samples).astype("f4"))[None]
    tokens = torch.tensor([[1, 300, 41, 300, 412, 7]])
    wanted = theirs(input_values=waveform, decoder_input_ids=tokens)
    network = published.network
    states, counts, bias = network.encoder(waveform, torch.tensor([samples]))
    torch.testing.assert_close(states, wanted.encoder_last_hidden_state, atol=1e-4, rtol=1e-4)
    assert counts.tolist() == [states.shape[1]]
    torch.testing.assert_close(network.decoder(tokens, states, bias), wanted.logits, atol=1e-4, rtol=1e-4)
    last = network.decoder(tokens, states, bias, last=True)
    torch.testing.assert_close(last, wanted.logits[:, -1:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_upper_layers_say_where_a_token_is(published: Published, base: Path) -> None:
    """The mean over all heads of what each listens to, as `transformers` tells it."""
    eager = MoonshineForConditionalGeneration.from_pretrained(base, attn_implementation="eager").eval()
    clip = torch.from_numpy(chirps(1)[0])[None]
    tokens = torch.tensor([[1, 300, 41, 300]])
    told = eager(input_values=clip, decoder_input_ids=tokens, output_attentions=True).cross_attentions
    network = published.network
    states, _, bias = network.encoder(clip, torch.tensor([clip.shape[1]]))
    found = network.decoder.attention(tokens, states, bias)
    torch.testing.assert_close(found, told[1].mean(dim=1), atol=1e-5, rtol=1e-3)
    assert [bool(Shape().followers(layer)) for layer in range(6)] == [False] * 3 + [True] * 3


@torch.inference_mode()
def test_a_text_is_what_transformers_writes(
    network: Moonshine, theirs: MoonshineForConditionalGeneration
) -> None:
    """As far as it may be long; what ends it here but not there are loops, of which there are none."""
    network.suppress.zero_()  # neither do they forbid anything
    for clip, ours in zip(chirps(4), said(network, chirps(4)), strict=True):
        found = theirs.generate(torch.from_numpy(clip)[None], max_new_tokens=len(ours), do_sample=False)
        assert found[0, 1 : 1 + len(ours)].tolist() == ours


@torch.inference_mode()
def test_an_item_in_a_batch_gives_what_it_gives_alone(published: Published) -> None:
    network, several = published.network, clips()
    states, counts, _ = network.encoder(*batch(several))
    together = said(network, several)
    assert len({len(one) for one in together}) > 3, "texts of several lengths"
    for place, clip in enumerate(several):
        alone, count, _ = network.encoder(*batch([clip]))
        assert int(counts[place]) == int(count) == alone.shape[1] == int(frames_of(torch.tensor(len(clip))))
        torch.testing.assert_close(states[place, : int(count)], alone[0], atol=1e-4, rtol=1e-4)
        assert said(network, [clip]) == [together[place]]


def test_what_lies_beyond_an_item_is_not_heard(published: Published) -> None:
    """Not even where it is louder than the item."""
    waveform, lengths = batch(clips()[:2])
    shorter = int(lengths.argmin())
    other = waveform.clone()
    other[shorter, int(lengths[shorter]) :] = 0.9
    with torch.inference_mode():
        before, after = (published.network.encoder(one, lengths) for one in (waveform, other))
    own = int(before[1][shorter])
    torch.testing.assert_close(before[0][shorter, :own], after[0][shorter, :own])


def test_the_fewest_samples_make_a_frame() -> None:
    assert frames_of(torch.tensor([MIN_SAMPLES - 1, MIN_SAMPLES])).tolist() == [0, 1]
    waveform, lengths = padded([torch.ones(3)])
    assert (waveform.shape, lengths.tolist()) == ((1, MIN_SAMPLES), [MIN_SAMPLES])


@pytest.mark.parametrize("company", [False, True])
def test_the_graph_says_what_the_network_says(published: Published, company: bool) -> None:
    """In a padded batch, each for itself, and for the shortest clip alone."""
    session = cpu_session(export_graph(published.network, company=company))
    for several in (clips(), clips()[:1], clips()[-1:]):
        exact, found = run_torch(published.network, several), run_graph(session, several)
        assert [len(one) for one in found] == [len(one) for one in exact]
        agreement = compare(exact, found)
        assert agreement.worst_posterior < 1e-4
        assert agreement.worst_log_prob < 1e-2
    for clip, one in zip(clips(), run_graph(session, clips()), strict=True):
        assert compare(run_graph(session, [clip]), [one]).worst_posterior < 1e-4


@pytest.mark.parametrize("count", [1, 3])
def test_company_in_the_search_is_there_for_one_clip(published: Published, count: int) -> None:
    """One clip is searched in two rows, more are among themselves."""
    graph = export_graph(published.network, company=True)
    for name in ("search.log_probs", "search.cache_0"):
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    feeds = {"waveform": np.zeros((count, 8_000), np.float32), "lengths": np.full(count, 8_000)}
    *_, steps, keys = cpu_session(graph).run(None, feeds)
    assert (steps.shape[1], len(keys)) == (count, max(2, count))


def test_tokens_of_the_graph_stand_two_frames_apart(published: Published) -> None:
    """And collapsing the frames gives back what was said, equal neighbours among it."""
    several = clips()
    wanted = said(published.network, several)
    assert any(a == b for one in wanted for a, b in pairwise(one))
    for frames, text in zip(
        run_graph(cpu_session(export_graph(published.network)), several), wanted, strict=True
    ):
        (found,) = collapsed(frames[None], np.array([len(frames)]), published.tokens.end)
        assert found.token_ids.tolist() == text
        assert (np.diff(found.start_frames) >= 2).all()
        assert len(text) <= len(frames) // 2


def test_what_writes_nothing_is_never_said(network: Moonshine) -> None:
    """Neither the beginning of a text nor an output without a token."""
    start, *_ = network.prompt.ids
    nothing = network.shape.vocabulary - 1
    assert {start, nothing} < set(network.prompt.suppressed)
    prefer(network, nothing)
    with torch.inference_mode():
        states, _, bias = network.encoder(*batch(chirps(1)))
        free = network.decoder(torch.tensor([[start]]), states, bias, last=True)
    assert int(free.argmax()) == nothing
    assert nothing not in said(network, chirps(1))[0]


def test_a_text_that_goes_round_in_a_loop_ends(network: Moonshine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the network, in the search of the training and in the graph."""
    token = 300
    prefer(network, token)
    monkeypatch.setattr(search, "working_dtype", lambda: torch.float32)
    with torch.inference_mode():
        assert search.greedy(network, *batch(chirps(2))) == said(network, chirps(2)) == [[token]] * 2
    graph = run_graph(cpu_session(export_graph(network)), chirps(2))
    assert compare(run_torch(network, chirps(2)), graph).worst_posterior < 1e-4


def test_greedy_search_with_caches_finds_the_same(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "working_dtype", lambda: torch.float32)
    with torch.inference_mode():
        found = search.greedy(published.network, *batch(clips()))
    wanted = said(published.network, clips())
    assert found == wanted
    assert min(map(len, wanted)) == 0, "a clip of one frame has no room for a token"
    assert max(map(len, wanted)) > 10


@pytest.mark.parametrize("positions", [2, 6])
def test_a_text_ends_where_there_are_no_more_positions(
    published: Published, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph, too; the start has the first position."""
    monkeypatch.setattr(search, "working_dtype", lambda: torch.float32)
    short = copy.deepcopy(published.network)
    short.shape = replace(short.shape, positions=positions)
    wanted = said(short, chirps(2))
    assert [len(one) for one in wanted] == [positions - 1] * 2 == [short.most_tokens] * 2
    with torch.inference_mode():
        assert search.greedy(short, *batch(chirps(2))) == wanted
    graph = run_graph(cpu_session(export_graph(short)), chirps(2))
    assert compare(run_torch(short, chirps(2)), graph).worst_posterior < 1e-4


@pytest.mark.parametrize("times", [1, 2])
def test_columns_made_alike_change_no_answer(network: Moonshine, times: int) -> None:
    """In torch and as a graph, where a few inputs weigh thirty times as much as others."""
    with torch.no_grad():
        for layer in (*network.encoder.layers, *network.decoder.layers):
            layer.fc1.weight[:, 5] *= 30.0
            layer.self_attn.q_proj.weight[:, 9] *= 30.0
            layer.self_attn.out_proj.weight[:, 7] *= 30.0
    before = run_torch(network, chirps(3))
    exact = copy.deepcopy(network)
    for _ in range(times):
        equalise(network)
    changed = {
        name
        for name, value in network.named_parameters()
        if not torch.equal(value, exact.get_parameter(name))
    }
    assert {"decoder.embed_tokens.weight", "encoder.layer_norm.weight"} < changed
    assert not any(name.startswith(("encoder.conv", "encoder.groupnorm")) for name in changed)
    assert compare(before, run_torch(network, chirps(3))).worst_posterior < 1e-3
    graph = export_graph(network, company=True)
    assert compare(before, run_graph(cpu_session(graph), chirps(3))).worst_posterior < 1e-3
    weight = network.decoder.layers[0].fc1.weight.detach().square().mean(dim=0).sqrt()  # type: ignore[union-attr]
    assert float(weight.max() / weight.median()) < 12 ** (1 / times), "thirty times before"


def test_only_layers_of_known_networks_are_made_alike(network: Moonshine) -> None:
    network.encoder.layers.append(torch.nn.Identity())
    with pytest.raises(TypeError, match="Identity: not a layer of a Whisper or a Moonshine"):
        equalise(network)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "heads of several sizes or with biases"),
        ({"encoder_num_key_value_heads": 1}, "heads of several sizes or with biases"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "positions .*500000"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "positions .*linear",
        ),
    ],
    ids=["biases", "shared keys", "other angles", "stretched positions"],
)
def test_shapes_that_no_moonshine_has_are_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    base = tiny_moonshine(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: {said}.* are not known of any Moonshine"):
        Published(str(base))


def test_what_is_no_moonshine_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none: no config\.json there"):
        Published(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(CheckpointError, match="model_type 'whisper', expected 'moonshine'"):
        Published(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer"):
        Published(str(tmp_path))


def test_a_tokenizer_of_more_tokens_than_outputs_is_refused(tmp_path: Path) -> None:
    base = tiny_moonshine(tmp_path, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has \d+ tokens, the network 300 outputs"):
        Published(str(base))


def test_how_much_of_a_head_is_turned_is_read(published: Published) -> None:
    assert published.network.shape.turned == 28, "nine tenths of 32"
