"""Recordings of a manifest as waveforms, whether they lie as files or in tar shards."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.data.audio import decode_waveform, load_waveform
from training.data.manifest import read_rows, spread
from training.data.shards import shard_members
from training.errors import DataError, EmptyManifestError
from training.inference import Waveform
from training.text import plain_normaliser


def shared_folder() -> Path:
    """Recordings and weights beside the project: ASR_SHARED_DIR, or `shared` next to the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("ASR_SHARED_DIR") or beside)


def manifest_rows(
    manifest: Path,
    limit: int | None = None,
    *,
    with_text: bool = False,
    longest_s: float = math.inf,
    **wanted: str | None,
) -> list[dict[str, Any]]:
    """Rows of a JSON lines manifest, filtered by duration and equal fields; `limit` of them, evenly spread.

    `language` is optional in a manifest: a row that does not name one fits any.

    Raises ManifestError on a line that is no row, EmptyManifestError where nothing is left.
    """
    default = {"language": wanted.get("language")}
    rows = [
        row
        for row in read_rows(manifest, dict)
        if all(row.get(name, default.get(name)) == value for name, value in wanted.items())
        and (row.get("text") or not with_text)
        and float(row.get("duration") or 0.0) <= longest_s
    ]
    if not rows:
        text = " with a text" if with_text else ""
        most = f" of at most {longest_s:g} s" if longest_s < math.inf else ""
        raise EmptyManifestError(f"{manifest}: no recording{text}{most}{f' fits {wanted}' if wanted else ''}")
    return rows if limit is None else spread(rows, limit)


def manifest_waveforms(
    manifest: Path,
    sample_rate_hz: int,
    limit: int | None = None,
    *,
    with_text: bool = False,
    longest_s: float = math.inf,
    **wanted: str | None,
) -> list[tuple[Waveform, str]]:
    """(waveform (samples,) float32, text) of the rows that `manifest_rows` gives, shard by shard.

    A row's file beside the manifest counts before the tar that `shard` names.
    """
    rows = manifest_rows(manifest, limit, with_text=with_text, longest_s=longest_s, **wanted)
    clips = []
    sharded: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        path, shard = manifest.parent / row["audio_filepath"], row.get("shard")
        if shard and not path.is_file():
            sharded[shard][row["audio_filepath"]].append(row)
            continue
        waveform = load_waveform(path, sample_rate_hz, *_span_s(row))
        clips.append((waveform, str(row.get("text", ""))))
    for row, content in _contents(sharded, manifest.parent):
        waveform = decode_waveform(content, row["audio_filepath"], sample_rate_hz, *_span_s(row))
        clips.append((waveform, str(row.get("text", ""))))
    return clips


def check_there(manifest: Path, languages: Sequence[str]) -> None:
    """Look for the recordings with a text in these languages, the first of which is that of rows without one.

    Raises ManifestError, EmptyManifestError, FileNotFoundError for one that is not there, or its shard.
    """
    for row in manifest_rows(manifest, with_text=True):
        path, shard = manifest.parent / row["audio_filepath"], row.get("shard")
        where = manifest.parent / shard if shard and not path.is_file() else path
        if row.get("language", languages[0]) in languages and not where.is_file():
            raise FileNotFoundError(f"{where}: no such recording, which {manifest} names")


def _span_s(row: dict[str, Any]) -> tuple[float, float]:
    """Offset and duration in seconds, 0 where the row does not say."""
    return float(row.get("offset") or 0.0), float(row.get("duration") or 0.0)


def _contents(
    sharded: Mapping[str, Mapping[str, list[dict[str, Any]]]], folder: Path
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows with their encoded audio; several may be stretches of one member. Raises DataError."""
    for shard, members in sharded.items():
        missing = set(members)
        for name, content in shard_members(folder / shard, members):
            missing.remove(name)
            yield from ((row, content) for row in members[name])
        if missing:
            raise DataError(f"{folder / shard}: has no {min(missing)} ({len(missing)} missing)")


def validation_clips(
    manifest: Path,
    rate_hz: int,
    limit: int | None,
    *,
    longest_s: float,
    language: str,
    taught: Sequence[str],
) -> list[tuple[Waveform, str]]:
    """Recordings up to a length with their texts, for `with_plain_texts`' comparison."""
    clips = manifest_waveforms(manifest, rate_hz, limit, with_text=True, longest_s=longest_s)
    return with_plain_texts(clips, language, taught)


def with_plain_texts(
    clips: Sequence[tuple[Waveform, str]], language: str, taught: Sequence[str]
) -> list[tuple[Waveform, str]]:
    """The clips with their texts as training normalises the language's: people's manifests have capitals
    and punctuation, and a CTC model of characters has neither. `taught`: the bundle's text normalisation."""
    plain = plain_normaliser(language, taught)
    return [(waveform, plain(text)) for waveform, text in clips]
