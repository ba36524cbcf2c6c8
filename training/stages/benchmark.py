"""Stage 5: PyTorch, ONNX and INT8 side by side: size, latency, real-time factor, error rates."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from training.data.manifest import Utterance
from training.loop.module import error_rates, greedy_texts
from training.loop.plots import plot_results
from training.loop.run_folder import RunFolder, environment
from training.stages.export import FLOAT32, INT8, load_part
from training.stages.recipe import Recipe
from training.stages.runtime import GraphRunner, Samples, clip_of, score
from training.stages.train import trained
from training.vocabulary import TokenCodec

COLUMNS = (
    ("graph", "{:10}"),
    ("megabytes", "{:>10.1f}"),
    ("latency_ms", "{:>11.1f}"),
    ("speedup", "{:>8.2f}"),
    ("real_time_factor", "{:>17.4f}"),
    ("wer", "{:>7.4f}"),
    ("cer", "{:>7.4f}"),
)


def benchmark(recipe: Recipe, rows: dict[str, list[Utterance]], folder: RunFolder) -> dict[str, Any]:
    """Measure on the test part, print the table and one JSON line, write `benchmark.json`.

    The three are timed in turns within one process, on the same clip, so that their ratio means something.
    """
    settings, rate_hz = recipe.config.benchmark, recipe.facts().sample_rate_hz
    codec = recipe.codec()
    recordings, texts = load_part(rows["test"], rate_hz)
    clip = clip_of(recordings, settings.clip_s, rate_hz)
    network = trained(recipe, codec, folder)
    graphs = {
        name: GraphRunner(path, settings.threads)
        for name, path in (
            ("onnx", folder.path / "export" / FLOAT32),
            ("int8", folder.path / "export" / INT8),
        )
        if path.is_file()
    }
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        runs: dict[str, Callable[[], float]] = {"pytorch": lambda: _torch_latency_s(network, clip)}
        runs |= {
            name: (lambda run: lambda: run.latency_s(clip, 1))(runner) for name, runner in graphs.items()
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in tqdm(range(settings.repeats), desc="latency", unit="round"):
            for name, run in runs.items():
                times[name].append(run())
        rates = {"pytorch": _score_torch(network, recordings, texts, codec)}
        rates |= {name: score(runner, recordings, texts, codec) for name, runner in graphs.items()}
    finally:
        torch.set_num_threads(before)
    sizes = {
        "pytorch": sum(value.numel() * value.element_size() for value in network.parameters()),
        "onnx": _size(folder.path / "export" / FLOAT32),
        "int8": _size(folder.path / "export" / INT8),
    }
    base_s = float(np.median(times["pytorch"]))
    table: list[dict[str, Any]] = []
    for name, seconds in times.items():
        latency_s = float(np.median(seconds))
        table.append(
            {
                "graph": name,
                "megabytes": sizes[name] / 1e6,
                "latency_ms": 1000 * latency_s,
                "speedup": base_s / latency_s,
                "real_time_factor": latency_s / settings.clip_s,
                "wer": rates[name][0],
                "cer": rates[name][1],
            }
        )
    result = {
        "clip_s": settings.clip_s,
        "threads": settings.threads,
        "test_utterances": len(texts),
        "hardware": environment()["processor"],
        "rows": table,
    }
    folder.write_json("benchmark.json", result)
    plot_results({str(row["graph"]): {"wer": row["wer"], "cer": row["cer"]} for row in table}, folder.plots)
    print(format_table(table))
    print(json.dumps(result))
    return result


def format_table(rows: list[dict[str, Any]]) -> str:
    """The table as text."""
    widths = [len(form.format("" if name == "graph" else 0.0)) for name, form in COLUMNS]
    lines = [" ".join(name.rjust(width) for (name, _), width in zip(COLUMNS, widths, strict=True))]
    lines += [" ".join(form.format(row[name]) for name, form in COLUMNS) for row in rows]
    return "\n".join(lines)


def _torch_latency_s(network: torch.nn.Module, clip: Samples) -> float:
    waveform, lengths = torch.from_numpy(clip)[None], torch.tensor([len(clip)])
    with torch.inference_mode():
        network(waveform, lengths)
        started = time.perf_counter()
        network(waveform, lengths)
        return time.perf_counter() - started


def _score_torch(
    network: torch.nn.Module, recordings: list[Samples], texts: list[str], codec: TokenCodec
) -> tuple[float, float]:
    hypotheses = []
    with torch.inference_mode():
        for samples in recordings:
            log_probs, frames = network(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
            hypotheses += greedy_texts(log_probs, frames, codec)
    return error_rates(texts, hypotheses)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
