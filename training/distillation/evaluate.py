"""Greedy word error rate of a student on cached utterances."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from training.distillation.batches import pad_features
from training.distillation.conformer import FastConformer
from training.distillation.examples import Corpus
from training.distillation.label import greedy, length_batches
from training.distillation.quartznet import FastQuartzNet, PlainQuartzNet
from training.distillation.whisper import FastWhisper
from training.evaluate import Utterance, error_rates

Network = FastQuartzNet | PlainQuartzNet | FastConformer | FastWhisper
SETTLING_CLIPS = 128
"""Training utterances that statistics are taken from, up to `SETTLING_FRAMES` of each."""
SETTLING_FRAMES = 1_000


def settle(network: Network, corpus: Corpus) -> None:
    """Take the statistics of the batch normalisations anew, all from one large batch of clean speech.

    Running ones lag behind the weights, and batches of one length are of one source mostly: they vary less
    than what the network will hear, and every layer's statistics must suit what the layers before it will do.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    before = [norm.momentum for norm in norms]
    count = min(SETTLING_CLIPS, len(corpus.train))
    chosen = np.random.default_rng(0).choice(corpus.train, count, replace=False)
    features, lengths = pad_features(
        [corpus.features(int(index)).numpy()[:SETTLING_FRAMES] for index in chosen]
    )
    network.train()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        network(corpus.normalise(features, lengths), lengths)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    network.eval()


def transcribe_cached(
    network: Network, corpus: Corpus, indices: list[int], batch_s: float = 100.0
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
            output = network(corpus.normalise(features, lengths), lengths)
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


def validate(network: Network, corpus: Corpus) -> dict[str, float]:
    """Word error rate per source on the held-out speakers."""
    rows = [corpus.rows[index] for index in corpus.validation]
    texts = transcribe_cached(network, corpus, corpus.validation)
    return word_error_rates([row.text for row in rows], texts, [row.source for row in rows])
