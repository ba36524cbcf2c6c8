"""The distillation at tiny scale: a real cache of generated sound, labelled by a tiny random teacher."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from tests.training.distillation.conftest import UTTERANCES, tiny_teacher
from training.checkpoint import load_checkpoint
from training.distillation import cache as cache_stage
from training.distillation import distill, label, runner, texts, weights
from training.distillation.augment import AugmentConfig
from training.distillation.batches import normalise_features
from training.distillation.cache import write_mel, write_pcm
from training.distillation.dataset import (
    ALPHABET,
    read_utterances,
    write_validation,
)
from training.distillation.evaluate import settle, validate
from training.distillation.examples import BatchMaker, Corpus, Epochs
from training.distillation.learner import learning_rate
from training.distillation.student import LossWeights, corpus_type
from training.distillation.trainer import TrainConfig, Trainer
from training.distillation.weights import halved, student_of
from training.errors import CheckpointError, ConfigError, DiskFullError, EmptyManifestError
from training.frontend import FrontendConfig, LogMel
from training.nemo import NemoModel
from training.torch_state import save_state


@pytest.fixture
def corpus(cache: Path, request: pytest.FixtureRequest) -> Corpus:
    """As the test's student reads it."""
    named = getattr(request.node, "callspec", None)
    size = named.params.get("size", "tiny") if named else "tiny"
    return corpus_type(size)(cache, min_confidence=-100.0, validation_fraction=0.3)


def trainer(corpus: Corpus, seed: int = 0, size: str = "tiny") -> Trainer:
    return Trainer(TrainConfig(size=size, workers=1, batch_s=4.0, warmup_steps=2, seed=seed), corpus)


