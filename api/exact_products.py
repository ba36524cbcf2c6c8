"""Exact sums of products of bytes in ONNX Runtime, on processors that would cut them off.

x86-64 without VNNI adds two products of unsigned and signed bytes in 16 bits. Two large ones do not fit: ONNX
Runtime cuts them off without a word, unless it is told to widen first. It then does so on every processor,
and with VNNI, which is exact by itself, its INT8 products take twice as long.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from api.processor import CPUINFO, processor_flags

VNNI = {"avx512_vnni", "avx_vnni"}  # of 512 and of 256 bits; ONNX Runtime has kernels for both
WIDEN = "session.x64quantprecision"


def has_vnni(cpuinfo: Path = CPUINFO) -> bool:
    """Whether every processor says that it sums products of bytes in 32 bits; False where nothing is said."""
    return not VNNI.isdisjoint(processor_flags(cpuinfo))


def make_products_exact(options: ort.SessionOptions) -> None:
    """Ask for exact products where they would not be exact anyway."""
    if not has_vnni():
        options.add_session_config_entry(WIDEN, "1")
