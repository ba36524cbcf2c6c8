"""Files that are there whole or not at all, and in UTF-8."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import DiskFullError, ManifestError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def in_utf8(path: Path) -> Iterator[None]:
    """While `path` is read as text: bytes of another encoding raise ManifestError, which names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8: {error}; save it in that encoding") from error


@contextmanager
def written_whole(path: Path, needs_bytes: int = 0) -> Iterator[Path]:
    """Where to write what becomes `path` when the block has ended: an interruption leaves the old file.

    The folder is made where it is missing; what a failure leaves of the new file is removed. Raises
    DiskFullError where the disk is; `needs_bytes`, where it is known, is how large the file will be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        written = partial.stat().st_size if partial.exists() else 0
        partial.unlink(missing_ok=True)
        if not is_full_disk(error):
            raise
        raise full_disk(path, max(needs_bytes, written)) from error


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """While others write to `path`, who name no file in their errors. Raises DiskFullError."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error) and not isinstance(error, DiskFullError):
            raise full_disk(path, 0) from error
        raise


def full_disk(path: Path, needs_bytes: int) -> DiskFullError:
    """The error for a file or folder that has no room for so many bytes, 0 where nobody knows how many."""
    needs = f"about {needs_bytes / 1e6:.1f} MB are needed and " if needs_bytes else ""
    free = shutil.disk_usage(path.parent).free
    return DiskFullError(
        f"{path}: the disk is full: {needs}{free / 1e6:.1f} MB are free; what was there before is whole: "
        "make room, then run the same command again"
    )


def is_full_disk(error: BaseException | None) -> bool:
    """Whether it, or what it came from, says so. safetensors has only words for it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(f"(os error {number})" in str(error) for number in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False