def test_cached_features_are_those_of_the_front_end(cache: Path) -> None:
    index = json.loads((cache / "index.json").read_text())
    mel = np.load(cache / "mel.npy", mmap_mode="r")
    row = index[5]
    samples, _ = soundfile.read(cache.parent / row["audio_filepath"], dtype="float32")
    expected, _ = LogMel().log_mel(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
    found = mel[row["mel_start"] : row["mel_start"] + row["mel_frames"]]
    assert found.shape == tuple(expected[0].shape)
    np.testing.assert_allclose(found, expected[0].numpy(), atol=0.02)


def test_the_cache_reads_stretches_of_recordings(tmp_path: Path) -> None:
    """Several rows may name one file, in a shard or beside the manifest; validation keeps their offsets."""
    ramp = np.arange(32_000) / 64_000
    soundfile.write(tmp_path / "a.wav", ramp, 16_000)
    with tarfile.open(tmp_path / "s.tar", "w") as shard:
        shard.add(tmp_path / "a.wav", "a.wav")
    spans = [{"offset": 0.5, "duration": 0.25}, {"offset": 1.0, "duration": 0.5}]
    rows = [
        span | {"audio_filepath": "a.wav", "speaker": "x", "text": "b"} | place
        for place in ({}, {"shard": "s.tar"})
        for span in spans
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    write_pcm(read_utterances(manifest), tmp_path, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    pcm = np.fromfile(tmp_path / "pcm.i16", np.int16)
    for row, (start, samples) in zip(index, [(8_000, 4_000), (16_000, 8_000)] * 2, strict=True):
        found = pcm[row["pcm_start"] : row["pcm_start"] + row["pcm_samples"]] / 32767
        np.testing.assert_allclose(found, ramp[start : start + samples], atol=1e-4)
    assert write_validation(manifest, tmp_path / "validation.jsonl", 1.0) == 4
    assert [row.offset_s for row in read_utterances(tmp_path / "validation.jsonl")] == [0.5, 1.0, 0.5, 1.0]


def test_a_cache_of_another_manifest_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", np.arange(16_000) / 64_000, 16_000)
    manifest, other, out = tmp_path / "m.jsonl", tmp_path / "other.jsonl", tmp_path / "cache"
    manifest.write_text('{"audio_filepath": "a.wav", "duration": 1}')
    other.write_text('{"audio_filepath": "a.wav", "duration": 0.5}')

    def made_of(path: Path) -> int:
        monkeypatch.setattr("sys.argv", ["cache", "--manifest", str(path), "--out", str(out)])
        return cache_stage.main()

    assert [made_of(manifest), made_of(manifest), made_of(other)] == [0, 0, 2]
    assert f"cache: --manifest {other}: {out} was made of another manifest; give another --out" in (
        capsys.readouterr().err
    )
    (out / "manifest.sha256").unlink()
    assert made_of(other) == 0, "a cache of earlier days does not say"


def test_features_have_their_name_only_when_the_index_knows_them(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption between the two writes would leave a cache that no stage repairs."""
    shutil.copyfile(cache / "pcm.i16", tmp_path / "pcm.i16")
    rows = json.loads((cache / "index.json").read_text())
    bare = [{name: value for name, value in row.items() if "mel" not in name} for row in rows]
    (tmp_path / "index.json").write_text(json.dumps(bare))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for method in ("write_text", "replace", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_mel(tmp_path)
        known = "mel_start" in json.loads((tmp_path / "index.json").read_text())[0]
        assert known or not (tmp_path / "mel.npy").exists()


def test_labels_are_the_teachers_answers(cache: Path, corpus: Corpus) -> None:
    features = corpus.features(4)
    mean, deviation = features.mean(dim=0), features.std(dim=0)
    normalised = ((features - mean) / (deviation + 1e-5)).T[None]
    with torch.inference_mode():
        output = tiny_teacher()(normalised, torch.tensor([len(features)]))
    posteriors, hidden = corpus.targets(4)
    assert posteriors.shape == output.log_probs[0].shape
    assert hidden.shape == (len(posteriors), 2 * label.COMPONENTS)
    assert (posteriors - output.log_probs[0].exp()).abs().max() < 0.02


@pytest.mark.parametrize("budget_s", [4.0, 1.7])
def test_interrupted_labelling_goes_on_where_it_stopped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float
) -> None:
    """Also with batches of another length, which somebody short of memory asks for."""
    for name in ("index.json", "mel.npy"):
        (tmp_path / name).write_bytes((cache / name).read_bytes())
    monkeypatch.setattr(
        label, "read_nemo", lambda path: NemoModel(tiny_teacher(), FrontendConfig(), tuple(ALPHABET))
    )
    original = label.Labeller.run
    calls = 0

    def failing(self: label.Labeller, batch: list[int]) -> object:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(label.Labeller, "run", failing)
    monkeypatch.setattr(label, "SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        label.label(tmp_path / "teacher.nemo", tmp_path, budget_s=4.0)
    done = json.loads((tmp_path / "labels.progress.json").read_text())["labels"]
    assert 0 < len(done) < UTTERANCES
    again: list[int] = []

    def watched(self: label.Labeller, batch: list[int]) -> object:
        again.extend(batch)
        return original(self, batch)

    monkeypatch.setattr(label.Labeller, "run", watched)
    label.label(tmp_path / "teacher.nemo", tmp_path, budget_s=budget_s)
    assert sorted([*again, *map(int, done)]) == list(range(UTTERANCES)), "nothing is done twice"
    found, expected = (json.loads((folder / "labels.json").read_text()) for folder in (tmp_path, cache))
    for ours, whole in zip(found, expected, strict=True):
        assert ours == whole | {"confidence": pytest.approx(whole["confidence"], rel=1e-3)}
    # Not bit for bit: how the matrix products are split over threads differs, and half precision rounds.
    ours, whole = (np.load(folder / "hidden.npy").astype(np.float32) for folder in (tmp_path, cache))
    np.testing.assert_allclose(ours, whole, rtol=2e-3, atol=1e-3)


def test_a_teacher_of_another_alphabet_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many letters in another order would give wrong texts without a word."""
    teacher = NemoModel(tiny_teacher(), FrontendConfig(), tuple(reversed(ALPHABET)))
    monkeypatch.setattr(label, "read_nemo", lambda path: teacher)
    with pytest.raises(CheckpointError, match="its characters are not those of the student"):
        label.Labeller(tmp_path / "teacher.nemo", cache)


def test_no_speaker_is_in_both_splits(corpus: Corpus) -> None:
    train = {corpus.rows[index].speaker for index in corpus.train}
    held_out = {corpus.rows[index].speaker for index in corpus.validation}
    assert held_out
    assert train
    assert not train & held_out
    assert all(corpus.rows[index].text for index in corpus.validation)


def test_texts_for_a_language_model_are_those_of_the_training_speakers(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No teacher's text is confident enough here, so only written ones are left."""
    command = ["texts", "--cache", str(cache), "--out", str(tmp_path / "texts.txt")]
    monkeypatch.setattr("sys.argv", command)
    texts.main()
    corpus = Corpus(cache, min_confidence=TrainConfig.min_confidence)
    written = sum(bool(corpus.rows[index].text) for index in corpus.train)
    assert (tmp_path / "texts.txt").read_text(encoding="utf-8") == "hello there\n" * written
    assert written > 0


def test_output_only_leaves_the_heads_of_training_alone(corpus: Corpus) -> None:
    config = TrainConfig(size="tiny", workers=1, batch_s=4.0, warmup_steps=2, output_only=True)
    taught = Trainer(config, corpus)
    batch = BatchMaker(corpus, 4.0, 0, None)(0)
    losses = taught.distiller.losses(batch, corpus.hidden_weights)
    weights = LossWeights(hidden=0.0, dense=0.0, posterior=0.7, ctc=0.3)
    taught._total(losses, weights).backward()
    assert not taught.distiller.acoustic_head.weight.grad.any()
    assert taught.distiller.model.head.weight.grad.any()
    before = taught.distiller.dense_head.bias.detach().clone()
    taught.train_step([batch], 0.5)
    assert torch.equal(taught.distiller.dense_head.bias, before)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        *(("--decay-share", share, "expected more than 0, at most 1") for share in ("0", "1.1", "-1")),
        *(("--batch-s", batch_s, "expected more than 0 seconds") for batch_s in ("0", "-1", "nan", "inf")),
        *(("--until", clock, f"{clock}: expected HH:MM") for clock in ("25:00", "soon")),
    ],
)
def test_values_out_of_range_are_refused(
    option: str, value: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        distill.arguments_of("").parse_args(["--cache", "c", "--run", "r", option, value])
    assert problem in capsys.readouterr().err


def test_until_is_the_next_such_moment() -> None:
    now = time.time()
    before = datetime.fromtimestamp(now - 120, UTC)
    given = ["--cache", "c", "--run", "r", "--until", f"{before:%H:%M}"]
    moment = runner.deadline(distill.arguments_of("").parse_args(given).until, None)
    assert moment == pytest.approx(now - 120 + 86_400, abs=61)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("cache", ["--manifest", "none.jsonl", "--out", "cache"]),
        ("dataset", ["--manifest", "none.jsonl", "--validation", "validation.jsonl"]),
        ("label", ["--teacher", "none.nemo", "--cache", "none"]),
        ("distill", ["--cache", "none", "--run", "run", "--steps", "1"]),
        ("texts", ["--cache", "none", "--out", "texts.txt"]),
        ("weights", ["--run", "none", "--out", "student.safetensors"]),
    ],
)
def test_what_is_not_there_is_one_line(
    stage: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [stage, *options])
    assert importlib.import_module(f"training.distillation.{stage}").main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{stage}: ")
    assert "none" in line


def test_batches_are_a_function_of_seed_and_step(corpus: Corpus) -> None:
    def make(seed: int) -> BatchMaker:
        return BatchMaker(corpus, 4.0, seed, AugmentConfig())

    first, again, other = make(1), make(1), make(2)
    for step in range(3):
        first(step)
    ours, same, different = first(3), again(3), other(3)
    assert torch.equal(ours.features, same.features)
    assert ours.texts == same.texts
    assert ours.features.shape != different.features.shape or not torch.equal(
        ours.features, different.features
    )
    assert ours.teacher.shape[1] == ours.hidden.shape[1] == ours.dense.shape[1]
    assert int(ours.target_lengths.max()) <= ours.teacher.shape[1]
    assert torch.allclose(ours.teacher.sum(dim=-1), torch.ones(ours.teacher.shape[:2]), atol=1e-2)


def test_nothing_to_learn_from_is_said_before_the_run(cache: Path) -> None:
    """It was looked for in one empty epoch after the other, for ever."""
    everybody_held_out = Corpus(cache, min_confidence=-100.0, validation_fraction=1.0)
    with pytest.raises(EmptyManifestError, match=f"all {UTTERANCES} of the cache are of speakers that"):
        trainer(everybody_held_out)
    with pytest.raises(EmptyManifestError, match="no utterance is left to learn from"):
        Epochs(lambda generator: list[list[int]](), 0)(0)


@pytest.mark.parametrize("size", ["tiny", "conformer-tiny", "whisper-micro"])
def test_training_learns_the_teachers_activations(corpus: Corpus, size: str) -> None:
    student = trainer(corpus, size=size)
    maker = BatchMaker(corpus, 4.0, 0, None)
    batch = maker(0)
    first = student.train_step([batch], 0.0)["hidden"]
    for _ in range(30):
        last = student.train_step([batch], 0.0)
    assert last["hidden"] < 0.9 * first


def test_two_workers_give_the_mean_gradient_of_their_batches(corpus: Corpus) -> None:
    maker = BatchMaker(corpus, 4.0, 0, None)
    batch = maker(0)
    alone, together = trainer(corpus), trainer(corpus)
    together.config = dataclasses.replace(together.config, workers=2)
    together.pool = ThreadPoolExecutor(2)
    alone.train_step([batch], 0.0)
    together.train_step([batch, batch], 0.0)
    expected = dict(alone.distiller.named_parameters())
    for name, value in together.distiller.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(corpus: Corpus, tmp_path: Path) -> None:
    whole = trainer(corpus)
    (tmp_path / "whole").mkdir()
    runner.run_until(whole, tmp_path / "whole", total_steps=6, deadline_s=None, validate_every_s=1e9)
    halves = trainer(corpus)
    (tmp_path / "half").mkdir()
    # The schedule runs over all six steps, so the first part stops from outside, at a checkpoint.
    maker = BatchMaker(corpus, 4.0, 0, AugmentConfig())
    for step in range(3):
        halves.train_step([maker(step)], step / 6)
    save_state(halves.state(), tmp_path / "half" / "last.pt")
    resumed = trainer(corpus, seed=0)
    resumed.restore(torch.load(tmp_path / "half" / "last.pt", weights_only=True))
    runner.run_until(resumed, tmp_path / "half", total_steps=6, deadline_s=None, validate_every_s=1e9)
    assert resumed.step == whole.step == 6
    expected = whole.distiller.state_dict()
    for name, value in resumed.distiller.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert (tmp_path / "whole" / "best.pt").exists()
    assert "wer_all" in (tmp_path / "whole" / "metrics.csv").read_text()


def test_a_full_disk_leaves_the_state_before(corpus: Corpus, tmp_path: Path) -> None:
    runner.run_until(trainer(corpus), tmp_path, total_steps=1, deadline_s=None, validate_every_s=1e9)
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / ".last.pt.partial").symlink_to("/dev/full")
    student = trainer(corpus)
    student.restore(torch.load(tmp_path / "last.pt", weights_only=True))
    with pytest.raises(DiskFullError, match=r"last\.pt: the disk is full"):
        runner.run_until(student, tmp_path, total_steps=2, deadline_s=None, validate_every_s=1e9)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_sigterm_leaves_a_state_to_go_on_from(corpus: Corpus, tmp_path: Path) -> None:
    """At once: what ends the process does not wait for a validation."""
    student, before = trainer(corpus), signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit) as ended:
        runner.run_until(student, tmp_path, total_steps=10**9, deadline_s=None, validate_every_s=1e9)
    assert ended.value.code == 143
    timer.join()
    stored = torch.load(tmp_path / "last.pt", weights_only=True)
    assert stored["counters"][0] == student.step > 0
    assert not (tmp_path / "best.pt").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("size", ["tiny", "conformer-tiny", "whisper-micro"])
