"""From a published Moonshine to a smaller one that is served: labels, batches, training, bundle."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from api.bundle import load_bundle
from api.decoding import decode
from api.engine import Engine
from tests.training.moonshine.conftest import TOKENS
from tests.training.networks import chirps
from training.compression import label as whisper_label
from training.compression import rounding as whisper_rounding
from training.compression import train as whisper_train
from training.compression import unpad
from training.compression.corpus import IGNORED
from training.compression.label import likely_tokens, read_labels
from training.compression.network import coarse_weights, evaluating
from training.errors import CheckpointError, ConfigError
from training.four_bits import rounded
from training.moonshine import label, publish, rounding, search, train
from training.moonshine.checkpoint import Published
from training.moonshine.corpus import MoonshineCorpus, SampleMaker
from training.moonshine.model import MAX_WINDOW_S, MIN_SAMPLES, SAMPLE_RATE_HZ, Moonshine
from training.moonshine.train import (
    MoonshineConfig,
    MoonshineTrainer,
    learned,
    network_of,
    new_network,
    small_network,
    validated,
)
from training.moonshine.vocabulary import Tokens


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on every processor."""
    for module in (label, search, train):
        monkeypatch.setattr(module, "working_dtype", lambda: torch.float32)


def trainer(published: Published, corpus: MoonshineCorpus, **changes: float) -> MoonshineTrainer:
    told = {"workers": 1, "batch_s": 8.0, "warmup_steps": 1, "learning_rate": 1e-3, "dropout": 0.0}
    config = MoonshineConfig(layers=(1,), **(told | changes))  # type: ignore[arg-type]
    torch.manual_seed(0)
    return MoonshineTrainer(config, small_network(published.network, [1], corpus.cut), corpus)


def test_labels_hold_the_known_words_and_how_likely_each_token_was(labels: Path, cache: Path) -> None:
    rows = json.loads((cache / "index.json").read_text())
    found, likely = read_labels(labels), likely_tokens(labels)
    cut = Tokens.load(labels / "tokens.json")
    assert sorted(one.index for one in found) == list(range(len(rows)))
    for one in found:
        if rows[one.index]["text"]:
            assert re.sub(r"\W+", " ", one.text).strip().lower() == "good morning"
            assert not one.understood, "a random network understood nothing"
        else:
            assert one.understood
        assert list(one.tokens) == cut.encode(one.text)
        places = likely[one.likely : one.likely + len(one.tokens) + 1]
        assert len(places) == len(one.tokens) + 1
        assert (places["probability"][:, 0] >= places["probability"][:, 1]).all()
        assert (places["token"] != cut.start).all()
        assert one.certainty < 0
    assert max(one.likely + len(one.tokens) + 1 for one in found) == len(likely)


def test_the_large_network_says_how_likely_kept_tokens_are(
    published: Published, cache: Path, labels: Path, exactly: None
) -> None:
    """As it would write them with its own tokens, those left out of the sum."""
    cut = Tokens.load(labels / "tokens.json")
    judge = label.Judge(published, cut)
    clip = torch.from_numpy(chirps(1)[0])
    ((found, likely),) = judge.answers([clip], [["good", "morning"]])
    network = published.network
    with torch.inference_mode():
        states, _, bias = network.encoder(clip[None], torch.tensor([len(clip)]))
        given = [published.tokens.start, *(cut.ids[token] for token in found.tokens)]
        logits = network.decoder(torch.tensor([given]), states, bias)[0][:, list(cut.ids)]
        logits[:, cut.start] = -1e9
        shares = logits.softmax(dim=-1)
    wanted = torch.tensor([*found.tokens, cut.end])
    certain = shares.gather(1, wanted[:, None]).log().mean()
    assert found.certainty == pytest.approx(float(certain), abs=1e-3)
    values, tokens = shares.topk(3, dim=-1)
    assert (likely["token"][:, :3] == tokens.numpy()).all()
    np.testing.assert_allclose(likely["probability"][:, :3], values.numpy(), rtol=2e-3)


def test_words_in_other_pieces_are_no_evidence(published: Published, labels: Path, exactly: None) -> None:
    judge = label.Judge(published, _without(Tokens.load(labels / "tokens.json"), "\u2581morning"))
    ((found, likely),) = judge.answers([torch.from_numpy(chirps(1)[0])], [["good", "morning"]])
    pieces = len(found.tokens)
    assert pieces > 3, "good, several of morning and the full stop"
    known = likely["probability"].sum(axis=1) > 0
    assert known[0]
    assert known[-1], "the end is the end"
    assert not known[1:-1].any()


