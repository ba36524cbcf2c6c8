"""Our INT8 kernels against ONNX Runtime's own: one thread, clips of several lengths, and time by operator.

    python -m loadtest.bench_kernels [--model en-quartznet-small] [--rounds 40]

The same graph with each set of instructions that this processor has; sessions take turns clip by clip, the
time is of the thread, the figure is the lower quartile. All must give the same bits; with weights of four
bits ours must, whose products add up in another order than ONNX Runtime's. The last line is JSON.

The floor is what an INT8 graph would take at the rate of a large INT8 matrix product, measured in the same
run: in a convolutional network each parameter is used once per frame, two operations each time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from api.bundle import Bundle, load_bundle
from api.engine import session_options
from api.kernels.library import instructions, library
from api.kernels.sessions import open_sessions
from loadtest.clips import speech
from loadtest.command import bundle_parser
from loadtest.processes import hardware

CLIPS_S = (1.0, 2.0, 5.0, 10.0, 15.0)
PROFILED_S = 5.0
OPERATORS = 6  # rows of the profile; the rest in one
PLAIN = "ONNX Runtime"


def options(profile: str = "") -> ort.SessionOptions:
    """The engine's, for one thread; ``profile``: prefix of the files of a profile."""
    chosen = session_options(1)
    if profile:
        chosen.enable_profiling = True
        chosen.profile_file_prefix = profile
    return chosen


def open_all(bundle: Bundle, make: Callable[[], ort.SessionOptions]) -> dict[str, ort.InferenceSession]:
    """A session for each way that works here."""
    path = str(bundle.graph_path(bundle.choose_graph("auto", instructions())))
    sessions = {PLAIN: ort.InferenceSession(path, make(), providers=["CPUExecutionProvider"])}
    loaded = library()
    if loaded is None:
        raise SystemExit("the kernels were not compiled: python api/kernels/build.py says why")
    for avx2_only in (1, 0):
        loaded.asr_avx2_only(avx2_only)
        (session,), found = open_sessions(path, [make], least_samples=bundle.manifest.input.min_samples)
        if found == instructions() != "onnxruntime":
            sessions[found] = session
    if len(sessions) == 1:
        raise SystemExit(f"{bundle.name} has no convolution that our kernels take, or they were refused")
    return sessions


def feeds(clip: NDArray[np.float32]) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """One clip as the graph takes it."""
    return {"waveform": clip[None], "lengths": np.array([len(clip)], np.int64)}


def milliseconds(
    sessions: dict[str, ort.InferenceSession], clip: NDArray[np.float32], rounds: int, like: str
) -> dict[str, float]:
    """Lower quartile of the thread's time for one clip; ends the program where bits are not ``like``'s."""
    expected = sessions[like].run(None, feeds(clip))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            start_s = time.thread_time()
            outputs = session.run(None, feeds(clip))
            times[name].append(time.thread_time() - start_s)
            if (name != PLAIN or like == PLAIN) and not all(map(np.array_equal, outputs, expected)):
                raise SystemExit(f"{name}: other bits than {like}")
    return {name: 1e3 * float(np.quantile(taken, 0.25)) for name, taken in times.items()}


def matrix_rate() -> float:
    """Operations per second of one thread at best: uint8 ``(252, 1024)`` times int8 ``(1024, 1024)``.

    As a pointwise convolution, which is the fastest that ONNX Runtime has for it.
    """
    rows, width = 252, 1024
    random = np.random.default_rng(0)
    parameters = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(0),
        "w": random.integers(-127, 128, (width, width, 1, 1)).astype(np.int8),
        "w_scale": np.full(width, 0.01, np.float32),
        "w_zero": np.zeros(width, np.int8),
        "y_scale": np.float32(0.5),
        "y_zero": np.uint8(0),
    }
    node = helper.make_node(
        "QLinearConv", ["x", *parameters], ["y"], domain="com.microsoft", channels_last=1, kernel_shape=[1, 1]
    )
    shape = [1, 1, rows, width]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in parameters.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = ort.InferenceSession(model, options(), providers=["CPUExecutionProvider"])
    x = random.integers(0, 256, shape).astype(np.uint8)
    best_s = float("inf")
    for _ in range(300):
        start_s = time.thread_time()
        session.run(None, {"x": x})
        best_s = min(best_s, time.thread_time() - start_s)
    return 2 * rows * width * width / best_s


