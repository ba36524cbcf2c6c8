"""The shared loop: records, resume, schedules, and what happens when things go wrong."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from training.data.importers import from_folder
from training.data.manifest import Utterance
from training.data.synthetic import make_corpus
from training.data.validate import validate
from training.errors import ConfigError, DiskFullError, DivergedError, EmptyManifestError, OutOfMemoryError
from training.evaluate import ErrorRates
from training.evaluate import Utterance as Said
from training.files import written_whole
from training.frontend import FrontendConfig, LogMel
from training.loop.dataset import UtteranceDataset, collate, make_loader
from training.loop.divergence import StopWhereDiverged
from training.loop.fit import choose_device, fit, is_out_of_memory
from training.loop.module import CtcModule, parameter_groups, rank, warmup_cosine
from training.loop.run_folder import RunFolder, append_metrics, open_run, read_metrics
from training.loop.settings import TrainingSettings
from training.recipes.quartznet_ctc.architectures import quartznet
from training.recipes.quartznet_ctc.model import QuartzNet
from training.recipes.quartznet_ctc.network import QuartzNetCtc
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc
from training.text import normaliser
from training.vocabulary import CharacterCodec

CODEC = CharacterCodec("abcdefghijklmnopqrstuvwxyz'")


class Small(nn.Module):
    """Two convolutions on log-mel."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend = LogMel()
        self.first = nn.Conv1d(64, 48, 5, stride=2, padding=2)
        self.second = nn.Conv1d(48, len(CODEC.vocabulary), 1)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, frames = self.frontend(waveform, lengths)
        logits = self.second(functional.relu(self.first(features))).transpose(1, 2)
        return functional.log_softmax(logits, dim=-1), (frames - 1) // 2 + 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Utterance]:
    folder = tmp_path_factory.mktemp("tones")
    make_corpus(folder, "en", utterances=16, speakers=4, synthesiser="tones")
    kept, _ = validate(from_folder(folder), normalise=normaliser("en"), outside=CODEC.outside)
    return kept


def settings(**changes: Any) -> TrainingSettings:
    values = {"epochs": 2, "learning_rate": 5e-3, "max_batch_s": 12.0, "workers": 0, "early_stopping": 0}
    return TrainingSettings(**(values | changes))


def run(
    rows: list[Utterance],
    folder: Path,
    chosen: TrainingSettings,
    callbacks: tuple[lightning.Callback, ...] = (),
    network: nn.Module | None = None,
) -> Path:
    torch.manual_seed(0)
    module = CtcModule(network or Small(), CODEC, chosen)
    dataset = UtteranceDataset(rows, CODEC.encode)
    training, validation = (
        make_loader(dataset, chosen, training=True),
        make_loader(dataset, chosen, training=False),
    )
    return fit(module, training, validation, chosen, RunFolder(folder), callbacks)


class StopAt(lightning.Callback):
    """Pulls the plug at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the power went out")


class Steps(lightning.Callback):
    """Notes the steps that were done, their learning rates and their utterances."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.rates: list[float] = []
        self.batches: list[tuple[int, list[str]]] = []
        self.validations = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, _module: Any, _out: Any, batch: Any, *_: Any) -> None:
        self.seen.append(trainer.global_step)
        self.batches.append((trainer.current_epoch, batch["texts"]))

    def on_validation_end(self, *_: Any) -> None:
        self.validations += 1


