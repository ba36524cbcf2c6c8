"""Every form of a trained run side by side on its test part: PyTorch, ONNX and each way to INT8.

    python -m training.bench_forms whisper_ctc --config FILE --run FOLDER \
        --variant 'model.length="true"' --variant model.length=fixed30

A variant changes the configuration and keeps the run's weights. Error rates have 95 % intervals, and so have
their differences from the first form: the same utterances are drawn for both. Forms take turns on one clip.
The `quantize` stage chooses among the ways to INT8 on validation; this table says what that choice was worth.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch

from training.benchmark import Form, onnx_form, torch_form
from training.config import load_config
from training.errors import EmptyManifestError, in_one_line
from training.evaluate import Difference, ErrorRates, error_rates, greedy_text, plainly, wer_difference
from training.evaluate import Utterance as Heard
from training.inference import Waveform, clip_of, in_turns_s
from training.loop.run_folder import WEIGHTS, RunFolder
from training.provenance import hardware
from training.recipes.conformer_ctc.recipe import ConformerRecipe
from training.recipes.quartznet_ctc.recipe import QuartzNetRecipe
from training.recipes.wav2vec2_ctc.recipe import Wav2Vec2Recipe
from training.recipes.whisper_ctc.recipe import WhisperCtcRecipe
from training.stages.export import load_part
from training.stages.prepare import prepare
from training.stages.quantize import calibration_clips
from training.stages.recipe import Recipe
from training.stages.train import load_weights, trained_weights

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (QuartzNetRecipe, Wav2Vec2Recipe, WhisperCtcRecipe, ConformerRecipe)
}
COLUMNS = (
    "form",
    "MB",
    "ms, median / least",
    "times as fast",
    "WER [95 % interval] / CER",
    "against the first, points",
    "other texts",
)


@dataclass(frozen=True)
class FormResult:
    """What one form gave."""

    form: str
    megabytes: float
    latency_ms: float
    """Median over rounds, on one clip alone."""
    fastest_ms: float
    speedup: float
    """The first form's median over this one's."""
    rates: ErrorRates
    difference: Difference
    """Word error rate less the first form's."""
    other_texts: int
    """Utterances that the first form hears otherwise."""


def forms_of(recipe: Recipe, weights: Path, calibration: Sequence[Waveform], folder: Path) -> Iterator[Form]:
    """PyTorch, ONNX float32, and every candidate of the recipe, made in `folder`."""
    threads = recipe.config.benchmark.threads
    network = load_weights(recipe.network(recipe.codec()), weights)
    yield torch_form("PyTorch float32", sum(value.numel() * 4 for value in network.parameters()), network)
    graph = folder / "float32.onnx"
    onnx.save(recipe.export(network), graph)
    yield onnx_form("ONNX float32", graph, threads)
    for how, path in recipe.quantized(graph, folder, calibration):
        yield onnx_form(f"INT8, {how}", path, threads)


def measure(recipe: Recipe, forms: Sequence[Form], clips: Sequence[tuple[Waveform, str]]) -> list[FormResult]:
    """Latency of all forms in turns, then their texts on all clips."""
    settings, vocabulary = recipe.config.benchmark, recipe.codec().vocabulary
    torch.set_num_threads(settings.threads)
    clip = clip_of([waveform for waveform, _ in clips], settings.clip_s, recipe.facts().sample_rate_hz)
    times_s = in_turns_s([partial(form.network, clip) for form in forms], settings.repeats, "latency")
    latencies_s = [float(np.median(times)) for times in times_s]
    heard = [
        plainly(
            [Heard(text, greedy_text(form.network(waveform), vocabulary)) for waveform, text in clips],
            recipe.normaliser(),
        )
        for form in forms
    ]
    return [
        FormResult(
            form=form.name,
            megabytes=form.size_bytes / 1e6,
            latency_ms=1000 * latencies_s[index],
            fastest_ms=1000 * min(times_s[index]),
            speedup=latencies_s[0] / latencies_s[index],
            rates=error_rates(texts),
            difference=wer_difference(heard[0], texts),
            other_texts=sum(
                mine.hypothesis != first.hypothesis for mine, first in zip(texts, heard[0], strict=True)
            ),
        )
        for index, (form, texts) in enumerate(zip(forms, heard, strict=True))
    ]


def table(results: Sequence[FormResult]) -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in results:
        rates, points = row.rates, [100 * value for value in astuple(row.difference)]
        lines.append(
            (
                row.form,
                f"{row.megabytes:.1f}",
                f"{row.latency_ms:.1f} / {row.fastest_ms:.1f}",
                f"{row.speedup:.2f}",
                f"{rates.wer:.1%} [{rates.wer_low:.1%}, {rates.wer_high:.1%}] / {rates.cer:.1%}",
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points),
                str(row.other_texts),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@in_one_line("bench-forms")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Every form of a trained run on its test part.")
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished training")
    parser.add_argument(
        "--variant",
        action="append",
        metavar="SECTION.FIELD=VALUE",
        help="the same weights in another configuration; default: the run's own",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="for all variants"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        forms: list[Form] = []
        # before `prepare`, which makes the folder of a run that is not there
        weights = trained_weights(given.run / WEIGHTS)
        for index, variant in enumerate(given.variant or [""]):
            changes = [*given.set, variant] if variant else given.set
            recipe = RECIPES[given.recipe](load_config(given.config, changes))
            rows = prepare(recipe, RunFolder(given.run))
            if not rows["test"]:
                raise EmptyManifestError("the test part is empty")
            rate_hz = recipe.facts().sample_rate_hz
            calibration = calibration_clips(rows, rate_hz)
            place = Path(folder) / str(index)
            place.mkdir()
            prefix = f"{variant}: " if variant else ""
            forms += [
                Form(prefix + form.name, form.size_bytes, form.network)
                for form in forms_of(recipe, weights, calibration, place)
            ]
        clips = load_part(rows["test"], rate_hz, len(rows["test"]))
        results = measure(recipe, forms, clips)
    print(table(results))
    setting = {"clip_s": recipe.config.benchmark.clip_s, "threads": recipe.config.benchmark.threads}
    print(json.dumps({"hardware": hardware(), **setting, "rows": [asdict(row) for row in results]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
