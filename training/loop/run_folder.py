"""The folder of a run: what was asked for, where it ran, how it went.

config.json        the configuration, as checked
environment.json   versions, machine, device, git commit
metrics.csv        one row per epoch
checkpoints/       last.ckpt to go on from, the best by validation WER
weights.safetensors  what training, or a conversion, ended with
export/            the graphs made of them
tensorboard/       the same figures for TensorBoard
plots/             PNG
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.errors import ConfigError
from training.files import written_whole
from training.provenance import git_commit, processor

WEIGHTS = "weights.safetensors"
FLOAT32, INT8 = "export/model.onnx", "export/model.int8.onnx"
PARTS = ("train", "validation", "test")
SOURCES = "data/sources.json"
"""SHA-256 of the manifests that the parts were made of."""
FREE = ("benchmark", "bundle", "name", "training")
"""Sections that may differ from call to call: neither the data nor the network depends on them."""
PACKAGES = ("torch", "lightning", "transformers", "datasets", "onnx", "onnxruntime", "numpy", "jiwer")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where Lightning keeps its state."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """Where pictures go."""
        return self.path / "plots"

    @property
    def metrics(self) -> Path:
        """One row per epoch."""
        return self.path / "metrics.csv"

    @property
    def manifests(self) -> Path:
        """The validated and split manifests."""
        return self.path / "data"

    def resume_from(self) -> Path | None:
        """The newest state to go on from: the last epoch's, or the one saved at an interruption."""
        states = [self.checkpoints / name for name in ("last.ckpt", "interrupted.ckpt")]
        there = [state for state in states if state.is_file()]
        return max(there, key=lambda state: state.stat().st_mtime_ns, default=None)

    @property
    def has_learned(self) -> bool:
        """Whether there is a state or there are weights, which belong to one configuration."""
        return (self.path / WEIGHTS).is_file() or any(self.checkpoints.glob("*.ckpt"))

    def forget(self, *names: str) -> None:
        """Remove files that earlier stages left, where they are there."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def forget_parts(self) -> None:
        """Remove what was prepared and what was measured on it: it is prepared again."""
        self.forget("split.json", SOURCES, "baseline.json", *(f"data/{part}.jsonl" for part in PARTS))

    def forget_graphs(self) -> None:
        """Remove what was exported from older weights: a bundle must not mix it with newer ones."""
        self.forget(FLOAT32, INT8, "quantize.json", "benchmark.json")

    def write_json(self, name: str, values: Any) -> Path:
        """Store plain values under `name`, atomically."""
        text = json.dumps(values, ensure_ascii=False, indent=1, default=str) + "\n"
        with written_whole(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8")
        return self.path / name

    def read_json(self, name: str) -> Any:
        """What write_json stored; None where there is nothing."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def open_run(path: Path, config: Mapping[str, Any]) -> RunFolder:
    """Create the folder, or come back to it.

    Sections named in FREE may differ (a smaller batch, more epochs). As long as nothing was learned any other
    may as well: what was prepared for the old configuration is then prepared again. Afterwards this raises
    ConfigError naming the section that changed: the state in the folder belongs to another experiment.
    """
    folder = RunFolder(path)
    wanted = json.loads(json.dumps(config, default=str))
    stored = folder.read_json("config.json")
    if stored is not None:
        changed = [
            key for key in sorted({*wanted, *stored} - set(FREE)) if wanted.get(key) != stored.get(key)
        ]
        if changed and folder.has_learned:
            raise ConfigError(
                f"{path} holds a run that was trained with another configuration ({', '.join(changed)} "
                "changed); give another --run folder, or remove this one"
            )
        if changed:
            folder.forget_parts()
    folder.write_json("config.json", wanted)
    folder.write_json("environment.json", environment())
    return folder


def environment() -> dict[str, Any]:
    """Versions, machine and device of this process."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": versions,
        "git_commit": git_commit(),
    }


COLUMNS = ("epoch", "step", "train_loss", "val_loss", "val_wer", "val_cer", "learning_rate", "seconds")


def append_metrics(path: Path, row: Mapping[str, Any]) -> None:
    """Add one epoch; a repeated epoch (after a resume) replaces the old row and what came after it."""
    rows = [old for old in read_metrics(path) if int(old["epoch"]) < int(row["epoch"])]
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as sink:
        writer = csv.DictWriter(sink, COLUMNS)
        writer.writeheader()
        writer.writerows([*rows, {name: row.get(name, "") for name in COLUMNS}])


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv; empty where there is none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as source:
        return list(csv.DictReader(source))
