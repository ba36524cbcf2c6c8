"""PyTorch, ONNX float32 and ONNX INT8 of one model: size, latency, real-time factor, error rates.

    python -m training.benchmark CHECKPOINT|ARCHIVE.nemo --bundle models/NAME --manifest MANIFEST [--limit N]

The three take turns on the same clip, so that a noisy machine disturbs all alike; texts come from the
service's own decoder. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from api.bundle import Bundle, load_bundle
from api.manifest import GraphName
from api.vocabulary import Vocabulary
from training.arguments import positive
from training.calibration import manifest_waveforms
from training.checkpoint import Checkpoint, load_checkpoint
from training.errors import in_one_line
from training.evaluate import ErrorRates, Network, greedy_rates
from training.inference import Waveform, clip_of, cpu_session, in_turns_s, run_graph
from training.nemo import read_nemo
from training.nemo_import import as_checkpoint
from training.provenance import hardware
from training.publish import exported_checkpoint
from training.text import Normaliser, plain_normaliser
from training.torch_inference import Forward, run_torch

CLIP_S = 5.0
COLUMNS = {
    "graph": "{}",
    "megabytes": "{:.1f}",
    "latency_ms": "{:.1f}",
    "speedup": "{:.2f}",
    "real_time_factor": "{:.4f}",
    "wer": "{:.2%}",
    "cer": "{:.2%}",
}


@dataclass(frozen=True)
class Form:
    """One form of the model."""

    name: str
    size_bytes: int
    network: Network


@dataclass(frozen=True)
class Row:
    """What was measured of one form."""

    form: str
    size_bytes: int
    latency_ms: float
    """Median over rounds, on one clip alone."""
    speedup: float
    """The first form's latency over this one's."""
    real_time_factor: float
    rates: ErrorRates

    def columns(self) -> dict[str, Any]:
        """By the names in `COLUMNS`."""
        return {
            "graph": self.form,
            "megabytes": self.size_bytes / 1e6,
            "latency_ms": self.latency_ms,
            "speedup": self.speedup,
            "real_time_factor": self.real_time_factor,
            "wer": self.rates.wer,
            "cer": self.rates.cer,
        }


def torch_form(name: str, size_bytes: int, forward: Forward) -> Form:
    """A network in PyTorch."""
    return Form(name, size_bytes, lambda waveform: run_torch(forward, [waveform])[0])


def onnx_form(name: str, graph: bytes | Path, threads: int) -> Form:
    """A graph in ONNX Runtime."""
    session = cpu_session(graph, threads)
    size_bytes = len(graph) if isinstance(graph, bytes) else graph.stat().st_size
    return Form(name, size_bytes, lambda waveform: run_graph(session, [waveform])[0])


def side_by_side(
    forms: Sequence[Form],
    clips: Sequence[tuple[Waveform, str]],
    vocabulary: Vocabulary,
    *,
    sample_rate_hz: int,
    clip_s: float,
    threads: int,
    rounds: int,
    normalise: Normaliser,
) -> list[Row]:
    """Latency on `clip_s` seconds of the clips, in turns; error rates of greedy texts on all of them.

    References and texts are normalised before they are compared: either may have capitals and punctuation.
    `threads` is PyTorch's for as long as this takes; a graph's session has its own.
    """
    clip = clip_of([waveform for waveform, _ in clips], clip_s, sample_rate_hz)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times_s = in_turns_s([partial(form.network, clip) for form in forms], rounds, "latency")
        rates = [greedy_rates(form.network, vocabulary, clips, normalise) for form in forms]
    finally:
        torch.set_num_threads(before)
    latencies_s = [float(value) for value in np.median(times_s, axis=1)]
    return [
        Row(
            form=form.name,
            size_bytes=form.size_bytes,
            latency_ms=1000 * latency_s,
            speedup=latencies_s[0] / latency_s,
            real_time_factor=latency_s / clip_s,
            rates=rates_of_form,
        )
        for form, latency_s, rates_of_form in zip(forms, latencies_s, rates, strict=True)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`Row.columns` of each as Markdown."""
    lines = [{name: name for name in COLUMNS}, dict.fromkeys(COLUMNS, "---")]
    lines += [{name: form.format(row[name]) for name, form in COLUMNS.items()} for row in rows]
    return "\n".join(f"| {' | '.join(line[name] for name in COLUMNS)} |" for line in lines)


def benchmark(
    checkpoint: Checkpoint,
    bundle: Bundle,
    clips: Sequence[tuple[Waveform, str]],
    *,
    threads: int = 1,
    rounds: int = 9,
) -> list[Row]:
    """Measure the checkpoint in PyTorch as training leaves it, and its graphs in ONNX Runtime."""
    size_bytes = 4 * sum(tensor.numel() for tensor in checkpoint.model.state_dict().values())
    graphs = bundle.manifest.graphs
    float_graph: bytes | Path
    if "float32" in graphs:
        float_graph = bundle.graph_path("float32")
    else:
        made = exported_checkpoint(checkpoint, bundle.manifest.max_window_s)
        float_graph = made.graph.SerializeToString()
    forms = [
        torch_form("PyTorch float32", size_bytes, checkpoint.forward()),
        onnx_form("ONNX float32", float_graph, threads),
    ]
    small: tuple[GraphName, ...] = ("int8", "int4")
    forms += [
        onnx_form(f"ONNX {name.upper()}", bundle.graph_path(name), threads)
        for name in small
        if name in graphs
    ]
    return side_by_side(
        forms,
        clips,
        bundle.vocabulary,
        sample_rate_hz=bundle.manifest.sample_rate_hz,
        clip_s=CLIP_S,
        threads=threads,
        rounds=rounds,
        normalise=plain_normaliser(bundle.manifest.languages[0], bundle.manifest.text_normalisation),
    )


@in_one_line("benchmark")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="PyTorch, ONNX and INT8 of one model side by side.")
    parser.add_argument("weights", type=Path, help="checkpoint (.safetensors) or NeMo archive (.nemo)")
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle made of these weights")
    parser.add_argument("--manifest", type=Path, required=True, help="recordings with texts")
    parser.add_argument("--language", help="only this language's utterances; default: the bundle's first")
    parser.add_argument("--limit", type=positive, help="at most this many utterances")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=9)
    given = parser.parse_args(arguments)
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
    where = hardware()
    print(f"{bundle.name}, {len(clips)} utterances, {CLIP_S:g} s clip, {given.threads} thread(s), {where}\n")
    print(table([row.columns() for row in rows]))
    print(json.dumps({"model": bundle.name, "hardware": where, "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
