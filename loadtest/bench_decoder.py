"""Decoders on ten seconds of log-probabilities: greedy, and the beam search with 0 to 1,000 hotwords or with
the bundle's language model.

    python -m loadtest.bench_decoder [--model en-whisper-tiny-ctc] [--beam 16] [--rounds 200]

The log-probabilities are a bundle's, on speech. The rows take turns, so that a machine whose speed drifts
treats them alike. What is timed is checked: greedy against plain Python, the beam against itself without
pruning. The last line is JSON.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from api.beam import EXACT, beam_search
from api.bundle import Bundle, load_bundle
from api.ctc import Decoded, FloatArray, align, greedy
from api.decoding import decode
from api.engine import Engine
from api.frames import Frames
from api.hotwords import HotwordAutomaton, build_hotwords
from api.vocabulary import Vocabulary
from loadtest.clips import speech
from loadtest.command import bundle_parser
from loadtest.processes import hardware

CLIP_S = 10.0


def log_probs_of(bundle: Bundle) -> FloatArray:
    """float32 (frames, vocabulary) of ten seconds of speech."""
    samples, _ = speech(CLIP_S)
    clip = samples[: int(CLIP_S * bundle.manifest.sample_rate_hz)]
    return Engine(bundle).run([clip], alone=False)[0].whole()


def random_words(count: int, vocabulary: Vocabulary) -> list[str]:
    """Words of the vocabulary's own characters, 4 to 11 long."""
    rng = np.random.default_rng(0)
    text = vocabulary.decode(range(len(vocabulary)))
    letters = sorted({letter for letter in text if letter.isalpha()}) or ["a"]
    return ["".join(rng.choice(letters, int(rng.integers(4, 12)))) for _ in range(count)]


def check(log_probs: FloatArray, blank: int, beam: int) -> None:
    """What is timed below is right. Raises SystemExit."""
    runs = [token for token, _ in itertools.groupby(log_probs.argmax(axis=1).tolist()) if token != blank]
    if greedy(log_probs[None], np.array([len(log_probs)]), blank)[0].token_ids.tolist() != runs:
        raise SystemExit("greedy differs from plain Python")
    pruned = beam_search(log_probs, blank, beam)[0]
    exact = beam_search(log_probs, blank, beam, pruning=EXACT)[0]
    if abs(pruned.score - exact.score) > 0.5:
        raise SystemExit(f"pruning changed the best score from {exact.score:.2f} to {pruned.score:.2f}")


def main() -> None:
    """The command."""
    parser = bundle_parser(__doc__)
    parser.set_defaults(model="en-whisper-tiny-ctc")  # a decoder network leaves a beam nothing to search
    parser.add_argument("--beam", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    bundle = load_bundle(given.models_dir, given.model)
    log_probs, vocabulary = log_probs_of(bundle), bundle.vocabulary
    blank, beam, frames = vocabulary.blank_id, given.beam, len(log_probs)
    check(log_probs, blank, beam)
    lengths = np.array([frames])
    rows: dict[str, Callable[[], Decoded]] = {
        "greedy": lambda: greedy(log_probs[None], lengths, blank)[0],
        f"beam {beam}": lambda: beam_search(log_probs, blank, beam)[0],
    }
    for count in (10, 100, 1000):
        automaton = build_hotwords(random_words(count, vocabulary), vocabulary)
        rows[f"beam {beam}, {count} hotwords"] = partial(boosted, log_probs, blank, beam, automaton)
    if bundle.guide is not None:
        rows[f"beam {bundle.default_beam}, language model"] = partial(
            decode, Frames(log_probs), bundle, bundle.default_beam
        )
    tokens = rows[f"beam {beam}"]().token_ids
    rows["alignment alone (in beam)"] = lambda: align(log_probs, tokens, blank)
    times_ms: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(given.rounds):
        for name, row in rows.items():
            start_s = time.perf_counter()
            row()
            times_ms[name].append((time.perf_counter() - start_s) * 1000)
    print(f"{frames} frames x {len(vocabulary)} outputs of {given.model}, one thread, {hardware()}\n")
    print(f"| {'decoder':<28} | median ms | least ms |\n|{'-' * 30}|----------:|---------:|")
    for name, values in times_ms.items():
        print(f"| {name:<28} | {np.median(values):9.3f} | {min(values):8.3f} |")
    table = {name: [float(np.median(values)), min(values)] for name, values in times_ms.items()}
    print(json.dumps({"frames": frames, "outputs": len(vocabulary), "median_and_least_ms": table}))


def boosted(log_probs: FloatArray, blank: int, beam: int, hotwords: HotwordAutomaton | None) -> Decoded:
    """The best text with hotwords."""
    return beam_search(log_probs, blank, beam, hotwords)[0]


if __name__ == "__main__":
    main()