def test_learns_and_keeps_records(rows: list[Utterance], tmp_path: Path) -> None:
    best = run(rows, tmp_path, settings(epochs=12))
    metrics = read_metrics(tmp_path / "metrics.csv")
    losses = [float(row["train_loss"]) for row in metrics]
    assert [int(row["epoch"]) for row in metrics] == list(range(12))
    assert losses[-1] < 0.8 * losses[0]
    assert all(float(row["val_wer"]) > 0 for row in metrics)
    assert best.parent == tmp_path / "checkpoints"
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss.png", "validation_wer.png"}
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_of_equal_word_error_rates_has_the_fewest_wrong_letters(
    rows: list[Utterance], tmp_path: Path
) -> None:
    class Hears(CtcModule):
        """Never the word, and most of its letters in the second epoch."""

        def validation_step(self, batch: Any, _index: int) -> None:
            self._heard.append(Said("word", ("xxxx", "worx", "wxxx")[self.current_epoch]))

    chosen = settings(epochs=3)
    dataset = UtteranceDataset(rows, CODEC.encode)
    loaders = [make_loader(dataset, chosen, training=training) for training in (True, False)]
    best = fit(Hears(Small(), CODEC, chosen), *loaders, chosen, RunFolder(tmp_path))
    assert best.name.startswith("best-epoch=001")


@given(st.integers(1, 10**6), st.data())
def test_rank_orders_by_words_then_letters(words: int, data: st.DataObject) -> None:
    def rates() -> ErrorRates:
        errors, cer = data.draw(st.integers(0, words)), data.draw(st.integers(0, 300)) / 100
        return ErrorRates(1, words, errors / words, 0.0, 1.0, cer)

    one, other = rates(), rates()
    assert (rank(one) < rank(other)) == ((one.wer, one.cer) < (other.wer, other.cer))


