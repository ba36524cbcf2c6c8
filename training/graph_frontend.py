"""The log-mel front end of training/frontend.py as ONNX nodes: products with constant bases."""

from __future__ import annotations

import onnx

from training.frontend import FrontendConfig, half_bases, mel_filters
from training.graph import GraphBuilder

FRAME_MULTIPLE = 4


def add_frontend(graph: GraphBuilder, config: FrontendConfig) -> tuple[str, str]:
    """Normalised log-mel (batch, features, frames) and frames per item; see training/frontend.py."""
    hop, bins = config.hop_samples, config.fft_samples // 2
    zero, one = graph.ints("zero", [0]), graph.ints("one", [1])
    hop_constant = graph.ints("hop", [hop])
    shape = graph.add("Shape", ["waveform"], "frontend.shape")
    total = graph.add("Gather", [shape, one], "frontend.samples", axis=0)
    batch = graph.add("Gather", [shape, zero], "frontend.batch", axis=0)
    column = graph.add("Unsqueeze", ["lengths", one], "frontend.lengths_column")
    own = graph.mask(total, column, "frontend.own")
    delay = graph.ints("frontend.delay_pads", [0, 1, 0, -1])
    delayed = graph.add("Pad", ["waveform", delay], "frontend.delayed")
    scaled = graph.add(
        "Mul", [delayed, graph.floats("frontend.preemphasis", config.preemphasis)], "frontend.scaled"
    )
    emphasised = graph.add("Sub", ["waveform", scaled], "frontend.emphasised")
    signal = graph.add("Mul", [emphasised, own], "frontend.signal")
    # One block of zeros before, and zeros after up to a whole number of blocks: a multiple of FRAME_MULTIPLE,
    # for the matrix kernels take rows in such groups, and sums are then the same whatever padding follows.
    span = graph.ints("frontend.frame_group", [FRAME_MULTIPLE * hop])
    groups = graph.add("Div", [total, span], "frontend.whole_groups")
    groups = graph.add("Add", [groups, one], "frontend.groups")
    multiple = graph.ints("frontend.frame_multiple", [FRAME_MULTIPLE])
    frames = graph.add("Mul", [groups, multiple], "frontend.frames")
    padded_size = graph.add("Mul", [frames, hop_constant], "frontend.padded_samples")
    missing = graph.add("Sub", [padded_size, total], "frontend.missing")
    halves = _add_halves if config.half_window == hop else _add_wide_halves
    even, odd = halves(graph, config, signal, batch, missing)
    # the outermost mel edges are 0 Hz and the Nyquist frequency, so the last bin has no weight anywhere
    cosine, sine = half_bases(config)
    real = graph.add("MatMul", [even, graph.weights("frontend.cosine", cosine[:, :bins])], "frontend.real")
    imaginary = graph.add(
        "MatMul", [odd, graph.weights("frontend.sine", sine[:, :bins])], "frontend.imaginary"
    )
    real_power = graph.add("Mul", [real, real], "frontend.real_power")
    imaginary_power = graph.add("Mul", [imaginary, imaginary], "frontend.imaginary_power")
    power = graph.add("Add", [real_power, imaginary_power], "frontend.power")
    mel = graph.weights("frontend.mel_filters", mel_filters(config)[:, :bins].T)
    energies = graph.add("MatMul", [power, mel], "frontend.mel")
    guarded = graph.add(
        "Add", [energies, graph.floats("frontend.log_guard", config.log_guard)], "frontend.guarded"
    )
    log_mel = graph.add("Log", [guarded], "frontend.log_mel")
    whole_frames = graph.add("Div", ["lengths", hop_constant], "frontend.whole_frames")
    counts = graph.add("Add", [whole_frames, one], "frontend.frame_counts")
    return _add_normalisation(graph, config, log_mel, counts, frames), counts


def _add_blocks(graph: GraphBuilder, hop: int, signal: str, batch: str, before: str, after: str) -> str:
    """The signal with zeros on both sides as blocks of one hop, (batch, blocks, hop)."""
    zero = graph.ints("zero", [0])
    pads = graph.add("Concat", [zero, before, zero, after], "frontend.pads", axis=0)
    padded = graph.add("Pad", [signal, pads], "frontend.padded")
    block_shape = graph.add(
        "Concat",
        [batch, graph.ints("minus_one", [-1]), graph.ints("hop", [hop])],
        "frontend.block_shape",
        axis=0,
    )
    return graph.add("Reshape", [padded, block_shape], "frontend.blocks")


def _add_turned(graph: GraphBuilder, before: str) -> str:
    """The last axis from its end to its beginning."""
    limit, last_axis = graph.ints("before_start", [-(2**31)]), graph.ints("axis_last", [-1])
    return graph.add(
        "Slice", [before, last_axis, limit, graph.ints("axis_height", [2]), last_axis], "frontend.turned"
    )


