"""Stage 3: train the student on the cache.

    python -m training.distillation.distill --cache CACHE --run runs/NAME --size m --max-minutes 100

The learning rate warms up, stays, and falls to nothing over the last part of the run. The run's length is
``--steps``, or a wall-clock budget (``--max-minutes``, or ``--until HH:MM`` UTC) for machines whose speed is
shared. ``last.pt`` and ``best.pt`` in the run folder hold everything; the same command goes on from
``last.pt``, also after SIGTERM. ``--init-from FILE.safetensors`` (made by stage ``weights``) starts a new run
from published weights instead of random ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.distillation.evaluate import settle, validate
from training.distillation.examples import Batch, BatchMaker, Corpus
from training.distillation.student import SIZE_NAMES, corpus_type
from training.distillation.trainer import TrainConfig, Trainer
from training.errors import in_one_line
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

    def validation(self, trainer: Trainer, rates: Mapping[str, float]) -> None:
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


def checkpoint(trainer: Trainer, run: Path, records: Records, *, measured: bool) -> None:
    """Write ``last.pt``; ``measured`` on the held-out speakers, ``best.pt`` too where it is the best."""
    if measured:
        if not trainer.config.frozen_norms:
            settle(trainer.average.fast, trainer.corpus)
        rates = validate(trainer.average.fast, trainer.corpus)
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


def train(
    trainer: Trainer, run: Path, total_steps: int | None, deadline_s: float | None, validate_every_s: float
) -> None:
    """Run until the steps or the time (``time.time()`` value) are used up, or SIGTERM comes."""
    config = trainer.config
    maker = BatchMaker(
        trainer.corpus, config.batch_s, config.seed, trainer.corpus.augmentation if config.augment else None
    )
    started_s, before_s = time.time(), trainer.elapsed_s
    horizon_s = before_s + (deadline_s - started_s) if deadline_s is not None else math.inf
    next_validation_s = started_s + validate_every_s

    def several(step: int) -> list[Batch]:
        return [maker(step * config.workers + worker) for worker in range(config.workers)]

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
            upcoming: Future[list[Batch]] = pool.submit(several, trainer.step)
            while not finished():
                batches = upcoming.result()
                upcoming = pool.submit(several, trainer.step + 1)
                records.step(trainer.train_step(batches, progress()))
                trainer.elapsed_s = before_s + time.time() - started_s
                if time.time() >= next_validation_s:
                    checkpoint(trainer, run, records, measured=True)
                    next_validation_s = time.time() + validate_every_s
            upcoming.cancel()
        # whoever ends the process waits only so long
        checkpoint(trainer, run, records, measured=bool(trainer.corpus.validation) and not stopped.is_set())


def _clock(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%H:%M")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected HH:MM") from None


def deadline(until: datetime | None, max_minutes: float | None) -> float | None:
    """The next moment of that hour and minute UTC, or minutes from now, as a ``time.time()`` value."""
    if until is not None:
        now = datetime.now(UTC)
        target = now.replace(hour=until.hour, minute=until.minute, second=0, microsecond=0)
        return (target if target > now else target + timedelta(days=1)).timestamp()
    return None if max_minutes is None else time.time() + 60.0 * max_minutes


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0, at most 1")
    return value


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """The command line that this stage and stage ``pieces`` share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, created or resumed")
    parser.add_argument("--size", choices=sorted(SIZE_NAMES), default=TrainConfig.size)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--until", type=_clock, help="HH:MM UTC")
    parser.add_argument("--batch-s", type=float, default=TrainConfig.batch_s)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument(
        "--decay-share", type=_share, default=TrainConfig.decay_share, help="of the run, 0 to 1"
    )
    parser.add_argument("--no-muon", action="store_true", help="AdamW for every weight")
    parser.add_argument("--output-only", action="store_true", help="no activations among the targets")
    parser.add_argument(
        "--frozen-norms",
        action="store_true",
        help="go on with statistics of the batch normalisations as they will be when it is used; Conformers",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=TrainConfig.workers, help="threads, each with a batch of its own"
    )
    parser.add_argument("--validate-every-minutes", type=float, default=5.0)
    parser.add_argument(
        "--init-from", type=Path, help="checkpoint (.safetensors), or OpenAI's own (.pt), to start from"
    )
    return parser


def run(arguments: argparse.Namespace, trainer_class: Callable[[TrainConfig, Corpus], Trainer]) -> None:
    """Train as the command line says, or go on with the run that is there. Raises SystemExit on misuse."""
    deadline_s = deadline(arguments.until, arguments.max_minutes)
    if arguments.steps is None and deadline_s is None:
        raise SystemExit("say how long: --steps, --max-minutes or --until")
    torch.set_num_threads(1)
    config = TrainConfig(
        size=arguments.size,
        workers=arguments.workers,
        muon=not arguments.no_muon,
        batch_s=arguments.batch_s,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
        output_only=arguments.output_only,
        decay_share=arguments.decay_share,
        frozen_norms=arguments.frozen_norms,
    )
    arguments.run.mkdir(parents=True, exist_ok=True)
    trainer = trainer_class(config, corpus_type(config.size)(arguments.cache, config.min_confidence))
    last, frozen_before = arguments.run / "last.pt", False
    if last.exists():
        state = torch.load(last, weights_only=True)
        if state["config"]["size"] != config.size:
            raise SystemExit(f"{last}: a student of size {state['config']['size']}, asked for {config.size}")
        trainer.restore(state)
        frozen_before = state["config"].get("frozen_norms", False)
        print(f"going on at step {trainer.step}")
    elif arguments.init_from:
        trainer.initialise_from(arguments.init_from)
    if config.frozen_norms:
        trainer.freeze_norms(anew=not frozen_before)
    (arguments.run / "config.json").write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    train(trainer, arguments.run, arguments.steps, deadline_s, 60.0 * arguments.validate_every_minutes)


@in_one_line("distill")
def main() -> int:
    """Command line."""
    run(arguments_of(__doc__).parse_args(), Trainer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