def test_goes_on_after_an_interruption(rows: list[Utterance], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the power went out"):
        run(rows, tmp_path, settings(epochs=3), (StopAt(5),))
    assert RunFolder(tmp_path).resume_from() == tmp_path / "checkpoints" / "interrupted.ckpt"
    steps = Steps()
    run(rows, tmp_path, settings(epochs=3), (steps,))
    assert steps.seen[0] == 6, "step 5 was done before the interruption"
    assert [int(row["epoch"]) for row in read_metrics(tmp_path / "metrics.csv")] == [0, 1, 2]


def test_the_last_state_is_that_of_the_last_epoch_also_where_nothing_gets_better(
    rows: list[Utterance], tmp_path: Path
) -> None:
    run(rows, tmp_path, settings(epochs=4, learning_rate=1e-9, keep=1))
    best, last = sorted((tmp_path / "checkpoints").iterdir())
    assert best.name.startswith("best-epoch=000")
    assert last.name == "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 3
    steps = Steps()
    run(rows, tmp_path, settings(epochs=5, learning_rate=1e-9, keep=1), (steps,))
    assert {epoch for epoch, _ in steps.batches} == {4}, "as after a kill, which leaves no other state"


def test_a_run_folder_that_moved_keeps_its_best_states(rows: list[Utterance], tmp_path: Path) -> None:
    heard = [2, 6, 4, 3, 1]
    train_told(rows, tmp_path / "old", [1.0] * 5, heard, epochs=3, keep=2)
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    (tmp_path / "old").rename(tmp_path / "new")
    for name in ("copy", "new"):
        best = train_told(rows, tmp_path / name, [1.0] * 5, heard, keep=2)
        assert best.parent == tmp_path / name / "checkpoints"
        assert best.name.startswith("best-epoch=001")
    kept = sorted(path.name[:14] for path in (tmp_path / "new" / "checkpoints").glob("best-*"))
    assert kept == ["best-epoch=001", "best-epoch=002"]


def test_best_states_that_were_not_copied_are_forgotten(rows: list[Utterance], tmp_path: Path) -> None:
    heard = [2, 6, 4, 3, 1]
    train_told(rows, tmp_path, [1.0] * 5, heard, epochs=3, keep=2)
    (gone,) = (tmp_path / "checkpoints").glob("best-epoch=001*")
    gone.unlink()
    best = train_told(rows, tmp_path, [1.0] * 5, heard, keep=2)
    assert best.name.startswith("best-epoch=002")


def test_the_state_of_an_interruption_goes_with_the_epoch_after_it(
    rows: list[Utterance], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="the power went out"):
        run(rows, tmp_path, settings(epochs=2), (StopAt(1),))
    assert (tmp_path / "checkpoints" / "interrupted.ckpt").is_file()
    run(rows, tmp_path, settings(epochs=2))
    assert not (tmp_path / "checkpoints" / "interrupted.ckpt").exists()


@pytest.mark.parametrize(("reason", "status"), [(SIGTERMException, 143), (KeyboardInterrupt, 130)])
def test_a_training_that_was_ended_does_not_look_finished(
    rows: list[Utterance],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reason: type[BaseException],
    status: int,
) -> None:
    class Ended(lightning.Callback):
        """What Lightning does after a batch once SIGTERM has come, and Python anywhere once Ctrl-C has."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            raise reason

    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            run(rows, tmp_path, settings(epochs=3), (Ended(),))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert caught.value.code == status
    state = RunFolder(tmp_path).resume_from()
    assert state == tmp_path / "checkpoints" / "interrupted.ckpt"
    assert f"interrupted after step 1: the same command goes on from {state}" in capsys.readouterr().err


def test_more_epochs_go_on_from_the_last(rows: list[Utterance], tmp_path: Path) -> None:
    run(rows, tmp_path, settings(epochs=1))
    first = read_metrics(tmp_path / "metrics.csv")
    run(rows, tmp_path, settings(epochs=2))
    both = read_metrics(tmp_path / "metrics.csv")
    assert both[0] == first[0]
    assert int(both[1]["step"]) == 2 * int(first[0]["step"])


def test_fewer_epochs_than_are_done_are_refused(rows: list[Utterance], tmp_path: Path) -> None:
    run(rows, tmp_path, settings(epochs=2))
    with pytest.raises(ConfigError, match=r"training\.epochs is 1, and 2 epochs are done"):
        run(rows, tmp_path, settings(epochs=1))
    assert RunFolder(tmp_path).resume_from() == tmp_path / "checkpoints" / "last.ckpt"
    run(rows, tmp_path, settings(epochs=2))


def test_a_resumed_epoch_has_the_batches_that_it_would_have_had(
    rows: list[Utterance], tmp_path: Path
) -> None:
    chosen = settings(epochs=3, max_batch_s=6.0)
    whole, first, second = Steps(), Steps(), Steps()
    run(rows, tmp_path / "whole", chosen, (whole,))
    per_epoch = len(whole.seen) // 3
    with pytest.raises(RuntimeError, match="the power went out"):
        run(rows, tmp_path / "parts", chosen, (first, StopAt(per_epoch + per_epoch // 2)))
    run(rows, tmp_path / "parts", chosen, (second,))
    assert first.batches + second.batches == whole.batches
    third = Steps()
    run(rows, tmp_path / "longer", settings(epochs=1, max_batch_s=6.0))
    run(rows, tmp_path / "longer", settings(epochs=2, max_batch_s=6.0), (third,))
    assert third.batches == [(epoch, texts) for epoch, texts in whole.batches if epoch == 1]


@pytest.mark.parametrize(
    ("hook", "accumulation", "index", "applied"),
    [("on_train_batch_start", 2, 3, 2), ("on_train_batch_end", 2, 2, 2), ("on_train_batch_end", 3, 1, 0)],
)
def test_batches_whose_gradient_was_lost_come_again(
    rows: list[Utterance], tmp_path: Path, hook: str, accumulation: int, index: int, applied: int
) -> None:
    class Stop(lightning.Callback):
        """In the second epoch, after so many batches that one or two are in no step yet."""

        def on_train_batch_start(self, trainer: Any, _module: Any, _batch: Any, batch: int) -> None:
            self.stop("on_train_batch_start", trainer.current_epoch, batch)

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            self.stop("on_train_batch_end", trainer.current_epoch, rest[-1])

        def stop(self, *place: Any) -> None:
            if place == (hook, 1, index):
                raise RuntimeError("the power went out")

    chosen = settings(epochs=2, max_batch_s=6.0, accumulation=accumulation)
    whole, second = Steps(), Steps()
    run(rows, tmp_path / "whole", chosen, (whole,))
    with pytest.raises(RuntimeError, match="the power went out"):
        run(rows, tmp_path / "parts", chosen, (Stop(),))
    run(rows, tmp_path / "parts", chosen, (second,))
    start = len(whole.seen) // 2 + applied
    assert second.batches == whole.batches[start:]
    assert second.seen == whole.seen[start:]
    once, twice = (torch.load(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("whole", "parts"))
    assert all(torch.equal(value, twice["state_dict"][name]) for name, value in once["state_dict"].items())


def test_every_epoch_is_validated(tmp_path: Path) -> None:
    make_corpus(tmp_path / "audio", "en", utterances=40, speakers=4, synthesiser="tones")
    kept, _ = validate(from_folder(tmp_path / "audio"), normalise=normaliser("en"), outside=CODEC.outside)
    steps = Steps()
    run(kept, tmp_path / "run", settings(epochs=4, max_batch_s=9.0), (steps,))
    assert steps.validations == 4


def test_a_resumed_run_follows_its_new_settings(rows: list[Utterance], tmp_path: Path) -> None:
    run(rows, tmp_path, settings(epochs=1, early_stopping=1))
    plain, resumed = Steps(), Steps()
    run(rows, tmp_path / "plain", settings(epochs=4, learning_rate=1e-3), (plain,))
    chosen = settings(epochs=4, learning_rate=1e-3, early_stopping=7, weight_decay=0.5)
    kept: list[Any] = []

    class Look(lightning.Callback):
        def on_train_end(self, trainer: Any, *_: Any) -> None:
            kept.append([group["weight_decay"] for group in trainer.optimizers[0].param_groups])
            kept.append([stop.patience for stop in trainer.early_stopping_callbacks])

    run(rows, tmp_path, chosen, (resumed, Look()))
    assert resumed.rates == pytest.approx(plain.rates[-len(resumed.rates) :])
    assert kept == [[0.5, 0.0], [7]]


def test_out_of_memory_says_what_to_change_and_keeps_the_state(rows: list[Utterance], tmp_path: Path) -> None:
    class Greedy(Small):
        """Asks for a petabyte in its third training batch."""

        calls = 0

        def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            Greedy.calls += int(self.training)
            if self.training and Greedy.calls == 3:
                torch.empty(2**50, dtype=torch.uint8)
            return super().forward(waveform, lengths)

    longest_s = max(row.duration_s or 0.0 for row in rows)
    with pytest.raises(OutOfMemoryError, match=r"goes on from .*ckpt") as ended:
        run(rows, tmp_path, settings(), network=Greedy())
    size = re.search(
        r"a batch of (\d) x (\d\.\d) s: lower training\.max_batch_s \(now 12\) below (\d+\.\d) or "
        r"training\.max_items \(now 64\) below (\d), and raise",
        str(ended.value),
    )
    assert size is not None, ended.value
    items, each_s, together_s = (float(number) for number in size.groups()[:3])
    assert size[1] == size[4]
    assert each_s <= longest_s + 0.05
    assert 0 < together_s <= 12
    assert together_s == pytest.approx(items * each_s, abs=0.05 * items + 0.05)
    steps = Steps()
    run(rows, tmp_path, settings(max_batch_s=6.0, accumulation=2), (steps,))
    assert steps.seen[0] == 2, "two steps were done before, the first of the next two batches adds none"
    assert len(read_metrics(tmp_path / "metrics.csv")) == 2


def test_a_network_that_pads_by_itself_has_few_in_a_batch(rows: list[Utterance]) -> None:
    dataset = UtteranceDataset(rows, CODEC.encode, padded_s=30.0)
    loader = make_loader(dataset, settings(max_batch_s=65.0), training=True)
    assert {len(batch) for batch in loader.batch_sampler or ()} == {2}


def no_room_for(path: Path) -> None:
    """The next file that would become `path` meets a full disk."""
    path.with_name(f".{path.name}.partial").symlink_to("/dev/full")


def test_a_training_that_diverges_ends_and_leaves_the_state_before(
    rows: list[Utterance], tmp_path: Path
) -> None:
    run(rows, tmp_path, settings(epochs=1))
    with pytest.raises(
        DivergedError,
        match=r"loss is .*training\.learning_rate \(now 1e\+30\) or training\.gradient_clip \(now 1; .*"
        r"training\.precision \(now float32, .*goes on from .*last\.ckpt",
    ):
        run(rows, tmp_path, settings(epochs=3, learning_rate=1e30, precision="float32"))
    assert RunFolder(tmp_path).resume_from() == tmp_path / "checkpoints" / "last.ckpt"
    steps = Steps()
    run(rows, tmp_path, settings(epochs=2), (steps,))
    assert {epoch for epoch, _ in steps.batches} == {1}


def test_only_losses_in_a_row_end_a_training(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(current_epoch=0, global_step=0, precision="16-mixed")
    watch = StopWhereDiverged(settings(), RunFolder(tmp_path))

    def see(*losses: float) -> None:
        for loss in losses:
            watch.on_train_batch_end(trainer, Any, {"loss": torch.tensor(loss)}, None, 0)

    see(*[float("nan")] * 9, 1.0, *[float("inf")] * 9, 1.0)
    with pytest.raises(DivergedError, match="the training loss is not finite, 10 batches in a row"):
        see(*[float("inf")] * 10)


def test_an_epoch_without_a_finite_loss_is_never_the_best(rows: list[Utterance], tmp_path: Path) -> None:
    class Overflows(CtcModule):
        """In the second epoch, which hears every word."""

        def loss_and_texts(self, batch: Any, *, decode: bool) -> tuple[Tensor, list[str]]:
            loss, _ = super().loss_and_texts(batch, decode=False)
            if self.current_epoch == 1 and decode:
                return loss * float("inf"), list(batch["texts"])
            return loss, [""] * len(batch["texts"])

    chosen = settings(epochs=3)
    dataset = UtteranceDataset(rows, CODEC.encode)
    loaders = [make_loader(dataset, chosen, training=training) for training in (True, False)]
    best = fit(Overflows(Small(), CODEC, chosen), *loaders, chosen, RunFolder(tmp_path))
    assert best.name.startswith("best-epoch=000")


def test_a_full_disk_is_said_with_the_file_and_loses_no_state(
    rows: list[Utterance], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(rows, tmp_path, settings(epochs=1))
    last = tmp_path / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    no_room_for(last)
    no_room_for(last.with_name("interrupted.ckpt"))
    with pytest.raises(DiskFullError, match=r"last\.ckpt: the disk is full: about 0\.\d MB .* are free"):
        run(rows, tmp_path, settings(epochs=2))
    assert "the state of the last step is lost: " in capsys.readouterr().err
    assert last.read_bytes() == before
    steps = Steps()
    run(rows, tmp_path, settings(epochs=2), (steps,))
    assert {epoch for epoch, _ in steps.batches} == {1}
    assert len(read_metrics(tmp_path / "metrics.csv")) == 2
    assert not list(tmp_path.glob("**/*.partial"))


def test_a_full_disk_that_names_no_file_is_said_with_the_run(rows: list[Utterance], tmp_path: Path) -> None:
    class Full(lightning.Callback):
        """TensorBoard's writer, when its disk is."""

        def on_train_batch_end(self, *_: Any) -> None:
            Path("/dev/full").write_bytes(b"events")

    with pytest.raises(DiskFullError, match=rf"{re.escape(str(tmp_path))}: the disk is full: \d+\.\d MB are"):
        run(rows, tmp_path, settings(), (Full(),))


def test_safetensors_has_only_words_for_a_full_disk(tmp_path: Path) -> None:
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(DiskFullError, match=r"weights\.safetensors: the disk is full"),
        written_whole(tmp_path / "weights.safetensors"),
    ):
        raise SafetensorError(words)


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_stops_early(rows: list[Utterance], tmp_path: Path) -> None:
    run(rows, tmp_path, settings(epochs=20, early_stopping=2, learning_rate=1e-9))
    assert len(read_metrics(tmp_path / "metrics.csv")) == 3


