"""Manifests from what people have: folders, Common Voice tables, NeMo manifests, Hugging Face datasets."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.data.manifest import Utterance, read_manifest
from training.errors import EmptyManifestError, ManifestError
from training.files import in_utf8, written_whole

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".webm", ".aac", ".wma"})


def from_folder(folder: Path, *, language: str = "", licence: str = "") -> list[Utterance]:
    """Recordings with a `.txt` of the same name beside them.

    The speaker is the first folder below `folder`; files that lie in `folder` itself have none. Recordings
    without a text are left out, and of several with one name (7.wav, 7.mp3) one is taken.

    Raises ManifestError, EmptyManifestError.
    """
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder")
    rows = []
    found = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    seen: set[Path] = set()
    for audio in sorted(found, key=lambda path: (path.parent, path.stem, _is_lossy(path), path.name)):
        text = audio.with_suffix(".txt")
        if text in seen or not text.is_file():
            continue
        seen.add(text)
        parts = audio.relative_to(folder).parts
        speaker = parts[0] if len(parts) > 1 else ""
        with in_utf8(text):
            content = " ".join(text.read_text(encoding="utf-8-sig").split())
        rows.append(Utterance(audio, content, speaker=speaker, language=language, licence=licence))
    return _some(rows, f"{folder}: no recording with a .txt of the same name beside it")


def from_table(table: Path, *, clips: Path | None = None, licence: str = "") -> list[Utterance]:
    """A CSV or TSV table in Common Voice's layout.

    Columns: `path` (or `audio`, `file`), `sentence` (or `text`, `transcript`), and where present `client_id`
    (or `speaker`) and `locale` (or `language`). `clips` is the folder of the recordings; without it, that is
    `clips/` beside the table or the table's own folder, whichever has the first recording that is found.
    Raises ManifestError, EmptyManifestError.
    """
    if not table.is_file():
        raise ManifestError(f"{table}: no such table")
    if clips is not None and not clips.is_dir():
        raise ManifestError(f"{clips}: no such folder of recordings")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows = []
    with table.open(encoding="utf-8-sig", newline="") as lines, in_utf8(table):
        tabbed = table.suffix.lower() == ".tsv"
        # strict: a quote that nobody closes would swallow the rows after it
        reader = csv.DictReader(
            lines,
            delimiter="\t" if tabbed else ",",
            quoting=csv.QUOTE_NONE if tabbed else csv.QUOTE_MINIMAL,
            strict=not tabbed,
        )
        try:
            columns, entries = reader.fieldnames or [], list(reader)
        except csv.Error as error:
            raise ManifestError(f"{table}:{reader.line_num + 1}: {error}; is a quote not closed?") from error
        audio = _column(table, columns, "path", "audio", "file", "audio_filepath")
        sentence = _column(table, columns, "sentence", "text", "transcript", "transcription")
        folder = clips or _folder_of(table, [row[audio] or "" for row in entries])
        speaker = next((name for name in ("client_id", "speaker", "speaker_id") if name in columns), "")
        language = next((name for name in ("locale", "language", "lang") if name in columns), "")
        for number, row in enumerate(entries, start=2):
            if not row.get(audio) or row.get(sentence) is None:
                raise ManifestError(f"{table}:{number}: {audio} or {sentence} is missing")
            if None in row:  # a comma in a text without quotes would cost what follows it
                found = len(columns) + len(row[None])
                raise ManifestError(
                    f"{table}:{number}: {found} fields, the header has {len(columns)}; "
                    "a text that holds the delimiter needs quotes around it"
                )
            rows.append(
                Utterance(
                    folder / row[audio],
                    row[sentence].strip(),
                    speaker=(row.get(speaker) or "") if speaker else "",
                    language=(row.get(language) or "") if language else "",
                    licence=licence,
                )
            )
    return _some(rows, f"{table}: the table has a header and no rows")


def from_nemo(manifest: Path) -> list[Utterance]:
    """A NeMo manifest, which has our form already. Raises ManifestError, EmptyManifestError."""
    return read_manifest(manifest)


def from_hugging_face(
    dataset: str,
    out: Path,
    *,
    split: str = "train",
    config: str | None = None,
    audio_column: str = "audio",
    text_column: str = "text",
    speaker_column: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    language: str = "",
    licence: str = "",
    **options: Any,
) -> list[Utterance]:
    """Stream a dataset of the Hugging Face hub (or local files) and store its recordings under `out`.

    Recordings are written as they come, undecoded, and one that is there already is not written again, so an
    interrupted import goes on where it stopped. Each dataset, split and revision has a folder of its own.
    `revision` pins the dataset's commit; `options` reach `datasets.load_dataset` (for example `data_files`).

    Raises ManifestError, EmptyManifestError.
    """
    from datasets import load_dataset

    try:
        stream = load_dataset(dataset, config, split=split, streaming=True, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{dataset}: {str(error).splitlines()[0]}") from error
    for name in (audio_column, text_column, *((speaker_column,) if speaker_column else ())):
        if stream.column_names is not None and name not in stream.column_names:
            raise ManifestError(f"{dataset}: no column {name!r}; it has {sorted(stream.column_names)}")
    # Without types the values come as they are stored: bytes, a path, or both. Even with decode=False,
    # `Audio` would ask for torchcodec where recordings lie in folders or tars.
    stream.info.features = None
    # by number and name alone, the recordings of two imports would be taken for one another
    chosen = json.dumps(
        [dataset, config, split, revision, audio_column, options], default=str, sort_keys=True
    )
    out = out / hashlib.sha256(chosen.encode()).hexdigest()[:12]
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    entries = stream if limit is None else stream.take(limit)
    for index, entry in enumerate(tqdm(entries, desc=f"import {dataset}", unit="clip", total=limit)):
        audio = _store(entry[audio_column], out, index)
        known = entry[speaker_column] if speaker_column else None
        speaker = "" if known is None else str(known).strip()
        text = str(entry[text_column] or "").strip()
        rows.append(
            Utterance(audio, text, speaker=speaker, language=language, source=dataset, licence=licence)
        )
    return _some(rows, f"{dataset}: split {split!r} has no rows")


def _folder_of(table: Path, names: list[str]) -> Path:
    """Where a table's recordings lie; its names may begin with `clips/` or not."""
    beside = table.parent / "clips"
    if not beside.is_dir():
        return table.parent
    for name in filter(None, names):
        for folder in (beside, table.parent):
            if (folder / name).is_file():
                return folder
    return beside


