"""Losses of the student: the teacher's activations, its frame posteriors, dense labels, and CTC on the text.

All take padded batches with lengths and average over valid frames, so that a batch's loss does not depend on
how much of it is padding.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.distillation.dataset import BLANK_ID
from training.masks import frame_mask


def dense_labels(
    posteriors: npt.NDArray[np.float32], blank: int = BLANK_ID, reach: int = 8
) -> npt.NDArray[np.int64]:
    """Spiky best path -> one character per frame, (frames, vocabulary) -> (frames,).

    A CTC network emits each character on one or two frames and blanks between. Here each blank frame takes
    the character of the nearest emission, at most ``reach`` frames away; farther ones stay blank (silence).
    """
    best = posteriors.argmax(axis=1)
    spikes = np.flatnonzero(best != blank)
    if len(spikes) == 0:
        return np.full(len(best), blank, np.int64)
    frames = np.arange(len(best))
    after = np.searchsorted(spikes, frames).clip(0, len(spikes) - 1)
    before = (np.searchsorted(spikes, frames, side="right") - 1).clip(0)
    use_after = np.abs(spikes[after] - frames) < np.abs(spikes[before] - frames)
    nearest = np.where(use_after, spikes[after], spikes[before])
    labels: npt.NDArray[np.int64] = np.where(np.abs(nearest - frames) <= reach, best[nearest], blank)
    return labels


def activation_loss(predicted: Tensor, target: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """Weighted mean squared error on standardised components; (B,T,D), (B,T,D), (D,), (B,).

    One means no better than predicting the mean.
    """
    error = ((predicted - target).square() * weights).sum(dim=-1) / weights.sum()
    mask = frame_mask(lengths, error.shape[1])
    return (error * mask).sum() / mask.sum()


def posterior_loss(log_probs: Tensor, teacher: Tensor, lengths: Tensor, blank_weight: float = 0.3) -> Tensor:
    """Kullback-Leibler divergence from the teacher's posteriors (B,T,V), blank frames counted less.

    Every frame's optimum is the teacher's distribution; the weights only keep the many blank frames from
    drowning the few that carry characters.
    """
    divergence = (teacher * (teacher.clamp(min=1e-8).log() - log_probs)).sum(dim=-1)
    weight = frame_mask(lengths, divergence.shape[1]) * (blank_weight + 1.0 - teacher[:, :, BLANK_ID])
    return (divergence * weight).sum() / weight.sum().clamp(min=1.0)


def dense_loss(logits: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """Cross-entropy with dense labels (B,T) of a head used in training only; logits (B,T,V)."""
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    mask = frame_mask(lengths, labels.shape[1]).flatten()
    return (loss * mask).sum() / mask.sum()


def repeats(target: list[int]) -> int:
    """Neighbours that are equal: each needs a blank between, so the shortest path is longer by as many."""
    return sum(a == b for a, b in itertools.pairwise(target))


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: list[list[int]]) -> Tensor:
    """CTC (Graves et al. 2006) per character, over the items that have a target; zero when none has."""
    chosen = [
        item
        for item, target in enumerate(targets)
        if target and len(target) + repeats(target) <= int(lengths[item])
    ]
    if not chosen:
        return log_probs.sum() * 0.0
    flat = torch.tensor([token for item in chosen for token in targets[item]])
    sizes = torch.tensor([len(targets[item]) for item in chosen])
    total = functional.ctc_loss(
        log_probs[chosen].transpose(0, 1),
        flat,
        lengths[chosen],
        sizes,
        blank=BLANK_ID,
        reduction="sum",
        zero_infinity=True,
    )
    return total / sizes.sum()