class Told(CtcModule):
    """Its validation says what the test wants: per epoch a loss, and of ten words how many are heard."""

    def __init__(self, chosen: TrainingSettings, losses: list[float], heard: list[int]) -> None:
        super().__init__(Small(), CODEC, chosen)
        self.losses, self.heard = losses, heard

    def validation_step(self, batch: Any, _index: int) -> None:
        words = list("abcdefghij")
        self.log("val_loss", self.losses[self.current_epoch], batch_size=1)
        kept = words[: self.heard[self.current_epoch]]
        self._heard.append(Said(" ".join(words), " ".join(kept)))


def train_told(
    rows: list[Utterance], folder: Path, losses: list[float], heard: list[int], **changes: Any
) -> Path:
    """The best state of a run of as many epochs as there are losses."""
    chosen = settings(**{"epochs": len(losses), "learning_rate": 1e-9, **changes})
    dataset = UtteranceDataset(rows, CODEC.encode)
    loaders = [make_loader(dataset, chosen, training=training) for training in (True, False)]
    return fit(Told(chosen, losses, heard), *loaders, chosen, RunFolder(folder))


def epochs_of(
    rows: list[Utterance], folder: Path, losses: list[float], heard: list[int], epochs: int | None = None
) -> int:
    """How many a run with a patience of two trains, of as many as there are losses."""
    train_told(rows, folder, losses, heard, epochs=epochs or len(losses), early_stopping=2)
    return len(read_metrics(folder / "metrics.csv"))