def _without(cut: Tokens, token: str) -> Tokens:
    """The same that merges nothing to this token."""
    described = copy.deepcopy(cut.described)
    merges = [pair for pair in described["model"]["merges"] if "".join(pair) != token]
    assert len(merges) < len(described["model"]["merges"])
    described["model"]["merges"] = merges
    return dataclasses.replace(cut, described=described)


@pytest.mark.parametrize("lines", [4, 5], ids=["between batches", "within one"])
def test_labelling_goes_on_where_it_stopped(
    base: Path,
    cache: Path,
    labels: Path,
    tmp_path: Path,
    lines: int,
    exactly: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the same files."""
    texts = ["--texts", str(labels / "texts.txt"), "--tokens", str(TOKENS), "--workers", "1"]
    monkeypatch.setattr(whisper_label, "BATCH_SAMPLES", 4 * (whisper_label.SILENCE_SAMPLES + 25_600))

    def run(out: Path) -> None:
        assert label.main(["--base", str(base), "--cache", str(cache), *texts, "--out", str(out)]) == 0

    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    written = (tmp_path / "whole" / "labels.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped" / "labels.jsonl").write_text("".join(written[:lines]) + written[lines][:20])
    run(tmp_path / "stopped")
    before, after = (
        {one.index: dataclasses.replace(one, certainty=0.0) for one in read_labels(tmp_path / name)}
        for name in ("whole", "stopped")
    )
    assert after == before
    whole, stopped = (likely_tokens(tmp_path / name) for name in ("whole", "stopped"))
    assert (whole["token"][:, 0] == stopped["token"][:, 0]).all()
    np.testing.assert_allclose(whole["probability"], stopped["probability"], rtol=0.01, atol=1e-4)
    if lines == 4:
        for name in ("tokens.json", "labels.jsonl", "likely.raw"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_fewer_tokens_than_were_kept_are_refused(
    base: Path, cache: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--base", str(base), "--cache", str(cache), "--texts", str(labels / "texts.txt")]
    assert label.main([*given, "--tokens", "50", "--out", str(labels)]) == 2
    assert re.search(r"tokens\.json has \d+ tokens of text, asked for 50", capsys.readouterr().err)


def test_what_is_too_long_is_not_learned(published: Published, labels: Path, tmp_path: Path) -> None:
    """A text that there are no positions for has no tokens; a clip beyond the window has no label."""
    samples = {"few": 8_000, "long": 8_000, "clip": int(MAX_WINDOW_S * SAMPLE_RATE_HZ) + 1}
    texts = {"few": "good morning", "long": "q " * published.network.shape.positions, "clip": "good morning"}
    starts = np.cumsum([0, *samples.values()])
    rows = [
        {"text": texts[name].strip(), "pcm_start": int(start), "pcm_samples": samples[name]}
        for name, start in zip(samples, starts, strict=False)
    ]
    (tmp_path / "index.json").write_text(json.dumps(rows))
    noise = np.random.default_rng(0).normal(0, 1000, starts[-1]).astype(np.int16)
    noise.tofile(tmp_path / "pcm.i16")
    label.label(label.Judge(published, Tokens.load(labels / "tokens.json")), tmp_path, tmp_path, 1)
    few, long = sorted(read_labels(tmp_path), key=lambda one: one.index)
    assert few.tokens
    assert few.certainty > whisper_label.DOUBTED
    assert (long.tokens, long.certainty) == ((), whisper_label.DOUBTED)
    assert len(likely_tokens(tmp_path)) == len(few.tokens) + 2


def test_a_silent_network_labels_silence(published: Published, labels: Path, exactly: None) -> None:
    """Clips without a text of which it wrote nothing, in a batch of nothing else."""
    judge = label.Judge(published, Tokens.load(labels / "tokens.json"))
    shortest = torch.zeros(10)
    for found, likely in judge.answers([shortest, shortest], [[], []]):
        assert (found.text, found.tokens, found.certainty) == ("", (), whisper_label.DOUBTED)
        assert len(likely) == 1


def test_batches_are_a_function_of_seed_and_step(corpus: MoonshineCorpus) -> None:
    makers = [SampleMaker(corpus, 8.0, seed, 60, masked=False) for seed in (0, 0, 1)]
    first, again, other = (maker(3) for maker in makers)
    torch.testing.assert_close(first.features, again.features)
    assert first.features.shape != other.features.shape or not torch.equal(first.features, other.features)
    for batch in (first, other):
        assert batch.features.ndim == 2, "samples, and no bands"
        assert batch.features.abs().max() <= 1.0
        assert batch.audio_s == pytest.approx(float(batch.lengths.sum()) / SAMPLE_RATE_HZ)
        assert int(batch.lengths.min()) >= MIN_SAMPLES
        for row in range(len(batch.lengths)):
            wanted = batch.wanted[row][batch.wanted[row] != IGNORED]
            assert int(wanted[-1]) == corpus.cut.end
            assert int(batch.tokens[row, 0]) == corpus.cut.start
            torch.testing.assert_close(batch.tokens[row, 1 : len(wanted)], wanted[:-1])
            assert not batch.features[row, int(batch.lengths[row]) :].any()


def test_every_step_can_be_heard(corpus: MoonshineCorpus) -> None:
    """Alone and in a row, with pauses, noise and what nobody said."""
    maker = SampleMaker(corpus, 8.0, 4, 60, masked=False)
    drawn = [maker(step) for step in range(30)]
    assert all(torch.isfinite(batch.features).all() for batch in drawn)
    assert any((batch.wanted[-1] != IGNORED).sum() == 1 for batch in drawn), (
        "noise, of which nothing is written"
    )
    longest = max(corpus.frames(index) for index in corpus.train) * 160
    assert any(int(batch.lengths.max()) > 1.5 * longest for batch in drawn), "several in a row"


def test_an_utterance_is_heard_as_it_was_recorded(corpus: MoonshineCorpus) -> None:
    start, count = corpus.spans[3]
    samples = corpus.features(3)
    assert samples.shape == (count,)
    np.testing.assert_array_equal(samples.numpy() * 32768, corpus.pcm[start : start + count])


def test_the_small_network_is_cut_out_of_the_large_one(published: Published, corpus: MoonshineCorpus) -> None:
    large, cut = published.network, corpus.cut
    small = small_network(large, [1], cut)
    assert (small.shape.vocabulary, len(small.decoder.layers)) == (len(cut.ids), 1)
    inner = large.shape.decoder_inner[1:]
    assert small.shape == dataclasses.replace(large.shape, vocabulary=len(cut.ids), decoder_inner=inner)
    theirs = large.state_dict()
    for name, value in small.state_dict().items():
        if name == "decoder.embed_tokens.weight":
            assert torch.equal(value, theirs[name][list(cut.ids)])
        else:
            assert torch.equal(value, theirs[name.replace("decoder.layers.0.", "decoder.layers.1.")]), name
    swapped = small_network(large, [1, 0], cut)
    for ours, index in zip(swapped.decoder.layers, (1, 0), strict=True):
        assert torch.equal(ours.fc1.weight, large.decoder.layers[index].fc1.weight)  # type: ignore[union-attr, arg-type]


def test_with_all_layers_it_writes_as_before(published: Published, corpus: MoonshineCorpus) -> None:
    """The same logits for the tokens that it kept."""
    large, cut = published.network, corpus.cut
    small = small_network(large, [0, 1], cut).eval()
    clip = torch.from_numpy(chirps(1)[0])[None]
    tokens = torch.tensor([[cut.start, 70, 200, 9]])
    with torch.inference_mode():
        states, _, bias = large.encoder(clip, torch.tensor([clip.shape[1]]))
        wanted = large.decoder(torch.tensor(cut.ids)[tokens], states, bias)[..., list(cut.ids)]
        torch.testing.assert_close(small.decoder(tokens, states, bias), wanted)


@pytest.mark.parametrize("layers", [(0, 5), (-1,), (2,)])
def test_a_layer_that_the_base_lacks_is_refused(
    base: Path, corpus: MoonshineCorpus, layers: tuple[int, ...]
) -> None:
    wrong = layers[-1]
    with pytest.raises(ConfigError, match=rf"--layers {wrong}: the decoder of .* has layers 0 to 1"):
        new_network(str(base), MoonshineConfig(layers=layers), corpus.cut)


def test_it_learns(published: Published, corpus: MoonshineCorpus) -> None:
    student = trainer(published, corpus)
    losses = [student.train_step(student.batches(step), 0.0)["label"] for step in range(20)]
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])


def test_a_resumed_run_equals_an_uninterrupted_one(published: Published, corpus: MoonshineCorpus) -> None:
    whole, half = trainer(published, corpus), trainer(published, corpus)
    for step in range(2):
        whole.train_step(whole.batches(step), step / 4)
    half.restore(copy.deepcopy(whole.state()))
    for step in range(2, 4):
        for student in (whole, half):
            student.train_step(student.batches(step), step / 4)
    assert half.step == whole.step == 4
    for name, value in half.network.state_dict().items():
        torch.testing.assert_close(value, whole.network.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_average_is_what_is_loaded(published: Published, corpus: MoonshineCorpus) -> None:
    student = trainer(published, corpus)
    student.train_step(student.batches(0), 0.0)
    loaded = network_of(student.state(), corpus.cut)
    assert not loaded.training
    for name, value in student.average.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)


def test_dropout_is_for_learning_only(published: Published, corpus: MoonshineCorpus) -> None:
    student = trainer(published, corpus, dropout=0.5)
    batch = student.batches(0)[0]
    heard = [train.answers(student.network, batch) for _ in range(2)]
    assert not torch.equal(*heard)
    with evaluating(student.network):
        assert torch.equal(*(train.answers(student.network, batch) for _ in range(2)))


def test_validation_hears_the_speakers_that_are_held_out(
    published: Published, corpus: MoonshineCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = trainer(published, corpus)
    rates = student.validation()
    assert rates.keys() == {"noise", "all"}
    assert min(rates.values()) > 0.5, "random words"
    said = corpus.cut.encode("Good-morning.")
    monkeypatch.setattr(train, "greedy", lambda network, waveform, lengths: [said] * len(lengths))
    assert {corpus.rows[index].text for index in corpus.validation} == {"good morning"}
    assert validated(student.average, corpus, student.pool) == {"noise": 0.0, "all": 0.0}
    monkeypatch.setattr(train, "greedy", lambda network, waveform, lengths: [said[:1]] * len(lengths))
    assert validated(student.average, corpus, student.pool) == {"noise": 0.5, "all": 0.5}


@pytest.fixture(scope="module")
def run(base: Path, cache: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by its command, gone on with once."""
    folder = tmp_path_factory.mktemp("run")
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(folder), "--workers", "1"]
    more = ["--layers", "1", "--steps", "2", "--batch-s", "8", "--learning-rate", "0.01"]
    assert train.main([*given, *more, "--base", str(base)]) == 0
    assert train.main([*given, "--steps", "3"]) == 0
    return folder


