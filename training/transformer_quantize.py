"""INT8 for graphs whose work is matrix products: dynamic, or static where batches must be exact."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from training.dynamic_int8 import graphs_of, quantize_products
from training.grouped_int8 import grouped_convolutions, quantize_grouped

STATIC = "static QDQ MatMul per channel"
FRONT = "frontend."
"""Nodes of the front end stay float: a spectrum does not fit 8 bits."""


def products(model: onnx.ModelProto) -> list[str]:
    """Names of the matrix products with constant weights, front end left out, in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for graph in graphs_of(model.graph)
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants and not node.name.startswith(FRONT)
    ]


class _Recordings(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Feeds one recording at a time."""

    def __init__(self, recordings: Sequence[npt.NDArray[np.float32]]) -> None:
        self.feeds = iter(
            [
                {"waveform": samples[None], "lengths": np.array([len(samples)], np.int64)}
                for samples in recordings
            ]
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next feed, None at the end."""
        return next(self.feeds, None)


def dynamic(graph: Path, out: Path, skipped: Sequence[str] = (), convolved: Sequence[str] = ()) -> Path:
    """Weights S8 per channel, activations U8 with a scale found on every call; `skipped` products stay float.

    The scale is one for the whole batch, so an item's result depends a little on its neighbours. `convolved`:
    grouped convolutions that are rounded as well.
    """
    model = onnx.load(graph)
    quantize_grouped(model, convolved)
    quantize_products(model, set(products(model)) - set(skipped))
    out.write_bytes(model.SerializeToString())
    return out


def static(
    graph: Path, out: Path, recordings: Sequence[npt.NDArray[np.float32]], *, averaged: bool = False
) -> Path:
    """Weights S8 per channel, activations U8 with scales measured on `recordings`: batched equals alone.

    A range is that of all recordings, or the mean of their ranges where it is `averaged`.
    """
    with _quiet():
        quantize_static(
            str(graph),
            str(out),
            _Recordings(recordings),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=products(onnx.load(graph, load_external_data=False)),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": True, "CalibMovingAverage": averaged},
        )
    return out


def dynamic_candidates(
    graph: Path, out: Path, calibration: Sequence[npt.NDArray[np.float32]]
) -> Iterator[tuple[str, Path]]:
    """The ways that need no run of the float graph to find ranges."""
    model = onnx.load(graph, load_external_data=False)
    names, grouped = products(model), grouped_convolutions(model)
    yield "dynamic MatMul per channel", dynamic(graph, out / "dynamic.onnx")
    if grouped:
        made = dynamic(graph, out / "dynamic_grouped.onnx", (), grouped)
        yield "dynamic MatMul and grouped convolutions per channel", made
    ends = [names[0], names[-1]]
    yield "dynamic MatMul per channel, ends float32", dynamic(graph, out / "dynamic_ends.onnx", ends)


def decoder_candidates(
    graph: Path,
    out: Path,
    calibration: Sequence[npt.NDArray[np.float32]],
    *,
    convolutions: bool = True,
) -> Iterator[tuple[str, Path]]:
    """The ways for a graph that searches with a decoder, whose output layer is inside of its loop.

    Without `convolutions` those of the encoder stay in float32.
    """
    names = products(onnx.load(graph, load_external_data=False))
    exact = [] if convolutions else [name for name in names if name.startswith("encoder.conv")]
    how = "dynamic MatMul per channel" + ("" if convolutions else ", convolutions float32")
    yield how, dynamic(graph, out / "dynamic.onnx", exact)
    ends = [*exact, names[0], "step.logits"]
    yield "dynamic MatMul per channel, ends float32", dynamic(graph, out / "dynamic_ends.onnx", ends)


def candidates(
    graph: Path, out: Path, calibration: Sequence[npt.NDArray[np.float32]]
) -> Iterator[tuple[str, Path]]:
    """The ways that are tried for every Transformer encoder."""
    yield from dynamic_candidates(graph, out, calibration)
    yield STATIC, static(graph, out / "static.onnx", calibration[:8])


def exact_candidates(
    graph: Path, out: Path, calibration: Sequence[npt.NDArray[np.float32]]
) -> Iterator[tuple[str, Path]]:
    """The ways whose batches are exact."""
    yield STATIC, static(graph, out / "static.onnx", calibration[:8])
    yield f"{STATIC}, mean ranges", static(graph, out / "averaged.onnx", calibration, averaged=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without onnxruntime's advice to run its shape inference first: the exporter writes plain graphs."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