def test_a_falling_loss_is_progress_until_words_are_heard(rows: list[Utterance], tmp_path: Path) -> None:
    falling, flat = [3.0, 2.9, 2.8, 2.7, 2.6, 2.5], [2.5] * 4
    assert epochs_of(rows, tmp_path / "1", falling + flat, [0] * 10) == len(falling) + 2
    rising_late = [0, 0, 0, 0, 0, 5, 6, 6, 6, 6]
    assert epochs_of(rows, tmp_path / "2", falling + flat, rising_late) == 9, "two epochs after the best WER"
    still_falling = [3.0 - 0.1 * epoch for epoch in range(10)]
    assert epochs_of(rows, tmp_path / "3", still_falling, [5] * 10) == 3, "then the WER alone counts"
    hardly = [3.0 - 0.0001 * epoch for epoch in range(10)]
    assert epochs_of(rows, tmp_path / "4", hardly, [0] * 10) == 3


def test_a_resumed_run_knows_its_best_loss(rows: list[Utterance], tmp_path: Path) -> None:
    losses = [2.0, 3.0, 2.9, 2.8, 2.7]
    assert epochs_of(rows, tmp_path, losses, [0] * 5, epochs=2) == 2
    assert epochs_of(rows, tmp_path, losses, [0] * 5) == 3


