"""Where a decoder's tokens stand, as ONNX nodes: `places_of` and `spread` of model.py."""

from __future__ import annotations

from typing import NamedTuple

from onnx import TensorProto

from training.graph import GraphBuilder
from training.recipes.whisper_seq2seq.model import (
    IMPOSSIBLE,
    NEVER,
    SMOOTHED,
    SMOOTHED_PADS,
    STEADY,
    TOKEN_FRAMES,
)
from training.transformer_graph import add_size


class Search(NamedTuple):
    """What greedy search leaves, one row per step, the prompt's among them."""

    steps: str
    """Log-probabilities (steps, batch, vocabulary); those of the prompt's steps are certain blanks."""
    heard: str
    """(steps, batch, audio frames): how much was listened to each."""
    found: str
    """(batch,) int64 text tokens."""
    prompt: int
    """Rows of the prompt, the last of which finds the first text token."""


class _Text:
    """The rows of the search that find text."""

    def __init__(self, graph: GraphBuilder, search: Search) -> None:
        self.graph = graph
        self.start = graph.ints("text.start", [search.prompt - 1])
        bounds = [self.start, graph.ints("far", [2**31 - 1]), graph.ints("zero", [0]), graph.ints("one", [1])]
        self.heard = graph.add("Slice", [search.heard, *bounds], "text.heard")
        self.order = _counted(graph, "text.order", add_size(graph, "text.steps", self.heard, 0))
        found = _stretched(graph, "text.found", search.found, 0)
        self.valid = graph.add("Less", [_stretched(graph, "text.rows", self.order, 1), found], "text.valid")


def _stretched(graph: GraphBuilder, name: str, values: str, axis: int) -> str:
    """With a new axis of length one."""
    return graph.add("Unsqueeze", [values, graph.ints(f"axis_{axis}", [axis])], name)


def _counted(graph: GraphBuilder, name: str, size: str) -> str:
    """0 to a size (1,), less one."""
    first, step = (graph.ints("zero", [0]), graph.ints("one", [1]))
    bounds = [graph.add("Squeeze", [part], f"{name}.{i}") for i, part in enumerate((first, size, step))]
    return graph.add("Range", bounds, name)


def add_places(graph: GraphBuilder, search: Search, counts: str, frames: str) -> str:
    """See `places_of`: (steps, batch) int64, a row per step that finds text; counts and frames (batch,)."""
    text = _Text(graph, search)
    best = _best_places(graph, text, counts, frames)
    one, two = graph.ints("one", [1]), graph.ints("two", [2])
    column, row = (_stretched(graph, f"places.order_{axis}", text.order, axis) for axis in (1, 0))
    before = graph.add("LessOrEqual", [row, column], "places.before")
    after = graph.add("GreaterOrEqual", [row, column], "places.after")
    kept = _in_order(graph, text, best, _stretched(graph, "places.before_all_items", before, 2))

    def extreme(values: str, name: str, of: str, *, earlier: bool) -> str:
        """The largest of the steps before and at each, or the smallest of those at and after; `of` counts."""
        near = _stretched(graph, f"{name}.near", before if earlier else after, 2)
        near = graph.add("And", [near, _stretched(graph, f"{name}.of", of, 0)], f"{name}.counted")
        beyond = graph.ints(
            "places.before_all" if earlier else "places.never", [-NEVER if earlier else NEVER]
        )
        rows = _stretched(graph, f"{name}.rows", values, 0)
        chosen = graph.add("Where", [near, rows, beyond], f"{name}.chosen")
        return graph.add("ReduceMax" if earlier else "ReduceMin", [chosen], name, axes=[1], keepdims=0)

    known_early = extreme(best, "places.known_early", kept, earlier=True)
    known_late = extreme(best, "places.known_late", kept, earlier=False)
    first = graph.add("Less", [known_early, graph.ints("zero", [0])], "places.first")
    early = graph.add("Where", [first, known_late, known_early], "places.early")
    final = graph.add("Equal", [known_late, graph.ints("places.never", [NEVER])], "places.final")
    late = graph.add("Where", [final, known_early, known_late], "places.late")
    middle = graph.add("Div", [graph.add("Add", [early, late], "places.both"), two], "places.middle")
    twice = graph.add("Mul", [column, two], "places.twice")
    packed = graph.add("Sub", [middle, twice], "places.packed")
    apart = extreme(packed, "places.packed_late", text.valid, earlier=True)
    apart = graph.add("Add", [apart, twice], "places.apart")
    last = graph.add("Sub", ["text.found", one], "places.last")
    rest = graph.add("Mul", [graph.add("Sub", [last, column], "places.rest"), two], "places.rest_frames")
    end = graph.add("Sub", [_stretched(graph, "places.frames", frames, 0), one], "places.end")
    return graph.add("Min", [apart, graph.add("Sub", [end, rest], "places.latest")], "places")


