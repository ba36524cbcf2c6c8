"""Error rates of the network in PyTorch, on the device that trains: before the training and after it."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from training import evaluate
from training.data.manifest import Utterance
from training.loop.dataset import UtteranceDataset, make_loader
from training.loop.fit import choose_device
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq
from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe


def score(
    recipe: WhisperSeq2SeqRecipe, network: nn.Module, rows: list[Utterance]
) -> tuple[dict[str, float], list[str]]:
    """Utterances, WER and CER (fractions of one) of greedy search; texts in the order of the rows.

    Hypotheses are normalised as the references are: the base model writes capitals and punctuation.
    """
    if not isinstance(network, WhisperSeq2Seq):
        raise TypeError(f"expected WhisperSeq2Seq, got {type(network).__name__}")
    settings = recipe.config.training
    device = "cuda" if choose_device(settings)[0] == "gpu" else "cpu"
    network = network.to(device)
    codec, normalise, facts = recipe.codec(), recipe.normaliser(), recipe.facts()
    dataset = UtteranceDataset(rows, codec.encode, facts.sample_rate_hz, padded_s=facts.padded_s)
    loader = make_loader(dataset, settings, training=False)
    batches = list(loader.batch_sampler or ())
    texts = [""] * len(rows)
    with torch.inference_mode():
        for places, batch in tqdm(zip(batches, loader, strict=True), total=len(batches), unit="batch"):
            steps, found, _ = network.generate(batch["waveform"].to(device), batch["lengths"].to(device))
            best = steps.argmax(dim=-1).tolist()
            for place, ids, count in zip(places, best, found.tolist(), strict=True):
                texts[place] = normalise(codec.vocabulary.decode(ids[:count]))
    heard = [evaluate.Utterance(row.text, text) for row, text in zip(rows, texts, strict=True)]
    rates = evaluate.error_rates(heard)
    return {"utterances": len(rows), "wer": rates.wer, "cer": rates.cer}, texts
