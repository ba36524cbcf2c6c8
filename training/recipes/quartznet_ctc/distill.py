"""Stage 3: train the student on the cache.

    python -m training.recipes.quartznet_ctc.distill --cache CACHE --run runs/NAME --size m --max-minutes 100

The learning rate warms up, stays, and falls to nothing over the last part of the run. The run's length is
``--steps``, or a wall-clock budget (``--max-minutes``, or ``--until HH:MM`` UTC) for machines whose speed is
shared. ``last.pt`` and ``best.pt`` in the run folder hold everything; the same command goes on from
``last.pt``, also after SIGTERM. ``--init-from FILE.safetensors`` (made by stage ``weights``) starts a new run
from published weights instead of random ones.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import load_checkpoint
from training.recipes.quartznet_ctc.augment import AugmentConfig
from training.recipes.quartznet_ctc.evaluate import validate
from training.recipes.quartznet_ctc.examples import Batch, BatchMaker, Corpus
from training.recipes.quartznet_ctc.label import COMPONENTS
from training.recipes.quartznet_ctc.muon import Muon
from training.recipes.quartznet_ctc.student import (
    SIZE_NAMES,
    Distiller,
    LossWeights,
    mix,
    student_config,
    total_loss,
)

START_WEIGHTS = LossWeights(hidden=1.0, dense=0.3, posterior=0.7, ctc=0.3)
AVERAGE_EVERY = 4
"""Steps between two moves of the running average; each touches every weight."""
END_WEIGHTS = LossWeights(hidden=0.3, dense=0.1, posterior=0.8, ctc=0.8)


@dataclass(frozen=True)
class TrainConfig:
    """What a run needs to know; stored with its checkpoints."""

    size: str = "m"
    workers: int = 2
    batch_s: float = 40.0
    """Padded audio-seconds per worker."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    muon: bool = True
    warmup_steps: int = 300
    decay_share: float = 0.55
    """Share of the run, at its end, over which the learning rate falls."""
    ema_steps: int = 300
    gradient_clip: float = 2.0
    min_confidence: float = -0.05
    ctc_every: int = 2
    seed: int = 0
    augment: bool = True
    output_only: bool = False
    """Posteriors and text count, activations do not: for a student that already follows the teacher."""


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warm-up, a plateau, then half a cosine to 2 % of the peak over the last ``decay_share``."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    late = max(0.0, (progress - (1.0 - config.decay_share)) / config.decay_share)
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, late))))


