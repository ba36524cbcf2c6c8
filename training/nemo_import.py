"""NeMo archive -> bundle.

    python -m training.nemo import ARCHIVE --name en-quartznet15x5 --models-dir models \\
        --calibration MANIFEST --validation MANIFEST [--test MANIFEST] [--texts FILE ...]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from api.bundle import Bundle, sha256_of
from api.manifest import Source
from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from training.bundle_writer import Card
from training.calibration import shared_folder
from training.checkpoint import Checkpoint
from training.errors import in_one_line
from training.exported import Exported, exported_conformer
from training.nemo import NemoModel, quartznet_of
from training.nemo_archive import CONFORMER, NemoError, read_archive
from training.publish import Recordings, add_recordings, exported_checkpoint, publish

CONTROL = re.compile(r"<.+>|\[.+\]")
"""Tokens that stand for no text: `<unk>`, `<s>`, `<pad>` of SentencePiece, `[UNK]` of word pieces."""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""SentencePiece's token for a byte of a character that it has no piece for."""


def as_checkpoint(found: NemoModel) -> Checkpoint:
    """The same network with the bundle's vocabulary: the space as U+2581, the blank in its place."""
    return Checkpoint(found.model, found.frontend, bundle_vocabulary(found.vocabulary))


def exported_nemo(archive: Path) -> Exported:
    """The graph of any archive with a CTC head that is known. Raises NemoError."""
    opened = read_archive(archive)
    if opened.encoder != CONFORMER:
        return exported_checkpoint(as_checkpoint(quartznet_of(opened)))
    # transformers takes seconds to load, which no other archive needs
    from training.conformer_graph import MAX_WINDOW_S, export_graph
    from training.nemo_conformer import conformer_of

    found = conformer_of(opened)
    vocabulary = bundle_vocabulary(found.vocabulary)
    return exported_conformer(found.model, export_graph(found.model), vocabulary, MAX_WINDOW_S)


def bundle_vocabulary(listed: Sequence[str]) -> Vocabulary:
    """Tokens as an archive lists them, with the bundle's spelling of spaces, and the blank after them.

    Raises NemoError where bytes are among them.
    """
    if spelled := [token for token in listed if BYTE.fullmatch(token)]:
        raise NemoError(f"decoder.vocabulary: {spelled[0]!r}, tokens that are bytes are not known")
    pieces = any(len(token) > 1 for token in listed)
    tokens = _pieces(listed) if pieces else tuple(listed)
    tokens = tuple(SPACE_MARK if token == " " else token for token in tokens)  # noqa: S105
    return Vocabulary(
        (*tokens, BLANK_TOKEN),
        blank_id=len(tokens),
        kind="wordpiece" if pieces else "chars",
        special_ids=frozenset(index for index, token in enumerate(tokens) if CONTROL.fullmatch(token)),
    )


def _pieces(tokens: Sequence[str]) -> tuple[str, ...]:
    """Word pieces with U+2581 before those that begin a word.

    Newer archives have them so. Older ones (Citrinet's) list them as BERT does: `##` before those that go on
    with a word, nothing before those that begin one. Source: NeMo's ASRBPEMixin and create_spt_model.
    """
    if not any(token.startswith("##") for token in tokens):
        return tuple(tokens)

    def spelled(token: str) -> str:
        if token == SPACE_MARK or CONTROL.fullmatch(token):
            return token
        return token[2:] if token.startswith("##") and len(token) > 2 else SPACE_MARK + token

    return tuple(spelled(token) for token in tokens)


@in_one_line("nemo import")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Import a NeMo CTC archive as a bundle, without NeMo.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "import",
        help="archive -> verified bundle",
        epilog="Without --calibration the shared training set is heard, without --test the shared test sets.",
    )
    command.add_argument("archive", type=Path)
    command.add_argument("--name", required=True)
    command.add_argument("--models-dir", type=Path, default=Path("models"))
    command.add_argument("--language", default="en", help="ISO 639-1 code of what the model hears")
    command.add_argument("--licence", default="see the source")
    command.add_argument("--source-url", default="", help="where the archive was published")
    add_recordings(command)
    command.add_argument("--no-test", action="store_true", help="do not measure error rates on test sets")
    command.add_argument("--no-float", action="store_true", help="leave the float32 graph out")
    given = parser.parse_args(arguments)
    bundle = _import(given)
    print(f"{bundle.path}: verified")
    return 0


def _import(given: argparse.Namespace) -> Bundle:
    shared = shared_folder() / "speech"
    calibration = given.calibration or shared / "train" / "manifest.jsonl"
    test = None if given.no_test else given.test or shared / "test" / "manifest.jsonl"
    if not calibration.is_file():
        raise FileNotFoundError(f"{calibration}: no such manifest; name recordings with --calibration")
    recordings = Recordings(
        calibration,
        given.validation or calibration,
        tuple(given.texts),
        test if test is not None and test.is_file() else None,
    )
    card = Card(
        title=given.name,
        languages=(given.language,),
        source=Source(title=given.archive.name, url=given.source_url, revision=sha256_of(given.archive)),
        licence=given.licence,
        summary=f"Imported from the NeMo archive `{given.archive.name}`; the weights are its authors'.",
    )
    made = exported_nemo(given.archive)
    return publish(
        made,
        given.name,
        given.models_dir,
        replace(card, text_normalisation=made.text_normalisation),
        recordings,
        keep_float=not given.no_float,
    )
