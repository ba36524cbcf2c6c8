"""A manifest: JSON lines with `audio_filepath`, `text`, `duration`, one utterance each (NeMo's form).

Paths are relative to the manifest's folder or absolute. `offset` (seconds into the file), `speaker`,
`language`, `source` and `licence` are optional; other keys are kept out. A row is `duration` seconds from
`offset` on, also where the offset is 0: several rows may be stretches of one recording.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from training.errors import EmptyManifestError, ManifestError
from training.files import in_utf8, written_whole

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Utterance:
    """One row. `audio` is the resolved path; `duration_s` is None until somebody measured it."""

    audio: Path
    text: str
    duration_s: float | None = None
    offset_s: float = 0.0
    speaker: str = ""
    language: str = ""
    source: str = ""
    licence: str = ""

    def to_row(self, folder: Path) -> dict[str, Any]:
        """Plain values for JSON; the path is relative to `folder` where it lies inside."""
        audio = self.audio.resolve()
        inside = audio.is_relative_to(folder.resolve())
        row: dict[str, Any] = {
            "audio_filepath": str(audio.relative_to(folder.resolve()) if inside else audio),
            "text": self.text,
        }
        if self.duration_s is not None:
            row["duration"] = round(self.duration_s, 4)
        optional = {
            "offset": self.offset_s,
            "speaker": self.speaker,
            "language": self.language,
            "source": self.source,
            "licence": self.licence,
        }
        return row | {key: value for key, value in optional.items() if value}


def _utterance(row: dict[str, Any], folder: Path) -> Utterance:
    audio, text = row["audio_filepath"], row.get("text", "")
    if not isinstance(text, str):
        raise ValueError(f"text is {type(text).__name__}, expected a string")
    duration = row.get("duration")
    return Utterance(
        audio=folder / audio,
        text=text,
        duration_s=None if duration is None else float(duration),
        offset_s=float(row.get("offset") or 0.0),
        speaker=str(row.get("speaker") or ""),
        language=str(row.get("language") or row.get("lang") or ""),
        source=str(row.get("source") or ""),
        licence=str(row.get("licence") or row.get("license") or ""),
    )


def read_rows(path: Path, parse: Callable[[dict[str, Any]], Parsed]) -> list[Parsed]:
    """What `parse` makes of each line's object, in file order; every object names its `audio_filepath`.

    Raises ManifestError naming the line that is wrong (`parse` raises KeyError, TypeError or ValueError),
    EmptyManifestError when there is none.
    """
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest")
    rows: list[Parsed] = []
    with path.open(encoding="utf-8-sig") as lines, in_utf8(path):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("expected an object with audio_filepath")
                if not isinstance(row.get("audio_filepath"), str) or not row["audio_filepath"]:
                    raise ValueError("audio_filepath is missing")
                _check_stretch(row)
                rows.append(parse(row))
            except KeyError as error:
                raise ManifestError(f"{path}:{number}: not a manifest row: {error} is missing") from error
            except (TypeError, ValueError) as error:
                raise ManifestError(f"{path}:{number}: not a manifest row: {error}") from error
    if not rows:
        raise EmptyManifestError(f"{path}: the manifest is empty; import recordings first")
    return rows


def _check_stretch(row: dict[str, Any]) -> None:
    """Raises ValueError. A duration that is not above zero says nothing (NeMo's rule)."""
    offset_s, duration_s = (float(row.get(name) or 0.0) for name in ("offset", "duration"))
    if not 0 <= offset_s < math.inf:
        raise ValueError(f"offset is {offset_s:g}, expected 0 or more seconds")
    if not math.isfinite(duration_s):
        raise ValueError(f"duration is {duration_s:g}, expected seconds")


def read_manifest(path: Path) -> list[Utterance]:
    """Rows in file order, their audio as resolved paths. Raises as `read_rows` does."""
    return read_rows(path, lambda row: _utterance(row, path.parent))


def spread(rows: Sequence[Parsed], limit: int) -> list[Parsed]:
    """At most `limit` rows, evenly from the first to the last."""
    places = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def write_manifest(path: Path, rows: Iterable[Utterance]) -> Path:
    """Write `rows`, whole or not at all."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as sink:
        for row in rows:
            sink.write(json.dumps(row.to_row(path.parent), ensure_ascii=False) + "\n")
    return path