class Trainer:
    """Model, optimiser, running average of the weights, and the step that moves them."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, corpus
        self.distiller = Distiller(student_config(config.size), COMPONENTS)
        self.average = copy.deepcopy(self.distiller).requires_grad_(False)
        self.pool = ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.optimisers = self._optimisers()
        self.step, self.elapsed_s, self.audio_s, self.best_wer = 0, 0.0, 0.0, math.inf

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the pointwise convolutions' matrices where it is asked for, AdamW for everything else."""
        config = self.config
        named = dict(self.distiller.named_parameters())
        matrices = {name for name in named if config.muon and name.endswith("pointwise.weight")}
        decayed = [p for name, p in named.items() if p.ndim > 1 and name not in matrices]
        plain = [p for p in named.values() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
        ]
        if matrices:
            wide = [named[name] for name in sorted(matrices)]
            found.append(Muon(wide, config.learning_rate, 0.95, config.weight_decay, self.pool))
        return found

    def _losses(self, batch: Batch, with_ctc: bool) -> dict[str, Tensor]:
        """The parts of the loss, each with its gradient recorded."""
        return self.distiller.losses(batch, self.corpus.hidden_weights, with_ctc)

    def _total(self, losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
        """One number to follow downhill."""
        return total_loss(losses, weights)

    def _backward(self, batch: Batch, weights: LossWeights, with_ctc: bool) -> dict[str, float]:
        """Adds the gradients of one batch of the step; runs in a worker thread."""
        losses = self._losses(batch, with_ctc)
        values = {name: float(value.detach()) for name, value in losses.items()}
        if "ctc" in losses:
            losses["ctc"] = losses["ctc"] * self.config.ctc_every
        loss = self._total(losses, weights) / self.config.workers
        loss.backward()  # type: ignore[no-untyped-call]
        return values

    def train_step(self, batches: list[Batch], progress: float) -> dict[str, float]:
        """One update on one batch per worker; returns the parts of the loss.

        A worker is a thread whose kernels are single-threaded: the threads meet once per step instead of
        once per operation, which is what counts on cores that are shared with other work.
        """
        rate = learning_rate(self.config, self.step, progress)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        with_ctc = self.step % self.config.ctc_every == 0
        weights = mix(START_WEIGHTS, END_WEIGHTS, progress)
        if self.config.output_only:
            weights = replace(weights, hidden=0.0, dense=0.0)
        parts = list(self.pool.map(lambda batch: self._backward(batch, weights, with_ctc), batches))
        norm = torch.nn.utils.clip_grad_norm_(self.distiller.parameters(), self.config.gradient_clip)
        if torch.isfinite(norm):
            for optimiser in self.optimisers:
                optimiser.step()
            if self.step % AVERAGE_EVERY == 0:
                self._move_average()
        self.distiller.zero_grad(set_to_none=True)
        self.step += 1
        self.audio_s += sum(batch.audio_s for batch in batches)
        values = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        return {**values, "norm": float(norm), "rate": rate}

    def _move_average(self) -> None:
        """Exponential moving average of weights and batch statistics, shorter in the first steps."""
        updates = self.step // AVERAGE_EVERY
        share = max(AVERAGE_EVERY / self.config.ema_steps, 9.0 / (10.0 + updates))
        with torch.no_grad():
            ours = [p for p in self.average.state_dict().values() if p.is_floating_point()]
            theirs = [p for p in self.distiller.state_dict().values() if p.is_floating_point()]
            torch._foreach_lerp_(ours, theirs, share)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "config": asdict(self.config),
            "distiller": self.distiller.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "counters": [self.step, self.elapsed_s, self.audio_s, self.best_wer],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        self.distiller.load_state_dict(state["distiller"])
        self.average.load_state_dict(state["average"])
        stored = state["optimisers"]
        if [len(entry["param_groups"]) for entry in stored] == [len(o.param_groups) for o in self.optimisers]:
            for optimiser, entry in zip(self.optimisers, stored, strict=True):
                optimiser.load_state_dict(entry)
        else:
            print("another optimiser than the checkpoint's: its averages start afresh")
        self.step, self.elapsed_s, self.audio_s, self.best_wer = state["counters"]

    def initialise_from(self, weights: Path) -> None:
        """Start from a published student; the heads of training only stay random."""
        stored = load_checkpoint(weights).model
        if stored.config != self.distiller.model.config:
            raise ValueError(f"{weights}: another network than size {self.config.size!r}")
        for network in (self.distiller, self.average):
            network.model.load_state_dict(stored.state_dict())


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the old one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


class RunLog:
    """Metrics as CSV lines in the run folder."""

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.csv"

    def write(self, values: dict[str, Any]) -> None:
        """One row ``time, step, name, value`` per metric, so that new metrics need no new header."""
        now = datetime.now(UTC).strftime("%H:%M:%S")
        with self.path.open("a", newline="", encoding="utf-8") as sink:
            writer = csv.writer(sink)
            step = values["step"]
            for name, value in values.items():
                if name != "step":
                    writer.writerow([now, step, name, f"{value:.5g}"])


def train(
    trainer: Trainer, run: Path, total_steps: int | None, deadline_s: float | None, validate_every_s: float
) -> None:
    """Run until the steps or the time (``time.time()`` value) are used up."""
    config = trainer.config
    log = RunLog(run)
    maker = BatchMaker(
        trainer.corpus, config.batch_s, config.seed, AugmentConfig() if config.augment else None
    )
    started = time.time()
    before_s = trainer.elapsed_s
    horizon_s = before_s + (deadline_s - started) if deadline_s is not None else math.inf
    smoothed: dict[str, float] = {}
    next_validation = time.time() + validate_every_s
    bar = tqdm(total=total_steps, initial=trainer.step, unit="step", mininterval=10, desc=run.name)

    stopped = threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())

    def several(step: int) -> list[Batch]:
        return [maker(step * config.workers + worker) for worker in range(config.workers)]

    def finished() -> bool:
        if stopped.is_set():
            return True
        if total_steps is not None and trainer.step >= total_steps:
            return True
        return deadline_s is not None and time.time() >= deadline_s

    def checkpoint(validation: bool) -> None:
        nonlocal next_validation
        state = trainer.state()
        if validation:
            rates = validate(trainer.average.fast, trainer.corpus)
            log.write({"step": trainer.step, "audio_h": trainer.audio_s / 3600} | smoothed)
            log.write({"step": trainer.step} | {f"wer_{name}": rate for name, rate in sorted(rates.items())})
            bar.write(
                f"{datetime.now(UTC):%H:%M} step {trainer.step} {trainer.audio_s / 3600:.1f} h seen "
                + " ".join(f"{name} {value:.3f}" for name, value in smoothed.items())
                + " | WER "
                + " ".join(f"{name} {rate:.3f}" for name, rate in sorted(rates.items()))
            )
            if rates.get("all", math.inf) < trainer.best_wer:
                trainer.best_wer = rates["all"]
                state = trainer.state()
                save(state, run / "best.pt")
        save(state, run / "last.pt")
        next_validation = time.time() + validate_every_s

    with ThreadPoolExecutor(1) as pool:
        upcoming: Future[list[Batch]] = pool.submit(several, trainer.step)
        while not finished():
            batches = upcoming.result()
            upcoming = pool.submit(several, trainer.step + 1)
            if total_steps is not None:
                progress = trainer.step / total_steps
            else:
                progress = min(1.0, trainer.elapsed_s / horizon_s)
            for name, value in trainer.train_step(batches, progress).items():
                smoothed[name] = value if name not in smoothed else 0.98 * smoothed[name] + 0.02 * value
            trainer.elapsed_s = before_s + time.time() - started
            bar.update()
            if time.time() >= next_validation:
                checkpoint(True)
        upcoming.cancel()
    checkpoint(bool(trainer.corpus.validation) and not stopped.is_set())
    bar.close()
    if in_main_thread:
        signal.signal(signal.SIGTERM, previous)