def test_the_command_goes_on_where_it_stopped(run: Path) -> None:
    """With what it was told: the second command named neither layers nor the size of batches."""
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["counters"][0] == 3
    found = json.loads((run / "config.json").read_text())
    assert (found["layers"], found["batch_s"], found["rounded"]) == ([1], 8, False)
    assert (run / "metrics.csv").read_text().count("label") == 2
    assert Tokens.load(run / "tokens.json").end == state["shape"]["vocabulary"] - 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "0"], "--layers 0: {run}/last.pt has layers 1; leave the option out"),
        (
            ["--init-from", "x.pt"],
            "--init-from x.pt: {run}/last.pt is a run to go on with; leave it out or give another --run",
        ),
    ],
)
def test_a_run_keeps_its_layers(
    run: Path, cache: Path, labels: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "config.json").read_bytes()
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(run), "--steps", "4"]
    assert train.main([*given, *more]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"train: {said.format(run=run)}"
    assert (run / "config.json").read_bytes() == before


def test_a_run_begins_with_something(
    base: Path, cache: Path, labels: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With layers that there are, or with another run's average, whose layers it keeps."""
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(tmp_path), "--steps", "1"]
    given += ["--workers", "1", "--batch-s", "8"]
    assert train.main(given) == 2
    assert "--base or --init-from" in capsys.readouterr().err
    assert train.main([*given, "--base", str(base)]) == 2
    assert "--layers 2: the decoder of" in capsys.readouterr().err, "six layers, if nothing else is said"
    assert train.main([*given, "--init-from", str(tmp_path / "none.pt")]) == 2
    assert "none.pt: no such checkpoint" in capsys.readouterr().err
    assert train.main([*given, "--init-from", str(run / "last.pt")]) == 0
    assert json.loads((tmp_path / "config.json").read_text())["layers"] == [1]


@pytest.fixture(scope="module")
def rounded_run(
    run: Path, base: Path, cache: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same, a fifth of it as it was published, rounded by its command."""
    folder = tmp_path_factory.mktemp("rounded") / "run"
    shutil.copytree(run, folder)
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(folder)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(whisper_rounding, "JUDGED_BATCHES", 1)
        assert rounding.main([*given, "--batches", "2", "--mean-with", str(base), "0.2"]) == 0
    return folder


def test_a_mean_with_rounded_weights_is_refused(
    rounded_run: Path, cache: Path, labels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their columns are divided by something."""
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(rounded_run)]
    assert rounding.main([*given, "--mean-with", str(rounded_run / "rounded.pt"), "0.2"]) == 2
    assert "rounded.pt: its weights are rounded" in capsys.readouterr().err


def test_learning_goes_on_through_the_rounding(
    exactly: None, run: Path, rounded_run: Path, cache: Path, labels: Path, tmp_path: Path
) -> None:
    """From weights that are served as they were rounded, and what it leaves is published as it is."""
    rounded_state = torch.load(rounded_run / "rounded.pt", weights_only=True)
    cut = Tokens.load(labels / "tokens.json")
    given = ["--cache", str(cache), "--labels", str(labels), "--batch-s", "8", "--workers", "1", "--rounded"]
    begun = [*given, "--init-from", str(rounded_run / "rounded.pt"), "--seed", "1"]
    for rate, folder in (("0", "still"), ("2", "moved")):
        there = ["--run", str(tmp_path / folder), "--steps", "2", "--learning-rate", rate]
        assert train.main([*begun, *there]) == 0
    wanted = network_of(rounded_state, cut)
    still, _ = publish.load_run(tmp_path / "still")
    moved, _ = publish.load_run(tmp_path / "moved")
    coarse = coarse_weights(wanted)
    for name, value in wanted.named_parameters():
        torch.testing.assert_close(still.get_parameter(name), value)
        if name in coarse:
            torch.testing.assert_close(rounded(moved.get_parameter(name)), moved.get_parameter(name))
    flipped = [not torch.equal(moved.get_parameter(name), wanted.get_parameter(name)) for name in coarse]
    assert sum(flipped) > len(coarse) / 2
    exact = torch.load(tmp_path / "still" / "last.pt", weights_only=True)["network"]
    assert any(not torch.equal(exact[name], wanted.get_parameter(name)) for name in coarse), "not on levels"
    assert train.main([*given, "--run", str(tmp_path / "moved"), "--steps", "3"]) == 0


def test_a_rounded_network_with_fewer_tokens_writes_as_before(
    exactly: None, rounded_run: Path, labels: Path, corpus: MoonshineCorpus
) -> None:
    """Rows of tokens are multiplied by what their columns were divided by."""
    state = torch.load(rounded_run / "rounded.pt", weights_only=True)
    whole, cut = network_of(state, corpus.cut), corpus.cut
    kept = [place for place in range(len(cut.ids)) if place % 7 or place >= len(cut.ids) - 2]
    fewer = dataclasses.replace(
        cut, ids=tuple(cut.ids[place] for place in kept), end=len(kept) - 2, start=len(kept) - 1
    )
    found = learned(state, rounded_run / "rounded.pt", fewer)
    clip = torch.from_numpy(chirps(1)[0])[None]
    tokens = torch.tensor([[fewer.start, 70, 200, 9]])
    with torch.inference_mode():
        audio, _, bias = whole.encoder(clip, torch.tensor([clip.shape[1]]))
        wanted = whole.decoder(torch.tensor(kept)[tokens], audio, bias)[..., kept]
        torch.testing.assert_close(found.decoder(tokens, audio, bias), wanted)


def test_a_run_goes_on_with_its_own_tokens_only(
    run: Path, cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied, others = tmp_path / "run", tmp_path / "labels"
    shutil.copytree(run, copied)
    shutil.copytree(labels, others)
    cut = Tokens.load(labels / "tokens.json")
    dataclasses.replace(cut, ids=(99_999, *cut.ids[1:])).save(others / "tokens.json")
    given = ["--cache", str(cache), "--labels", str(others), "--run", str(copied), "--steps", "9"]
    assert train.main(given) == 2
    said = capsys.readouterr().err
    assert f"--labels {others}: other tokens than {copied / 'last.pt'} learned with" in said


def card_and_manifest(cache: Path, folder: Path) -> list[str]:
    card = {
        "title": "Small",
        "languages": ["en"],
        "source": {"title": "noise", "url": "none"},
        "licence": "MIT",
        "text_normalisation": ["nfc"],
    }
    (folder / "card.json").write_text(json.dumps(card))
    manifest = str(cache.parent / "manifest.jsonl")
    return ["--card", str(folder / "card.json"), "--calibration", manifest, "--validation", manifest]


def test_a_run_is_rounded_before_it_is_published(
    run: Path, rounded_run: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And anew where it went on since."""
    said = r"learned in float32, to be rounded first: python -m training\.moonshine\.rounding --run"
    with pytest.raises(CheckpointError, match=said):
        publish.load_run(run)
    given = ["--run", str(run), "--name", "en-small", "--models-dir", str(tmp_path / "models")]
    assert publish.main([*given, *card_and_manifest(cache, tmp_path)]) == 2
    assert re.search(f"publish: .*last.pt: {said}", capsys.readouterr().err)
    assert not (tmp_path / "models").exists()
    later = shutil.copytree(rounded_run, tmp_path / "later")
    publish.load_run(later)
    state = torch.load(later / "last.pt", weights_only=True)
    state["counters"] = [state["counters"][0] + 1, *state["counters"][1:]]
    torch.save(state, later / "last.pt")
    with pytest.raises(CheckpointError, match="learned in float32"):
        publish.load_run(later)
    with pytest.raises(CheckpointError, match=r"last\.pt: no such checkpoint"):
        publish.load_run(tmp_path)


def test_a_run_becomes_a_bundle_that_is_served(rounded_run: Path, cache: Path, tmp_path: Path) -> None:
    """What its engine hears is what the rounded network writes, nearly."""
    given = ["--run", str(rounded_run), "--name", "en-small", "--models-dir", str(tmp_path / "models")]
    given += card_and_manifest(cache, tmp_path)
    assert publish.main([*given, "--min-speed", "0", "--max-wer-increase", "9"]) == 0
    bundle = load_bundle(tmp_path / "models", "en-small")
    manifest = bundle.manifest
    assert (manifest.default_graph, bundle.graph_path().name) == ("int4", "model.int4.onnx")
    assert (manifest.max_window_s, manifest.input.min_samples, manifest.decoder) == (30.0, MIN_SAMPLES, True)
    assert manifest.frame_stride_s == pytest.approx(0.048)
    engine = Engine(bundle, threads=1)
    assert engine.graph == "int4"
    network, tokens = publish.load_run(rounded_run)
    for clip in chirps(3):
        (found,) = engine.run([clip], alone=True)
        assert found.whole().shape[1] == manifest.vocabulary.size == len(tokens.ids)
        ids = decode(found, bundle, 0).token_ids.tolist()
        text = bundle.vocabulary.decode(ids)
        assert text
        steps, count, frames = _generated(network, clip)
        assert len(found.whole()) == frames
        assert ids[:1] == steps[:1], "four bits and inputs of eight change little"
        assert count >= 1
    card = (bundle.path / "README.md").read_text()
    assert "INT4, weights of four bits in groups of 128, of 32 where those are not whole" in card


def _generated(network: Moonshine, clip: npt.NDArray[np.float32]) -> tuple[list[int], int, int]:
    with torch.inference_mode():
        steps, found, frames = network.generate(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
    return steps[0].argmax(-1).tolist(), int(found), int(frames)


@pytest.mark.parametrize("command", [train, whisper_train, unpad], ids=["moonshine", "whisper", "unpad"])
def test_a_refused_run_leaves_no_folder(
    command: Any, cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = ["--cache", str(cache), "--labels", str(tmp_path / "none"), "--base", str(tmp_path / "none")]
    assert command.main([*given, "--run", str(run), "--steps", "1"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not run.exists()
