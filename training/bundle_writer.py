"""Write a bundle: files, manifest, model card; verified before it takes its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from api.bundle import MANIFEST_FILE, Bundle, load_bundle, sha256_of, verify_bundle
from api.manifest import (
    Evaluation,
    GraphEntry,
    GraphName,
    InputEntry,
    LanguageModelEntry,
    Manifest,
    Source,
    Speed,
    TrainingData,
    VocabularyEntry,
)
from api.ngram import NgramTable
from api.vocabulary import Vocabulary
from training.errors import ConfigError
from training.files import written_whole
from training.provenance import git_commit

GRAPH_FILES: Mapping[GraphName, str] = {
    "int8": "model.int8.onnx",
    "int4": "model.int4.onnx",
    "float32": "model.onnx",
}
VOCABULARY_FILE = "vocab.txt"
LANGUAGE_MODEL_FILE = "ngram.npz"


@dataclass(frozen=True)
class Card:
    """What a person must say about a model; no program can know it."""

    title: str
    languages: tuple[str, ...]
    source: Source
    licence: str
    version: str = "1"
    summary: str = ""
    limits: str = ""
    text_normalisation: tuple[str, ...] = ("nfc", "lowercase")
    training_data: tuple[TrainingData, ...] = ()


@dataclass(frozen=True)
class Graphs:
    """Serialized graphs and what they have in common."""

    files: Mapping[GraphName, bytes | Path]
    default: GraphName
    opset: int
    parameters: int
    frame_stride_s: float
    max_window_s: float
    min_samples: int
    sample_rate_hz: int = 16_000
    decoder: bool = False


@dataclass(frozen=True)
class LanguageModel:
    """For the beam search: the table, and the weights chosen for it."""

    table: NgramTable
    order: int
    weight: float
    bonus: float
    beam: int

    def entry(self) -> LanguageModelEntry:
        """For the manifest."""
        return LanguageModelEntry(
            file=LANGUAGE_MODEL_FILE, order=self.order, weight=self.weight, bonus=self.bonus, beam=self.beam
        )


@dataclass(frozen=True)
class Measurements:
    """Numbers for manifest and card, each with where it was measured."""

    evaluation: tuple[Evaluation, ...] = ()
    speed: tuple[Speed, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    """Section title -> Markdown, appended to the card: the quantizer's table, the agreement."""


def check_card(name: str, card: Card) -> None:
    """What the manifest would refuse of a name and a card, before the work rather than after it.

    Raises ConfigError naming the field.
    """
    said = {
        field: getattr(card, field) for field in Card.__dataclass_fields__ if field in Manifest.model_fields
    }
    try:
        Manifest.model_validate({**said, "name": name})
    except ValidationError as error:
        problems = [problem for problem in error.errors() if problem["type"] != "missing"]
        if problems:
            where = ".".join(str(part) for part in problems[0]["loc"])
            raise ConfigError(f"{where} {problems[0]['input']!r}: {problems[0]['msg']}") from None


def write_bundle(
    models_dir: Path,
    name: str,
    graphs: Graphs,
    vocabulary: Vocabulary,
    card: Card,
    measurements: Measurements | None = None,
    language_model: LanguageModel | None = None,
) -> Bundle:
    """Write `models_dir/name` and verify it; a bundle that was there is replaced only then.

    Raises BundleError where the new bundle does not hold.
    """
    models_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=models_dir) as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        given = measurements or Measurements()
        _write_files(folder, name, graphs, vocabulary, card, given, language_model)
        verify_bundle(Path(scratch), name)
        target = models_dir / name
        if target.exists():
            os.rename(target, Path(scratch) / "replaced")
        os.rename(folder, target)
    return load_bundle(models_dir, name)


def add_measurements(models_dir: Path, name: str, card: Card, measurements: Measurements) -> Bundle:
    """Write what was measured on a bundle into its manifest and card; the graphs stay as they are."""
    bundle = load_bundle(models_dir, name)
    manifest = _changed(bundle, evaluation=measurements.evaluation, speed=measurements.speed)
    _write_text(bundle.path / "README.md", model_card(manifest, card, measurements))
    return load_bundle(models_dir, name)