def test_an_empty_part_is_refused(rows: list[Utterance], tmp_path: Path) -> None:
    chosen = settings()
    loader = make_loader(UtteranceDataset(rows, CODEC.encode), chosen, training=True)
    with pytest.raises(EmptyManifestError, match="the validation part is empty"):
        fit(CtcModule(Small(), CODEC, chosen), loader, [], chosen, RunFolder(tmp_path))  # type: ignore[arg-type]


def test_reading_in_other_processes_gives_the_same(
    rows: list[Utterance], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A started process runs its parent's main file, and a pytest-xdist worker's is not one to run twice.
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    dataset = UtteranceDataset(rows[:4], CODEC.encode)
    here = list(make_loader(dataset, settings(), training=False))
    there = list(make_loader(dataset, settings(workers=1), training=False))
    assert all(torch.equal(a["waveform"], b["waveform"]) for a, b in zip(here, there, strict=True))
    assert [batch["texts"] for batch in here] == [batch["texts"] for batch in there]


def test_padding(rows: list[Utterance]) -> None:
    dataset = UtteranceDataset(rows[:3], CODEC.encode)
    batch = collate([dataset[index] for index in range(3)])
    for row, length, count in zip(range(3), batch["lengths"], batch["target_lengths"], strict=True):
        assert not batch["waveform"][row, length:].any()
        assert (batch["targets"][row, count:] == -100).all()
        assert CODEC.vocabulary.decode(batch["targets"][row, :count].tolist()) == batch["texts"][row]


def test_schedule() -> None:
    factors = [warmup_cosine(step, 100, 0.1, 0.05) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors.index(max(factors)) == 9
    assert factors[55] == pytest.approx(0.525, abs=0.02)
    assert 0.05 <= factors[-1] < 0.06
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[9:]))


