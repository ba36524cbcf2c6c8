"""The Azerbaijani experiment, from the environment to the final report in 14 stages.

    python -m training.recipes.whisper_seq2seq.experiment --mode sample --config FILE --out FOLDER

`sample` takes 200 utterances, spread over the manifest, and one epoch, to see every stage work; `full` takes
everything. Gives:

    charts/      pictures
    artifacts/   config, environment, device, validation, split, data summary, tokenizer, model, history,
                 results, sample predictions
    outputs/     model/ (transformers' form, with its card), bundle/, report.md
    run/         checkpoints and graphs; an interrupted experiment goes on from here
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from training.benchmark import table
from training.config import RunConfig, load_config
from training.data.manifest import Utterance, spread
from training.data.split import told_apart_by
from training.errors import in_one_line
from training.loop.fit import choose_device
from training.loop.plots import plot_results
from training.loop.run_folder import RunFolder, environment, open_run
from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe
from training.recipes.whisper_seq2seq.scoring import score
from training.stages.benchmark import benchmark
from training.stages.export import export
from training.stages.prepare import prepare
from training.stages.publish import publish
from training.stages.quantize import quantize
from training.stages.train import train, trained

SAMPLE_UTTERANCES = 200
BASELINE_UTTERANCES = 50
SHOWN_PREDICTIONS = 20


@dataclass
class Experiment:
    """What the stages share."""

    mode: Literal["sample", "full"]
    config: RunConfig
    out: Path
    recipe: WhisperSeq2SeqRecipe
    folder: RunFolder
    rows: dict[str, list[Utterance]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, values: Any) -> None:
        """Write an artifact."""
        path = self.out / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(values, ensure_ascii=False, indent=1, default=str) + "\n", encoding="utf-8"
        )

    def chart(self, name: str) -> None:
        """Take a picture over from the run."""
        source = self.folder.plots / name
        target = self.out / "charts" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            shutil.copyfile(source, target)


def _environment(run: Experiment) -> None:
    run.keep("environment.json", environment())


def _configuration(run: Experiment) -> None:
    run.keep("config.json", {"mode": run.mode, **run.config.model_dump(mode="json")})


def _device(run: Experiment) -> None:
    accelerator, precision = choose_device(run.config.training)
    run.keep(
        "device.json",
        {"accelerator": accelerator, "precision": precision, "threads": torch.get_num_threads()},
    )


def _validation(run: Experiment) -> None:
    run.rows = prepare(run.recipe, run.folder)
    reports = sorted(run.folder.manifests.glob("report_*.json"))
    run.keep("validation.json", {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in reports})


def _split(run: Experiment) -> None:
    run.keep(
        "split.json", {"fractions": run.config.data.fractions, "parts": run.folder.read_json("split.json")}
    )


def _summary(run: Experiment) -> None:
    everything = [row for part in run.rows.values() for row in part]
    durations_s = sorted(row.duration_s or 0.0 for row in everything)
    words = sorted(len(row.text.split()) for row in everything)
    run.keep(
        "data_summary.json",
        {
            "utterances": len(everything),
            "hours": sum(durations_s) / 3600,
            "duration_s": {
                "shortest": durations_s[0],
                "median": _median(durations_s),
                "longest": durations_s[-1],
            },
            "words": {"fewest": words[0], "median": _median(words), "most": words[-1]},
            "characters": "".join(sorted({character for row in everything for character in row.text})),
        },
    )
    for name in ("durations.png", "text_lengths.png"):
        run.chart(name)


def _median(ordered: Sequence[float]) -> float:
    return float(ordered[len(ordered) // 2])


def _tokenizer(run: Experiment) -> None:
    codec = run.recipe.codec()
    counts = sorted(len(codec.encode(row.text)) for row in run.rows["train"])
    vocabulary = codec.vocabulary
    run.keep(
        "tokenizer.json",
        {
            "tokens": len(vocabulary),
            "blank_id": vocabulary.blank_id,
            "special_tokens": len(vocabulary.special_ids),
            "normalisation": run.recipe.normaliser().steps,
            "tokens_per_text": {"median": _median(counts), "most": counts[-1]},
        },
    )


def _model(run: Experiment) -> None:
    network = run.recipe.network(run.recipe.codec())
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    run.keep(
        "model.json",
        {
            "base": run.recipe.settings.base,
            "parameters": sum(size for size, _ in sizes),
            "trainable": sum(size for size, learns in sizes if learns),
        },
    )


def _baseline(run: Experiment) -> None:
    stored = run.folder.read_json("baseline.json")
    if stored is None:
        network = run.recipe.network(run.recipe.codec()).eval()
        stored = score(run.recipe, network, spread(run.rows["test"], BASELINE_UTTERANCES))[0]
        run.folder.write_json("baseline.json", stored)
    run.results["baseline"] = stored


def _training(run: Experiment) -> None:
    train(run.recipe, run.rows, run.folder)
    run.keep("history.json", (run.folder.read_json("train.json") or {})["history"])
    shutil.copyfile(run.folder.metrics, run.out / "artifacts" / "history.csv")
    for name in ("loss.png", "validation_wer.png"):
        run.chart(name)


def _test(run: Experiment) -> None:
    network = trained(run.recipe, run.recipe.codec(), run.folder)
    rates, texts = score(run.recipe, network, run.rows["test"])
    run.results["fine_tuned"] = rates
    run.keep("results.json", run.results)
    with (run.out / "artifacts" / "sample_predictions.csv").open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["audio_filepath", "reference", "hypothesis"])
        for row, text in list(zip(run.rows["test"], texts, strict=True))[:SHOWN_PREDICTIONS]:
            writer.writerow([str(row.audio), row.text, text])
    plot_results({name: run.results[name] for name in ("baseline", "fine_tuned")}, run.out / "charts")


def _serving(run: Experiment) -> None:
    export(run.recipe, run.rows, run.folder)
    quantize(run.recipe, run.rows, run.folder)
    run.results["serving"] = benchmark(run.recipe, run.rows, run.folder)
    run.results["quantization"] = run.folder.read_json("quantize.json")
    run.keep("results.json", run.results)


def _folders(run: Experiment) -> None:
    outputs = run.out / "outputs"
    network = trained(run.recipe, run.recipe.codec(), run.folder)
    run.recipe.save_model(network, outputs / "model")
    bundle = publish(run.recipe, run.rows, run.folder)
    shutil.copyfile(bundle / "README.md", outputs / "model" / "README.md")
    target = outputs / "bundle" / bundle.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(bundle, target)


def _report(run: Experiment) -> None:
    baseline, tuned = run.results["baseline"], run.results["fine_tuned"]
    serving = run.results["serving"]
    chosen = run.results["quantization"]["chosen"] or "none passed the gate"
    lines = [
        f"# {run.config.name}: {run.mode} run",
        "",
        f"Base {run.recipe.settings.base}; {len(run.rows['train'])} utterances to learn from, "
        f"{len(run.rows['validation'])} for validation, {len(run.rows['test'])} for the test; "
        f"no {told_apart_by(run.rows)} is in two parts.",
        "",
        "| | utterances | WER, % | CER, % |",
        "|---|---|---|---|",
        *(
            f"| {name} | {rates['utterances']} | {100 * rates['wer']:.1f} | {100 * rates['cer']:.1f} |"
            for name, rates in (("base, untouched", baseline), ("fine-tuned", tuned))
        ),
        "",
        f"Serving a {serving['clip_s']:g} s clip, {serving['threads']} thread, {serving['hardware']}.",
        f"INT8: {chosen}.",
        "",
        table(serving["rows"]),
        "",
        "A decoder writes token by token: its cost grows with the text. Where speed matters more,",
        "the CTC recipes serve the same encoder without it.",
    ]
    (run.out / "outputs" / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


STAGES: tuple[tuple[str, Callable[[Experiment], None]], ...] = (
    ("environment", _environment),
    ("configuration", _configuration),
    ("device", _device),
    ("data validation", _validation),
    ("split", _split),
    ("data summary", _summary),
    ("tokenizer", _tokenizer),
    ("model", _model),
    ("baseline", _baseline),
    ("training", _training),
    ("test", _test),
    ("export, INT8, benchmark", _serving),
    ("model folder and bundle", _folders),
    ("report", _report),
)


def run_experiment(
    mode: Literal["sample", "full"], config: Path, out: Path, changes: Sequence[str] = ()
) -> Path:
    """All stages; gives the report. Raises TrainingError."""
    if mode == "sample":
        changes = [f"data.limit={SAMPLE_UTTERANCES}", "training.epochs=1", *changes]
    checked = load_config(config, changes)
    recipe = WhisperSeq2SeqRecipe(checked)
    folder = open_run(out / "run", {"recipe": recipe.name, **checked.model_dump(mode="json")})
    experiment = Experiment(mode, checked, out, recipe, folder)
    for number, (name, stage) in enumerate(STAGES, start=1):
        print(f"[{number}/{len(STAGES)}] {name}", flush=True)
        stage(experiment)
    return out / "outputs" / "report.md"


@in_one_line("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=["sample", "full"], default="sample")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    given = parser.parse_args(arguments)
    print(run_experiment(given.mode, given.config, given.out, given.set))
    return 0


if __name__ == "__main__":
    sys.exit(main())
