"""Runs a training until its steps or its time are used up: metrics, checkpoints, validation, SIGTERM."""

from __future__ import annotations

import csv
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.distillation.learner import Batch, Learner
from training.errors import ConfigError
from training.torch_state import save_state


class Records:
    """What a run tells: smoothed metrics, as CSV in its folder and in a line above the progress bar."""

    def __init__(self, run: Path, bar: tqdm[Any]) -> None:
        self.path, self.bar = run / "metrics.csv", bar
        self.smoothed: dict[str, float] = {}

    def step(self, values: Mapping[str, float]) -> None:
        """Take in one step's metrics."""
        for name, value in values.items():
            before = self.smoothed.get(name, value)
            self.smoothed[name] = 0.98 * before + 0.02 * value
        self.bar.update()

    def validation(self, trainer: Learner[Any], rates: Mapping[str, float]) -> None:
        """Write the smoothed metrics and the word error rates by source."""
        audio_h = trainer.audio_s / 3600
        errors = {f"wer_{name}": rate for name, rate in sorted(rates.items())}
        self._write(trainer.step, {"audio_h": audio_h, **self.smoothed, **errors})
        self.bar.write(
            f"{datetime.now(UTC):%H:%M} step {trainer.step} {audio_h:.1f} h seen "
            + " ".join(f"{name} {value:.3f}" for name, value in self.smoothed.items())
            + " | WER "
            + " ".join(f"{name} {rate:.3f}" for name, rate in sorted(rates.items()))
        )

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        """One row ``time, step, name, value`` per metric, so that new metrics need no new header."""
        now = datetime.now(UTC).strftime("%H:%M:%S")
        with self.path.open("a", newline="", encoding="utf-8") as sink:
            csv.writer(sink).writerows([now, step, name, f"{value:.5g}"] for name, value in values.items())


def checkpoint(trainer: Learner[Any], run: Path, records: Records, *, measured: bool) -> None:
    """Write ``last.pt``; ``measured`` on the held-out speakers, ``best.pt`` too where it is the best."""
    if measured:
        rates = trainer.validation()
        records.validation(trainer, rates)
        if rates.get("all", math.inf) < trainer.best_wer:
            trainer.best_wer = rates["all"]
            save_state(trainer.state(), run / "best.pt")
    save_state(trainer.state(), run / "last.pt")


@contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process."""
    stopped = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_until(
    trainer: Learner[Batch],
    run: Path,
    total_steps: int | None,
    deadline_s: float | None,
    validate_every_s: float,
) -> None:
    """Run until the steps or the time (``time.time()`` value) are used up, or SIGTERM comes.

    Raises SystemExit after SIGTERM, once the state is saved, with the status of a process that it ended.
    """
    started_s, before_s = time.time(), trainer.elapsed_s
    horizon_s = before_s + (deadline_s - started_s) if deadline_s is not None else math.inf
    next_validation_s = started_s + validate_every_s

    def progress() -> float:
        return trainer.step / total_steps if total_steps else min(1.0, trainer.elapsed_s / horizon_s)

    def finished() -> bool:
        return (
            stopped.is_set()
            or (total_steps is not None and trainer.step >= total_steps)
            or (deadline_s is not None and time.time() >= deadline_s)
        )

    with (
        sigterm_noted() as stopped,
        tqdm(total=total_steps, initial=trainer.step, unit="step", mininterval=10, desc=run.name) as bar,
    ):
        records = Records(run, bar)
        with ThreadPoolExecutor(1) as pool:
            upcoming: Future[list[Batch]] = pool.submit(trainer.batches, trainer.step)
            while not finished():
                batches = upcoming.result()
                upcoming = pool.submit(trainer.batches, trainer.step + 1)
                records.step(trainer.train_step(batches, progress()))
                trainer.elapsed_s = before_s + time.time() - started_s
                if time.time() >= next_validation_s:
                    checkpoint(trainer, run, records, measured=True)
                    next_validation_s = time.time() + validate_every_s
            upcoming.cancel()
        # whoever ends the process waits only so long
        checkpoint(trainer, run, records, measured=not stopped.is_set())
    if stopped.is_set():
        raise SystemExit(128 + signal.SIGTERM)


def begun_once(last: Path, init_from: Path | None) -> None:
    """Raises ConfigError where a run is to begin with other weights and `last`, to go on with, is there."""
    if init_from is not None and last.exists():
        raise ConfigError(
            f"--init-from {init_from}: {last} is a run to go on with; leave it out or give another --run"
        )


def deadline(until: datetime | None, max_minutes: float | None) -> float | None:
    """The next moment of that hour and minute UTC, or minutes from now, as a ``time.time()`` value."""
    if until is not None:
        now = datetime.now(UTC)
        target = now.replace(hour=until.hour, minute=until.minute, second=0, microsecond=0)
        return (target if target > now else target + timedelta(days=1)).timestamp()
    return None if max_minutes is None else time.time() + 60.0 * max_minutes
