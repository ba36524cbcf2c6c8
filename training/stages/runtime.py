"""Texts and error rates of an exported graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.inference import cpu_session, run_graph
from training.loop.module import error_rates
from training.text import Normaliser
from training.vocabulary import TokenCodec, collapse

Samples = npt.NDArray[np.float32]


class GraphRunner:
    """A bundle's graph on a CPU."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.session = cpu_session(path, threads)

    def __call__(self, waveforms: Sequence[Samples]) -> list[npt.NDArray[np.float32]]:
        """Log-probabilities (frames, vocabulary) of each recording, run as one padded batch."""
        return run_graph(self.session, waveforms)

    def texts(self, waveforms: Sequence[Samples], codec: TokenCodec) -> list[str]:
        """Greedy texts, one recording at a time."""
        out = []
        vocabulary = codec.vocabulary
        for samples in waveforms:
            ids = self([samples])[0].argmax(axis=-1).tolist()
            out.append(vocabulary.decode(collapse(ids, vocabulary.blank_id)))
        return out


def score(
    runner: GraphRunner,
    waveforms: Sequence[Samples],
    texts: Sequence[str],
    codec: TokenCodec,
    normalise: Normaliser,
) -> tuple[float, float]:
    """WER and CER of a graph on recordings with known texts.

    Hypotheses are normalised as the references are: converted models may write capitals and punctuation.
    """
    return error_rates(texts, [normalise(text) for text in runner.texts(waveforms, codec)])