def _in_order(graph: GraphBuilder, text: _Text, best: str, before: str) -> str:
    """Which tokens' places count, (steps, batch) bool; `before` is (steps, steps, 1)."""
    one = graph.ints("one", [1])
    theirs, own = _stretched(graph, "order.theirs", best, 0), _stretched(graph, "order.own", best, 1)
    earlier = graph.add(
        "And", [graph.add("Greater", [theirs, own], "order.greater"), before], "order.earlier"
    )
    later = graph.add("Transpose", [earlier], "order.later", perm=[1, 0, 2])
    crossed = graph.add("Or", [earlier, later], "order.either")
    for axis in (0, 1):
        valid = _stretched(graph, f"order.valid_{axis}", text.valid, axis)
        crossed = graph.add("And", [crossed, valid], f"order.crossed_{axis}")
    crossed = graph.add("Cast", [crossed], "order.crossed", to=TensorProto.INT64)
    times = graph.add("ReduceSum", [crossed, one], "order.times", keepdims=0)
    of_theirs = graph.add("Mul", [crossed, _stretched(graph, "order.times_row", times, 0)], "order.of_theirs")
    of_theirs = graph.add("ReduceSum", [of_theirs, one], "order.times_of_theirs", keepdims=0)
    squares = graph.add("Mul", [times, times], "order.squares")
    kept = graph.add("LessOrEqual", [squares, of_theirs], "order.few")
    return graph.add("And", [kept, text.valid], "order.kept")


def _best_places(graph: GraphBuilder, text: _Text, counts: str, frames: str) -> str:
    """The output frame where each token's attention is most above that of the others, (steps, batch)."""
    zero = graph.ints("zero", [0])
    valid = graph.add("Cast", [text.valid], "best.valid", to=TensorProto.FLOAT)
    own = _stretched(graph, "best.own", valid, 2)
    number = graph.add("ReduceSum", [own, zero], "best.own_number", keepdims=1)
    number = graph.add("Max", [number, graph.floats("one_float", 1.0)], "best.number")

    def mean(values: str, name: str) -> str:
        total = graph.add("Mul", [values, own], f"{name}.own")
        total = graph.add("ReduceSum", [total, zero], f"{name}.sum", keepdims=1)
        return graph.add("Div", [total, number], name)

    steady = graph.floats("best.steady", STEADY)
    away = graph.add("Sub", [text.heard, mean(text.heard, "best.mean")], "best.away")
    variance = mean(graph.add("Mul", [away, away], "best.squares"), "best.variance")
    deviation = graph.add("Sqrt", [variance], "best.deviation")
    deviation = graph.add("Add", [deviation, steady], "best.deviation_steady")
    above = graph.add("Div", [away, deviation], "best.away_steady")
    above = graph.add("Add", [above, text.heard], "best.above")
    audio = add_size(graph, "best.audio", text.heard, 2)
    inside = graph.mask(audio, _stretched(graph, "best.counts", counts, 1), "best.inside")
    inside = _stretched(graph, "best.inside_row", inside, 0)

    def pooled(values: str, name: str) -> str:
        pads = list(SMOOTHED_PADS)
        kernel = [SMOOTHED]
        return graph.add(
            "AveragePool", [values], name, kernel_shape=kernel, strides=[2], pads=pads, count_include_pad=1
        )

    share = graph.add("Max", [pooled(inside, "best.share"), steady], "best.share_steady")
    smooth = pooled(graph.add("Mul", [above, inside], "best.above_inside"), "best.pooled")
    smooth = graph.add("Div", [smooth, share], "best.smooth")
    width = add_size(graph, "best.width", smooth, 2)
    real = graph.mask(width, _stretched(graph, "best.frames", frames, 1), "best.real_float")
    real = graph.add("Cast", [real], "best.real", to=TensorProto.BOOL)
    masked = graph.add("Where", [real, smooth, graph.floats("best.nowhere", IMPOSSIBLE)], "best.masked")
    return graph.add("ArgMax", [masked], "best", axis=2, keepdims=0)


