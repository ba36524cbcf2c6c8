"""A Whisper with its decoder made small: which tokens stay, what it is taught, and what is served."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from api.bundle import load_bundle
from api.engine import Engine
from tests.training.compression.conftest import LANGUAGE, TEXTS, TOKENS
from tests.training.networks import chirps
from training.compression import label, publish, train
from training.compression.corpus import IGNORED, BatchMaker, LabelledCorpus, SoundMaker
from training.compression.label import (
    Large,
    counted_texts,
    difference,
    in_the_style_of,
    likely_tokens,
    read_labels,
)
from training.compression.network import (
    coarse_weights,
    decode,
    evaluating,
    greedy,
    heard,
    listen,
    logits,
    round_into,
    small_network,
)
from training.compression.train import TrainConfig, Trainer, network_of, new_network
from training.compression.vocabulary import CutVocabulary, cut_vocabulary, unchanged_share
from training.distillation.kernels import working_dtype
from training.dynamic_int8 import graphs_of
from training.errors import CheckpointError, ConfigError, DataError, EmptyManifestError
from training.four_bits import rounded
from training.inference import compare, cpu_session, run_graph
from training.recipes.whisper_seq2seq.export import export_graph
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq
from training.torch_inference import run_torch

SAID = [(text, 1.0) for text in TEXTS.splitlines()]


@pytest.fixture(scope="module")
def large(base: Path) -> Large:
    return Large(str(base), LANGUAGE)


def small(large: Large, corpus: LabelledCorpus) -> WhisperSeq2Seq:
    return small_network(large.network, [1], corpus.cut)


def trainer(large: Large, corpus: LabelledCorpus) -> Trainer:
    config = TrainConfig(layers=(1,), workers=1, batch_s=8.0, warmup_steps=1, learning_rate=1e-3, dropout=0.0)
    torch.manual_seed(0)
    return Trainer(config, small(large, corpus), corpus)


def test_kept_tokens_write_every_text(large: Large) -> None:
    cut = cut_vocabulary(large.tokenizer, large.network.prompt, SAID, TOKENS)
    assert cut.texts <= TOKENS < cut.texts + 30
    tokenizer, vocabulary = cut.tokenizer(), cut.vocabulary()
    for text in ("good morning", "Zebra? çığ 🙂"):
        ids = tokenizer.encode(f" {text}").ids
        assert max(ids) < cut.end
        assert vocabulary.decode(ids) == text
        assert large.vocabulary.decode([cut.ids[index] for index in ids]) == text
    assert len(cut.ids) == len(vocabulary) == cut.texts + 1 + len(large.network.prompt.ids)
    assert vocabulary.decode([*cut.prompt().ids, cut.end]) == ""
    assert cut.ids[cut.end] == large.network.prompt.end


def test_the_texts_choose_the_tokens(large: Large) -> None:
    word = max(large.tokenizer.backend_tokenizer.encode(" evening", add_special_tokens=False).tokens, key=len)
    with_it = cut_vocabulary(large.tokenizer, large.network.prompt, [("evening", 3.0)], 300)
    without = cut_vocabulary(large.tokenizer, large.network.prompt, [("zzzz", 1.0)], 256)
    assert word in with_it.spelled
    assert word not in without.spelled
    assert unchanged_share(large.tokenizer, with_it, ["evening"]) == 1.0
    assert unchanged_share(large.tokenizer, without, ["evening"]) == 0.0


@pytest.mark.parametrize(
    ("often", "kept", "gone"), [(5.0, "\u0120t", "\u0120f"), (0.2, "\u0120f", "\u0120t")]
)
def test_how_often_a_text_is_said_counts(large: Large, often: float, kept: str, gone: str) -> None:
    """One more token than bytes: that of the letter that is said more often."""
    said = [("f", 1.0), ("t", often)]
    spelled = cut_vocabulary(large.tokenizer, large.network.prompt, said, 257).spelled
    assert kept in spelled
    assert gone not in spelled


def test_a_list_of_words_says_how_often(tmp_path: Path) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("good\t3.5\nplain text\n")
    assert counted_texts([path]) == [("good", 3.5), ("plain text", 1.0)]
    path.write_text("good\tmany\n")
    with pytest.raises(DataError, match=r"words\.tsv:1: 'many' behind the tab is no number"):
        counted_texts([path])
    path.write_text("çay\n", encoding="latin1")
    with pytest.raises(DataError, match=r"words\.tsv: not UTF-8"):
        counted_texts([path])


def test_fewer_tokens_than_bytes_are_refused(large: Large) -> None:
    with pytest.raises(ConfigError, match="200 tokens: the single bytes alone are 256"):
        cut_vocabulary(large.tokenizer, large.network.prompt, [], 200)


def test_a_broken_vocabulary_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text('{"ids": [1]}')
    with pytest.raises(CheckpointError, match=r"vocabulary\.json: no cut vocabulary"):
        CutVocabulary.load(path)


@pytest.mark.parametrize(
    ("written", "known", "expected"),
    [
        ("He said, I'm late.", "he said i'm late", "He said, I'm late."),
        ("Mr. Braun left; then?", "mr brown left then", "Mr. Brown left; then?"),
        ("A well-known man", "a well known man", "A well known man."),
        ("In 1984.", "in nineteen eighty four", "In nineteen eighty four."),
        ("", "i saw it", "I saw it."),
        ("Yes, and i do.", "yes and i do", "Yes, and I do."),
        ("Um, so it goes.", "it goes", "It goes."),
        ("Jeff, 5.", "j e f f five", "J E F F five."),
        ("Why am I a fool...", "why am i a fool", "Why am I a fool."),
        ("Stop!!!!", "stop", "Stop!"),
    ],
)
def test_known_words_get_the_large_networks_capitals_and_stops(
    written: str, known: str, expected: str
) -> None:
    assert in_the_style_of(written, known.split()) == expected


def test_how_much_of_a_known_text_was_not_understood() -> None:
    assert difference("One, two-three.", ["one", "two", "three"]) == 0.0
    assert difference("One, four.", ["one", "two"]) == 0.5
    assert difference("", ["one"]) == 1.0


def test_labels_hold_the_known_words_and_how_likely_each_token_was(labels: Path, cache: Path) -> None:
    rows = json.loads((cache / "index.json").read_text())
    found = read_labels(labels)
    likely = likely_tokens(labels)
    assert sorted(one.index for one in found) == list(range(len(rows)))
    for one in found:
        if rows[one.index]["text"]:
            assert re.sub(r"\W+", " ", one.text).strip().lower() == "good morning"
            assert not one.understood, "a random network understood nothing"
        places = likely[one.likely : one.likely + len(one.tokens) + 1]
        assert len(places) == len(one.tokens) + 1
        assert (places["probability"][:, 0] >= places["probability"][:, 1]).all()
        assert one.certainty < 0
    assert max(one.likely + len(one.tokens) + 1 for one in found) == len(likely)


def test_another_model_says_the_words_where_both_agree(
    large: Large, labels: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads((cache / "index.json").read_text())
    first, second = (index for index, row in enumerate(rows) if not row["text"])
    assert rows[first]["pcm_samples"] != rows[second]["pcm_samples"]
    hear = large.hear

    def written(clips: list[np.ndarray]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        _, audio, missing = hear(clips)
        return ["Please, call me bak."] * len(clips), audio, missing

    def other(waveform: np.ndarray) -> str:
        assert np.abs(waveform).max() <= 1
        return "PLEASE CALL ME BACK" if len(waveform) == rows[first]["pcm_samples"] else "police column"

    monkeypatch.setattr(large, "hear", written)
    (tmp_path / "vocabulary.json").write_bytes((labels / "vocabulary.json").read_bytes())
    label.label(large, CutVocabulary.load(tmp_path / "vocabulary.json"), cache, tmp_path, 1, other)
    found = {one.index: one.text for one in read_labels(tmp_path)}
    assert found[first] == "Please, call me back."
    assert difference(found[second], ["police", "column"]) == 0.0
    learned = LabelledCorpus(cache, tmp_path, validation_fraction=0.0).train
    assert first in learned
    assert second not in learned


def test_what_is_too_long_is_labelled_as_not_to_be_learned(
    large: Large, labels: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text of more tokens than positions ended the stage; of a long clip only the beginning is heard."""
    positions = large.network.decoder.config.positions
    samples = {"few": 8_000, "long": 8_000, "clip": 31 * 16_000}
    texts = {"few": "good morning", "long": "z " * positions, "clip": "good morning"}
    starts = np.cumsum([0, *samples.values()])
    (tmp_path / "index.json").write_text(
        json.dumps(
            [
                {"text": texts[name].strip(), "pcm_start": int(start), "pcm_samples": samples[name]}
                for name, start in zip(samples, starts, strict=False)
            ]
        )
    )
    noise = np.random.default_rng(0).normal(0, 1000, starts[-1]).astype(np.int16)
    noise.tofile(tmp_path / "pcm.i16")
    cut = CutVocabulary.load(labels / "vocabulary.json")
    label.label(large, cut, tmp_path, tmp_path, 1)
    few, long, clip = sorted(read_labels(tmp_path), key=lambda one: one.index)
    assert few.tokens
    assert few.certainty > label.DOUBTED
    for one in (long, clip):
        assert (one.tokens, one.certainty) == ((), label.DOUBTED)
    assert len(likely_tokens(tmp_path)) == len(few.tokens) + 3
    most = positions - len(large.network.prompt.ids)
    said = f"not to be learned: 1 clips of more than 30 s, 1 texts of more than {most} tokens"
    assert said in capsys.readouterr().out


