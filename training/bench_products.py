"""One matrix product in float32, dynamic INT8, four bits, four bits widened, and our kernel's, on one thread.

    python -m training.bench_products [--rows 1,250] [--rounds 60]

Shapes of Whisper tiny: attention, feed-forward in and out, the tokens of `en-whisper-tiny`. Forms take turns;
outputs are compared with float32 of the same rounded weights. Prints a Markdown table of median milliseconds;
without the service's kernels (no C compiler, another processor) their column is not there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from api.engine import session_options
from api.kernels.four_bits import hand_over_products
from api.kernels.library import LIBRARY, Weights
from training.arguments import positive
from training.dynamic_int8 import quantize_products
from training.four_bits import quantize_to_four_bits, rounded
from training.inference import cpu_session, in_turns_s
from training.provenance import hardware

SHAPES = ((384, 384), (384, 1536), (1536, 384), (384, 24_578))
NODE = "product"
WORST_ERROR = 0.2
"""Of the output's deviation; 8-bit inputs cost a twentieth of it at most."""


def product(weight: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """A graph of one product with a weight (inputs, outputs)."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name=NODE)],
        NODE,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def forms(weight: npt.NDArray[np.float32]) -> Mapping[str, onnx.ModelProto]:
    """The product in every form."""
    found = {name: product(weight) for name in ("float32", "INT8", "four bits", "four bits, widened")}
    quantize_products(found["INT8"], {NODE})
    quantize_to_four_bits(found["four bits"], {NODE})
    quantize_to_four_bits(found["four bits, widened"], {NODE}, {NODE})
    return found


def ours(model: onnx.ModelProto) -> onnxruntime.InferenceSession | None:
    """The product in four bits by the service's kernel; None where there is none."""
    with tempfile.TemporaryDirectory() as folder, Weights() as weights:
        optimised = Path(folder, "model.onnx")
        options = session_options(1)
        options.optimized_model_filepath = str(optimised)
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rewritten, probe = hand_over_products(optimised.read_bytes(), weights.keep)
        if probe is None:
            return None
        options = session_options(1)
        options.register_custom_ops_library(str(LIBRARY))
        return onnxruntime.InferenceSession(rewritten, options, providers=["CPUExecutionProvider"])


def measured(inputs: int, outputs: int, rows: int, rounds: int) -> dict[str, float]:
    """Median seconds per form. Raises ValueError where a form gives something else."""
    generator = np.random.default_rng(0)
    weight = generator.normal(0.0, 0.02, (inputs, outputs)).astype(np.float32)
    weight = rounded(torch.from_numpy(weight.T.copy())).numpy().T.copy()
    x = generator.normal(size=(rows, inputs)).astype(np.float32)
    exact = x @ weight
    found = forms(weight)
    sessions = {name: cpu_session(model.SerializeToString()) for name, model in found.items()}
    if session := ours(found["four bits"]):
        sessions["four bits, ours"] = session
    for name, session in sessions.items():
        error = np.abs(session.run(None, {"x": x})[0] - exact).max()
        if error > WORST_ERROR * exact.std():
            raise ValueError(f"{name}: off by {error:.3f}, the output's deviation is {exact.std():.3f}")
    seconds = in_turns_s([partial(session.run, None, {"x": x}) for session in sessions.values()], rounds)
    return dict(zip(sessions, (float(np.median(times)) for times in seconds), strict=True))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,250", help="comma list: a token, the frames of 5 s")
    parser.add_argument("--rounds", type=positive, default=60)
    given = parser.parse_args()
    print(f"{hardware()}, one thread, median ms\n")
    header: list[str] = []
    for rows in map(int, given.rows.split(",")):
        for inputs, outputs in SHAPES:
            if rows > 1 and outputs > 10_000:
                continue  # tokens are told one at a time
            found = measured(inputs, outputs, rows, given.rounds)
            if not header:
                header = ["product", *found]
                print("| " + " | ".join(header) + " |\n|---|" + "---|" * len(found))
            cells = [f"{rows} x {inputs} by {inputs} x {outputs}"]
            print("| " + " | ".join([*cells, *(f"{1e3 * s:.3f}" for s in found.values())]) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
