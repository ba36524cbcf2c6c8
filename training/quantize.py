"""float32 graph -> static INT8 graph, accepted only where it is faster and hears as well.

    python -m training.quantize GRAPH --vocabulary vocab.txt --out OUT \
        --calibration MANIFEST --validation MANIFEST

Convolutions become U8S8 per channel; the first block, the head and the front end stay float (the recipe that
is measured to win, see docs/quantization.md). Several ways to set the ranges are tried and measured on the
validation set. Of those that hear as well as the best, the one that is nearest to the float graph is kept if
it passes the gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from tqdm import tqdm

from api.manifest import GraphName
from api.vocabulary import BLANK_TOKEN, Vocabulary
from training.calibration import manifest_waveforms
from training.errors import Int8RefusedError, in_one_line
from training.evaluate import ErrorRates, Utterance, error_rates, greedy_text, wer_difference
from training.exported import Ways
from training.graph import weights_bytes
from training.inference import (
    Agreement,
    Waveform,
    compare,
    cpu_session,
    quiet_run_s,
    run_graph,
    served_session,
    tensors_of,
)
from training.qdq import Range, quantizable, quantize_graph

SAMPLES_PER_TENSOR = 2000
FEW_WORDS = 100  # of which one is as much as the gate allows
HARDLY_SLOWER = 0.9  # of the fastest way's speed


def float_ends(name: str) -> bool:
    """All convolutions but those of the first block and the head."""
    return not name.startswith("blocks.0.") and name != "head"


@dataclass(frozen=True)
class Statistics:
    """What a tensor showed on each calibration clip."""

    lows: npt.NDArray[np.float32]
    highs: npt.NDArray[np.float32]
    drawn: npt.NDArray[np.float32]

    def extremes(self) -> Range:
        """Everything that was seen."""
        return Range(float(self.lows.min()), float(self.highs.max()))

    def mean_extremes(self) -> Range:
        """Each clip's extremes, averaged: one loud clip does not set the scale for all."""
        return Range(float(self.lows.mean()), float(self.highs.mean()))

    def percentile(self, share: float = 99.99) -> Range:
        """All but the outermost values."""
        low, high = np.percentile(self.drawn, [100.0 - share, share])
        return Range(float(low), float(high))


RANGE_METHODS: Mapping[str, Callable[[Statistics], Range]] = {
    "mean of extremes": Statistics.mean_extremes,
    "extremes": Statistics.extremes,
    "99.99 percentile": Statistics.percentile,
}


def calibrate(graph: onnx.ModelProto, clips: Sequence[Waveform], seed: int = 0) -> dict[str, Statistics]:
    """Run the float graph on real sound and note what each tensor to be quantized shows."""
    if not clips:
        raise ValueError("calibration needs at least one recording")
    names = quantizable(graph, float_ends)
    generator = np.random.default_rng(seed)
    lows: dict[str, list[float]] = {name: [] for name in names}
    highs: dict[str, list[float]] = {name: [] for name in names}
    drawn: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
    heard = tqdm(clips, desc="calibrate", unit="clip", disable=None)
    for found in tensors_of(graph, names, heard):
        for name, values in zip(names, found, strict=True):
            lows[name].append(values.min())
            highs[name].append(values.max())
            drawn[name].append(generator.choice(values.ravel(), SAMPLES_PER_TENSOR))
    return {
        name: Statistics(np.array(lows[name]), np.array(highs[name]), np.concatenate(drawn[name]))
        for name in names
    }


@dataclass(frozen=True)
class Trial:
    """One way to quantize, and what it gave beside the float graph."""

    method: str
    graph: onnx.ModelProto
    size_bytes: int
    agreement: Agreement
    heard: Sequence[Utterance]
    rates: ErrorRates
    speed: float
    """Times as fast as the float graph, one thread, runs taking turns."""
    batched_worst: float
    """Largest difference between an item in a padded batch and alone."""


