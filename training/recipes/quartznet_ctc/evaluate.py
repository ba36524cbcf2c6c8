"""Greedy word error rate of a student on cached utterances."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.recipes.quartznet_ctc.batches import normalise_features, pad_features
from training.recipes.quartznet_ctc.examples import Corpus
from training.recipes.quartznet_ctc.fast import FastQuartzNet, PlainQuartzNet
from training.recipes.quartznet_ctc.label import greedy, length_batches


def edit_distance(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Levenshtein distance with unit costs."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != heard))
    return row[-1]


def transcribe_cached(
    network: FastQuartzNet | PlainQuartzNet, corpus: Corpus, indices: list[int], batch_s: float = 100.0
) -> list[str]:
    """Greedy texts of cached utterances, in the order of ``indices``; leaves the network's mode as it was."""
    was_training = network.training
    network.eval()
    texts = [""] * len(indices)
    frames = [corpus.mel_spans[index][1] for index in indices]
    with torch.inference_mode():
        for batch in length_batches(frames, int(batch_s * 100)):
            features, lengths = pad_features(
                [corpus.features(indices[position]).numpy() for position in batch]
            )
            output = network(normalise_features(features, lengths), lengths)
            for item, position in enumerate(batch):
                texts[position] = greedy(output.log_probs[item, : int(output.lengths[item])].numpy())[0]
    network.train(was_training)
    return texts


def word_error_rates(
    references: Sequence[str], hypotheses: Sequence[str], groups: Sequence[str]
) -> dict[str, float]:
    """Word error rate per group and under ``all``."""
    errors: dict[str, list[int]] = {}
    for reference, hypothesis, group in zip(references, hypotheses, groups, strict=True):
        words = reference.split()
        distance = edit_distance(words, hypothesis.split())
        for key in (group, "all"):
            total = errors.setdefault(key, [0, 0])
            total[0] += distance
            total[1] += len(words)
    return {key: wrong / max(1, count) for key, (wrong, count) in errors.items()}


def validate(network: FastQuartzNet | PlainQuartzNet, corpus: Corpus) -> dict[str, float]:
    """Word error rate per source on the held-out speakers."""
    rows = [corpus.rows[index] for index in corpus.validation]
    texts = transcribe_cached(network, corpus, corpus.validation)
    return word_error_rates([row.text for row in rows], texts, [row.source for row in rows])
