"""The step that every training shares: one batch per worker, one update, and the running average."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

AVERAGE_EVERY = 4
"""Steps between two moves of the running average; each touches every weight."""


@dataclass(frozen=True)
class LearnerConfig:
    """What every run needs to know; stored with its checkpoints."""

    learning_rate: float
    """The peak."""
    warmup_steps: int
    """Until the peak."""
    decay_share: float
    """Share of the run, at its end, over which the learning rate falls."""
    ema_steps: int
    """Over which the running average looks back."""
    gradient_clip: float
    """Largest norm of a step's gradient."""
    workers: int = 2
    """Threads, each with a batch of its own."""
    batch_s: float = 40.0
    """Padded audio-seconds per worker."""
    weight_decay: float = 0.01
    """Of matrices."""
    seed: int = 0


def adamw(config: LearnerConfig, parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """Decay for matrices only."""
    several = list(parameters)
    groups = [
        {"params": [p for p in several if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in several if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def learning_rate(config: LearnerConfig, step: int, progress: float) -> float:
    """Linear warm-up, a plateau, then half a cosine to 2 % of the peak over the last ``decay_share``."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    late = max(0.0, (progress - (1.0 - config.decay_share)) / config.decay_share)
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, late))))


class Timed(Protocol):
    """What a step asks of a batch."""

    @property
    def audio_s(self) -> float:
        """Seconds of audio in it."""
        ...


Batch = TypeVar("Batch", bound=Timed)


class Learner(ABC, Generic[Batch]):
    """Weights, their running average, and the step that moves both.

    Whoever derives from it sets the four attributes once ``__init__`` has seeded PyTorch's draws.
    """

    maker: Callable[[int], Batch]
    """Gives the batch of a number."""
    learned: nn.Module
    """What the optimisers move."""
    averaged: nn.Module
    """Its running average."""
    optimisers: list[torch.optim.Optimizer]

    def __init__(self, config: LearnerConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.pool = ThreadPoolExecutor(config.workers, initializer=torch.set_num_threads, initargs=(1,))
        self.step, self.elapsed_s, self.audio_s, self.best_wer = 0, 0.0, 0.0, math.inf

    @abstractmethod
    def _loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
        """The loss on one batch, with its gradient recorded, and its parts; runs in a worker thread."""

    @abstractmethod
    def validation(self) -> dict[str, float]:
        """Word error rates of the average by source and under ``all``; empty where nobody is held out."""

    def batches(self, step: int) -> list[Batch]:
        """What step number ``step`` learns from; called with rising numbers, in a thread of its own."""
        workers = self.config.workers
        return [self.maker(step * workers + worker) for worker in range(workers)]

    def train_step(self, batches: list[Batch], progress: float) -> dict[str, float]:
        """One update, at 0 to 1 of the run; returns the parts of the loss, the gradient's norm and the rate.

        A worker is a thread whose kernels are single-threaded: the threads meet once per step instead of
        once per operation, which is what counts on cores that are shared with other work.
        """
        rate = learning_rate(self.config, self.step, progress)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        parts = self._gradients(batches, progress)
        norm = torch.nn.utils.clip_grad_norm_(self.learned.parameters(), self.config.gradient_clip)
        if torch.isfinite(norm):
            for optimiser in self.optimisers:
                optimiser.step()
            if self.step % AVERAGE_EVERY == 0:
                self._move_average()
        self.learned.zero_grad(set_to_none=True)
        self.step += 1
        self.audio_s += sum(batch.audio_s for batch in batches)
        values = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        return {**values, "norm": float(norm), "rate": rate}

    def _gradients(self, batches: list[Batch], progress: float) -> list[dict[str, float]]:
        """Give `learned` the mean gradient of the batches; returns the parts of the loss on each."""

        def backward(batch: Batch) -> dict[str, float]:
            loss, parts = self._loss(batch, progress)
            (loss / self.config.workers).backward()  # type: ignore[no-untyped-call]
            return parts

        return list(self.pool.map(backward, batches))

    def _move_average(self) -> None:
        """Of weights and batch statistics, exponentially, faster in the first steps."""
        share = max(AVERAGE_EVERY / self.config.ema_steps, 9.0 / (10.0 + self.step // AVERAGE_EVERY))
        ours, theirs = (
            [value for value in module.state_dict().values() if value.is_floating_point()]
            for module in (self.averaged, self.learned)
        )
        with torch.no_grad():
            torch._foreach_lerp_(ours, theirs, share)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs; whoever derives adds the weights."""
        return {
            "config": asdict(self.config),
            "counters": [self.step, self.elapsed_s, self.audio_s, self.best_wer],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        self.step, self.elapsed_s, self.audio_s, self.best_wer = state["counters"]
