"""wav2vec2-large-xlsr-53 at full size with random weights: PyTorch, ONNX, INT8 and four bits side by side.

    python -m training.recipes.wav2vec2_ctc.full_size --clip-s 5 --threads 2

Speed and size do not depend on what the weights know. All forms take turns in one process on the same clip,
and what they answer is compared before it is timed. "CPU ms" is the processor's time, which other programs on
the machine disturb less than the clock's. Needs about 8 GB of memory and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tqdm import tqdm

from training.data.synthetic import SAMPLE_RATE_HZ, tones
from training.four_bits import quantize_to_four_bits
from training.grouped_int8 import grouped_convolutions
from training.inference import LogProbs, compare, cpu_session, run_graph, served_session
from training.provenance import processor
from training.recipes.wav2vec2_ctc.export import export_graph
from training.recipes.wav2vec2_ctc.model import Wav2Vec2Config, Wav2Vec2Ctc
from training.torch_inference import run_torch
from training.transformer_quantize import dynamic, products

OUTPUTS = 35
TABLE_HEAD = (
    f"{'form':42} {'MB':>6} {'median ms':>10} {'fastest ms':>10} "
    f"{'CPU ms':>8} {'speedup':>8} {'posterior':>10}"
)
TABLE_ROW = (
    "{form:42} {megabytes:6.0f} {latency_ms:10.0f} {fastest_ms:10.0f} {processor_ms:8.0f} {speedup:7.2f}x "
    "{worst_posterior:10.1e}"
)


def int8_forms(graph: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The recipes that are tried."""
    model = onnx.load(graph, load_external_data=False)
    features = [name for name in products(model) if name.startswith("features.")]
    yield "INT8 dynamic, Transformer only", dynamic(graph, folder / "transformer.onnx", features)
    yield "INT8 dynamic, convolutions as MatMul too", dynamic(graph, folder / "convolutions.onnx")
    grouped = grouped_convolutions(model)
    yield "INT8 dynamic, positions' convolution too", dynamic(graph, folder / "grouped.onnx", (), grouped)


def four_bit_forms(graph: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Each weight rounded by itself: random ones have nothing to make up for."""
    names = set(products(onnx.load(graph, load_external_data=False)))
    transformer = {name for name in names if not name.startswith("features.")}
    for how, chosen in (("Transformer only", transformer), ("convolutions as MatMul too", names)):
        model = onnx.load(graph)
        quantize_to_four_bits(model, chosen)
        path = folder / f"four_bits_{len(chosen)}.onnx"
        onnx.save(model, path)
        yield f"four bits, {how}", path


def measure(
    config: Wav2Vec2Config, clip_s: float, threads: int, repeats: int, folder: Path
) -> list[dict[str, Any]]:
    """One row per form: megabytes, milliseconds, ratio to PyTorch, agreement with PyTorch."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    network = Wav2Vec2Ctc(config, OUTPUTS).eval()
    graph = folder / "float32.onnx"
    onnx.save(export_graph(network), graph)
    gc.collect()
    smaller = {**dict(int8_forms(graph, folder)), **dict(four_bit_forms(graph, folder))}
    files = {"PyTorch float32": graph, "ONNX float32": graph, **smaller}
    gc.collect()
    clip = np.resize(tones("bir iki üç dört beş"), round(clip_s * SAMPLE_RATE_HZ))
    runs: dict[str, Callable[[], list[LogProbs]]] = {"PyTorch float32": partial(run_torch, network, [clip])}
    for name, path in list(files.items())[1:]:
        session = served_session(path, threads) if name in smaller else cpu_session(path, threads)
        runs[name] = partial(run_graph, session, [clip])
    expected = runs["PyTorch float32"]()
    agreements = {name: compare(expected, run()) for name, run in runs.items()}
    if agreements["ONNX float32"].worst_posterior > 1e-4:
        raise SystemExit(f"ONNX disagrees with PyTorch: {agreements['ONNX float32'].describe()}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), unit="round"):
        for name, run in runs.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            processor[name].append(time.process_time() - used)
            times[name].append(time.perf_counter() - started)
    base_s = float(np.median(times["PyTorch float32"]))
    weights_bytes = sum(value.numel() * 4 for value in network.parameters())
    return [
        {
            "form": name,
            "megabytes": (weights_bytes if index == 0 else files[name].stat().st_size) / 1e6,
            "latency_ms": 1000 * float(np.median(times[name])),
            "fastest_ms": 1000 * min(times[name]),
            "processor_ms": 1000 * min(processor[name]),
            "speedup": base_s / float(np.median(times[name])),
            "worst_posterior": agreements[name].worst_posterior,
        }
        for index, name in enumerate(runs)
    ]


def main() -> None:
    """The command; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip-s", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24, help="fewer, to see it work quickly")
    given = parser.parse_args()
    config = Wav2Vec2Config(layers=given.layers)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(config, given.clip_s, given.threads, given.repeats, Path(folder))
    print(TABLE_HEAD)
    for row in rows:
        print(TABLE_ROW.format(**row))
    setting = {
        "clip_s": given.clip_s,
        "threads": given.threads,
        "repeats": given.repeats,
        "layers": given.layers,
    }
    print(json.dumps({"hardware": processor(), **setting, "rows": rows}))


if __name__ == "__main__":
    main()
