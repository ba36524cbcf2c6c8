"""Word and character error rates of a bundle's graph, with the service's own vocabulary and decoding.

python -m training.evaluate MODELS_DIR NAME --manifest MANIFEST [--graph GRAPH] [--beam N] [--limit N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jiwer
import numpy as np
import numpy.typing as npt
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from tqdm import tqdm

from api.beam import MAX_BEAM
from api.bundle import Bundle, load_bundle
from api.ctc import greedy_of
from api.decoding import decode
from api.frames import Frames
from api.manifest import GraphChoice
from api.vocabulary import Vocabulary
from training.arguments import positive
from training.calibration import manifest_waveforms
from training.errors import in_one_line
from training.inference import LogProbs, Waveform, cpu_session, run_graph
from training.text import Normaliser, plain_normaliser

BOOTSTRAP_ROUNDS = 1000
Network = Callable[[Waveform], LogProbs]
"""Waveform (samples,) -> log-probabilities (frames, vocabulary)."""


@dataclass(frozen=True)
class Utterance:
    """What was said, and what was heard."""

    reference: str
    hypothesis: str


@dataclass(frozen=True)
class ErrorRates:
    """Fractions of one over a set of utterances, with a 95 % interval by resampling utterances."""

    utterances: int
    words: int
    wer: float
    wer_low: float
    wer_high: float
    cer: float


def error_rates(utterances: Sequence[Utterance], seed: int = 0) -> ErrorRates:
    """Levenshtein errors over the references' words and characters (spaces counted), pooled over the set.

    The interval is the percentile bootstrap over utterances (Bisani and Ney 2004). Raises ValueError where no
    reference has a word.
    """
    counts = np.array([_errors(item) for item in utterances], dtype=np.float64).reshape(-1, 4)
    words, characters = counts[:, 1].sum(), counts[:, 3].sum()
    if words == 0:
        raise ValueError("error rates need at least one reference word")
    low, high = _interval(counts[:, 0], counts[:, 1], seed)
    return ErrorRates(
        utterances=len(utterances),
        words=int(words),
        wer=float(counts[:, 0].sum() / words),
        wer_low=low,
        wer_high=high,
        cer=float(counts[:, 2].sum() / characters),
    )


def _errors(item: Utterance) -> tuple[int, int, int, int]:
    """(word errors, words, character errors, characters)."""
    reference, hypothesis = " ".join(item.reference.split()), " ".join(item.hypothesis.split())
    if not reference:
        return len(hypothesis.split()), 0, len(hypothesis), 0
    words, characters = (
        jiwer.process_words(reference, hypothesis),
        jiwer.process_characters(reference, hypothesis),
    )
    return (
        words.substitutions + words.deletions + words.insertions,
        len(reference.split()),
        characters.substitutions + characters.deletions + characters.insertions,
        len(reference),
    )


def _interval(
    errors: npt.NDArray[np.float64], words: npt.NDArray[np.float64], seed: int
) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(errors), (BOOTSTRAP_ROUNDS, len(errors)))
    totals = words[drawn].sum(axis=1)
    rates = errors[drawn].sum(axis=1) / np.maximum(totals, 1.0)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """A difference of two word error rates as a fraction of one, with its 95 % interval."""

    wer: float
    low: float
    high: float


def wer_difference(first: Sequence[Utterance], second: Sequence[Utterance], seed: int = 0) -> Difference:
    """WER of `second` less that of `first` on the same utterances, which are drawn for both at once.

    So what makes an utterance hard for both does not widen the interval (Bisani and Ney 2004). Raises
    ValueError where the references differ or have no word.
    """
    if [item.reference for item in first] != [item.reference for item in second]:
        raise ValueError("a difference needs two systems on the same references")
    before, after = (
        np.array([_errors(item)[:2] for item in items], dtype=np.float64).reshape(-1, 2)
        for items in (first, second)
    )
    more, words = after[:, 0] - before[:, 0], before[:, 1]
    if words.sum() == 0:
        raise ValueError("error rates need at least one reference word")
    return Difference(float(more.sum() / words.sum()), *_interval(more, words, seed))


def greedy_text(log_probs: LogProbs, vocabulary: Vocabulary) -> str:
    """Text of (frames, vocabulary) by the service's own greedy decoder."""
    decoded = greedy_of(Frames(log_probs), vocabulary.blank_id)
    return vocabulary.decode(int(token) for token in decoded.token_ids)


