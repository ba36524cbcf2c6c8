"""The training manifest as rows, with a speaker-disjoint validation split.

A row is one utterance of ``manifest.jsonl``: audio inside a tar shard (or a plain file), its duration in
seconds, its text where it is known. The split is a pure function of the speaker's name and a seed, so that
every stage and every resumed run sees the same one. To write it down, for the gate of publishing:

    python -m training.distillation.dataset --manifest MANIFEST --validation VALIDATION.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.manifest import read_rows
from training.errors import in_one_line

ALPHABET = " abcdefghijklmnopqrstuvwxyz'"
"""Characters of the English alphabet in the order of their token ids; the blank is the last id (28)."""

BLANK_ID = len(ALPHABET)
VOCABULARY_SIZE = len(ALPHABET) + 1
VALIDATION_FRACTION = 0.05
"""Share of the speakers that are held out."""
_NOT_IN_ALPHABET = re.compile(r"[^a-z' ]+")
_CHARACTER_TO_ID = {character: index for index, character in enumerate(ALPHABET)}


@dataclass(frozen=True)
class Utterance:
    """One row of the manifest; ``text`` is normalised and empty where nobody wrote it down."""

    id: str
    shard: str
    audio_filepath: str
    text: str
    duration_s: float
    speaker: str
    source: str
    licence: str
    offset_s: float = 0.0
    """Start of the stretch inside the file."""


def normalise_text(text: str) -> str:
    """Lower-cased text in the alphabet ``[a-z' ]``, runs of anything else become one space."""
    lowered = text.lower().replace("\u2019", "'").replace("`", "'")
    return " ".join(_NOT_IN_ALPHABET.sub(" ", lowered).split())


def encode_text(text: str) -> list[int]:
    """Token ids of a normalised text; raises ``KeyError`` on a character outside the alphabet."""
    return [_CHARACTER_TO_ID[character] for character in text]


def decode_ids(ids: Iterable[int]) -> str:
    """Text of token ids without blanks."""
    return "".join(ALPHABET[index] for index in ids)


def _utterance(row: dict[str, Any]) -> Utterance:
    return Utterance(
        id=row.get("id") or row["audio_filepath"],
        shard=row.get("shard", ""),
        audio_filepath=row["audio_filepath"],
        text=normalise_text(row.get("text") or ""),
        duration_s=float(row["duration"]),
        speaker=row.get("speaker") or "",
        source=row.get("source") or "unknown",
        licence=row.get("licence") or "unknown",
        offset_s=float(row.get("offset") or 0.0),
    )


def read_utterances(path: Path) -> list[Utterance]:
    """Rows of a manifest whose audio may lie in tar shards, in file order. Raises as `read_rows` does."""
    return read_rows(path, _utterance)


def is_validation(row: Utterance, fraction: float, seed: int = 0) -> bool:
    """Whether a row belongs to validation: by its speaker's hash, never for unknown speakers or texts.

    A speaker is either wholly in training or held out; rows of a held-out speaker without text are in
    neither (see :func:`split_rows`).
    """
    if not row.speaker:
        return False
    digest = hashlib.sha256(f"{seed}:{row.source}:{row.speaker}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def split_rows(rows: list[Utterance], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of training and validation rows; no speaker is in both."""
    held_out = [is_validation(row, fraction, seed) for row in rows]
    train = [index for index, out in enumerate(held_out) if not out]
    validation = [index for index, out in enumerate(held_out) if out and rows[index].text]
    return train, validation


def write_validation(manifest: Path, out: Path, fraction: float = VALIDATION_FRACTION) -> int:
    """Write the held-out rows as a manifest of its own, with absolute paths; returns how many they are."""
    rows = read_utterances(manifest)
    folder = manifest.parent.resolve()
    lines = []
    for index in split_rows(rows, fraction)[1]:
        row = rows[index]
        path = {"shard": str(folder / row.shard), "audio_filepath": row.audio_filepath}
        if not row.shard:
            path = {"audio_filepath": str(folder / row.audio_filepath)}
        known = {"text": row.text, "duration": row.duration_s, "speaker": row.speaker, "source": row.source}
        if row.offset_s:
            known["offset"] = row.offset_s
        lines.append(json.dumps(path | known))
    out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


@in_one_line("dataset")
def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True, help="manifest to write")
    arguments = parser.parse_args()
    print(f"{arguments.validation}: {write_validation(arguments.manifest, arguments.validation)} utterances")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
