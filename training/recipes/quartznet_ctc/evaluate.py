"""Greedy word error rate of a student on cached utterances."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from training.evaluate import Utterance, error_rates
from training.recipes.quartznet_ctc.batches import normalise_features, pad_features
from training.recipes.quartznet_ctc.examples import Corpus
from training.recipes.quartznet_ctc.fast import FastQuartzNet, PlainQuartzNet
from training.recipes.quartznet_ctc.label import greedy, length_batches


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
    heard: defaultdict[str, list[Utterance]] = defaultdict(list)
    for reference, hypothesis, group in zip(references, hypotheses, groups, strict=True):
        for key in (group, "all"):
            heard[key].append(Utterance(reference, hypothesis))
    return {key: error_rates(utterances).wer for key, utterances in heard.items()}


def validate(network: FastQuartzNet | PlainQuartzNet, corpus: Corpus) -> dict[str, float]:
    """Word error rate per source on the held-out speakers."""
    rows = [corpus.rows[index] for index in corpus.validation]
    texts = transcribe_cached(network, corpus, corpus.validation)
    return word_error_rates([row.text for row in rows], texts, [row.source for row in rows])
