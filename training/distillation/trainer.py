"""What moves a student: losses, optimisers, the running average of its weights, and the stored state."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.checkpoint import load_checkpoint
from training.distillation.evaluate import settle, validate
from training.distillation.examples import Batch, BatchMaker, Corpus
from training.distillation.label import COMPONENTS
from training.distillation.muon import Muon
from training.distillation.student import Distiller, LossWeights, mix, student_of_size, total_loss
from training.errors import CheckpointError, ConfigError
from training.pretrained import FrozenNorms, fill
from training.recipes.whisper_ctc.model import WhisperCtc, is_openai, read_openai

START_WEIGHTS = LossWeights(hidden=1.0, dense=0.3, posterior=0.7, ctc=0.3)
END_WEIGHTS = LossWeights(hidden=0.3, dense=0.1, posterior=0.8, ctc=0.8)
AVERAGE_EVERY = 4
"""Steps between two moves of the running average; each touches every weight."""


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
    frozen_norms: bool = False
    """Batch normalisations keep the statistics that the run began with: for its last part."""


class Schedule(Protocol):
    """What the optimiser needs to know of a run."""

    @property
    def learning_rate(self) -> float:
        """The peak."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of matrices."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Until the peak."""
        ...

    @property
    def decay_share(self) -> float:
        """Share of the run, at its end, over which the rate falls."""
        ...

    @property
    def ema_steps(self) -> int:
        """Over which the running average looks back."""
        ...


def adamw(config: Schedule, parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """Decay for matrices only."""
    several = list(parameters)
    groups = [
        {"params": [p for p in several if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in several if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def move_average(config: Schedule, step: int, ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Exponentially, faster in the first steps: `ours` towards `theirs`. For every `AVERAGE_EVERY`th step."""
    share = max(AVERAGE_EVERY / config.ema_steps, 9.0 / (10.0 + step // AVERAGE_EVERY))
    with torch.no_grad():
        torch._foreach_lerp_(list(ours), list(theirs), share)


def learning_rate(config: Schedule, step: int, progress: float) -> float:
    """Linear warm-up, a plateau, then half a cosine to 2 % of the peak over the last ``decay_share``."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    late = max(0.0, (progress - (1.0 - config.decay_share)) / config.decay_share)
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, late))))


class Trainer:
    """Model, optimiser, running average of the weights, and the step that moves them."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, corpus
        self.distiller = Distiller(student_of_size(config.size), COMPONENTS)
        self.average = copy.deepcopy(self.distiller).requires_grad_(False)
        self.pool = ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.optimisers = self._optimisers()
        augmentation = corpus.augmentation if config.augment else None
        self.maker = BatchMaker(corpus, config.batch_s, config.seed, augmentation)
        self.step, self.elapsed_s, self.audio_s, self.best_wer = 0, 0.0, 0.0, math.inf

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the student's matrices where it is asked for, AdamW for everything else."""
        config = self.config
        named = dict(self.distiller.named_parameters())
        ends = self.distiller.student.matrices
        matrices = {name for name in named if config.muon and name.endswith(ends)}
        rest = (p for name, p in named.items() if name not in matrices)
        found: list[torch.optim.Optimizer] = [adamw(config, rest)]
        if matrices:
            wide = [named[name] for name in sorted(matrices)]
            found.append(Muon(wide, config.learning_rate, 0.95, config.weight_decay, self.pool))
        return found

    def batches(self, step: int) -> list[Batch]:
        """One per worker."""
        workers = self.config.workers
        return [self.maker(step * workers + worker) for worker in range(workers)]

    def validation(self) -> dict[str, float]:
        """Word error rate of the averaged weights per source, on the held-out speakers."""
        if not self.corpus.validation:
            return {}
        if not self.config.frozen_norms:
            settle(self.average.fast, self.corpus)
        return validate(self.average.fast, self.corpus)

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
        """Of weights and batch statistics."""
        ours = [p for p in self.average.state_dict().values() if p.is_floating_point()]
        theirs = [p for p in self.distiller.state_dict().values() if p.is_floating_point()]
        move_average(self.config, self.step, ours, theirs)

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

    def freeze_norms(self, *, anew: bool) -> None:
        """Keep the normalisations' statistics, taken `anew` from clean speech or as they are.

        Raises ConfigError for a student that is no Conformer.
        """
        ours, average = self.distiller.model, self.average.model
        if not (isinstance(ours, FrozenNorms) and isinstance(average, FrozenNorms)):
            raise ConfigError(f"--frozen-norms: a student of size {self.config.size!r} cannot")
        if anew:
            settle(self.distiller.fast, self.corpus)
            average.load_state_dict(dict(ours.named_buffers()), strict=False)
        ours.frozen_norms = average.frozen_norms = True
        self.distiller.train()

    def initialise_from(self, weights: Path) -> None:
        """Start from a published student, or from an encoder of OpenAI's; heads that it lacks stay random.

        Raises CheckpointError.
        """
        ours = self.distiller.model
        shape: object
        if isinstance(ours, WhisperCtc) and is_openai(weights.name):
            shape, encoder = read_openai(weights)
            state = {f"encoder.{name}": value for name, value in encoder.items()}
            new: tuple[str, ...] = ("ctc_head.", "encoder.embed_positions.")
        else:
            stored = load_checkpoint(weights).model
            shape, state, new = stored.config, stored.state_dict(), ()
        if shape != ours.config:
            raise CheckpointError(f"{weights}: another network than size {self.config.size!r}")
        for network in (self.distiller, self.average):
            fill(network.model, state, new=new)