def _changed(bundle: Bundle, **changes: object) -> Manifest:
    """The bundle's manifest with these fields, as it is on disk from now on."""
    manifest = bundle.manifest.model_copy(update=changes)
    _write_text(bundle.path / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return manifest


def _change_card(bundle: Bundle, sections: Mapping[str, str]) -> None:
    """Give the bundle's card these sections, in place of those of the same titles or at its end."""
    card = bundle.path / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {bundle.name}\n"
    for title, content in sections.items():
        text = _with_section(text, title, content)
    _write_text(card, text)


def append_measurements(models_dir: Path, name: str, measurements: Measurements) -> Bundle:
    """Give a bundle's manifest these evaluations and speeds, and its card the tables and the notes."""
    bundle = load_bundle(models_dir, name)
    manifest = _changed(bundle, evaluation=measurements.evaluation, speed=measurements.speed)
    tables = {
        "Error rates": _evaluation_table(manifest.evaluation),
        "Speed": _speed_table(manifest.speed),
    }
    _change_card(bundle, {**tables, **measurements.notes})
    return load_bundle(models_dir, name)


def _with_section(text: str, title: str, content: str) -> str:
    """Markdown with one section of the second level replaced, or put at the end."""
    before, found, after = text.partition(f"\n## {title}\n")
    _, more, rest = after.partition("\n## ")
    tail = f"\n## {rest}" if more else ""
    return (
        f"{before.rstrip()}\n\n## {title}\n\n{content}\n{tail}"
        if found
        else (f"{text.rstrip()}\n\n## {title}\n\n{content}\n")
    )


def add_graph_without_vnni(models_dir: Path, name: str, graph: GraphName, content: bytes) -> Bundle:
    """Give a bundle another graph, for processors without VNNI. Raises BundleError, before or after."""
    bundle = load_bundle(models_dir, name)
    path = bundle.path / GRAPH_FILES[graph]
    with written_whole(path) as partial:
        partial.write_bytes(content)
    opset = next(iter(bundle.manifest.graphs.values())).opset
    _changed(
        bundle,
        graphs={**bundle.manifest.graphs, graph: GraphEntry(file=path.name, opset=opset)},
        graph_without_vnni=graph,
        files={**bundle.manifest.files, path.name: sha256_of(path)},
    )
    return load_bundle(models_dir, name)


def add_language_model(models_dir: Path, name: str, language_model: LanguageModel, note: str) -> Bundle:
    """Give a bundle a language model, or another one; `note` (Markdown) is a section of its card.

    Raises BundleError where the bundle does not hold, before or after.
    """
    bundle = load_bundle(models_dir, name)
    path = bundle.path / LANGUAGE_MODEL_FILE
    with written_whole(path) as partial:
        language_model.table.save(partial)
    files = {**bundle.manifest.files, LANGUAGE_MODEL_FILE: sha256_of(path)}
    _changed(bundle, language_model=language_model.entry(), files=files)
    _change_card(bundle, {"Language model": note})
    return load_bundle(models_dir, name)


def _write_files(
    folder: Path,
    name: str,
    graphs: Graphs,
    vocabulary: Vocabulary,
    card: Card,
    measurements: Measurements,
    language_model: LanguageModel | None,
) -> None:
    for graph, content in graphs.files.items():
        path = folder / GRAPH_FILES[graph]
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
    _write_text(folder / VOCABULARY_FILE, "\n".join(vocabulary.tokens) + "\n")
    listed = [*(GRAPH_FILES[graph] for graph in graphs.files), VOCABULARY_FILE]
    if language_model is not None:
        listed.append(LANGUAGE_MODEL_FILE)
        language_model.table.save(folder / LANGUAGE_MODEL_FILE)
    manifest = Manifest(
        name=name,
        version=card.version,
        languages=card.languages,
        sample_rate_hz=graphs.sample_rate_hz,
        frame_stride_s=graphs.frame_stride_s,
        max_window_s=graphs.max_window_s,
        blank_id=vocabulary.blank_id,
        vocabulary=VocabularyEntry(
            kind=vocabulary.kind,
            size=len(vocabulary),
            file=VOCABULARY_FILE,
            word_separator=vocabulary.word_separator,
            special_ids=tuple(sorted(vocabulary.special_ids)),
        ),
        text_normalisation=card.text_normalisation,
        input=InputEntry(min_samples=graphs.min_samples),
        graphs={graph: GraphEntry(file=GRAPH_FILES[graph], opset=graphs.opset) for graph in graphs.files},
        default_graph=graphs.default,
        decoder=graphs.decoder,
        language_model=language_model.entry() if language_model is not None else None,
        files={file: sha256_of(folder / file) for file in listed},
        source=card.source,
        licence=card.licence,
        training_data=card.training_data,
        evaluation=measurements.evaluation,
        speed=measurements.speed,
        git_commit=git_commit(),
        parameters=graphs.parameters,
    )
    _write_text(folder / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    _write_text(folder / "README.md", model_card(manifest, card, measurements))


def _write_text(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def model_card(manifest: Manifest, card: Card, measurements: Measurements) -> str:
    """README.md of a bundle."""
    hours = sum(entry.hours for entry in manifest.training_data)
    rows = [
        ("Languages", ", ".join(manifest.languages)),
        ("Parameters", f"{manifest.parameters / 1e6:.1f} million"),
        (
            "Output",
            f"one frame every {manifest.frame_stride_s * 1000:g} ms, {manifest.vocabulary.size} tokens",
        ),
        ("Graphs", ", ".join(f"{g} (`{e.file}`)" for g, e in manifest.graphs.items())),
        ("Text", ", ".join(manifest.text_normalisation) or "as trained"),
        ("Licence", manifest.licence),
        ("Source", _source(manifest.source)),
    ]
    parts = [f"# {card.title}", card.summary]
    parts.append("\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]))
    if manifest.evaluation:
        parts += ["## Error rates", _evaluation_table(manifest.evaluation)]
    if manifest.speed:
        parts += ["## Speed", _speed_table(manifest.speed)]
    if manifest.training_data:
        lines = ["| data | licence | hours |", "|---|---|---|"]
        lines += [f"| {e.name} | {e.licence} | {e.hours:.1f} |" for e in manifest.training_data]
        parts += [f"## Training data ({hours:.1f} hours)", "\n".join(lines)]
    if card.limits:
        parts += ["## Limits", card.limits]
    for title, text in measurements.notes.items():
        parts += [f"## {title}", text]
    return "\n\n".join(part for part in parts if part) + "\n"


def _source(source: Source) -> str:
    text = (
        f"[{source.title}]({source.url})"
        if source.url.startswith("http")
        else f"{source.title} ({source.url})"
    )
    return text + (f", revision {source.revision}" if source.revision else "")


def _evaluation_table(evaluation: Sequence[Evaluation]) -> str:
    lines = ["| test set | language | utterances | WER | CER | decoding |", "|---|---|---|---|---|---|"]
    for entry in evaluation:
        lines.append(
            f"| {entry.test_set} | {entry.language} | {entry.utterances} | {entry.wer:.1%} | {entry.cer:.1%} "
            f"| {entry.decoding} |"
        )
    return "\n".join(lines)


def _speed_table(speed: Sequence[Speed]) -> str:
    lines = ["| hardware | threads | graph | clip | real-time factor |", "|---|---|---|---|---|"]
    for entry in speed:
        lines.append(
            f"| {entry.hardware} | {entry.threads} | {entry.graph} | {entry.clip_s:g} s | {entry.rtf:.4f} |"
        )
    return "\n".join(lines)
