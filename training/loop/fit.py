"""Train: Lightning's trainer with our records around it, resumable at any epoch."""

from __future__ import annotations

import gc
import logging
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from training.errors import ConfigError, EmptyManifestError, OutOfMemoryError
from training.files import naming_full_disk
from training.loop.divergence import StopWhereDiverged
from training.loop.module import SpeechModule
from training.loop.plots import plot_history
from training.loop.run_folder import RunFolder, append_metrics, read_metrics
from training.loop.settings import INFORMATIVE_WER, LOSS_STEP, TrainingSettings
from training.loop.states import Checkpoints, Resume, SaveOnInterruption
from training.torch_state import WholeFiles

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}


def choose_device(settings: TrainingSettings, cuda: Any = torch.cuda) -> tuple[str, str]:
    """Lightning's accelerator ("cpu", "gpu") and precision for these settings. Raises ConfigError."""
    there = cuda.is_available()
    if settings.device == "gpu" and not there:
        raise ConfigError("training.device is gpu, and this machine has none that torch can use")
    accelerator = "gpu" if there and settings.device != "cpu" else "cpu"
    if settings.precision != "auto":
        return accelerator, PRECISIONS[settings.precision]
    if accelerator == "cpu":
        return accelerator, PRECISIONS["float32"]
    # Older GPUs (T4, V100) emulate bfloat16 and are many times slower with it than with float16.
    native = cuda.is_bf16_supported(including_emulation=False)
    return accelerator, PRECISIONS["bfloat16" if native else "float16"]


class Records(Callback):
    """metrics.csv and the pictures, after every epoch."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.started_s = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.started_s = time.monotonic()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the epoch's row."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "train_loss": values.get("train_loss_epoch", float("nan")),
            "val_loss": values.get("val_loss", float("nan")),
            "val_wer": values.get("val_wer", float("nan")),
            "val_cer": values.get("val_cer", float("nan")),
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "seconds": round(time.monotonic() - self.started_s, 2),
        }
        append_metrics(self.folder.metrics, row)
        plot_history(read_metrics(self.folder.metrics), self.folder.plots)


class Progress(TQDMProgressBar):
    """Lightning's bar without its version number."""

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Any:
        """What the bar shows."""
        return {
            name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"
        }


class Patience(EarlyStopping):
    """Early stopping by validation WER, and by validation loss as long as no WER said anything.

    From random weights the WER stays near one for many epochs in which the loss falls. The patience is that
    of the settings, also where a resumed state had another.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("val_wer", patience=patience, mode="min")
        self.best_loss = float("inf")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to wait anew after a better loss, then do what the WER says."""
        loss = float(trainer.callback_metrics.get("val_loss", float("nan")))
        if loss < (1.0 - LOSS_STEP) * self.best_loss:
            self.best_loss = loss
            if float(self.best_score) > INFORMATIVE_WER:
                self.wait_count = -1  # with this epoch, whose WER may be no better, none
        super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """With the best loss."""
        return {**super().state_dict(), "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Everything but the patience; older states have no loss."""
        super().load_state_dict({**state_dict, "patience": self.patience})
        self.best_loss = state_dict.get("best_loss", self.best_loss)


class LastBatch(Callback):
    """The size of the batch that is worked on."""

    items, samples = 0, 0

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        """Keep a batch's."""
        self.items, self.samples = batch["waveform"].shape

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, *_: Any
    ) -> None:
        """Keep a batch's."""
        self.items, self.samples = batch["waveform"].shape


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # the last is cuBLAS's and cuDNN's way to say it
    signs = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def fit(
    module: SpeechModule,
    training: DataLoader[Any],
    validation: DataLoader[Any],
    settings: TrainingSettings,
    folder: RunFolder,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train until the epochs are used up or validation stops improving; returns the best checkpoint.

    A run that was interrupted goes on from its last state. Raises OutOfMemoryError with the state saved,
    DivergedError, DiskFullError, EmptyManifestError for an empty part, ConfigError where more epochs are done
    than asked for, SystemExit with a status that is not 0 where the job was ended.
    """
    for name, loader in (("training", training), ("validation", validation)):
        if len(loader) == 0:
            raise EmptyManifestError(f"the {name} part is empty")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    best = Checkpoints(
        dirpath=folder.checkpoints,
        filename="best-{epoch:03d}-{val_wer:.4f}",
        monitor="val_rank",
        mode="min",
        save_top_k=settings.keep,
        enable_version_counter=False,
    )
    # `save_last` would write only when a best one is kept, and a killed run would go back to that epoch
    last = Checkpoints(dirpath=folder.checkpoints, filename="last", enable_version_counter=False)
    worked_on = LastBatch()
    watchers: list[Callback] = [
        worked_on,
        best,
        last,
        Records(folder),
        Resume(training, settings.epochs),
        SaveOnInterruption(folder),
        StopWhereDiverged(settings, folder),
        Progress(),
        *callbacks,
    ]
    if settings.early_stopping:
        watchers.append(Patience(settings.early_stopping))
    accelerator, precision = choose_device(settings)
    with quiet():
        lightning.seed_everything(settings.seed, workers=True, verbose=False)
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]  # one of Lightning's names, see PRECISIONS
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulation,
            gradient_clip_val=settings.gradient_clip or None,
            logger=TensorBoardLogger(folder.path, name="", version="tensorboard"),
            callbacks=watchers,
            plugins=[WholeFiles()],
            log_every_n_steps=10,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
        state = folder.resume_from()
        # Lightning keeps the mode that modules are in; `train` is where networks put frozen parts to rest
        module.train()
        try:
            with naming_full_disk(folder.path):  # TensorBoard writes there, too
                trainer.fit(module, training, validation, ckpt_path=state, weights_only=True)
        except SIGTERMException as error:
            # Lightning's has status 0, and whoever ended the job would take the training for a finished one
            raise SystemExit(128 + signal.SIGTERM) from error
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            raise SystemExit(128 + signal.SIGINT) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            gc.collect()
            dataset: Any = training.dataset
            each_s = dataset.padded_s or worked_on.samples / dataset.sample_rate_hz
            raise OutOfMemoryError(
                f"memory ran out at epoch {trainer.current_epoch}, step {trainer.global_step}, in a batch of "
                f"{worked_on.items} x {each_s:.1f} s: lower training.max_batch_s (now "
                f"{settings.max_batch_s:g}) below {worked_on.items * each_s:.1f} or training.max_items (now "
                f"{settings.max_items}) below {worked_on.items}, and raise training.accumulation (now "
                f"{settings.accumulation}), then run the same command again: it goes on from "
                f"{folder.resume_from() or 'the start'}"
            ) from error
    if not best.best_model_path:
        raise EmptyManifestError(f"no checkpoint was written in {settings.epochs} epochs")
    return Path(best.best_model_path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advice about workers, loggers and batch sizes, which does not concern us here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", module=r"torch\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