def add_frames(graph: GraphBuilder, search: Search, places: str, frames: str) -> None:
    """See `spread`; what shows no token is the first step of the search, a certain blank."""
    zero, one = graph.ints("zero", [0]), graph.ints("one", [1])
    frame = _counted(graph, "spread.frame", graph.add("ReduceMax", [frames], "spread.longest", keepdims=1))
    never = graph.ints("places.never", [NEVER])
    starts = graph.add("Where", ["text.valid", places, never], "spread.starts")
    starts = graph.add("Transpose", [starts], "spread.starts_of_items", perm=[1, 0])
    rows, column = _stretched(graph, "spread.rows", starts, 1), _stretched(graph, "spread.column", frame, 1)
    begun = graph.add("LessOrEqual", [rows, column], "spread.begun")
    begun = graph.add("Cast", [begun], "spread.begun_count", to=TensorProto.INT64)
    number = graph.add("ReduceSum", [begun, graph.ints("axis_2", [2])], "spread.number", keepdims=0)
    index = graph.add("Sub", [number, one], "spread.index")
    safe = graph.add("Max", [index, zero], "spread.safe")
    items = add_size(graph, "spread.items", starts, 0)
    shape = graph.add("Concat", [items, one], "spread.one_more_shape", axis=0)
    one_more = graph.add("Expand", [never, shape], "spread.one_more")
    longer = graph.add("Concat", [starts, one_more], "spread.longer", axis=1)
    begins = graph.add("GatherElements", [longer, safe], "spread.begins", axis=1)
    place = graph.add("Add", [safe, one], "spread.next_place")
    following = graph.add("GatherElements", [longer, place], "spread.following", axis=1)
    ends = graph.add("Add", [begins, graph.ints("spread.token_frames", [TOKEN_FRAMES])], "spread.ends")
    free = graph.add("Sub", [following, one], "spread.before_following")
    free = graph.add("Max", [free, graph.add("Add", [begins, one], "spread.least")], "spread.free")
    shown = graph.add("Less", [frame, graph.add("Min", [ends, free], "spread.until")], "spread.short")
    inside = graph.add("GreaterOrEqual", [index, zero], "spread.inside")
    shown = graph.add("And", [shown, inside], "spread.shown")
    step = graph.add("Add", [safe, "text.start"], "spread.step")
    step = graph.add("Where", [shown, step, zero], "spread.chosen")
    item = _stretched(graph, "spread.item_column", _counted(graph, "spread.item", items), 1)
    item = graph.add("Expand", [item, graph.add("Shape", [step], "spread.shape")], "spread.item_everywhere")
    pair = [_stretched(graph, f"{name}.pair", name, -1) for name in (step, item)]
    graph.add("GatherND", [search.steps, graph.add("Concat", pair, "spread.pairs", axis=-1)], "log_probs")
    graph.add("Identity", [frames], "frame_lengths")
