"""Recordings that lie together in tar files."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path


def shard_members(shard: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files `names` in a tar, each once, in its order.

    A name that is not there is not given. Raises FileNotFoundError, tarfile.TarError.
    """
    missing = set(names)
    with tarfile.open(shard) as archive:
        for member in archive:
            if member.name in missing and (stream := archive.extractfile(member)) is not None:
                missing.remove(member.name)
                yield member.name, stream.read()
