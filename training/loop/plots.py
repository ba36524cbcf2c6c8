"""Pictures of a run, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def plot_history(metrics: Sequence[Mapping[str, str]], folder: Path) -> list[Path]:
    """`loss.png` and `validation_wer.png` from the rows of metrics.csv."""
    epochs = [int(row["epoch"]) for row in metrics]
    figure, axes = _figure("Loss", "epoch", "loss per token")
    for column, label in (("train_loss", "training"), ("val_loss", "validation")):
        axes.plot(epochs, [float(row[column] or "nan") for row in metrics], marker="o", label=label)
    axes.legend()
    paths = [_save(figure, folder / "loss.png")]
    figure, axes = _figure("Validation", "epoch", "error rate, %")
    for column, label in (("val_wer", "words (WER)"), ("val_cer", "characters (CER)")):
        axes.plot(epochs, [100 * float(row[column] or "nan") for row in metrics], marker="o", label=label)
    axes.legend()
    return [*paths, _save(figure, folder / "validation_wer.png")]


def plot_distributions(durations_s: Sequence[float], texts: Sequence[str], folder: Path) -> list[Path]:
    """`durations.png` and `text_lengths.png`."""
    figure, axes = _figure("Durations", "seconds", "utterances")
    axes.hist(durations_s, bins=min(40, max(5, len(durations_s) // 5)))
    paths = [_save(figure, folder / "durations.png")]
    figure, axes = _figure("Text lengths", "characters", "utterances")
    axes.hist([len(text) for text in texts], bins=min(40, max(5, len(texts) // 5)))
    return [*paths, _save(figure, folder / "text_lengths.png")]


def plot_results(results: Mapping[str, Mapping[str, float]], folder: Path) -> Path:
    """`results.png`: WER and CER per part or graph, {"test": {"wer": 0.2, "cer": 0.1}}."""
    figure, axes = _figure("Results", "", "error rate, %")
    names = list(results)
    for shift, measure in ((-0.2, "wer"), (0.2, "cer")):
        heights = [100 * results[name][measure] for name in names]
        bars = axes.bar([index + shift for index in range(len(names))], heights, 0.4, label=measure.upper())
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks(range(len(names)), names)
    axes.legend()
    return _save(figure, folder / "results.png")
