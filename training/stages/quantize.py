"""Stage 4: the INT8 graph, behind a gate."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from training.data.manifest import Utterance
from training.errors import CheckpointError
from training.evaluate import ErrorRates, greedy_rates
from training.files import naming_full_disk
from training.inference import Waveform, clip_of, compare, cpu_session, in_turns_s, run_graph
from training.loop.run_folder import FLOAT32, INT8, RunFolder
from training.stages.export import load_part
from training.stages.recipe import Recipe

NOISE = 1.15
"""Latencies within this factor of each other count as the same."""


@dataclass(frozen=True)
class Candidate:
    """One way to INT8 and what it gave."""

    how: str
    bytes: int
    latency_ms: float
    speedup: float
    """Latency of float32 over this one, measured in the same run."""
    wer: float
    cer: float
    batch_against_alone: float
    """Largest difference of a posterior between a padded batch and each item alone."""
    accepted: bool
    reason: str


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The accepted candidate with the lowest WER among those as fast as the fastest, but for NOISE."""
    accepted = [candidate for candidate in candidates if candidate.accepted]
    fastest = max((candidate.speedup for candidate in accepted), default=0.0)
    close = [candidate for candidate in accepted if candidate.speedup * NOISE >= fastest]
    return min(close, key=lambda candidate: (candidate.wer, -candidate.speedup), default=None)


def calibration_clips(rows: dict[str, list[Utterance]], rate_hz: int) -> list[Waveform]:
    """What ranges of activations are measured on."""
    return [clip for clip, _ in load_part(rows["train"], rate_hz, limit=32)]


def quantize(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> Path | None:
    """Try the recipe's ways to INT8; the fastest that passes becomes `export/model.int8.onnx`.

    The gate: faster than float32, and a WER on validation that is higher by `benchmark.max_wer_loss` at most.
    None when nothing passes; `quantize.json` says what was tried and what each gave. Raises CheckpointError
    where there is no float32 graph, DiskFullError.
    """
    settings, rate_hz = recipe.config.benchmark, recipe.facts().sample_rate_hz
    graph, target = folder.path / FLOAT32, folder.path / INT8
    if not graph.is_file():
        raise CheckpointError(f"{graph}: no graph; run the export stage first")
    folder.forget(INT8, "quantize.json", "benchmark.json")
    gate = _Gate(recipe, graph, load_part(rows["validation"], rate_hz))
    calibration = calibration_clips(rows, rate_hz)
    work = folder.path / "export" / "candidates"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with naming_full_disk(work):
            files = dict(recipe.quantized(graph, work, calibration))
        candidates = [gate.measure(how, path) for how, path in files.items()]
        best = choose(candidates)
        if best is not None:
            files[best.how].replace(target)
    finally:
        shutil.rmtree(work)
    folder.write_json(
        "quantize.json",
        {
            "float32": {"bytes": graph.stat().st_size, "wer": gate.rates.wer, "cer": gate.rates.cer},
            "clip_s": settings.clip_s,
            "threads": settings.threads,
            "max_wer_loss": settings.max_wer_loss,
            "chosen": best.how if best else None,
            "candidates": [asdict(candidate) for candidate in candidates],
        },
    )
    return target if best else None


class _Gate:
    """The float32 graph, which candidates are set beside."""

    def __init__(self, recipe: Recipe, graph: Path, clips: Sequence[tuple[Waveform, str]]) -> None:
        self.settings = recipe.config.benchmark
        self.clips = clips
        self.clip = clip_of([clip for clip, _ in clips], self.settings.clip_s, recipe.facts().sample_rate_hz)
        self.vocabulary, self.normalise = recipe.codec().vocabulary, recipe.normaliser()
        self.session = cpu_session(graph, self.settings.threads)
        self.rates = self._rates(self.session)

    def _rates(self, session: InferenceSession) -> ErrorRates:
        return greedy_rates(
            lambda clip: run_graph(session, [clip])[0], self.vocabulary, self.clips, self.normalise
        )

    def measure(self, how: str, graph: Path) -> Candidate:
        """What a candidate gives, and whether it passes."""
        session = cpu_session(graph, self.settings.threads)
        turns = [partial(run_graph, each, [self.clip]) for each in (self.session, session)]
        base_s, latency_s = (float(np.median(times)) for times in in_turns_s(turns, self.settings.repeats))
        speedup, rates = base_s / latency_s, self._rates(session)
        some = [clip for clip, _ in self.clips[:4]]
        alone = [run_graph(session, [clip])[0] for clip in some]
        apart = compare(alone, run_graph(session, some)).worst_posterior
        reason = ""
        if math.isnan(apart):
            reason = "its log-probabilities are not numbers"
        elif speedup <= 1.0:
            reason = "not faster than float32"
        elif rates.wer > self.rates.wer + self.settings.max_wer_loss:
            reason = f"WER {100 * rates.wer:.2f} % against {100 * self.rates.wer:.2f} %"
        return Candidate(
            how,
            bytes=graph.stat().st_size,
            latency_ms=1000 * latency_s,
            speedup=speedup,
            wer=rates.wer,
            cer=rates.cer,
            batch_against_alone=apart,
            accepted=not reason,
            reason=reason,
        )