def _is_lossy(recording: Path) -> bool:
    return recording.suffix.lower() not in (".wav", ".flac")


def _store(given: Mapping[str, Any] | str, out: Path, index: int) -> Path:
    audio: Mapping[str, Any] = {"path": given} if isinstance(given, str) else given
    name = Path(str(audio.get("path") or "audio")).name
    suffix = Path(name).suffix.lower() if Path(name).suffix.lower() in AUDIO_SUFFIXES else ".wav"
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]
    target = out / f"{index:07d}_{stem}{suffix}"
    if target.is_file():
        return target
    data, source = audio.get("bytes"), audio.get("path")
    if data is None and "://" in str(source):
        import fsspec  # type: ignore[import-untyped]  # comes with datasets

        with fsspec.open(source, "rb") as remote:
            data = remote.read()
    if data is None:
        if not source or not Path(source).is_file():
            raise ManifestError(f"row {index}: the dataset gives neither bytes nor a local file")
        return Path(source)
    with written_whole(target) as partial:
        partial.write_bytes(data)
    return target


def _column(table: Path, columns: Any, *names: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise ManifestError(f"{table}: none of the columns {list(names)}; it has {json.dumps(list(columns))}")


def _some(rows: list[Utterance], problem: str) -> list[Utterance]:
    if not rows:
        raise EmptyManifestError(problem)
    return rows