@dataclass(frozen=True)
class Gate:
    """What an INT8 graph must reach to be taken."""

    min_speed: float = 1.3
    max_wer_increase: float = 0.01
    """Absolute, on the validation set."""
    max_batch_difference: float = 1e-4
    """Of a log-probability, between an item in a padded batch and alone."""


@dataclass(frozen=True)
class Outcome:
    """The float graph's error rates, every trial, and the one that is kept."""

    float_rates: ErrorRates
    float_bytes: int
    trials: tuple[Trial, ...]
    chosen: Trial
    form: GraphName = "int8"

    def table(self) -> str:
        """All trials as Markdown, and whether they were measured on something that can tell them apart."""
        lines = [
            "| way | MB | speed | WER | CER | same best token | batched against alone |",
            "|---|---|---|---|---|---|---|",
            f"| float32 | {self.float_bytes / 1e6:.1f} | 1.00x | {self.float_rates.wer:.2%} "
            f"| {self.float_rates.cer:.2%} | | |",
        ]
        for trial in self.trials:
            mark = " (kept)" if trial is self.chosen else ""
            lines.append(
                f"| {self.form.upper()}, {trial.method}{mark} | {trial.size_bytes / 1e6:.1f} "
                f"| {trial.speed:.2f}x | {trial.rates.wer:.2%} | {trial.rates.cer:.2%} "
                f"| {trial.agreement.same_best:.2%} | {trial.batched_worst:.1e} |"
            )
        words = self.float_rates.words
        if words < FEW_WORDS:
            lines += ["", f"Only {words} words were compared, which tells little."]
        if self.float_rates.wer >= 1.0:
            lines += ["", "float32 is wrong about all of it: do these texts belong to the recordings?"]
        return "\n".join(lines)


