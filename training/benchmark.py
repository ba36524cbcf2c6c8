"""PyTorch, ONNX float32 and ONNX INT8 of one model: size, latency, real-time factor, error rates.

    python -m training.benchmark CHECKPOINT|ARCHIVE.nemo --bundle models/NAME --manifest MANIFEST [--limit N]

The three take turns on the same clip, so that a noisy machine disturbs all alike; texts come from the
service's own decoder. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from api.bundle import Bundle, BundleError, load_bundle
from training.bundle_writer import hardware
from training.calibration import manifest_waveforms
from training.checkpoint import Checkpoint, load_checkpoint
from training.errors import TrainingError
from training.evaluate import ErrorRates, Utterance, error_rates, greedy_text
from training.export import export_graph
from training.frontend import LogMel
from training.inference import LogProbs, Waveform, cpu_session, run_graph
from training.nemo import read_nemo
from training.nemo_import import as_checkpoint

CLIP_S = 5.0
Network = Callable[[Waveform], LogProbs]
"""Waveform (samples,) -> log-probabilities (frames, vocabulary)."""


@dataclass(frozen=True)
class Row:
    """One form of the model."""

    form: str
    size_bytes: int
    latency_ms: float
    """Median over rounds, on one clip of `CLIP_S` seconds."""
    real_time_factor: float
    rates: ErrorRates


def torch_network(checkpoint: Checkpoint) -> Network:
    """The network in PyTorch as training leaves it."""
    model, frontend = checkpoint.model.eval(), LogMel(checkpoint.frontend)

    def run(waveform: Waveform) -> LogProbs:
        with torch.inference_mode():
            lengths = torch.tensor([len(waveform)])
            output = model(*frontend(torch.from_numpy(waveform)[None], lengths))
        values: LogProbs = output.log_probs[0, : int(output.lengths[0])].numpy()
        return values

    return run


def onnx_network(graph: bytes | Path, threads: int) -> Network:
    """A graph in ONNX Runtime."""
    session = cpu_session(graph, threads)
    return lambda waveform: run_graph(session, [waveform])[0]


def alternating_ms(networks: Mapping[str, Network], waveform: Waveform, rounds: int) -> dict[str, float]:
    """Median milliseconds of each network; one run of each per round, the first round does not count."""
    times: dict[str, list[float]] = {form: [] for form in networks}
    for _ in range(rounds + 1):
        for form, network in networks.items():
            start = time.perf_counter()
            network(waveform)
            times[form].append((time.perf_counter() - start) * 1000)
    return {form: float(np.median(values[1:])) for form, values in times.items()}


def benchmark(
    checkpoint: Checkpoint,
    bundle: Bundle,
    clips: Sequence[tuple[Waveform, str]],
    *,
    threads: int = 1,
    rounds: int = 9,
) -> list[Row]:
    """Measure the checkpoint in PyTorch and its graphs in ONNX Runtime."""
    torch.set_num_threads(threads)
    float_graph: bytes | Path
    if "float32" in bundle.manifest.graphs:
        float_graph = bundle.graph_path("float32")
    else:
        float_graph = export_graph(checkpoint.model, checkpoint.frontend).SerializeToString()
    graphs: dict[str, bytes | Path] = {"ONNX float32": float_graph}
    if "int8" in bundle.manifest.graphs:
        graphs["ONNX INT8"] = bundle.graph_path("int8")
    networks = {"PyTorch float32": torch_network(checkpoint)}
    networks |= {form: onnx_network(graph, threads) for form, graph in graphs.items()}
    sizes = {"PyTorch float32": 4 * sum(tensor.numel() for tensor in checkpoint.model.state_dict().values())}
    sizes |= {
        form: len(graph) if isinstance(graph, bytes) else graph.stat().st_size
        for form, graph in graphs.items()
    }
    latencies = alternating_ms(networks, _clip(clips, bundle.manifest.sample_rate_hz), rounds)
    return [
        Row(
            form=form,
            size_bytes=sizes[form],
            latency_ms=latencies[form],
            real_time_factor=latencies[form] / 1000 / CLIP_S,
            rates=_rates(network, bundle, clips),
        )
        for form, network in networks.items()
    ]


def _clip(clips: Sequence[tuple[Waveform, str]], sample_rate_hz: int) -> Waveform:
    """`CLIP_S` seconds of real sound: recordings one after another, cut."""
    samples = round(CLIP_S * sample_rate_hz)
    joined = np.concatenate([clip for clip, _ in clips])
    return np.ascontiguousarray(np.resize(joined, samples) if len(joined) < samples else joined[:samples])


def _rates(network: Network, bundle: Bundle, clips: Sequence[tuple[Waveform, str]]) -> ErrorRates:
    return error_rates(
        [Utterance(text, greedy_text(network(clip), bundle.vocabulary)) for clip, text in clips]
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown; speed is against PyTorch, the first row."""
    lines = [
        f"| form | MB | {CLIP_S:g} s clip | against PyTorch | real-time factor | WER | CER |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.form} | {row.size_bytes / 1e6:.1f} | {row.latency_ms:.1f} ms "
            f"| {rows[0].latency_ms / row.latency_ms:.2f}x | {row.real_time_factor:.4f} "
            f"| {row.rates.wer:.2%} | {row.rates.cer:.2%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="PyTorch, ONNX and INT8 of one model side by side.")
    parser.add_argument("weights", type=Path, help="checkpoint (.safetensors) or NeMo archive (.nemo)")
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle made of these weights")
    parser.add_argument("--manifest", type=Path, required=True, help="recordings with texts")
    parser.add_argument("--language", help="only this language's utterances; default: the bundle's first")
    parser.add_argument("--limit", type=int, help="at most this many utterances")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args(arguments)
    try:
        nemo = given.weights.suffix == ".nemo"
        checkpoint = as_checkpoint(read_nemo(given.weights)) if nemo else load_checkpoint(given.weights)
        bundle = load_bundle(given.bundle.parent, given.bundle.name)
        clips = manifest_waveforms(
            given.manifest,
            bundle.manifest.sample_rate_hz,
            given.limit,
            with_text=True,
            language=given.language or bundle.manifest.languages[0],
        )
        rows = benchmark(checkpoint, bundle, clips, threads=given.threads, rounds=given.rounds)
    except (TrainingError, BundleError, FileNotFoundError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    where = hardware()
    print(f"{bundle.name}, {len(clips)} utterances, {given.threads} thread(s), {where}\n")
    print(table(rows))
    print(json.dumps({"model": bundle.name, "hardware": where, "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
