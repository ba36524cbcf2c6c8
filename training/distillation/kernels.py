"""Compiles and loads ``kernels.cpp`` (AVX512-BF16); :func:`load` returns None where that cannot work."""

from __future__ import annotations

import fcntl
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from api.processor import processor_flags

NAME = "asr_training_kernels"


def cpu_has_bfloat16() -> bool:
    """Whether the processor states the AVX512 instructions that the kernels are written in (Linux only)."""
    return processor_flags() >= {"avx512_bf16", "avx512bw"}


def working_dtype() -> torch.dtype:
    """What networks of matrix products train in: bfloat16 where the processor multiplies it, else float32."""
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def build_folder() -> Path:
    """Where the extension is compiled, one folder per Python and torch."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    version = f"py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    return Path(root) / version / NAME


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Nobody else compiles in `folder`; a lock of torch's that a killed compilation left there goes.

    torch marks a compilation by a file, for whose end the next one waits for ever. The system's own lock
    ends with the process that has it, and who has it knows that such a file is nobody's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compiling").open("w") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


@functools.cache
def load() -> Any | None:
    """The compiled extension module, or None without the instructions, a compiler or ninja."""
    if not cpu_has_bfloat16():
        return None
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        from torch.utils import cpp_extension

        folder = build_folder()
        with one_at_a_time(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cpp_extension.load(
                name=NAME,
                build_directory=str(folder),
                sources=[str(Path(__file__).with_suffix(".cpp"))],
                extra_cflags=["-O3", "-march=native", "-fopenmp"],
                extra_ldflags=["-fopenmp"],
            )
    except (ImportError, OSError, RuntimeError) as error:
        print(f"training kernels are not available, using plain torch: {error}", file=sys.stderr)
        return None


def kernels() -> Any:
    """The extension module; raises ``RuntimeError`` where :func:`load` gives None."""
    module = load()
    if module is None:
        raise RuntimeError("the kernels want a CPU with AVX512-BF16, a C++ compiler and ninja")
    return module