def static_convolutions(
    graph: onnx.ModelProto, calibration: Sequence[Waveform]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """All convolutions but those of the first block and the head, with each of `RANGE_METHODS`."""
    statistics = calibrate(graph, calibration)
    for method, ranges in RANGE_METHODS.items():
        chosen = {name: ranges(seen) for name, seen in statistics.items()}
        yield method, quantize_graph(graph, chosen, float_ends)


def quantize(
    graph: onnx.ModelProto,
    vocabulary: Vocabulary,
    calibration: Sequence[Waveform],
    validation: Sequence[tuple[Waveform, str]],
    gate: Gate | None = None,
    *,
    ways: Ways | None = None,
    plain: Callable[[str], str] = str,
    form: GraphName = "int8",
) -> Outcome:
    """Try every way and keep one: see `best_of`.

    Args:
        validation: (waveform, reference) pairs; a reference may come from a teacher.
        ways: to INT8; default: static convolutions with each of `RANGE_METHODS`.
        plain: what is done to a text before it is compared with its reference.
        form: what the ways lead to.

    Raises Int8RefusedError, with the table, where no INT8 graph is good enough.
    """
    gate = gate or Gate()
    reference = _Reference(graph, vocabulary, validation, plain)
    tried = (ways or static_convolutions)(graph, calibration)
    trials = [reference.measure(method, quantized) for method, quantized in tried]
    best = best_of(trials)
    outcome = Outcome(reference.rates, weights_bytes(graph), tuple(trials), best, form)
    problems = []
    if best.speed < gate.min_speed:
        problems.append(f"speed {best.speed:.2f}x, expected at least {gate.min_speed}x")
    if best.rates.wer > reference.rates.wer + gate.max_wer_increase:
        problems.append(
            f"WER {best.rates.wer:.2%}, expected at most {reference.rates.wer + gate.max_wer_increase:.2%}"
        )
    if not best.batched_worst <= gate.max_batch_difference:  # NaN is refused as well
        problems.append(
            f"batched differs from alone by {best.batched_worst:.1e}, limit {gate.max_batch_difference:.0e}"
        )
    if problems:
        raise Int8RefusedError(f"{form.upper()} is refused: " + "; ".join(problems) + "\n" + outcome.table())
    return outcome


def best_of(trials: Sequence[Trial]) -> Trial:
    """The nearest to the float graph, of those that hear as well as the best and are hardly slower.

    A hundred clips cannot tell ways apart whose word error rates differ by a point: the one with the lowest
    was the worst on test sets once. In how many frames the most probable token stays can be told.
    """
    lowest = min(trials, key=lambda trial: trial.rates.wer)
    as_good = [trial for trial in trials if wer_difference(lowest.heard, trial.heard).low <= 0.0]
    enough = HARDLY_SLOWER * max(trial.speed for trial in as_good)
    return max(
        (trial for trial in as_good if trial.speed >= enough),
        key=lambda trial: (trial.agreement.same_best, trial.speed),
    )


class _Reference:
    """The float graph's answers on the validation set."""

    def __init__(
        self,
        graph: onnx.ModelProto,
        vocabulary: Vocabulary,
        validation: Sequence[tuple[Waveform, str]],
        plain: Callable[[str], str],
    ) -> None:
        if not validation:
            raise ValueError("the gate needs at least one validation recording")
        self.vocabulary = vocabulary
        self.validation = validation
        self.plain = plain
        self.session = cpu_session(graph)
        self.log_probs = [
            run_graph(self.session, [clip])[0]
            for clip, _ in tqdm(validation, desc="float32", unit="clip", disable=None)
        ]
        self.rates = error_rates(self._heard(self.log_probs))

    def _heard(self, log_probs: Sequence[npt.NDArray[np.float32]]) -> list[Utterance]:
        texts = [self.plain(greedy_text(values, self.vocabulary)) for values in log_probs]
        pairs = zip(self.validation, texts, strict=True)
        return [Utterance(reference, text) for (_, reference), text in pairs]

    def measure(self, method: str, graph: onnx.ModelProto) -> Trial:
        session = served_session(graph)
        log_probs = [
            run_graph(session, [clip])[0]
            for clip, _ in tqdm(self.validation, desc=method, unit="clip", disable=None)
        ]
        middle = sorted((clip for clip, _ in self.validation), key=len)[len(self.validation) // 2]
        float_s, int8_s = quiet_run_s([self.session, session], middle)
        some = [clip for clip, _ in self.validation[:4]]
        batched = compare(log_probs[: len(some)], run_graph(session, some))
        heard = self._heard(log_probs)
        return Trial(
            method=method,
            graph=graph,
            size_bytes=graph.ByteSize(),
            agreement=compare(self.log_probs, log_probs),
            heard=heard,
            rates=error_rates(heard),
            speed=float_s / int8_s,
            batched_worst=batched.worst_log_prob,
        )


@in_one_line("quantize", ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Quantize a float32 graph of this project behind its gate.")
    parser.add_argument("graph", type=Path)
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocab.txt of single characters")
    parser.add_argument("--calibration", type=Path, required=True, help="manifest of training audio")
    parser.add_argument("--validation", type=Path, required=True, help="manifest with texts")
    parser.add_argument(
        "--clips", type=int, nargs=2, default=(48, 120), metavar=("CALIBRATION", "VALIDATION")
    )
    parser.add_argument("--sample-rate-hz", type=int, default=16_000)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    tokens = tuple(given.vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    vocabulary = Vocabulary(tokens, tokens.index(BLANK_TOKEN))
    rate_hz, (calibration_clips, validation_clips) = given.sample_rate_hz, given.clips
    outcome = quantize(
        onnx.load(given.graph),
        vocabulary,
        [clip for clip, _ in manifest_waveforms(given.calibration, rate_hz, calibration_clips)],
        manifest_waveforms(given.validation, rate_hz, validation_clips, with_text=True),
    )
    print(outcome.table())
    given.out.write_bytes(outcome.chosen.graph.SerializeToString())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
