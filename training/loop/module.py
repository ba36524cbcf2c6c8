"""Lightning modules: what a step computes and how validation is scored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from training.evaluate import ErrorRates, Utterance, error_rates, greedy_text
from training.loop.dataset import Batch
from training.loop.settings import TrainingSettings
from training.vocabulary import TokenCodec


def warmup_cosine(step: int, total: int, warmup_share: float, final_share: float) -> float:
    """Factor on the peak learning rate: linear rise, then half a cosine down to `final_share`.

    Source: Loshchilov and Hutter 2017 (cosine), Goyal et al. 2017 (warm-up).
    """
    warmup = max(1, round(total * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels, none on biases and norms."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def rank(rates: ErrorRates) -> float:
    """Lower is better: by WER, and by CER where the WER is the same.

    Early on, a network hears no whole word and yet more and more letters. One word more or less moves the WER
    by 1 / words, and what the CER adds stays below that.
    """
    return rates.wer + rates.cer / (1.0 + rates.cer) / rates.words


class SpeechModule(lightning.LightningModule):
    """Optimiser, schedule and scoring; a recipe's module says what loss and hypotheses are."""

    def __init__(self, model: nn.Module, settings: TrainingSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self._heard: list[Utterance] = []
        self._losses: Tensor | float = 0.0

    def loss_and_texts(self, batch: Batch, *, decode: bool) -> tuple[Tensor, list[str]]:
        """Mean loss per token of a batch, and its hypotheses where `decode` asks for them."""
        raise TypeError(f"{type(self).__name__} must say what its loss is")

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up and cosine schedule over all the steps of the run."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model.parameters(), settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
        )
        total = int(self.trainer.estimated_stepping_batches)
        # Of a partial nothing is stored in checkpoints: a resumed run with other settings has its own length.
        factor = partial(
            warmup_cosine,
            total=total,
            warmup_share=settings.warmup_share,
            final_share=settings.final_share,
        )
        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """The settings count, not what a resumed state remembers of earlier ones."""
        settings = self.settings
        (optimizer,) = self.trainer.optimizers
        schedule = self.trainer.lr_scheduler_configs[0].scheduler
        if not isinstance(schedule, LambdaLR):
            raise TypeError(f"expected LambdaLR, got {type(schedule).__name__}")
        schedule.base_lrs = [settings.learning_rate for _ in optimizer.param_groups]
        rate = settings.learning_rate * schedule.lr_lambdas[0](schedule.last_epoch)
        for group, decay in zip(optimizer.param_groups, (settings.weight_decay, 0.0), strict=True):
            group.update(lr=rate, weight_decay=decay, betas=settings.betas)

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        """One batch's loss."""
        loss, _ = self.loss_and_texts(batch, decode=False)
        size = len(batch["texts"])
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: Batch, _index: int) -> None:
        """One batch's loss and hypotheses."""
        loss, texts = self.loss_and_texts(batch, decode=True)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch["texts"]))
        self._losses = self._losses + loss.detach()
        self._heard += map(Utterance, batch["texts"], texts)

    def on_validation_epoch_end(self) -> None:
        """WER and CER over the whole validation part; without a finite loss, no epoch ranks lower.

        A network whose answers are no numbers says nothing, and its WER of one may be better than the first.
        """
        rates = error_rates(self._heard)
        self.log_dict({"val_wer": rates.wer, "val_cer": rates.cer}, prog_bar=True)
        order = rank(rates) if math.isfinite(self._losses) else math.inf
        self.log("val_rank", torch.tensor(order, dtype=torch.float64))  # float32 would round the CER away
        self._heard, self._losses = [], 0.0


class CtcModule(SpeechModule):
    """CTC on any network that maps waveform (batch, samples), lengths to log_probs, frame_lengths."""

    def __init__(self, model: nn.Module, codec: TokenCodec, settings: TrainingSettings) -> None:
        super().__init__(model, settings)
        self.codec = codec

    def loss_and_texts(self, batch: Batch, *, decode: bool) -> tuple[Tensor, list[str]]:
        """CTC loss (Graves et al. 2006) in float32, per target token; greedy hypotheses."""
        log_probs, frame_lengths = self.model(batch["waveform"], batch["lengths"])
        blank_id = self.codec.vocabulary.blank_id
        losses = functional.ctc_loss(
            log_probs.float().transpose(0, 1),
            batch["targets"].clamp(min=0),
            frame_lengths,
            batch["target_lengths"],
            blank=blank_id,
            reduction="none",
            zero_infinity=True,
        )
        loss = losses.sum() / batch["target_lengths"].sum().clamp(min=1)
        if not decode:
            return loss, []
        rows = zip(log_probs.float().cpu().numpy(), frame_lengths.tolist(), strict=True)
        return loss, [greedy_text(row[:count], self.codec.vocabulary) for row, count in rows]