def by_operator(session: ort.InferenceSession, clip: NDArray[np.float32], rounds: int) -> dict[str, float]:
    """Milliseconds per clip and operator, from ONNX Runtime's profile: the median of the rounds.

    Our sessions have also run on what they were compared by; those rounds are not looked at.
    """
    for _ in range(rounds):
        session.run(None, feeds(clip))
    events = json.loads(Path(session.end_profiling()).read_text())
    runs = [event for event in events if event["name"] == "model_run"][-rounds:]
    sums: list[dict[str, float]] = [{} for _ in runs]
    for event in events:
        name = event.get("args", {}).get("op_name")
        # What a loop or a branch takes are the nodes inside of it.
        if name is None or name in ("Loop", "If") or not event["name"].endswith("_kernel_time"):
            continue
        if name == "QLinearConv":
            name += ", depthwise" if "depthwise" in event["name"] else ", pointwise"
        for run, found in zip(runs, sums, strict=True):
            if run["ts"] <= event["ts"] < run["ts"] + run["dur"]:
                found[name] = found.get(name, 0.0) + event["dur"] / 1e3
    names = {name for found in sums for name in found}
    return {name: float(np.median([found.get(name, 0.0) for found in sums])) for name in names}


def print_profile(name: str, found: dict[str, float]) -> None:
    """The costliest operators and their share."""
    total = sum(found.values())
    largest = sorted(found.items(), key=lambda item: -item[1])[:OPERATORS]
    rest = total - sum(taken for _, taken in largest)
    parts = [f"{operator} {taken:.2f}" for operator, taken in [*largest, ("rest", rest)]]
    print(f"{name}: {total:.1f} ms: {', '.join(parts)}")


def main() -> None:
    """The command."""
    parser = bundle_parser(__doc__)
    parser.set_defaults(model="en-quartznet-small")  # our own operators are of convolutions
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    bundle = load_bundle(given.models_dir, given.model)
    rate_hz = bundle.manifest.sample_rate_hz
    longest = speech(CLIPS_S[-1])[0]
    sessions = open_all(bundle, options)
    graph = bundle.choose_graph("auto", instructions())
    print(f"{given.model} ({graph}), one thread, {hardware()}\n")
    ours = list(sessions)[1:]
    with_floor = graph == "int8"
    heads = ["clip", *(["floor, ms"] if with_floor else [])]
    for name in sessions:
        heads += [f"{name}, ms", *(["of the floor"] if with_floor else [])]
        heads += [] if name == PLAIN else ["times as fast"]
    print(f"| {' | '.join(heads)} |\n{'|--:' * len(heads)}|")
    operations = 2 * bundle.manifest.parameters / bundle.manifest.frame_stride_s  # per second of audio
    rows = []
    for clip_s in CLIPS_S:
        rate = matrix_rate()
        clip = longest[: int(clip_s * rate_hz)]
        taken = milliseconds(sessions, clip, given.rounds, PLAIN if with_floor else ours[0])
        floor_ms = 1e3 * clip_s * operations / rate
        cells = [f"{floor_ms:.2f}"] if with_floor else []
        for name in sessions:
            cells += [f"{taken[name]:.2f}", *([f"{floor_ms / taken[name]:.0%}"] if with_floor else [])]
            cells += [] if name == PLAIN else [f"{taken[PLAIN] / taken[name]:.2f}"]
        print(f"| {clip_s:g} s | {' | '.join(cells)} |")
        floor = {"matrix_gop_per_s": rate / 1e9, "floor": floor_ms} if with_floor else {}
        rows.append({"clip_s": clip_s} | floor | taken)
    print(f"\nBy operator, ms of a clip of {PROFILED_S:g} s (profiling adds a little):\n")
    with tempfile.TemporaryDirectory() as folder:
        profiled = open_all(bundle, lambda: options(f"{folder}/profile"))
        for name, session in profiled.items():
            print_profile(name, by_operator(session, longest[: int(PROFILED_S * rate_hz)], given.rounds))
    print(json.dumps({"model": given.model, "hardware": hardware(), "rows": rows}))


if __name__ == "__main__":
    main()
