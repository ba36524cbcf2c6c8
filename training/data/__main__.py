"""`python -m training.data import|validate|split`: manifests without a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from training.arguments import positive
from training.data import importers
from training.data.manifest import read_manifest, write_manifest
from training.data.split import little_to_train_on, split_by_speaker
from training.data.validate import Limits, validate
from training.errors import ConfigError, in_one_line
from training.text import alphabet, normaliser
from training.vocabulary import CharacterCodec


def _import(given: argparse.Namespace) -> None:
    labels = {"language": given.language or "", "licence": given.licence}
    if given.kind == "folder":
        rows = importers.from_folder(Path(given.source), **labels)
    elif given.kind == "table":
        rows = importers.from_table(Path(given.source), clips=given.clips, licence=given.licence)
    elif given.kind == "nemo":
        rows = importers.from_nemo(Path(given.source))
    else:
        rows = importers.from_hugging_face(
            given.source,
            given.out.parent / "audio",
            split=given.split,
            config=given.config,
            revision=given.revision,
            audio_column=given.audio_column,
            text_column=given.text_column,
            speaker_column=given.speaker_column,
            limit=given.limit,
            **labels,
        )
    # tables and NeMo manifests may name neither
    rows = [
        replace(row, **{name: getattr(row, name) or value for name, value in labels.items()}) for row in rows
    ]
    missing = [row.audio for row in rows if not row.audio.is_file()]
    gone = f", {len(missing)} without their recording (the first: {missing[0]})" if missing else ""
    print(f"{len(rows)} utterances{gone} -> {write_manifest(given.out, rows)}")


def _validate(given: argparse.Namespace) -> None:
    rows = read_manifest(given.manifest)
    normalise = normaliser(given.language, letters=given.letters)
    try:
        letters = given.letters or alphabet(given.language, (normalise(row.text) for row in rows))
        codec = CharacterCodec(letters)
    except ValueError as error:
        raise ConfigError(f"--letters: {error}") from error
    limits = Limits(max_duration_s=given.max_duration_s)
    report_to = given.out.with_suffix(".report.json")
    kept, report = validate(
        rows, normalise=normalise, outside=codec.outside, limits=limits, report_to=report_to
    )
    print(report.summary())
    print(write_manifest(given.out, kept))


def _split(given: argparse.Namespace) -> None:
    split = split_by_speaker(read_manifest(given.manifest), tuple(given.fractions), given.seed)
    if warning := little_to_train_on(split, tuple(given.fractions)):
        print(warning, file=sys.stderr)
    for part, rows in split.parts().items():
        print(f"{part}: {len(rows)} -> {write_manifest(given.out / f'{part}.jsonl', rows)}")


@in_one_line("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    bring = commands.add_parser("import", help="make a manifest")
    bring.add_argument("kind", choices=["folder", "table", "nemo", "huggingface"])
    bring.add_argument(
        "source",
        help="folder (with one folder per speaker, or files only), CSV or TSV file, NeMo manifest, or the "
        "dataset's name",
    )
    bring.add_argument("--out", type=Path, required=True, help="manifest to write")
    bring.add_argument("--language")
    bring.add_argument("--licence", default="", help="licence of the recordings")
    bring.add_argument("--clips", type=Path, help="table: folder of the recordings")
    bring.add_argument("--split", default="train", help="huggingface: which split")
    bring.add_argument("--config", help="huggingface: which configuration")
    bring.add_argument("--revision", help="huggingface: commit to pin")
    bring.add_argument("--audio-column", default="audio")
    bring.add_argument("--text-column", default="text")
    bring.add_argument("--speaker-column")
    bring.add_argument("--limit", type=positive, help="huggingface: first utterances only")
    bring.set_defaults(do=_import)
    check = commands.add_parser("validate", help="drop what cannot be used, say why")
    check.add_argument("manifest", type=Path)
    check.add_argument("--language", required=True)
    check.add_argument(
        "--letters",
        help="alphabet; default: that of the language, or where none is known the texts' characters",
    )
    check.add_argument("--max-duration-s", type=float, default=30.0)
    check.add_argument("--out", type=Path, required=True)
    check.set_defaults(do=_validate)
    cut = commands.add_parser("split", help="train, validation and test without a common speaker")
    cut.add_argument("manifest", type=Path)
    cut.add_argument("--fractions", type=float, nargs=3, default=(0.8, 0.1, 0.1))
    cut.add_argument("--seed", type=int, default=0)
    cut.add_argument("--out", type=Path, required=True, help="folder")
    cut.set_defaults(do=_split)
    given = parser.parse_args(arguments)
    given.do(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