def test_published_weights_start_another_run(corpus: Corpus, tmp_path: Path, size: str) -> None:
    student = trainer(corpus, size=size)
    maker = BatchMaker(corpus, 4.0, 0, None)
    for step in range(3):
        student.train_step([maker(step)], 0.5)
    path = tmp_path / "student.safetensors"
    from training.checkpoint import save_checkpoint

    save_checkpoint(path, halved(student_of(student.state())))
    size_bytes = sum(
        parameter.numel() * (2.5 if parameter.requires_grad else 4)
        for parameter in student.distiller.model.parameters()
    )
    assert path.stat().st_size < size_bytes + 40_000
    loaded = load_checkpoint(path)
    assert loaded.meta["steps"] == 3
    successor = trainer(corpus, seed=9, size=size)
    successor.initialise_from(path)
    ours = successor.distiller.model.state_dict()
    for name, value in student.average.model.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=1e-4)
    rates = validate(successor.average.fast, corpus)
    assert set(rates) == {"all", "noise"}


def test_weights_may_be_the_mean_with_other_students(corpus: Corpus, tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        save_state(trainer(corpus, seed=seed).state(), tmp_path / str(seed) / "last.pt")
        weights.main(["--run", str(tmp_path / str(seed)), "--out", str(tmp_path / f"{seed}.safetensors")])
    others = ["--average-with", str(tmp_path / "0.safetensors")]
    weights.main(["--run", str(tmp_path / "1"), "--out", str(tmp_path / "mean.safetensors"), *others])
    first, second, mean = (
        load_checkpoint(tmp_path / f"{name}.safetensors").model.head.weight for name in ("0", "1", "mean")
    )
    assert not torch.equal(first, second)
    torch.testing.assert_close(mean.float(), (first.float() + second.float()) / 2, rtol=2e-3, atol=1e-4)


def test_published_weights_of_another_size_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    from training.checkpoint import save_checkpoint

    path = tmp_path / "student.safetensors"
    save_checkpoint(path, student_of(trainer(corpus).state()))
    bigger = Trainer(TrainConfig(size="s"), corpus)
    with pytest.raises(CheckpointError, match="another network"):
        bigger.initialise_from(path)


@pytest.mark.parametrize("size", ["tiny", "conformer-tiny"])
def test_settled_statistics_are_those_of_the_weights(corpus: Corpus, size: str) -> None:
    """The means of the batches' own statistics, whatever the running ones were, and momentum as before."""
    network = trainer(corpus, size=size).average.fast
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    settle(network, corpus)
    first = [norm.running_mean.clone() for norm in norms]
    for norm in norms:
        norm.running_mean.fill_(7.0)
        norm.running_var.fill_(7.0)
    settle(network, corpus)
    for norm, mean in zip(norms, first, strict=True):
        torch.testing.assert_close(norm.running_mean, mean)
        assert norm.momentum == nn.BatchNorm1d(1).momentum
    assert not network.training
    index = corpus.train[0]
    values = corpus.features(index)[None]
    lengths = torch.tensor([values.shape[1]])
    with torch.no_grad():
        before = network(normalise_features(values, lengths), lengths).log_probs
        network.train()
        own = network(normalise_features(values, lengths), lengths).log_probs
    assert (before - own).abs().mean() < 0.5, "its own statistics and those of the corpus are close"


def test_frozen_norms_keep_what_clean_speech_gave(cache: Path, tmp_path: Path) -> None:
    """Over a run that is gone on with, while the weights move; what is published has the same statistics."""
    given = ["--cache", str(cache), "--run", str(tmp_path), "--size", "conformer-tiny", "--workers", "1"]

    def go_on(steps: int, *more: str) -> tuple[dict[str, torch.Tensor], Trainer]:
        trainers: list[Trainer] = []

        def make(config: TrainConfig, corpus: Corpus) -> Trainer:
            trainers.append(Trainer(config, corpus))
            return trainers[-1]

        distill.run(distill.arguments_of("").parse_args([*given, "--steps", str(steps), *more]), make)
        return torch.load(tmp_path / "last.pt", weights_only=True), trainers[-1]

    go_on(2)
    kept: list[dict[str, torch.Tensor]] = []
    for steps in (4, 6):
        state, student = go_on(steps, "--frozen-norms")
        for part in ("distiller", "average"):
            kept.append({name: value for name, value in state[part].items() if ".running_" in name})
    for other in kept[1:]:
        assert all(torch.equal(value, other[name]) for name, value in kept[0].items())
    assert kept[0]
    moved = student.distiller.model.network.ctc_head.weight, student.average.model.network.ctc_head.weight
    assert not torch.equal(*moved)


def test_a_quartznet_learns_with_its_own_statistics_only(cache: Path, tmp_path: Path) -> None:
    given = ["--cache", str(cache), "--run", str(tmp_path), "--size", "tiny", "--steps", "1"]
    with pytest.raises(ConfigError, match="--frozen-norms: a student of size 'tiny' cannot"):
        distill.run(distill.arguments_of("").parse_args([*given, "--frozen-norms"]), Trainer)


def test_a_run_of_another_size_is_not_gone_on_with(cache: Path, corpus: Corpus, tmp_path: Path) -> None:
    save_state(trainer(corpus).state(), tmp_path / "last.pt")
    given = ["--cache", str(cache), "--run", str(tmp_path), "--size", "s", "--steps", "1"]
    with pytest.raises(SystemExit, match="a student of size tiny, asked for s"):
        distill.run(distill.arguments_of("").parse_args(given), Trainer)


def test_a_run_that_is_there_does_not_begin_again(cache: Path, corpus: Corpus, tmp_path: Path) -> None:
    save_state(trainer(corpus).state(), tmp_path / "last.pt")
    given = ["--cache", str(cache), "--run", str(tmp_path), "--size", "tiny", "--steps", "1"]
    with pytest.raises(
        ConfigError, match=r"--init-from x\.pt: .*last\.pt is a run to go on with; .* another --run"
    ):
        distill.run(distill.arguments_of("").parse_args([*given, "--init-from", "x.pt"]), Trainer)


def test_learning_rate_warms_up_stays_and_falls() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=10, decay_share=0.5)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(config, 50, 0.3) == pytest.approx(1.0)
    assert learning_rate(config, 50, 0.75) == pytest.approx(0.51)
    assert learning_rate(config, 99, 1.0) == pytest.approx(0.02)