def test_labelling_goes_on_where_it_stopped(base: Path, cache: Path, labels: Path, tmp_path: Path) -> None:
    for name in ("vocabulary.json", "labels.jsonl", "likely.raw"):
        (tmp_path / name).write_bytes((labels / name).read_bytes())
    lines = (tmp_path / "labels.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "labels.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    given = ["--base", str(base), "--cache", str(cache), "--texts", str(labels / "texts.txt")]
    assert label.main([*given, "--tokens", str(TOKENS), "--workers", "1", "--out", str(tmp_path)]) == 0
    before = {one.index: one for one in read_labels(labels)}
    after = read_labels(tmp_path)
    assert [one.index for one in after[:4]] == [json.loads(line)["index"] for line in lines[:4]]
    assert {one.index: one.tokens for one in after} == {one.index: one.tokens for one in before.values()}
    assert len(likely_tokens(tmp_path)) == len(likely_tokens(labels))


def test_the_fast_path_says_what_the_network_says(large: Large, corpus: LabelledCorpus) -> None:
    network = small(large, corpus)
    clip = torch.from_numpy(chirps(1)[0])[None]
    lengths = torch.tensor([clip.shape[1]])
    tokens = torch.tensor([[*network.prompt.ids, 5, 9, 4]])
    with evaluating(network):
        features, counts = network.frontend(clip, lengths)
        audio, _, missing = listen(network, features, counts)
        fast = logits(network, decode(network, tokens, heard(network, audio), missing))
        exact = network.logits(clip, lengths, tokens)
        assert (fast - exact).abs().max() < 0.05 * exact.std() + 0.05
        steps, found, _ = network.generate(clip, lengths)
        taken = steps[0, : int(found)].argmax(dim=-1).tolist()
        (quick,) = greedy(network, audio, missing, network.prompt, [3])
    assert quick[:1] == taken[:1]
    assert len(quick) <= 3


def test_a_loop_ends_the_fast_path_where_it_ends_the_network(large: Large, corpus: LabelledCorpus) -> None:
    network = small(large, corpus)
    with evaluating(network):
        row = network.decoder.embed_tokens.weight[9]
        network.decoder.layer_norm.bias.data += 100 * row / row.square().sum()
        clip = torch.from_numpy(chirps(1)[0])[None]
        steps, found, _ = network.generate(clip, torch.tensor([clip.shape[1]]))
        features, counts = network.frontend(clip, torch.tensor([clip.shape[1]]))
        audio, _, missing = listen(network, features, counts)
        (quick,) = greedy(network, audio, missing, network.prompt, [30])
    assert quick == steps[0, : int(found)].argmax(dim=-1).tolist() == [9]


def test_caches_of_tokens_give_what_all_tokens_give(large: Large, corpus: LabelledCorpus) -> None:
    network = small(large, corpus)
    tokens = torch.tensor([[3, 5, 9, 4]])
    with evaluating(network):
        audio, missing = torch.randn(1, 12, 128), torch.zeros(1, 1, 1, 12)
        audio, missing = audio.to(working_dtype()), missing.to(working_dtype())
        memory = heard(network, audio)
        whole = decode(network, tokens, memory, missing)
        caches: list[tuple[torch.Tensor, torch.Tensor] | None] = [None]
        parts = [decode(network, tokens[:, :2], memory, missing, caches)]
        parts.append(decode(network, tokens[:, 2:], memory, missing, caches, 2))
    torch.testing.assert_close(torch.cat(parts, 1).float(), whole.float(), rtol=0.02, atol=0.02)


def test_the_small_network_is_cut_out_of_the_large_one(large: Large, corpus: LabelledCorpus) -> None:
    network = small(large, corpus)
    whole = large.network.decoder
    assert len(network.decoder.layers) == 1
    torch.testing.assert_close(network.decoder.layers[0].fc1.weight, whole.layers[1].fc1.weight)  # type: ignore[union-attr]
    last = corpus.cut.ids[7]
    torch.testing.assert_close(network.decoder.embed_tokens.weight[7], whole.embed_tokens.weight[last])
    torch.testing.assert_close(network.encoder.conv1.weight, large.network.encoder.conv1.weight)


def test_weights_that_fill_no_groups_stay_as_they_are(large: Large, corpus: LabelledCorpus) -> None:
    network = small(large, corpus)
    coarse = coarse_weights(network)
    assert "encoder.conv1.weight" not in coarse, "80 bands of 3 taps"
    assert {"encoder.conv2.weight", "decoder.embed_tokens.weight", "decoder.layers.0.fc2.weight"} <= coarse
    before = network.encoder.conv1.weight.clone()
    round_into(network, network, coarse)
    torch.testing.assert_close(network.encoder.conv1.weight, before)
    weight = network.encoder.conv2.weight
    torch.testing.assert_close(weight, rounded(weight))


def test_batches_are_a_function_of_seed_and_step(corpus: LabelledCorpus) -> None:
    makers = [BatchMaker(corpus, 8.0, seed, 60) for seed in (0, 0, 1)]
    first, again, other = (maker(3) for maker in makers)
    torch.testing.assert_close(first.features, again.features)
    assert first.features.shape != other.features.shape or not torch.equal(first.features, other.features)
    for batch in (first, other):
        start = corpus.cut.prompt().ids
        for row in range(len(batch.lengths)):
            wanted = batch.wanted[row][batch.wanted[row] != IGNORED]
            assert int(wanted[-1]) == corpus.cut.end
            said = batch.tokens[row, len(start) : len(start) + len(wanted) - 1]
            torch.testing.assert_close(said, wanted[:-1])
            assert not batch.features[row, int(batch.lengths[row]) :].any()


def test_every_utterance_is_heard_once_an_epoch_some_in_a_row(corpus: LabelledCorpus) -> None:
    maker = BatchMaker(corpus, 8.0, 0, 60)
    rows = [row for seed in range(20) for row in maker._joined(np.random.default_rng(seed))]
    assert sorted(index for row in rows for index in row) == sorted(corpus.train * 20)
    assert any(len(row) > 1 for row in rows)


def test_texts_of_speakers_that_are_held_out_are_not_learned(corpus: LabelledCorpus) -> None:
    assert corpus.validation
    speakers = {corpus.rows[index].speaker for index in corpus.validation}
    assert not speakers & {corpus.rows[index].speaker for index in corpus.train}


def test_it_learns_with_the_weights_that_are_served(large: Large, corpus: LabelledCorpus) -> None:
    student = trainer(large, corpus)
    losses = [student.train_step(student.batches(step), 0.0)["label"] for step in range(30)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    name = "decoder.layers.0.fc1.weight"
    served, learned = (dict(n.named_parameters())[name] for n in (student.rounded, student.network))
    student.train_step(student.batches(30), 0.0)
    assert not torch.equal(served, learned)
    torch.testing.assert_close(rounded(served.detach()), served.detach())


def test_a_resumed_run_equals_an_uninterrupted_one(large: Large, corpus: LabelledCorpus) -> None:
    whole, half = trainer(large, corpus), trainer(large, corpus)
    for step in range(2):
        whole.train_step(whole.batches(step), step / 4)
    half.restore(copy.deepcopy(whole.state()))
    for step in range(2, 4):
        for student in (whole, half):
            student.train_step(student.batches(step), step / 4)
    assert half.step == whole.step == 4
    for name, value in half.network.state_dict().items():
        torch.testing.assert_close(value, whole.network.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def run(
    large: Large,
    corpus: LabelledCorpus,
    base: Path,
    cache: Path,
    labels: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run by its command, gone on with once."""
    folder = tmp_path_factory.mktemp("run")
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(folder), "--workers", "1"]
    assert train.main([*given, "--base", str(base), "--layers", "1", "--steps", "2", "--batch-s", "8"]) == 0
    assert train.main([*given, "--steps", "3"]) == 0
    return folder


def test_the_command_goes_on_where_it_stopped(run: Path) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["counters"][0] == 3
    assert (run / "metrics.csv").read_text().count("label") == 2


def test_a_run_goes_on_with_what_it_was_told(run: Path) -> None:
    """The second command of `run` named neither layers nor the size of batches."""
    found = json.loads((run / "config.json").read_text())
    assert (found["layers"], found["batch_s"], found["rounded"]) == ([1], 8, True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "0"], "--layers 0: {run}/last.pt has layers 1; leave the option out"),
        (["--exact"], "--exact: {run}/last.pt learns through the rounding; give another --run"),
        (
            ["--init-from", "x.pt"],
            "--init-from x.pt: {run}/last.pt is a run to go on with; leave it out or give another --run",
        ),
    ],
)
def test_a_run_keeps_its_layers_and_its_rounding(
    run: Path, cache: Path, labels: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "config.json").read_bytes()
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(run), "--steps", "4"]
    assert train.main([*given, *more]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"train: {said.format(run=run)}"
    assert (run / "config.json").read_bytes() == before


def test_a_layer_that_the_base_lacks_is_refused(base: Path, corpus: LabelledCorpus) -> None:
    with pytest.raises(ConfigError, match=r"--layers 5: the decoder of .* has layers 0 to 1"):
        new_network(str(base), LANGUAGE, TrainConfig(layers=(0, 5)), corpus.cut)


def test_layers_and_batches_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--cache", "none", "--labels", "none", "--run", "none", "--base", "none", "--steps", "1"]
    assert train.main([*given, "--layers", "1", "1"]) == 2
    assert "train: --layers 1 1: a layer is there twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*given, "--batch-s", "0"])
    assert "--batch-s: 0: expected more than 0 seconds" in capsys.readouterr().err


def test_nothing_to_go_on_with_is_said(
    cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cache", str(cache), "--labels", str(labels), "--run", str(tmp_path / "run"), "--steps", "1"]
    assert train.main(given) == 2
    assert "no run to go on with; --base or --init-from says what to begin with" in capsys.readouterr().err


def test_nothing_to_learn_from_is_said_before_the_run(
    base: Path, cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("vocabulary.json", "likely.raw"):
        (tmp_path / name).write_bytes((labels / name).read_bytes())
    given = ["--cache", str(cache), "--labels", str(tmp_path), "--run", str(tmp_path / "run"), "--steps", "1"]
    assert train.main([*given, "--base", str(base), "--layers", "1"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("train: no utterance is left to learn from: of 10 in the cache ")
    assert line.endswith(" s long, 0 of them with a text that is believed")
    with pytest.raises(EmptyManifestError, match="in the cache 0 are of speakers"):
        SoundMaker(LabelledCorpus(cache, labels, validation_fraction=1.0), 8.0, 0)


@pytest.mark.parametrize("widened", [False, True])
def test_the_graph_of_four_bits_says_what_the_rounded_network_says(run: Path, widened: bool) -> None:
    network, cut = publish.load_run(run)
    made = publish.exported_small(network, cut, widened=widened)
    clips = chirps(3)
    exact = run_torch(network, clips)
    assert compare(exact, run_graph(cpu_session(made.graph), clips)).worst_posterior < 1e-4
    ((way, small_graph),) = made.ways(made.graph, clips)
    assert (publish.WIDENED in way) is widened
    for ours, theirs in zip(run_graph(cpu_session(small_graph), clips), exact, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(np.exp(ours[0]) - np.exp(theirs[0])).max() < 0.05
    operators = Counter(node.op_type for graph in graphs_of(small_graph.graph) for node in graph.node)
    assert operators["GatherBlockQuantized"] == 1
    if widened:
        assert operators["MatMulNBits"] == 9, "a layer of the decoder less two, and the output"
        assert operators["MatMulInteger"] == 2 * 6 - 2 + 1 + 2
    else:
        assert operators["MatMulNBits"] == 2 * 6 - 2 + 1 + 11, "but what the first layer carries"
    assert len(small_graph.SerializeToString()) < 0.5 * len(made.graph.SerializeToString())
    floats = [t for t in small_graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(t.dims)) for t in floats) < 20_000, "nothing large is left in float32"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_company_in_the_search_changes_nothing(run: Path, count: int) -> None:
    """One clip is searched in two rows, more are among themselves."""
    network, _ = publish.load_run(run)
    clips = chirps(3)[:count]
    alone, beside = (export_graph(network, company=company) for company in (False, True))
    for one, other in zip(*(run_graph(cpu_session(graph), clips) for graph in (alone, beside)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    beside.graph.output.append(onnx.helper.make_tensor_value_info("search.log_probs", 1, None))
    beside.graph.output.append(onnx.helper.make_tensor_value_info("search.cache_0", 1, None))
    waveforms = np.zeros((count, 8000), np.float32)
    feeds = {"waveform": waveforms, "lengths": np.full(count, 8000)}
    *_, steps, keys = cpu_session(beside).run(None, feeds)
    assert (steps.shape[1], len(keys)) == (count, max(2, count))


def test_a_run_becomes_a_bundle_that_is_served(run: Path, cache: Path, tmp_path: Path) -> None:
    card = {
        "title": "Small",
        "languages": ["en"],
        "source": {"title": "noise", "url": "none"},
        "licence": "MIT",
        "text_normalisation": ["nfc"],
    }
    (tmp_path / "card.json").write_text(json.dumps(card))
    manifest = str(cache.parent / "manifest.jsonl")
    given = ["--run", str(run), "--name", "en-small", "--models-dir", str(tmp_path / "models")]
    given += ["--card", str(tmp_path / "card.json"), "--calibration", manifest, "--validation", manifest]
    assert publish.main([*given, "--min-speed", "0", "--max-wer-increase", "9"]) == 0
    bundle = load_bundle(tmp_path / "models", "en-small")
    assert bundle.manifest.default_graph == "int4"
    assert bundle.graph_path().name == "model.int4.onnx"
    engine = Engine(bundle, threads=1)
    assert engine.graph == "int4"
    clip = chirps(1)[0]
    (found,) = engine.run([clip], alone=True)
    assert found.whole().shape[1] == bundle.manifest.vocabulary.size
    assert "INT4" in (bundle.path / "README.md").read_text()


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"last\.pt: no such checkpoint"):
        publish.load_run(tmp_path)


def test_the_average_is_what_is_loaded(large: Large, corpus: LabelledCorpus) -> None:
    student = trainer(large, corpus)
    student.train_step(student.batches(0), 0.0)
    loaded = network_of(student.state(), corpus.cut)
    for name, value in student.average.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)


def test_where_the_large_network_has_no_say_nothing_is_followed(
    cache: Path, labels: Path, tmp_path: Path
) -> None:
    """Some of an utterance's words are in pieces now: the shares there are zero and not 0 / 0."""
    for name in ("vocabulary.json", "labels.jsonl", "likely.raw"):
        (tmp_path / name).write_bytes((labels / name).read_bytes())
    likely = np.memmap(tmp_path / "likely.raw", label.Likely, mode="r+")
    likely["probability"][:] = 0.25
    likely["probability"][1] = 0.0
    likely.flush()
    corpus = LabelledCorpus(cache, tmp_path)
    first = next(one for one in corpus.labels.values() if one.likely == 0)
    _, shares = corpus.targets(dataclasses.replace(first, understood=True), last=True)
    sums = shares.sum(axis=1)
    assert sums[1] == 0
    np.testing.assert_allclose(np.delete(sums, 1), 1.0, rtol=1e-3)
    assert not corpus.targets(dataclasses.replace(first, understood=False), last=True)[1].any()