def greedy_rates(
    network: Network, vocabulary: Vocabulary, clips: Iterable[tuple[Waveform, str]], normalise: Normaliser
) -> ErrorRates:
    """Error rates of greedy texts on (waveform, reference) pairs, both sides normalised."""
    heard = [Utterance(text, greedy_text(network(clip), vocabulary)) for clip, text in clips]
    return error_rates(plainly(heard, normalise))


Recogniser = Callable[[Waveform], str]
"""Waveform (samples,) -> text."""


def bundle_recogniser(
    bundle: Bundle, graph: str = "auto", threads: int = 1, beam: int | None = None
) -> Recogniser:
    """Recognition with one of a bundle's graphs; ``beam`` 0 is greedy, None the bundle's own way.

    A recording that a graph refuses because it is longer than the bundle's window is cut there.
    """
    chosen = bundle.choose_graph(graph)  # type: ignore[arg-type]
    session = cpu_session(bundle.graph_path(chosen), threads)
    width = bundle.default_beam if beam is None else beam
    window = round(bundle.manifest.max_window_s * bundle.manifest.sample_rate_hz)

    def recognise(waveform: Waveform) -> str:
        try:
            return heard(waveform)
        except Fail:  # convolutions take any length, a Conformer's distances end
            if len(waveform) <= window:
                raise
            parts = (heard(waveform[start : start + window]) for start in range(0, len(waveform), window))
            return " ".join(filter(None, parts))

    def heard(waveform: Waveform) -> str:
        shortest = bundle.manifest.input.min_samples
        padded = np.pad(waveform, (0, max(0, shortest - len(waveform))))
        decoded = decode(Frames(run_graph(session, [padded])[0]), bundle, width)
        return bundle.vocabulary.decode(decoded.token_ids.tolist())

    return recognise


def recognise_all(
    recogniser: Recogniser, items: Iterable[tuple[Waveform, str]], label: str = ""
) -> Iterator[Utterance]:
    """Run over (waveform, reference) pairs with a progress bar."""
    for waveform, reference in tqdm(items, desc=label, unit="clip", disable=None):
        yield Utterance(reference, recogniser(waveform))


def plainly(heard: Iterable[Utterance], plain: Normaliser) -> list[Utterance]:
    """Both sides as training normalises texts: capitals and punctuation are no errors."""
    return [Utterance(plain(item.reference), plain(item.hypothesis)) for item in heard]


def beam_width(text: str) -> int:
    """Hypotheses that a beam search keeps, 0 for greedy search."""
    width = int(text)
    if not 0 <= width <= MAX_BEAM:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to {MAX_BEAM}")
    return width


@in_one_line("evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("name")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--graph", choices=get_args(GraphChoice), default="auto")
    parser.add_argument("--beam", type=beam_width, help="0 is greedy; default: the bundle's own way")
    parser.add_argument(
        "--limit", type=positive, help="at most this many utterances, spread over the manifest"
    )
    given = parser.parse_args(arguments)
    bundle = load_bundle(given.models_dir, given.name)
    recogniser = bundle_recogniser(bundle, given.graph, beam=given.beam)
    clips = manifest_waveforms(given.manifest, bundle.manifest.sample_rate_hz, given.limit, with_text=True)
    heard = recognise_all(recogniser, clips, given.name)
    plain = plain_normaliser(bundle.manifest.languages[0], bundle.manifest.text_normalisation)
    rates = error_rates(plainly(heard, plain))
    print(f"WER {rates.wer:.2%} [{rates.wer_low:.2%}, {rates.wer_high:.2%}]  CER {rates.cer:.2%}")
    print(json.dumps(rates.__dict__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
