"""Files that are there whole or not at all, and in UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import ManifestError


@contextmanager
def in_utf8(path: Path) -> Iterator[None]:
    """While `path` is read as text: bytes of another encoding raise ManifestError, which names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8: {error}; save it in that encoding") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block has ended: an interruption leaves the old file.

    The folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.replace(path)