def test_no_decay_on_biases() -> None:
    decayed, plain = parameter_groups(Small().parameters(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [3, 3]
    assert [p.ndim for p in plain["params"]] == [1, 1]
    assert plain["weight_decay"] == 0.0


def test_device_and_precision() -> None:
    assert choose_device(settings(device="cpu")) == ("cpu", "32-true")
    assert choose_device(settings(device="cpu", precision="bfloat16")) == ("cpu", "bf16-mixed")
    # torch's default counts the emulation on a T4 as support
    old = SimpleNamespace(
        is_available=lambda: True, is_bf16_supported=lambda including_emulation=True: including_emulation
    )
    new = SimpleNamespace(is_available=lambda: True, is_bf16_supported=lambda including_emulation: True)
    assert choose_device(settings(), new) == ("gpu", "bf16-mixed")
    assert choose_device(settings(), old) == ("gpu", "16-mixed"), "emulated bfloat16 is slower than float16"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"training\.device is gpu"):
            choose_device(settings(device="gpu"))


def test_bfloat16_trains(rows: list[Utterance], tmp_path: Path) -> None:
    run(rows, tmp_path, settings(epochs=1, precision="bfloat16", device="cpu"))
    assert float(read_metrics(tmp_path / "metrics.csv")[0]["train_loss"]) > 0


def test_frozen_parts_rest_while_the_others_train(rows: list[Utterance], tmp_path: Path) -> None:
    shape = {"groups": ((32, 5),), "blocks_per_group": 1, "repeat": 1, "last_filters": 32}
    config = quartznet(len(CODEC.vocabulary), stem=(32, 5), tail=(32, 5), **shape)
    network = QuartzNetCtc(QuartzNet(config), FrontendConfig(), frozen_norms=True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(rows, tmp_path / "norms", settings(epochs=1), network=network)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("running" in name for name in moved)
    assert any("pointwise.weight" in name for name in moved)

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert module.model.ctc_head.training
            assert not any(part.training for part in module.model.encoder.modules())

    encoder = EncoderConfig(width=16, layers=1, heads=2, inner=16)
    whisper = WhisperCtc(encoder, len(CODEC.vocabulary), dropout=0.5)
    whisper.encoder.requires_grad_(False)
    run(rows, tmp_path / "encoder", settings(epochs=1), (Look(),), whisper)


def test_run_folder_belongs_to_one_configuration(tmp_path: Path) -> None:
    config = {"name": "a", "training": {"epochs": 1}, "model": {"width": 1}}
    open_run(tmp_path, config)
    folder = open_run(tmp_path, {**config, "training": {"epochs": 9}, "name": "b", "bundle": {"version": 2}})
    folder.checkpoints.mkdir()
    (folder.checkpoints / "interrupted.ckpt").touch()
    with pytest.raises(ConfigError, match="another configuration \\(model changed\\)"):
        open_run(tmp_path, {**config, "model": {"width": 2}})
    assert json.loads((tmp_path / "config.json").read_text())["model"] == {"width": 1}
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert "git_commit" in environment


def test_a_repeated_epoch_replaces_the_old_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for epoch, loss in ((0, 3.0), (1, 2.0), (2, 1.5), (1, 1.9)):
        append_metrics(path, {"epoch": epoch, "train_loss": loss})
    assert [(row["epoch"], row["train_loss"]) for row in read_metrics(path)] == [("0", "3.0"), ("1", "1.9")]
