"""PyTorch states written whole, as the two training loops keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from training.files import written_whole


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, whole or not at all. Raises DiskFullError; what was there before stays."""
    # a file and not its name: PyTorch's own writer does not say that it was the disk
    with written_whole(path, needs_bytes=_bytes_of(state)) as partial, partial.open("wb") as sink:
        torch.save(state, sink)


def _bytes_of(value: object) -> int:
    """Of every tensor in a state, about what its file takes."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    return sum(map(_bytes_of, inner))


class WholeFiles(TorchCheckpointIO):
    """For Lightning, which writes to the folder of temporary files and copies from there.

    A copy that breaks off, by a full disk or a kill, would leave the newest state in pieces.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Raises DiskFullError."""
        save_state(checkpoint, Path(path))
