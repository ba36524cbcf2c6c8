"""End a training that has lost its way: its loss is no finite number any more."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from training.errors import DivergedError
from training.loop.run_folder import RunFolder
from training.loop.settings import TrainingSettings

IN_A_ROW = 10
"""Batches without a finite loss that end a training. float16's scaler skips single ones, and they pass."""


class StopWhereDiverged(Callback):
    """Raises DivergedError for IN_A_ROW training losses that are not finite, or a validation loss of NaN."""

    def __init__(self, settings: TrainingSettings, folder: RunFolder) -> None:
        self.settings = settings
        self.folder = folder
        self.seen = 0
        self.lost: torch.Tensor | int = 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count on the device, and wait for it once in IN_A_ROW batches only."""
        loss = outputs["loss"].detach()
        self.lost = torch.where(torch.isfinite(loss), 0, self.lost + 1)
        self.seen += 1
        if self.seen % IN_A_ROW == 0 and int(self.lost) >= IN_A_ROW:
            raise self._error(trainer, f"the training loss is not finite, {int(self.lost)} batches in a row")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before the epoch's state is kept."""
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and torch.isnan(loss):
            raise self._error(trainer, "the validation loss is NaN")

    def _error(self, trainer: lightning.Trainer, what: str) -> DivergedError:
        settings = self.settings
        return DivergedError(
            f"{what}, at epoch {trainer.current_epoch}, step {trainer.global_step}: lower "
            f"training.learning_rate (now {settings.learning_rate:g}) or training.gradient_clip (now "
            f"{settings.gradient_clip:g}; 0 clips nothing), or set training.precision (now "
            f"{settings.precision}, here {trainer.precision}) to float32, then run the same command again: "
            f"it goes on from {self.folder.resume_from() or 'the start'}; another --run folder starts anew"
        )
