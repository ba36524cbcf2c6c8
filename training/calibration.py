"""Recordings of a manifest as waveforms, whether they lie as files or in tar shards."""

from __future__ import annotations

import io
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from training.data.audio import load_waveform
from training.data.manifest import read_rows
from training.errors import EmptyManifestError
from training.inference import Waveform


def shared_folder() -> Path:
    """Recordings and weights beside the project: ASR_SHARED_DIR, or `shared` next to the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("ASR_SHARED_DIR") or beside)


def manifest_rows(
    manifest: Path, limit: int | None = None, *, with_text: bool = False, **wanted: str
) -> list[dict[str, Any]]:
    """Rows of a JSON lines manifest, filtered by equal fields; `limit` of them, evenly spread over the file.

    Raises ManifestError on a line that is no row, EmptyManifestError where nothing is left.
    """
    rows = [
        row
        for row in read_rows(manifest, dict)
        if all(row.get(name) == value for name, value in wanted.items())
        and (row.get("text") or not with_text)
    ]
    if not rows:
        raise EmptyManifestError(f"{manifest}: no utterance fits {wanted or 'the request'}")
    if limit is not None and limit < len(rows):
        rows = [rows[index] for index in np.linspace(0, len(rows) - 1, limit).round().astype(int)]
    return rows


def manifest_waveforms(
    manifest: Path, sample_rate_hz: int, limit: int | None = None, *, with_text: bool = False, **wanted: str
) -> list[tuple[Waveform, str]]:
    """(waveform (samples,) float32, text) of the rows that `manifest_rows` gives, shard by shard."""
    rows = manifest_rows(manifest, limit, with_text=with_text, **wanted)
    clips = []
    sharded: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if shard := row.get("shard"):
            sharded[shard][row["audio_filepath"]] = row
            continue
        span_s = float(row.get("offset") or 0.0), float(row.get("duration") or 0.0)
        waveform = load_waveform(manifest.parent / row["audio_filepath"], sample_rate_hz, *span_s)
        clips.append((waveform, str(row.get("text", ""))))
    for row, content in _contents(sharded, manifest.parent):
        samples, rate_hz = soundfile.read(content, dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
        if rate_hz != sample_rate_hz:
            mono = soxr.resample(mono, rate_hz, sample_rate_hz)
        clips.append((np.ascontiguousarray(mono, np.float32), str(row.get("text", ""))))
    return clips


def _contents(
    sharded: dict[str, dict[str, dict[str, Any]]], folder: Path
) -> Iterator[tuple[dict[str, Any], io.BytesIO]]:
    for shard, members in sharded.items():
        with tarfile.open(folder / shard) as archive:
            for member in archive:
                if member.name in members and (stream := archive.extractfile(member)) is not None:
                    yield members[member.name], io.BytesIO(stream.read())
