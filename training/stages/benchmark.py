"""Stage 5: PyTorch, ONNX and INT8 side by side: size, latency, real-time factor, error rates."""

from __future__ import annotations

import json
from typing import Any

from training.benchmark import onnx_form, side_by_side, table, torch_form
from training.data.manifest import Utterance
from training.errors import EmptyManifestError
from training.loop.plots import plot_results
from training.loop.run_folder import FLOAT32, INT8, RunFolder
from training.provenance import processor
from training.stages.export import load_part
from training.stages.recipe import Recipe
from training.stages.train import trained


def benchmark(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> dict[str, Any]:
    """Measure on the test part, print the table and one JSON line, write `benchmark.json`.

    Raises EmptyManifestError where the split left no test part.
    """
    if not rows["test"]:
        raise EmptyManifestError("the test part is empty; publish works without a benchmark")
    settings, rate_hz = recipe.config.benchmark, recipe.facts().sample_rate_hz
    codec = recipe.codec()
    clips = load_part(rows["test"], rate_hz)
    network = trained(recipe, codec, folder)
    size_bytes = sum(value.numel() * value.element_size() for value in network.parameters())
    graphs = {"onnx": folder.path / FLOAT32, "int8": folder.path / INT8}
    measured = side_by_side(
        [
            torch_form("pytorch", size_bytes, network),
            *(onnx_form(name, path, settings.threads) for name, path in graphs.items() if path.is_file()),
        ],
        clips,
        codec.vocabulary,
        sample_rate_hz=rate_hz,
        clip_s=settings.clip_s,
        threads=settings.threads,
        rounds=settings.repeats,
        normalise=recipe.normaliser(),
    )
    columns = [row.columns() for row in measured]
    result = {
        "clip_s": settings.clip_s,
        "threads": settings.threads,
        "test_utterances": len(clips),
        "hardware": processor(),
        "rows": columns,
    }
    folder.write_json("benchmark.json", result)
    plot_results({row.form: {"wer": row.rates.wer, "cer": row.rates.cer} for row in measured}, folder.plots)
    print(table(columns))
    print(json.dumps(result))
    return result
