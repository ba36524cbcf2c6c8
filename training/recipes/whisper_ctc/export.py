"""WhisperCtc -> a graph that takes a waveform: log-mel inside, true lengths or 30 padded seconds."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto
from torch import nn

from training.graph import GraphBuilder
from training.recipes.whisper_ctc import frontend
from training.recipes.whisper_ctc.model import WhisperCtc, WhisperEncoder, rates, sinusoids
from training.transformer import EncoderLayer
from training.transformer_graph import (
    add_convolution,
    add_encoder_layer,
    add_frames,
    add_gelu,
    add_key_bias,
    add_layer_norm,
    add_linear,
    add_own_frames,
    array,
)


def export_graph(model: WhisperCtc) -> onnx.ModelProto:
    """The bundle's float32 graph."""
    graph = GraphBuilder()
    features, counts = add_features(graph, model.encoder.config.bands, fixed=model.fixed)
    hidden, counts, _ = add_encoder(graph, "encoder", model.encoder, features, counts, fixed=model.fixed)
    first, norm, last = model.ctc_head[0], model.ctc_head[2], model.ctc_head[3]
    if not (isinstance(first, nn.Linear) and isinstance(norm, nn.LayerNorm) and isinstance(last, nn.Linear)):
        raise TypeError("ctc_head: expected Linear, GELU, LayerNorm, Linear")
    hidden = add_gelu(graph, "ctc_head.1", add_linear(graph, "ctc_head.0", hidden, first))
    hidden = add_layer_norm(graph, "ctc_head.2", hidden, norm)
    graph.add("LogSoftmax", [add_linear(graph, "ctc_head.3", hidden, last)], "log_probs", axis=-1)
    graph.add("Identity", [counts], "frame_lengths")
    return graph.build("whisper_ctc", last.out_features)


