"""A recipe's configuration: one YAML file, checked field by field.

`--set training.epochs=2` on the command line changes a field; paths are relative to the YAML file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from api.manifest import Language
from training.augment.spectrogram import SpecAugmentConfig
from training.augment.waveform import WaveformAugmentConfig
from training.errors import ConfigError
from training.loop.settings import TrainingSettings

Checked = TypeVar("Checked", bound=BaseModel)


class Section(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Section):
    """Which recordings, and which of them count."""

    manifest: Path | None = Field(
        default=None, description="One manifest, split by speaker into three parts."
    )
    train: Path | None = Field(default=None, description="Or three manifests that are split already.")
    validation: Path | None = None
    test: Path | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    min_duration_s: float = Field(default=0.3, ge=0)
    max_duration_s: float = Field(default=20.0, gt=0)
    limit: int | None = Field(
        default=None, ge=1, description="At most so many utterances of a manifest, spread over it."
    )
    seed: int = 0


class AugmentSettings(Section):
    """Random changes of the training part; leave the section out to train on the recordings as they are."""

    waveform: WaveformAugmentConfig | None = WaveformAugmentConfig()
    features: SpecAugmentConfig | None = SpecAugmentConfig()


class BundleSettings(Section):
    """What the manifest of the bundle says and cannot know by itself."""

    version: str = "1"
    licence: str = Field(description="Licence of the weights, as SPDX writes it.")
    source_title: str = "trained from scratch"
    source_url: str = "no published source"
    source_revision: str | None = None
    data_name: str = "own recordings"
    data_licence: str = "unknown"


class BenchmarkSettings(Section):
    """How the table is measured."""

    clip_s: float = Field(default=5.0, gt=0)
    threads: int = Field(default=1, ge=1)
    repeats: int = Field(default=5, ge=1)
    max_wer_loss: float = Field(
        default=0.01, ge=0, description="WER that INT8 may cost, as a fraction of one."
    )


class RunConfig(Section):
    """Everything a run depends on. `model` and `export` belong to the recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Name of the bundle.")
    language: Language = Field(description="ISO 639-1; ISO 639-3 for a language that has no such code.")
    letters: str | None = Field(default=None, description="Alphabet; default: that of the language.")
    fold_yo: bool = Field(default=False, description="Russian: ё becomes е.")
    data: DataSettings
    model: dict[str, Any] = Field(default_factory=dict)
    augment: AugmentSettings | None = None
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    benchmark: BenchmarkSettings = Field(default_factory=BenchmarkSettings)
    bundle: BundleSettings

    @field_validator("language", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        if value is False:
            raise ValueError('YAML takes a bare no for false; Norwegian is "no", in quotes')
        return value


def load_config(path: Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read and check a YAML file. Raises ConfigError naming the field."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections, found {type(values).__name__}")
    for change in changes:
        _apply(values, change)
    config = check(RunConfig, values, str(path))
    return _absolute(config, path.parent)


def check(model: type[Checked], values: Any, where: str) -> Checked:
    """`values` as `model`. Raises ConfigError with one line per problem."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            field, value = ".".join(str(part) for part in problem["loc"]) or "value", problem["input"]
            known = f", not {value}" if "ctx" in problem and type(value) in (int, float) else ""
            lines.append(f"{where}: {field}: {problem['msg']}{known}")
        raise ConfigError("\n".join(lines)) from None


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {change}: expected section.field=value")
    *sections, name = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change}: {section} is not a section")
        values = inner
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: not YAML: {error}") from error


def _absolute(config: RunConfig, folder: Path) -> RunConfig:
    data = {
        name: (folder / path).resolve()
        for name in ("manifest", "train", "validation", "test")
        if (path := getattr(config.data, name)) is not None
    }
    given = set(data)
    if given != {"manifest"} and given != {"train", "validation", "test"}:
        raise ConfigError("data: give either `manifest`, or all of `train`, `validation` and `test`")
    model = dict(config.model)
    for name in ("transfer_from", "checkpoint"):
        if isinstance(value := model.get(name), str):
            model[name] = str((folder / Path(value).expanduser()).resolve())
    # `base` names a folder, a file of weights or something on the hub: only what is there is a path
    if isinstance(value := model.get("base"), str) and (folder / value).exists():
        model["base"] = str((folder / value).resolve())
    augment = config.augment
    if augment is not None and augment.waveform is not None and augment.waveform.noise_folder is not None:
        noises = (folder / augment.waveform.noise_folder.expanduser()).resolve()
        augment = augment.model_copy(update={"waveform": replace(augment.waveform, noise_folder=noises)})
    changed = {"data": config.data.model_copy(update=data), "model": model, "augment": augment}
    return config.model_copy(update=changed)
