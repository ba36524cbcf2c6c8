"""States of a training: kept, saved when it breaks off, and gone on from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from training.data.sampler import DurationBatchSampler
from training.errors import ConfigError, DiskFullError, DivergedError
from training.loop.run_folder import RunFolder

APPLIED = "applied_batches"
"""Key of a state: how many batches of its epoch are in the weights."""


class Checkpoints(ModelCheckpoint):
    """Lightning's, for a run folder that may have moved since the state was saved.

    Lightning stores whole paths: in another folder it would forget which states were the best, and in one
    that is gone it would fail to remove them.
    """

    @property
    def state_key(self) -> str:
        """That of Lightning's own, under which older states lie."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The files of these names in the folder of now; what is not there is forgotten."""
        here = {**state_dict, "dirpath": self.dirpath}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            here[name] = self._here(state_dict.get(name, ""))
        kept = {self._here(path): score for path, score in state_dict.get("best_k_models", {}).items()}
        kept.pop("", None)
        here["best_k_models"] = kept
        if kept:
            best, *_, worst = sorted(kept, key=lambda path: float(kept[path])) * 2
            here |= {"best_model_path": best, "best_model_score": kept[best]}
            here |= {"kth_best_model_path": worst, "kth_value": kept[worst]}
        super().load_state_dict(here)

    def _here(self, path: str) -> str:
        found = Path(str(self.dirpath), Path(path).name)
        return str(found) if path and found.is_file() else ""


class Resume(Callback):
    """Sends the sampler to where a stored state left it; Lightning alone starts with epoch 0's batches.

    Where that was between two optimiser steps, the gradients of the batches after the first of them are lost:
    these batches come again.
    """

    def __init__(self, loader: DataLoader[Any], epochs: int) -> None:
        self.sampler = loader.batch_sampler
        self.epochs = epochs
        self.stepping: list[tuple[int, int, int]] = []
        """Of the last two optimiser steps: epoch, how many of its batches are in the weights then, number."""

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note what the step is about to apply."""
        step = trainer.current_epoch, trainer.fit_loop.batch_idx + 1, trainer.global_step + 1
        self.stepping = [*self.stepping[-1:], step]

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """How many of the epoch's batches are in the weights."""
        done = (batches for epoch, batches, step in self.stepping if self._is_done(trainer, epoch, step))
        checkpoint[APPLIED] = max(done, default=0)

    @staticmethod
    def _is_done(trainer: lightning.Trainer, epoch: int, step: int) -> bool:
        return epoch == trainer.current_epoch and step <= trainer.global_step

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Epoch and complete batches are those of Lightning's own progress. Raises ConfigError."""
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = (loops[name]["current"] for name in ("epoch_progress", "epoch_loop.batch_progress"))
        if epochs["processed"] > self.epochs:
            raise ConfigError(
                f"training.epochs is {self.epochs}, and {epochs['processed']} epochs are done: give as many "
                "or more, or another --run folder"
            )
        if not isinstance(self.sampler, DurationBatchSampler):
            return
        if epochs["processed"] == epochs["ready"]:
            self.sampler.go_on_from(epochs["processed"], 0)
            return
        applied = checkpoint.get(APPLIED, batches["completed"])  # older states do not say
        if applied < batches["processed"]:
            _set_back(loops["epoch_loop.batch_progress"], applied)
        self.stepping = [(epochs["processed"], applied, checkpoint["global_step"])]
        self.sampler.go_on_from(epochs["processed"], applied)


def _set_back(progress: dict[str, Any], batches: int) -> None:
    """Let Lightning's counters say that the batch after so many of the epoch had just begun."""
    before = progress["total"]["completed"] - progress["current"]["completed"]
    for name, earlier in (("total", before), ("current", 0)):
        begun = dict.fromkeys(("ready", "started"), earlier + batches + 1)
        progress[name] |= begun | dict.fromkeys(("processed", "completed"), earlier + batches)


class SaveOnInterruption(Callback):
    """Keep the state of the last complete step when training ends with an exception.

    It goes once an epoch is done after it: in a copy of the folder it may be the newer file of the two.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.path = folder.checkpoints / "interrupted.ckpt"

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The state of the epoch before is there."""
        if self.folder.resume_from() != self.path:
            self.path.unlink(missing_ok=True)

    on_train_end = on_train_epoch_start

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Save, where there is room; the reason is what is told. A network that diverged is not worth it."""
        if trainer.global_step == 0 or isinstance(exception, DivergedError):
            return
        try:
            trainer.save_checkpoint(self.path)
        except DiskFullError as error:
            print(f"warning: the state of the last step is lost: {error}", file=sys.stderr)
            return
        if isinstance(exception, KeyboardInterrupt | SIGTERMException):
            print(
                f"\ninterrupted after step {trainer.global_step}: the same command goes on from {self.path}",
                file=sys.stderr,
            )
