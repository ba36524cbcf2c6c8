"""Sessions with our operators, or without where they do not work."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
import structlog
from numpy.typing import NDArray

from api.kernels.graph import hand_over

log = structlog.get_logger("api.kernels")

LIBRARY = Path(__file__).with_name("asr_kernels.so")
MAX_GRAPH_BYTES = 64 * 2**20  # the graph is in memory three times while it is rewritten
NOISE_SAMPLES = 96_000  # 6 s: more frames than the kernel works on at once, so that its seams are looked at

Kernels = Literal["vnni", "avx2", "onnxruntime"]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled operators; None where they were not compiled or cannot be loaded."""
    if not LIBRARY.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.asr_instructions.restype = ctypes.c_char_p
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


def open_session(
    path: str, make_options: Callable[[], ort.SessionOptions], *, least_samples: int
) -> tuple[ort.InferenceSession, Kernels]:
    """A CPU session on a bundle's graph and what runs its depthwise convolutions.

    ``make_options`` gives fresh options each time; ``least_samples`` is the shortest input of the graph.
    What ONNX Runtime says against the graph itself passes through; what it says against our operators is
    logged, and the session does without them.
    """
    found = instructions()
    if found == "onnxruntime" or os.stat(path).st_size > MAX_GRAPH_BYTES:
        return _open(path, make_options()), "onnxruntime"
    try:
        ours = _with_kernels(path, make_options, max(NOISE_SAMPLES, least_samples))
    except Exception as error:  # ONNX Runtime has no common type for what it raises
        log.warning("kernels_refused", graph=path, problem=str(error))
        ours = None
    if ours is not None:
        return ours, found
    return _open(path, make_options()), "onnxruntime"


def _with_kernels(
    path: str, make_options: Callable[[], ort.SessionOptions], samples: int
) -> ort.InferenceSession | None:
    """A session whose bits were compared; None where there is nothing for our operators to do."""
    with _memory_file() as optimised:
        options = make_options()
        options.optimized_model_filepath = optimised
        # Not to be kept: a session that was told to save its graph holds the weights twice.
        plain = _open(path, options)
        graph, nodes = hand_over(Path(optimised).read_bytes())
    if not nodes:
        return None
    ours = _open_rewritten(graph, make_options())
    if not _same_bits(plain, ours, samples):
        raise ValueError("other log-probabilities than ONNX Runtime's own")
    return ours


def _open(path: str, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open_rewritten(graph: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it has been optimised
    options.register_custom_ops_library(str(LIBRARY))
    options.log_severity_level = 4  # what it refuses is told in our log
    # From a file, because a session keeps the bytes that it was given.
    with _memory_file() as path:
        Path(path).write_bytes(graph)
        return _open(path, options)


@contextlib.contextmanager
def _memory_file() -> Iterator[str]:
    """Path of a file that never touches a disk, gone with the block. Linux only, as the library is."""
    descriptor = os.memfd_create("graph")
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _same_bits(plain: ort.InferenceSession, ours: ort.InferenceSession, samples: int) -> bool:
    """Two clips of different length, so that padding and masks are looked at, too."""
    noise: NDArray[np.float32] = np.random.default_rng(0).normal(0.0, 0.1, (2, samples)).astype(np.float32)
    lengths = np.array([samples, max(1, samples * 2 // 3)], np.int64)
    noise[1, lengths[1] :] = 0.0
    feeds = {"waveform": noise, "lengths": lengths}
    pairs = zip(plain.run(None, feeds), ours.run(None, feeds), strict=True)
    return all(np.array_equal(expected, found) for expected, found in pairs)
