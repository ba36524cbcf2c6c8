"""What moves a student: losses, optimisers, and the stored state."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import load_checkpoint
from training.distillation.evaluate import settle, validate
from training.distillation.examples import Batch, BatchMaker, Corpus
from training.distillation.label import COMPONENTS
from training.distillation.learner import Learner, LearnerConfig, adamw
from training.distillation.muon import Muon
from training.distillation.student import Distiller, LossWeights, mix, student_of_size, total_loss
from training.errors import CheckpointError, ConfigError
from training.pretrained import FrozenNorms, fill
from training.recipes.whisper_ctc.model import WhisperCtc, is_openai, read_openai

START_WEIGHTS = LossWeights(hidden=1.0, dense=0.3, posterior=0.7, ctc=0.3)
END_WEIGHTS = LossWeights(hidden=0.3, dense=0.1, posterior=0.8, ctc=0.8)


@dataclass(frozen=True)
class TrainConfig(LearnerConfig):
    """What a run needs to know; stored with its checkpoints."""

    size: str = "m"
    learning_rate: float = 2e-3
    muon: bool = True
    warmup_steps: int = 300
    decay_share: float = 0.55
    ema_steps: int = 300
    gradient_clip: float = 2.0
    min_confidence: float = -0.05
    ctc_every: int = 2
    augment: bool = True
    output_only: bool = False
    """Posteriors and text count, activations do not: for a student that already follows the teacher."""
    frozen_norms: bool = False
    """Batch normalisations keep the statistics that the run began with: for its last part."""


class Trainer(Learner[Batch]):
    """A student, its losses and optimisers, and where it starts from."""

    config: TrainConfig

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        super().__init__(config)
        self.corpus = corpus
        self.distiller = Distiller(student_of_size(config.size), COMPONENTS)
        self.average = copy.deepcopy(self.distiller).requires_grad_(False)
        self.learned, self.averaged = self.distiller, self.average
        self.optimisers = self._optimisers()
        augmentation = corpus.augmentation if config.augment else None
        self.maker = BatchMaker(corpus, config.batch_s, config.seed, augmentation)

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

    def _loss(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, float]]:
        weights = mix(START_WEIGHTS, END_WEIGHTS, progress)
        if self.config.output_only:
            weights = replace(weights, hidden=0.0, dense=0.0)
        losses = self._losses(batch, self.step % self.config.ctc_every == 0)
        values = {name: float(value.detach()) for name, value in losses.items()}
        if "ctc" in losses:
            losses["ctc"] = losses["ctc"] * self.config.ctc_every
        return self._total(losses, weights), values

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return super().state() | {
            "distiller": self.distiller.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        super().restore(state)
        self.distiller.load_state_dict(state["distiller"])
        self.average.load_state_dict(state["average"])
        stored = state["optimisers"]
        if [len(entry["param_groups"]) for entry in stored] == [len(o.param_groups) for o in self.optimisers]:
            for optimiser, entry in zip(self.optimisers, stored, strict=True):
                optimiser.load_state_dict(entry)
        else:
            print("another optimiser than the checkpoint's: its averages start afresh")

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