def _add_halves(
    graph: GraphBuilder, config: FrontendConfig, signal: str, batch: str, missing: str
) -> tuple[str, str]:
    """Sum and difference of both halves of frames that are two blocks, each (batch, frames, hop)."""
    zero, one, last_axis = graph.ints("zero", [0]), graph.ints("one", [1]), graph.ints("axis_last", [-1])
    hop = graph.ints("hop", [config.hop_samples])
    blocks = _add_blocks(graph, config.hop_samples, signal, batch, hop, missing)
    after = graph.add("Slice", [blocks, one, graph.ints("far", [2**31 - 1]), one], "frontend.after")
    before = graph.add("Slice", [blocks, zero, last_axis, one], "frontend.before")
    turned = _add_turned(graph, before)
    even = graph.add("Add", [after, turned], "frontend.even")
    return even, graph.add("Sub", [after, turned], "frontend.odd")


def _add_wide_halves(
    graph: GraphBuilder, config: FrontendConfig, signal: str, batch: str, missing: str
) -> tuple[str, str]:
    """The same where a half reaches into a second block; (batch, frames, half_window).

    Other names than above, by which the service's kernels know frames of two blocks.
    """
    hop, rest = config.hop_samples, config.half_window - config.hop_samples
    if not 0 < rest <= hop:
        raise ValueError(f"window_samples = {config.window_samples}: expected {2 * hop} to {4 * hop}")
    far, axes = 2**31 - 1, graph.ints("axes_1_2", [1, 2])
    two_hops = graph.ints("frontend.two_hops", [2 * hop])
    behind = graph.add("Add", [missing, graph.ints("hop", [hop])], "frontend.behind")
    blocks = _add_blocks(graph, hop, signal, batch, two_hops, behind)

    def part(name: str, starts: tuple[int, int], ends: tuple[int, int]) -> str:
        where = [graph.ints(f"frontend.{name}.starts", starts), graph.ints(f"frontend.{name}.ends", ends)]
        return graph.add("Slice", [blocks, *where, axes], f"frontend.{name}")

    after = [part("after_first", (2, 0), (-1, far)), part("after_second", (3, 0), (far, rest))]
    before = [part("before_first", (0, hop - rest), (-3, far)), part("before_second", (1, 0), (-2, far))]
    whole = graph.add("Concat", after, "frontend.after", axis=2)
    turned = _add_turned(graph, graph.add("Concat", before, "frontend.before", axis=2))
    even = graph.add("Add", [whole, turned], "frontend.even_wide")
    return even, graph.add("Sub", [whole, turned], "frontend.odd_wide")


def _add_normalisation(
    graph: GraphBuilder, config: FrontendConfig, log_mel: str, counts: str, frames: str
) -> str:
    """Mean 0 and deviation 1 per feature over an item's own frames; (batch, features, frames)."""
    one = graph.ints("one", [1])
    column = graph.add("Unsqueeze", [counts, one], "frontend.counts_column")
    own_row = graph.mask(frames, column, "frontend.own_frames")
    row = graph.add("Unsqueeze", [own_row, one], "frontend.own_frames_row")
    own = graph.add("Unsqueeze", [own_row, graph.ints("axis_height", [2])], "frontend.own_frames_column")
    count = graph.add("Cast", [counts], "frontend.count_float", to=onnx.TensorProto.FLOAT)
    count = graph.add("Unsqueeze", [count, graph.ints("axes_1_2", [1, 2])], "frontend.count")
    # Sums are products with a row of ones and zeros: unlike ReduceSum's, their order does not depend on the
    # batch. The mean is taken twice, so that a constant feature (digital silence) centres to zero exactly.
    centred = log_mel
    for step in ("first", "second"):
        total = graph.add("MatMul", [row, centred], f"frontend.{step}_total")
        mean = graph.add("Div", [total, count], f"frontend.{step}_mean")
        centred = graph.add("Sub", [centred, mean], f"frontend.{step}_centred")
    centred = graph.add("Mul", [centred, own], "frontend.centred")
    squared = graph.add("Mul", [centred, centred], "frontend.squared")
    squares = graph.add("MatMul", [row, squared], "frontend.squares")
    one_float = graph.floats("one_float", 1.0)
    freedom = graph.add("Sub", [count, one_float], "frontend.freedom_raw")
    freedom = graph.add("Max", [freedom, one_float], "frontend.freedom")
    variance = graph.add("Div", [squares, freedom], "frontend.variance")
    deviation = graph.add("Sqrt", [variance], "frontend.deviation_raw")
    deviation = graph.add(
        "Add", [deviation, graph.floats("frontend.std_guard", config.std_guard)], "frontend.deviation"
    )
    normalised = graph.add("Div", [centred, deviation], "frontend.normalised")
    return graph.add("Transpose", [normalised], "frontend.features", perm=[0, 2, 1])
