"""The compiled operators: what they run on here, and the weights that the library holds for them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Literal

import structlog

log = structlog.get_logger("api.kernels")

LIBRARY = Path(__file__).with_name("asr_kernels.so")

Kernels = Literal["vnni", "avx2", "onnxruntime"]
Kind = Literal["depthwise", "pointwise"]
Layout = Literal["depthwise", "pointwise", "woven", "four_bits", "four_bits_small"]
Keep = Callable[[Layout, bytes, int, int], int]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled operators; None where they were not compiled or cannot be loaded."""
    if not LIBRARY.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.asr_instructions.restype = ctypes.c_char_p
        number = ctypes.c_int64
        loaded.asr_keep_weights.argtypes = [ctypes.c_char_p, ctypes.c_char_p, number, number, number]
        loaded.asr_keep_weights.restype = number
        loaded.asr_let_go_of_weights.argtypes = [number]
        loaded.asr_let_go_of_weights.restype = None
        loaded.asr_weights_bytes.restype = number
        loaded.asr_instructions()
    except (OSError, AttributeError) as error:
        log.warning("kernels_unusable", file=str(LIBRARY), problem=str(error))
        return None
    return loaded


def instructions() -> Kernels:
    """What our operators would run on here; ``onnxruntime`` where there are none."""
    loaded = library()
    found = b"" if loaded is None else loaded.asr_instructions()
    return "vnni" if found == b"vnni" else "avx2" if found == b"avx2" else "onnxruntime"


class Weights:
    """Weights that the library packs and holds, for the sessions that open while this is entered.

    Afterwards they live as long as one of those sessions does, and are in memory once for all of them.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loaded = library()
        while loaded is not None and self._numbers:
            loaded.asr_let_go_of_weights(self._numbers.pop())

    def keep(self, kind: Layout, weights: bytes, channels: int, depth: int) -> int:
        """The number by which an operator finds int8 ``(channels, depth)``; 0 for what none here can use."""
        loaded = library()
        if loaded is None:
            return 0
        number = int(loaded.asr_keep_weights(kind.encode(), weights, len(weights), channels, depth))
        if number:
            self._numbers.append(number)
        return number


def weights_bytes() -> int:
    """Of all the weights that the library holds now."""
    loaded = library()
    return 0 if loaded is None else int(loaded.asr_weights_bytes())
