"""How a run trains: the `training` section of a recipe's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

INFORMATIVE_WER = 0.9
"""Validation WER (fraction of one) above which a falling validation loss is progress, too."""
LOSS_STEP = 0.001
"""Share by which a validation loss must be below the best one to be better."""


class TrainingSettings(BaseModel):
    """Every value has a default that a recipe's YAML overrides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=50, ge=1, description="Passes over the training part.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak of the schedule.")
    final_share: float = Field(
        default=0.01, ge=0, le=1, description="Learning rate at the end, as a share of the peak."
    )
    warmup_share: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps with a rising learning rate."
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's, on matrices and kernels only.")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="AdamW's.")
    max_batch_s: float = Field(
        default=240.0,
        gt=0,
        description="Padded audio-seconds per batch; memory grows with it. A Whisper that pads to 30 s "
        "counts them for every utterance.",
    )
    max_items: int = Field(default=64, ge=1, description="Utterances per batch at most.")
    accumulation: int = Field(default=1, ge=1, description="Batches per optimiser step.")
    gradient_clip: float = Field(
        default=1.0, ge=0, description="Largest gradient norm; 0 switches clipping off."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: bfloat16 on a GPU that has it, float16 on an older one, float32 on a CPU.",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="auto takes a GPU where there is one."
    )
    workers: int = Field(
        default=2, ge=0, description="Processes that read and augment audio; 0: in the main process."
    )
    threads: int = Field(default=0, ge=0, description="torch threads on a CPU; 0 leaves torch's choice.")
    early_stopping: int = Field(
        default=10,
        ge=0,
        description="Epochs without a better validation WER, or, until one was below 90 %, without a better "
        "validation loss (by 0.1 % or more); 0: never stop early.",
    )
    keep: int = Field(default=3, ge=1, description="Best checkpoints to keep, besides the last.")
    seed: int = Field(default=0, ge=0, description="Of everything random.")