def add_features(graph: GraphBuilder, bands: int, *, fixed: bool) -> tuple[str, str]:
    """Features (batch, frames, bands) and frames per item (batch,); see frontend.py."""
    zero, one, minus_one = graph.ints("zero", [0]), graph.ints("one", [1]), graph.ints("axis_last", [-1])
    hop, far = graph.ints("hop", [frontend.HOP]), graph.ints("far", [2**31 - 1])
    column = graph.add("Unsqueeze", ["lengths", one], "frontend.lengths_column")
    own = graph.mask(add_frames(graph, "frontend.given_samples", "waveform"), column, "frontend.own")
    signal = graph.add("Mul", ["waveform", own], "frontend.own_signal")
    if fixed:
        window = graph.ints("frontend.window_samples", [frontend.WINDOW_SAMPLES])
        longer = graph.ints("frontend.window_pads", [0, 0, 0, frontend.WINDOW_SAMPLES])
        signal = graph.add("Pad", [signal, longer], "frontend.longer")
        signal = graph.add("Slice", [signal, zero, window, one], "frontend.window")
    samples = add_frames(graph, "frontend.samples", signal)
    less_one = graph.ints("frontend.hop_less_one", [frontend.HOP - 1])
    rounded = graph.add("Add", [samples, less_one], "frontend.samples_up")
    frames = graph.add("Div", [rounded, hop], "frontend.frames")
    blocks = graph.add("Add", [frames, graph.ints("two", [2])], "frontend.blocks_count")
    needed = graph.add("Mul", [blocks, hop], "frontend.samples_needed")
    half = graph.ints("frontend.half", [frontend.FFT // 2])
    after = graph.add("Sub", [needed, samples], "frontend.missing_both")
    after = graph.add("Sub", [after, half], "frontend.missing")
    pads = graph.add("Concat", [zero, zero, zero, after], "frontend.pads", axis=0)
    signal = graph.add("Pad", [signal, pads], "frontend.padded")
    stop = graph.ints("frontend.mirror_start", [frontend.FFT // 2])
    mirrored = graph.add("Slice", [signal, stop, zero, one, minus_one], "frontend.mirrored")
    signal = graph.add("Concat", [mirrored, signal], "frontend.signal", axis=1)
    shape = graph.ints("frontend.block_shape", [0, -1, frontend.HOP])
    hops = graph.add("Reshape", [signal, shape], "frontend.blocks")
    ends = [graph.ints("minus_two", [-2]), minus_one, far]
    starts = [zero, one, graph.ints("two", [2])]
    parts = [
        graph.add("Slice", [hops, start, end, one], f"frontend.part_{index}")
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    stacked = graph.add("Concat", parts, "frontend.stacked", axis=2)
    spectrum = graph.add("MatMul", [stacked, _add_bases(graph)], "frontend.spectrum")
    squares = graph.add("Mul", [spectrum, spectrum], "frontend.squares")
    filters = graph.weights("frontend.filters", frontend.filters(bands))
    both = graph.add("Concat", [filters, filters], "frontend.filters_of_both", axis=0)
    energies = graph.add("MatMul", [squares, both], "frontend.energies")
    floored = graph.add("Max", [energies, graph.floats("frontend.floor", frontend.FLOOR)], "frontend.floored")
    natural = graph.add("Log", [floored], "frontend.natural_log")
    log_mel = graph.add(
        "Mul", [natural, graph.floats("frontend.log10", 1.0 / np.log(10.0))], "frontend.log_mel"
    )
    up = graph.add("Add", ["lengths", less_one], "frontend.lengths_up")
    counts = graph.add("Div", [up, hop], "frontend.counts_raw")
    counts = graph.add("Min", [counts, frames], "frontend.counts")
    inside = "" if fixed else add_own_frames(graph, "frontend.inside", log_mel, counts)
    if not fixed:
        # log10 of the floor is -10: shift by it, so that zero stands for silence beyond an item
        lifted = graph.add("Add", [log_mel, graph.floats("frontend.ten", 10.0)], "frontend.lifted")
        lifted = graph.add("Mul", [lifted, inside], "frontend.lifted_own")
        log_mel = graph.add("Sub", [lifted, graph.floats("frontend.ten", 10.0)], "frontend.log_mel_own")
    loudest = graph.add("ReduceMax", [log_mel], "frontend.loudest", axes=[1, 2], keepdims=1)
    lowest = graph.add("Sub", [loudest, graph.floats("frontend.range", frontend.RANGE)], "frontend.lowest")
    clipped = graph.add("Max", [log_mel, lowest], "frontend.clipped")
    raised = graph.add("Add", [clipped, graph.floats("frontend.four", 4.0)], "frontend.raised")
    features = graph.add("Mul", [raised, graph.floats("frontend.quarter", 0.25)], "frontend.features")
    if not fixed:
        features = graph.add("Mul", [features, inside], "frontend.features_own")
    return features, counts


def _add_bases(graph: GraphBuilder) -> str:
    """`frontend.bases()` from angles that are whole multiples of one: stored it would be 0.8 MB.

    ONNX Runtime computes it once, as it loads the graph, in float64: a float32 angle is off by as much as
    shows in a quiet band beside a loud one.
    """
    half = frontend.FFT // 2 + 1
    samples = graph.ints("frontend.sample_column", np.arange(frontend.FFT)[:, None])
    bins = graph.ints("frontend.bin_row", np.arange(half)[None, :])
    turns = graph.add("Mul", [samples, bins], "frontend.turns")
    turns = graph.add("Mod", [turns, graph.ints("frontend.turn", [frontend.FFT])], "frontend.turns_within")
    counted = graph.add("Cast", [turns], "frontend.turns_double", to=TensorProto.DOUBLE)
    step = graph.doubles("frontend.angle", 2.0 * np.pi / frontend.FFT)
    angles = graph.add("Mul", [counted, step], "frontend.angles")
    waves = [graph.add(kind, [angles], f"frontend.{kind.lower()}") for kind in ("Cos", "Sin")]
    both = graph.add("Concat", waves, "frontend.waves", axis=1)
    window = graph.doubles("frontend.hann", frontend.hann()[:, None])
    windowed = graph.add("Mul", [both, window], "frontend.windowed_double")
    windowed = graph.add("Cast", [windowed], "frontend.windowed", to=TensorProto.FLOAT)
    pads = graph.ints("frontend.bases_pads", [0, 0, 3 * frontend.HOP - frontend.FFT, 0])
    return graph.add("Pad", [windowed, pads], "frontend.bases")


def add_places(graph: GraphBuilder, name: str, encoder: WhisperEncoder, values: str) -> str:
    """Positions of the frames of `values` (batch, frames, width): (frames, width).

    Sinusoids are computed as the graph is loaded (the table of whisper-tiny would be a fifth of its INT8
    graph), and in float64: angles go up to 1,500, of which float32 knows the fourth decimal.
    """
    table = array(encoder.embed_positions.weight)
    frames = add_frames(graph, f"{name}.frames", values)
    zero = graph.ints("zero", [0])
    if not np.allclose(table, sinusoids(*table.shape).numpy(), atol=1e-6):
        stored = graph.weights(f"{name}.embed_positions", table)
        return graph.add("Slice", [stored, zero, frames, zero], f"{name}.places")
    counted = graph.doubles(f"{name}.counted", np.arange(len(table))[:, None])
    angles = graph.add(
        "Mul", [counted, graph.doubles(f"{name}.rates", rates(table.shape[1]))], f"{name}.angles"
    )
    waves = [graph.add(kind, [angles], f"{name}.{kind.lower()}") for kind in ("Sin", "Cos")]
    both = graph.add("Concat", waves, f"{name}.waves", axis=1)
    stored = graph.add("Cast", [both], f"{name}.embed_positions", to=TensorProto.FLOAT)
    return graph.add("Slice", [stored, zero, frames, zero], f"{name}.places")


def add_encoder(
    graph: GraphBuilder, name: str, encoder: WhisperEncoder, features: str, counts: str, *, fixed: bool
) -> tuple[str, str, str | None]:
    """Hidden states (batch, frames, width), frames per item, and the bias for attention over them."""
    one, two = graph.ints("one", [1]), graph.ints("two", [2])
    convolved = add_convolution(graph, f"{name}.conv1", features, encoder.conv1)
    values = add_gelu(graph, f"{name}.conv1.gelu", convolved)
    if not fixed:
        inside = add_own_frames(graph, f"{name}.conv1.inside", values, counts)
        values = graph.add("Mul", [values, inside], f"{name}.conv1.own")
    convolved = add_convolution(graph, f"{name}.conv2", values, encoder.conv2)
    values = add_gelu(graph, f"{name}.conv2.gelu", convolved)
    up = graph.add("Add", [counts, one], f"{name}.counts_up")
    counts = graph.add("Div", [up, two], f"{name}.counts")
    values = graph.add("Add", [values, add_places(graph, name, encoder, values)], f"{name}.placed")
    bias = None
    if not fixed:
        bias = add_key_bias(graph, f"{name}.bias", add_own_frames(graph, f"{name}.inside", values, counts))
    for index, layer in enumerate(encoder.layers):
        if not isinstance(layer, EncoderLayer):
            raise TypeError(f"{name}.layers.{index}: unknown layer {type(layer).__name__}")
        values = add_encoder_layer(graph, f"{name}.layers.{index}", layer, values, bias)
    return add_layer_norm(graph, f"{name}.layer_norm", values, encoder.layer_norm), counts, bias