def parse_deadline(until: str | None, max_minutes: float | None) -> float | None:
    """``HH:MM`` UTC (the next one) or minutes from now, as a ``time.time()`` value."""
    if until is not None:
        now = datetime.now(UTC)
        hour, minute = (int(part) for part in until.split(":"))
        target = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
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
    parser.add_argument("--until", help="HH:MM UTC")
    parser.add_argument("--batch-s", type=float, default=TrainConfig.batch_s)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument(
        "--decay-share", type=_share, default=TrainConfig.decay_share, help="of the run, 0 to 1"
    )
    parser.add_argument("--no-muon", action="store_true", help="AdamW for every weight")
    parser.add_argument("--output-only", action="store_true", help="no activations among the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=TrainConfig.workers, help="threads, each with a batch of its own"
    )
    parser.add_argument("--validate-every-minutes", type=float, default=5.0)
    parser.add_argument("--init-from", type=Path, help="checkpoint (.safetensors) to start from")
    return parser


def run(arguments: argparse.Namespace, trainer_class: Callable[[TrainConfig, Corpus], Trainer]) -> None:
    """Train as the command line says, or go on with the run that is there. Raises SystemExit on misuse."""
    deadline_s = parse_deadline(arguments.until, arguments.max_minutes)
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
    )
    arguments.run.mkdir(parents=True, exist_ok=True)
    trainer = trainer_class(config, Corpus(arguments.cache, config.min_confidence))
    last = arguments.run / "last.pt"
    if last.exists():
        state = torch.load(last, weights_only=True)
        if state["config"]["size"] != config.size:
            raise SystemExit(f"{last}: a student of size {state['config']['size']}, asked for {config.size}")
        trainer.restore(state)
        print(f"going on at step {trainer.step}")
    elif arguments.init_from:
        trainer.initialise_from(arguments.init_from)
    (arguments.run / "config.json").write_text(json.dumps(asdict(config), indent=1), encoding="utf-8")
    train(trainer, arguments.run, arguments.steps, deadline_s, 60.0 * arguments.validate_every_minutes)


def main() -> None:
    run(arguments_of(__doc__).parse_args(), Trainer)


if __name__ == "__main__":
    main()
