"""Stage 3: the float32 graph, checked against the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import onnx
from torch import nn

from training.data.audio import load_waveform
from training.data.manifest import Utterance, spread
from training.errors import QualityGateError
from training.exported import View, as_it_is
from training.files import written_whole
from training.inference import Agreement, Waveform, compare, cpu_session, run_graph
from training.loop.run_folder import FLOAT32, RunFolder
from training.stages.recipe import Recipe
from training.stages.train import trained
from training.torch_inference import run_torch

TOLERANCE = 1e-4
"""Largest difference of a posterior between torch and ONNX, and between batched and alone."""

MAX_SCORED = 200
"""Utterances the gate is measured on at most."""


def load_part(
    rows: Sequence[Utterance], sample_rate_hz: int, limit: int = MAX_SCORED
) -> list[tuple[Waveform, str]]:
    """Recordings and texts of `limit` rows, evenly spread: manifests tend to be sorted by speaker."""
    return [
        (load_waveform(row.audio, sample_rate_hz, row.offset_s, row.duration_s), row.text)
        for row in spread(rows, limit)
    ]


def export(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> Path:
    """Write `export/model.onnx`. Raises QualityGateError when it disagrees with the network, DiskFullError.

    Until it agrees there is no graph, neither this one nor an earlier one.
    """
    target = folder.path / FLOAT32
    folder.forget_graphs()
    codec = recipe.codec()
    network = trained(recipe, codec, folder)
    model = recipe.export(network)
    onnx.checker.check_model(model)
    partial = target.with_name(target.name + ".partial")
    with written_whole(partial, model.ByteSize()) as unfinished:
        onnx.save(model, unfinished)
    clips = load_part(rows["validation"], recipe.facts().sample_rate_hz, limit=4)
    agreement = agree(network, partial, [clip for clip, _ in clips], recipe.compared)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    found = {name: asdict(result) for name, result in agreement.items()}
    folder.write_json("export.json", {"opset": opset, "bytes": partial.stat().st_size, **found})
    for name, result in agreement.items():
        if not result.worst_posterior <= TOLERANCE:  # NaN is no agreement either
            raise QualityGateError(f"{partial}: {name}: {result.describe()}; allowed {TOLERANCE:.0e}")
    return partial.replace(target)


def agree(
    network: nn.Module, graph: Path, recordings: Sequence[Waveform], view: View = as_it_is
) -> dict[str, Agreement]:
    """How far apart things are in a `view`: torch against ONNX, and a padded batch against each alone."""
    session = cpu_session(graph)
    reference, batched = run_torch(network, recordings), run_graph(session, recordings)
    alone = [run_graph(session, [samples])[0] for samples in recordings]
    reference, batched, alone = ([view(one) for one in several] for several in (reference, batched, alone))
    for row, (first, second, third) in enumerate(zip(reference, batched, alone, strict=True)):
        if not len(first) == len(second) == len(third):
            raise QualityGateError(
                f"item {row} has {len(first)} frames in torch, {len(second)} in a batch, {len(third)} alone"
            )
    return {"torch_against_onnx": compare(reference, batched), "batch_against_alone": compare(alone, batched)}
