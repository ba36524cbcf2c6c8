"""Compiles and loads ``kernels.cpp`` (AVX512-BF16); :func:`load` returns None where that cannot work."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Any


def cpu_has_bfloat16() -> bool:
    """Whether the processor states the AVX512 instructions that the kernels are written in (Linux only)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags and "avx512bw" in flags


@functools.cache
def load() -> Any | None:
    """The compiled extension module, or None without the instructions, a compiler or ninja."""
    if not cpu_has_bfloat16():
        return None
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        from torch.utils import cpp_extension

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cpp_extension.load(
                name="asr_training_kernels",
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
