"""Stages 3 and 4: the float32 graph, checked against the network; the INT8 graph behind a gate."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from training.data.audio import load_waveform
from training.data.manifest import Utterance, spread
from training.errors import CheckpointError, QualityGateError
from training.inference import Agreement, clip_of, compare, in_turns_s
from training.loop.run_folder import FLOAT32, INT8, RunFolder
from training.stages.recipe import Recipe
from training.stages.runtime import GraphRunner, Samples, score
from training.stages.train import trained

TOLERANCE = 1e-4
"""Largest difference of a posterior between torch and ONNX, and between batched and alone."""

MAX_SCORED = 200
"""Utterances the gate is measured on at most."""


def load_part(
    rows: Sequence[Utterance], sample_rate_hz: int, limit: int = MAX_SCORED
) -> tuple[list[Samples], list[str]]:
    """Recordings and texts of `limit` rows, evenly spread: manifests tend to be sorted by speaker."""
    chosen = spread(rows, limit)
    audio = [load_waveform(row.audio, sample_rate_hz, row.offset_s, row.duration_s) for row in chosen]
    return audio, [row.text for row in chosen]


def export(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> Path:
    """Write `export/model.onnx`. Raises QualityGateError when it disagrees with the network.

    Until it agrees there is no graph, neither this one nor an earlier one.
    """
    target = folder.path / FLOAT32
    folder.forget_graphs()
    codec = recipe.codec()
    network = trained(recipe, codec, folder)
    model = recipe.export(network)
    onnx.checker.check_model(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    onnx.save(model, partial)
    recordings, _ = load_part(rows["validation"], recipe.facts().sample_rate_hz, limit=4)
    agreement = agree(network, GraphRunner(partial), recordings)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    found = {name: asdict(result) for name, result in agreement.items()}
    folder.write_json("export.json", {"opset": opset, "bytes": partial.stat().st_size, **found})
    for name, result in agreement.items():
        if result.worst_posterior > TOLERANCE:
            raise QualityGateError(f"{partial}: {name}: {result.describe()}; allowed {TOLERANCE:.0e}")
    return partial.replace(target)


def agree(network: nn.Module, runner: GraphRunner, recordings: Sequence[Samples]) -> dict[str, Agreement]:
    """How far apart things are: torch against ONNX, and a padded batch against each alone."""
    lengths = torch.tensor([len(samples) for samples in recordings])
    padded = torch.zeros(len(recordings), int(lengths.max()))
    for row, samples in enumerate(recordings):
        padded[row, : len(samples)] = torch.from_numpy(samples)
    with torch.inference_mode():
        expected, expected_frames = network(padded, lengths)
    reference = [row[:count].numpy() for row, count in zip(expected, expected_frames.tolist(), strict=True)]
    batched = runner(recordings)
    alone = [runner([samples])[0] for samples in recordings]
    for row, (first, second, third) in enumerate(zip(reference, batched, alone, strict=True)):
        if not len(first) == len(second) == len(third):
            raise QualityGateError(
                f"item {row} has {len(first)} frames in torch, {len(second)} in a batch, {len(third)} alone"
            )
    return {"torch_against_onnx": compare(reference, batched), "batch_against_alone": compare(alone, batched)}


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
    """The accepted candidate with the lowest WER among those that are within 15 % (noise) of the fastest."""
    accepted = [candidate for candidate in candidates if candidate.accepted]
    fastest = max((candidate.speedup for candidate in accepted), default=0.0)
    close = [candidate for candidate in accepted if candidate.speedup * 1.15 >= fastest]
    return min(close, key=lambda candidate: (candidate.wer, -candidate.speedup), default=None)


def quantize(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> Path | None:
    """Try the recipe's ways to INT8; the fastest that passes becomes `export/model.int8.onnx`.

    The gate: faster than float32, and a WER on validation that is higher by `benchmark.max_wer_loss` at most.
    None when nothing passes; `quantize.json` says what was tried and what each gave.
    """
    settings = recipe.config.benchmark
    rate_hz = recipe.facts().sample_rate_hz
    graph = folder.path / FLOAT32
    target = folder.path / INT8
    if not graph.is_file():
        raise CheckpointError(f"{graph}: no graph; run the export stage first")
    folder.forget(INT8, "quantize.json", "benchmark.json")
    codec = recipe.codec()
    calibration, _ = load_part(rows["train"], rate_hz, limit=32)
    recordings, texts = load_part(rows["validation"], rate_hz)
    clip = clip_of(recordings, settings.clip_s, rate_hz)
    reference = GraphRunner(graph, settings.threads)
    normalise = recipe.normaliser()
    base_wer, base_cer = score(reference, recordings, texts, codec, normalise)
    candidates: list[Candidate] = []
    files: dict[str, Path] = {}
    work = folder.path / "export" / "candidates"
    work.mkdir(parents=True, exist_ok=True)
    for how, path in recipe.quantized(graph, work, calibration):
        runner = GraphRunner(path, settings.threads)
        turns = [partial(each, [clip]) for each in (reference, runner)]
        base_s, latency_s = (float(np.median(times)) for times in in_turns_s(turns, settings.repeats))
        speedup = base_s / latency_s
        wer, cer = score(runner, recordings, texts, codec, normalise)
        reason = ""
        if speedup <= 1.0:
            reason = "not faster than float32"
        elif wer > base_wer + settings.max_wer_loss:
            reason = f"WER {100 * wer:.2f} % against {100 * base_wer:.2f} %"
        neighbours = compare(
            [runner([one])[0] for one in recordings[:4]], runner(recordings[:4])
        ).worst_posterior
        candidates.append(
            Candidate(
                how, path.stat().st_size, 1000 * latency_s, speedup, wer, cer, neighbours, not reason, reason
            )
        )
        files[how] = path
    best = choose(candidates)
    if best is not None:
        shutil.copyfile(files[best.how], target)
    folder.write_json(
        "quantize.json",
        {
            "float32": {"bytes": graph.stat().st_size, "wer": base_wer, "cer": base_cer},
            "clip_s": settings.clip_s,
            "threads": settings.threads,
            "max_wer_loss": settings.max_wer_loss,
            "chosen": best.how if best else None,
            "candidates": [asdict(candidate) for candidate in candidates],
        },
    )
    shutil.rmtree(work)
    return target if best else None
