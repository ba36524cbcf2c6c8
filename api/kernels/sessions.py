"""Sessions with our operators, or without where they do not work."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog
from numpy.typing import NDArray

from api.kernels.four_bits import PRODUCT, Probe, hand_over_products, probe_inputs
from api.kernels.graph import hand_over
from api.kernels.library import LIBRARY, Kernels, Weights, instructions
from api.kernels.rows import PLACES, ROWS

Feeds = dict[str, NDArray[np.float32] | NDArray[np.int64]]
Outputs = dict[str, NDArray[Any]]

log = structlog.get_logger("api.kernels")

# The graph is in memory three times while it is rewritten. A large one in INT8 gains little by that, its work
# being products; one in four bits is slow without.
MAX_GRAPH_BYTES = 64 * 2**20
MAX_FOUR_BITS_BYTES = 512 * 2**20
# Of a product's largest value: its additions are in another order, and where an input lies between two steps
# of its rounding, it may take the other one. A wrong weight is ten times as much.
MOST_ERROR = 2e-3
NOISE_SAMPLES = 96_000  # 6 s: more frames than the kernels work on at once, so that their seams are looked at
SHORT_SAMPLES = 16_000  # where products were compared one by one, and the graph only has to run


def open_sessions(
    path: str,
    make_options: Sequence[Callable[[], ort.SessionOptions]],
    *,
    least_samples: int,
    rows: bool = False,
) -> tuple[list[ort.InferenceSession], Kernels]:
    """CPU sessions on a bundle's graph, one for each of ``make_options``, and what runs its convolutions.

    ``make_options`` give fresh options each time; ``least_samples`` is the shortest input of the graph. With
    ``rows`` a session may have the outputs of ``rows.py`` instead of ``log_probs``.
    What ONNX Runtime says against the graph itself passes through; what it says against our operators is
    logged, and the sessions do without them. Of weights that our operators use there is one copy for all.
    """
    found = instructions()
    if found != "onnxruntime" and _small_enough(path):
        try:
            ours = _with_kernels(path, make_options, least_samples, rows=rows)
        except Exception as error:  # ONNX Runtime has no common type for what it raises
            log.warning("kernels_refused", graph=path, problem=str(error))
        else:
            if ours:
                return ours, found
    return [_open(path, make()) for make in make_options], "onnxruntime"


def _small_enough(path: str) -> bool:
    size = os.stat(path).st_size
    if not MAX_GRAPH_BYTES < size <= MAX_FOUR_BITS_BYTES:
        return size <= MAX_GRAPH_BYTES
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(PRODUCT.encode()) >= 0


def _with_kernels(
    path: str, make_options: Sequence[Callable[[], ort.SessionOptions]], least_samples: int, *, rows: bool
) -> list[ort.InferenceSession]:
    """Sessions that were compared; none where there is nothing for our operators to do."""
    with Weights() as weights:
        with _memory_file() as optimised:
            options = make_options[0]()
            options.optimized_model_filepath = optimised
            plain = _open(path, options)
            content = Path(optimised).read_bytes()
        graph, nodes = hand_over(content, weights.keep, avx512=instructions() == "vnni")
        probe = None
        if not nodes:
            graph, probe = hand_over_products(content, weights.keep, rows=rows)
            if probe is None:
                return []
            _compare_products(probe, make_options[0]())
        noise = _noise(max(NOISE_SAMPLES if probe is None else SHORT_SAMPLES, least_samples))
        expected = outputs_of(plain, noise)
        del plain  # a session that was told to save its graph holds the weights twice
        with _memory_file() as rewritten:  # because a session keeps the bytes that it was given
            Path(rewritten).write_bytes(graph)
            ours = [_open_rewritten(rewritten, make()) for make in make_options]
    compare = _same_bits if probe is None else _same_shapes
    if not all(compare(session, noise, expected) for session in ours):
        raise ValueError("other log-probabilities than ONNX Runtime's own")
    return ours


def _compare_products(probe: Probe, options: ort.SessionOptions) -> None:
    """ValueError where one of our products is not nearly what ONNX Runtime's is."""
    with _memory_file() as path:
        Path(path).write_bytes(probe.model)
        outputs = _open_rewritten(path, options).run(None, probe_inputs(probe))
    for theirs, ours in zip(outputs[::2], outputs[1::2], strict=True):
        error = np.abs(ours - theirs).max(axis=-1)
        if not (error <= MOST_ERROR * np.abs(theirs).max(axis=-1)).all():
            raise ValueError(f"a product of up to {np.abs(theirs).max():.2g} is off by {error.max():.2g}")


def _open(path: str, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _open_rewritten(path: str, options: ort.SessionOptions) -> ort.InferenceSession:
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it has been optimised
    options.register_custom_ops_library(str(LIBRARY))
    options.log_severity_level = 4  # what it refuses is told in our log
    return _open(path, options)


@contextlib.contextmanager
def _memory_file() -> Iterator[str]:
    """Path of a file that never touches a disk, gone with the block. Linux only, as the library is."""
    descriptor = os.memfd_create("graph")
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def outputs_of(session: ort.InferenceSession, feeds: Feeds) -> Outputs:
    """What a session gives, by name."""
    names = (value.name for value in session.get_outputs())
    return dict(zip(names, session.run(None, feeds), strict=True))


def _same_bits(session: ort.InferenceSession, feeds: Feeds, expected: Outputs) -> bool:
    found = outputs_of(session, feeds)
    return all(np.array_equal(found[name], wanted) for name, wanted in expected.items())


def _same_shapes(session: ort.InferenceSession, feeds: Feeds, expected: Outputs) -> bool:
    found = outputs_of(session, feeds)
    shapes = {name: values.shape for name, values in found.items()}
    if ROWS in shapes:
        shapes["log_probs"] = (*shapes.pop(PLACES)[:-1], shapes.pop(ROWS)[-1])
    return shapes == {name: values.shape for name, values in expected.items()}


def _noise(samples: int) -> Feeds:
    """Two clips of different length, so that padding and masks are looked at, too."""
    noise: NDArray[np.float32] = np.random.default_rng(0).normal(0.0, 0.1, (2, samples)).astype(np.float32)
    lengths = np.array([samples, max(1, samples * 2 // 3)], np.int64)
    noise[1, lengths[1] :] = 0.0
    return {"waveform": noise, "lengths": lengths}
