"""NeMo archive -> graph and vocabulary, for whoever writes the bundle (`training/convert.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from training.checkpoint import Checkpoint
from training.exported import Exported, exported_conformer
from training.nemo import NemoModel, quartznet_of
from training.nemo_archive import CONFORMER, NemoError, read_archive
from training.publish import exported_checkpoint

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
