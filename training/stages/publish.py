"""Stage 6: a bundle, checked by the service's own reader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from api.manifest import Evaluation, GraphName, Source, Speed, TrainingData
from training.benchmark import table
from training.bundle_writer import Card, Graphs, Measurements, write_bundle
from training.data.manifest import Utterance
from training.data.split import told_apart_by
from training.errors import CheckpointError
from training.loop.run_folder import FLOAT32, INT8, WEIGHTS, RunFolder
from training.stages.recipe import Recipe
from training.vocabulary import casing_steps

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def publish(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> Path:
    """Write `bundle/NAME` with manifest, graphs, vocabulary and model card; returns it.

    Raises CheckpointError when there is no graph yet, BundleError where the service would refuse the bundle.
    """
    exported: dict[GraphName, Path] = {
        "float32": folder.path / FLOAT32,
        "int8": folder.path / INT8,
    }
    there = {name: path for name, path in exported.items() if path.is_file()}
    if "float32" not in there:
        raise CheckpointError(f"{exported['float32']}: no graph; run the export stage first")
    facts, default = recipe.facts(), _default(there)
    graphs = Graphs(
        files=there,
        default=default,
        opset=int(folder.read_json("export.json")["opset"]),
        parameters=parameters(folder.path / WEIGHTS),
        frame_stride_s=facts.frame_stride_s,
        max_window_s=facts.max_window_s,
        min_samples=facts.min_samples,
        sample_rate_hz=facts.sample_rate_hz,
        decoder=facts.decoder,
    )
    measured = folder.read_json("benchmark.json") or {"rows": []}
    learned = folder.read_json("train.json") is not None  # `convert` leaves none
    bundle = write_bundle(
        folder.path / "bundle",
        recipe.config.name,
        graphs,
        recipe.codec().vocabulary,
        _card(recipe, rows, learned=learned),
        _measurements(
            recipe, measured, default, f"held-out {told_apart_by(rows)}s" if learned else "test part"
        ),
    )
    return bundle.path


def _default(there: dict[GraphName, Path]) -> GraphName:
    return "int8" if "int8" in there else "float32"


def parameters(weights: Path) -> int:
    """Weights that training moves, in a safetensors file."""
    with safe_open(weights, framework="np") as stored:
        return sum(
            math.prod(stored.get_slice(name).get_shape())
            for name in stored.keys()  # noqa: SIM118  not a mapping
            if not name.endswith(STATISTICS)
        )


def _card(recipe: Recipe, rows: dict[str, list[Utterance]], *, learned: bool) -> Card:
    config, said = recipe.config, recipe.config.bundle
    hours = sum(row.duration_s or 0.0 for row in rows["train"]) / 3600
    made = f"Made by the recipe `{recipe.name}` from {len(rows['train'])} utterances."
    taught = recipe.normaliser().steps if learned else casing_steps(recipe.codec().vocabulary)
    data = TrainingData(name=said.data_name, licence=said.data_licence, hours=round(hours, 4))
    return Card(
        title=config.name,
        languages=(config.language,),
        source=Source(title=said.source_title, url=said.source_url, revision=said.source_revision),
        licence=said.licence,
        version=said.version,
        summary=made if learned else f"Converted by the recipe `{recipe.name}`, the weights as they were.",
        text_normalisation=taught,
        training_data=(data,) if learned else (),
    )


def _measurements(recipe: Recipe, measured: dict[str, Any], default: GraphName, part: str) -> Measurements:
    """The default graph's error rates, every graph's speed, and the table of the benchmark."""
    if not measured["rows"]:
        return Measurements()
    names: dict[str, GraphName] = {"onnx": "float32", "int8": "int8"}
    by_graph = {names[row["graph"]]: row for row in measured["rows"] if row["graph"] in names}
    return Measurements(
        evaluation=(
            Evaluation(
                test_set=f"{recipe.config.bundle.data_name}, {part}",
                language=recipe.config.language,
                utterances=measured["test_utterances"],
                wer=by_graph[default]["wer"],
                cer=by_graph[default]["cer"],
                decoding="greedy",
            ),
        )
        if default in by_graph
        else (),
        speed=tuple(
            Speed(
                hardware=measured["hardware"],
                threads=measured["threads"],
                graph=name,
                clip_s=measured["clip_s"],
                rtf=row["real_time_factor"],
            )
            for name, row in by_graph.items()
        ),
        notes={"PyTorch, ONNX and INT8 side by side": table(measured["rows"])},
    )
