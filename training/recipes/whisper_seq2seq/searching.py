"""Greedy search of a decoder as an ONNX Loop with cached keys.

A step of the loop sees one token; keys and values of earlier tokens are carried from step to step, those of
the audio are computed once outside.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from training.graph import GraphBuilder
from training.recipes.whisper_seq2seq.model import IMPOSSIBLE, LEAST_REPEATED, LONGEST_PHRASE, Prompt
from training.recipes.whisper_seq2seq.placing import Search
from training.transformer_graph import array


class Speaker(Protocol):
    """A decoder, as far as the search needs to know it."""

    prompt: Prompt
    vocabulary: int
    layers: int
    heads: int
    width: int
    positions: int
    """Of tokens, prompt and all."""
    keys_turned: bool
    """Whether keys are kept as (batch, heads, width / heads, tokens), as products want them."""
    suppress: npt.NDArray[np.float32]
    """(2, vocabulary): added to what a text goes on with, and to what it begins with."""

    def heads_of(self, layer: int) -> list[int]:
        """Those of one layer whose attention follows the speech."""
        ...

    def add_step(
        self, graph: GraphBuilder, token: str, index: str, heard: list[tuple[str, str]], bias: str | None
    ) -> tuple[str, list[str]]:
        """Logits (batch, 1, vocabulary) after a token (batch, 1) at a place (1,), and the grown caches.

        Earlier keys and values (batch, heads, tokens, width / heads) are `step.cache_0`, `step.cache_1` and
        so on, one after the other for each layer. The shares of a layer's attention on the audio are called
        `decoder.layers.N.encoder_attn.shares`.
        """
        ...


def add_row_of(graph: GraphBuilder, output: str, token: str, scale: Tensor | None) -> str:
    """What tokens (batch, 1) are as inputs, (batch, 1, width), of the output matrix (width, vocabulary)."""
    embedded = graph.add("Gather", [output, token], "step.embedded_first", axis=1)
    embedded = graph.add("Transpose", [embedded], "step.embedded", perm=[1, 2, 0])
    if scale is None:
        return embedded
    factor = graph.weights("decoder.embed_scale", array(scale))
    return graph.add("Mul", [embedded, factor], "step.embedded_scaled")


class _Company(NamedTuple):
    """At least two rows for the products of a step."""

    batch: str
    """(1,) int64, the items there are."""
    rows: str
    """(1,) int64, at least two."""
    pads: dict[int, str]
    """For values of one and of four dimensions: zeros around (batch, ...) to make (rows, ...)."""

    @classmethod
    def of(cls, graph: GraphBuilder, batch: str) -> _Company:
        """For a batch of so many items."""
        rows = graph.add("Max", [batch, graph.ints("two", [2])], "search.rows")
        missing = graph.add("Sub", [rows, batch], "search.missing")
        pads = {}
        for rank in (1, 4):
            before = graph.ints(f"search.zeros_{rank}", [0] * rank)
            after = graph.ints(f"search.zeros_{rank - 1}", [0] * (rank - 1))
            pads[rank] = graph.add("Concat", [before, missing, after], f"search.pads_{rank}", axis=0)
        return cls(batch, rows, pads)

    def padded(self, graph: GraphBuilder, values: str) -> str:
        """(batch, ...) of four dimensions -> (rows, ...)."""
        return graph.add("Pad", [values, self.pads[4]], f"{values}.rows")

    def without(self, graph: GraphBuilder, rows: str, name: str) -> str:
        """The items there are, (batch, ...), of (rows, ...)."""
        zero = graph.ints("zero", [0])
        return graph.add("Slice", [rows, zero, self.batch, zero], name)


def add_search(
    graph: GraphBuilder,
    speaker: Speaker,
    heard: list[tuple[str, str]],
    bias: str | None,
    limit: str,
    *,
    company: bool,
) -> Search:
    """Greedy search as a loop.

    Args:
        graph: what it is added to.
        speaker: the decoder.
        heard: of the audio, keys and values for every layer, of `add_keys_and_memory`.
        bias: of the attention on it, or None.
        limit: (batch,) int64, tokens of text that an item may have.
        company: see `export_graph`.
    """
    prompt = speaker.prompt.ids
    shape = graph.add("Shape", ["waveform"], "search.shape")
    batch = graph.add("Gather", [shape, graph.ints("zero", [0])], "search.batch", axis=0)
    longest = graph.add("ReduceMax", [limit], "search.longest", keepdims=1)
    wanted = graph.add("Add", [longest, graph.ints("search.prompt_size", [len(prompt)])], "search.wanted")
    room = graph.add("Min", [wanted, graph.ints("search.room", [speaker.positions - 1])], "search.steps_row")
    count = graph.add("Squeeze", [room], "search.steps")
    first = graph.add("Expand", [graph.ints("search.start", [prompt[0]]), batch], "search.first")
    falses = helper.make_tensor("value", TensorProto.BOOL, [1], [False])
    done = graph.add("ConstantOfShape", [batch], "search.none_done", value=falses)
    beside = _Company.of(graph, batch) if company else None
    rows = batch
    if beside:
        rows = beside.rows
        heard = [(beside.padded(graph, keys), beside.padded(graph, memory)) for keys, memory in heard]
        bias = bias and beside.padded(graph, bias)
    size = speaker.width // speaker.heads
    heads, none = graph.ints("search.heads", [speaker.heads]), graph.ints("zero", [0])
    per_head = graph.ints("search.head_size", [size])
    value_shape = graph.add("Concat", [rows, heads, none, per_head], "search.value_shape", axis=0)
    key_shape = value_shape
    if speaker.keys_turned:
        key_shape = graph.add("Concat", [rows, heads, per_head, none], "search.key_shape", axis=0)
    keys = graph.add("ConstantOfShape", [key_shape], "search.no_keys")
    values = graph.add("ConstantOfShape", [value_shape], "search.no_values")
    none_yet = graph.add("ConstantOfShape", [batch], "search.none_cut", value=_filled(0))
    phrase = graph.ints("search.longest_phrase", [LONGEST_PHRASE])
    phrases = graph.add("Concat", [batch, phrase], "search.phrase_shape", axis=0)
    recent = graph.add("ConstantOfShape", [phrases], "search.none_recent", value=_filled(-1))
    runs = graph.add("ConstantOfShape", [phrases], "search.no_runs", value=_filled(0))
    least = _add_least_repeats(graph, limit)
    _add_mostly_alike(graph, "search.suppress", speaker.suppress)
    _add_mostly_alike(graph, "search.blank", _blank(speaker))
    body = _body(graph.inner(), speaker, heard, bias, limit, least, beside)
    caches = [none_yet, recent, runs, *(name for _ in heard for name in (keys, values))]
    finals = ["search.last", "search.done", "search.cut", "search.recent", "search.runs"]
    finals += [f"search.cache_{index}" for index in range(2 * len(heard))]
    graph.nodes.append(
        helper.make_node(
            "Loop",
            [count, "", first, done, *caches],
            [*finals, "search.log_probs", "search.valid", "search.heard"],
            name="search",
            body=body,
        )
    )
    counted = graph.add("Cast", ["search.valid"], "search.valid_count", to=TensorProto.INT64)
    found = graph.add("ReduceSum", [counted, graph.ints("zero", [0])], "search.found_all", keepdims=0)
    found = graph.add("Sub", [found, "search.cut"], "search.found")
    if len(prompt) > 1:
        return Search("search.log_probs", "search.heard", found, len(prompt))
    return _with_blank(graph, speaker, batch, found)


def _with_blank(graph: GraphBuilder, speaker: Speaker, batch: str, found: str) -> Search:
    """The same after a step that found nothing, for frames between tokens: one token of a prompt has none."""
    one = graph.ints("one", [1])
    every = graph.add(
        "Concat",
        [one, batch, graph.ints("search.vocabulary", [speaker.vocabulary])],
        "search.blank_shape",
        axis=0,
    )
    blank = graph.add("Expand", ["search.blank", every], "search.blank_step")
    steps = graph.add("Concat", [blank, "search.log_probs"], "search.steps_after_blank", axis=0)
    first = graph.add(
        "Slice", ["search.heard", graph.ints("zero", [0]), one, graph.ints("zero", [0])], "search.heard_first"
    )
    heard = graph.add("Concat", [first, "search.heard"], "search.heard_after_blank", axis=0)
    return Search(steps, heard, found, 2)


def _blank(speaker: Speaker) -> npt.NDArray[np.float32]:
    """Log-probabilities (vocabulary,) of a certain blank."""
    blank = np.full(speaker.vocabulary, IMPOSSIBLE, np.float32)
    blank[speaker.prompt.end] = 0.0
    return blank


def _add_mostly_alike(graph: GraphBuilder, name: str, values: npt.NDArray[np.float32]) -> str:
    """A constant, of which a file holds what differs from the usual value; made as the graph is loaded."""
    found, counts = np.unique(values, return_counts=True)
    usual = helper.make_tensor("value", TensorProto.FLOAT, [1], [found[counts.argmax()]])
    places = np.argwhere(values != found[counts.argmax()])
    shape = graph.ints(f"{name}.shape", values.shape)
    if not len(places):
        return graph.add("ConstantOfShape", [shape], name, value=usual)
    alike = graph.add("ConstantOfShape", [shape], f"{name}.alike", value=usual)
    others = graph.weights(f"{name}.others", values[tuple(places.T)])
    return graph.add("ScatterND", [alike, graph.ints(f"{name}.places", places), others], name)


def _filled(value: int) -> onnx.TensorProto:
    """For ConstantOfShape."""
    return helper.make_tensor("value", TensorProto.INT64, [1], [value])


def _body(
    graph: GraphBuilder,
    speaker: Speaker,
    heard: list[tuple[str, str]],
    bias: str | None,
    limit: str,
    least: str,
    beside: _Company | None,
) -> onnx.GraphProto:
    """One step: token (batch,) and caches in, next token and longer caches out."""
    prompt = speaker.prompt
    one = graph.ints("one", [1])
    index = graph.add("Reshape", ["step.index", one], "step.index_row")
    tokens = "step.token"
    if beside:
        tokens = graph.add("Pad", [tokens, beside.pads[1]], "step.token_rows")
    token = graph.add("Unsqueeze", [tokens, one], "step.token_column")
    logits, caches = speaker.add_step(graph, token, index, heard, bias)
    _add_heard(graph, speaker, beside)
    flat = graph.add("Squeeze", [logits, one], "step.flat")
    if beside:
        flat = beside.without(graph, flat, "step.flat_items")
    following = graph.add("Add", [index, one], "step.following")
    size = graph.ints("step.prompt_size", [len(prompt.ids)])
    begins = graph.add("Equal", [following, size], "step.begins")
    row = graph.add("Cast", [begins], "step.suppress_row", to=TensorProto.INT64)
    suppress = graph.add("Gather", ["search.suppress", row], "step.suppress", axis=0)
    allowed = graph.add("Add", [flat, suppress], "step.allowed")
    found = graph.add("LogSoftmax", [allowed], "step.found", axis=-1)
    best = graph.add("ArgMax", [found], "step.best", axis=-1, keepdims=0)
    prompted = graph.add("Less", [following, size], "step.prompted")
    last = graph.ints("step.prompt_last", [len(prompt.ids) - 1])
    within = graph.add("Min", [following, last], "step.within")
    forced = graph.add("Gather", [graph.ints("step.prompt", prompt.ids), within], "step.forced", axis=0)
    graph.add("Where", [prompted, forced, best], "step.next")
    graph.add("Where", [prompted, "search.blank", found], "step.log_probs")
    text = graph.add("Not", [prompted], "step.text")
    number_of_text = graph.add("Sub", [following, size], "step.text_number")
    full = graph.add("GreaterOrEqual", [number_of_text, limit], "step.full")
    ended = graph.add("Equal", [best, graph.ints("step.end", [prompt.end])], "step.ended")
    over = graph.add("Or", [ended, full], "step.over")
    over = graph.add("And", [over, text], "step.over_text")
    finished = graph.add("Or", ["step.done", over], "step.finished_or_over")
    finished = _add_repeats(graph, best, text, finished, least)
    going = graph.add("Not", [finished], "step.going")
    graph.add("And", [going, text], "step.valid")
    count = graph.add("Cast", [going], "step.going_count", to=TensorProto.INT64)
    any_going = graph.add("ReduceMax", [count], "step.any", keepdims=0)
    graph.add("Cast", [any_going], "step.continue", to=TensorProto.BOOL)
    inputs = [
        helper.make_tensor_value_info("step.index", TensorProto.INT64, []),
        helper.make_tensor_value_info("step.condition", TensorProto.BOOL, []),
        helper.make_tensor_value_info("step.token", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("step.done", TensorProto.BOOL, ["batch"]),
        *_repeats_info("step.cut", "step.recent", "step.runs"),
        *(_cache_info(f"step.cache_{i}", i, speaker) for i in range(len(caches))),
    ]
    outputs = [
        helper.make_tensor_value_info("step.continue", TensorProto.BOOL, []),
        helper.make_tensor_value_info("step.next", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("step.finished", TensorProto.BOOL, ["batch"]),
        *_repeats_info("step.cut_after", "step.recent_after", "step.runs_after"),
        *(_cache_info(name, i, speaker) for i, name in enumerate(caches)),
        helper.make_tensor_value_info("step.log_probs", TensorProto.FLOAT, ["batch", speaker.vocabulary]),
        helper.make_tensor_value_info("step.valid", TensorProto.BOOL, ["batch"]),
        helper.make_tensor_value_info("step.heard", TensorProto.FLOAT, ["batch", None]),
    ]
    # ONNX Runtime knows the type of every output but this one of MultiHeadAttention
    scores = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for node in graph.nodes
        if node.op_type == "MultiHeadAttention"
        for name in node.output[3:]
    ]
    return helper.make_graph(graph.nodes, "step", inputs, outputs, value_info=scores)


def _repeats_info(*names: str) -> list[onnx.ValueInfoProto]:
    shapes: tuple[list[str | int], ...] = (["batch"], ["batch", LONGEST_PHRASE], ["batch", LONGEST_PHRASE])
    return [
        helper.make_tensor_value_info(name, TensorProto.INT64, shape)
        for name, shape in zip(names, shapes, strict=True)
    ]


def _add_least_repeats(graph: GraphBuilder, limit: str) -> str:
    """See model.least_repeats."""
    half = graph.add("Div", [limit, graph.ints("two", [2])], "search.half")
    most = graph.ints("search.least_repeated", [LEAST_REPEATED])
    half = graph.add("Min", [half, most], "search.half_or_ten")
    half = graph.add("Unsqueeze", [half, graph.ints("one", [1])], "search.half_column")
    twice = graph.ints("search.twice", [2 * length for length in range(1, LONGEST_PHRASE + 1)])
    return graph.add("Max", [half, twice], "search.least_repeats")


def _add_repeats(graph: GraphBuilder, best: str, text: str, finished: str, least: str) -> str:
    """See model.Repeats; which items are finished, those in a loop among them."""
    zero, one = graph.ints("zero", [0]), graph.ints("one", [1])
    column = graph.add("Unsqueeze", [best, one], "step.best_column")
    same = graph.add("Equal", ["step.recent", column], "step.same")
    longer = graph.add("Add", ["step.runs", one], "step.runs_longer")
    runs = graph.add("Where", [same, longer, zero], "step.runs_now")
    graph.add("Where", [text, runs, "step.runs"], "step.runs_after")
    last = graph.ints("axis_last", [-1])
    earlier = graph.add("Slice", ["step.recent", zero, last, one], "step.recent_earlier")
    recent = graph.add("Concat", [column, earlier], "step.recent_now", axis=1)
    graph.add("Where", [text, recent, "step.recent"], "step.recent_after")
    looping = graph.add("GreaterOrEqual", [runs, least], "step.looping")
    lengths = graph.add("Where", [looping, runs, zero], "step.loop_lengths")
    length = graph.add("ReduceMax", [lengths], "step.loop_length", axes=[1], keepdims=0)
    looped = graph.add("And", [graph.add("Greater", [length, zero], "step.in_loop"), text], "step.looped")
    newly = graph.add("And", [graph.add("Not", [finished], "step.unfinished"), looped], "step.newly_looped")
    before = graph.add("Sub", [length, one], "step.loop_before")
    graph.add("Where", [newly, before, "step.cut"], "step.cut_after")
    return graph.add("Or", [finished, looped], "step.finished")


def _add_heard(graph: GraphBuilder, speaker: Speaker, beside: _Company | None) -> None:
    """Mean of the attention on the audio over the heads that follow the speech, (batch, audio frames)."""
    sums, followers = [], 0
    for layer in range(speaker.layers):
        if heads := speaker.heads_of(layer):
            followers += len(heads)
            name = f"decoder.layers.{layer}.encoder_attn"
            chosen = graph.add(
                "Gather",
                [f"{name}.shares", graph.ints(f"{name}.followers", heads)],
                f"{name}.followed",
                axis=1,
            )
            axes = graph.ints("step.heads_and_token", [1, 2])
            sums.append(graph.add("ReduceSum", [chosen, axes], f"{name}.heard_sum", keepdims=0))
    total = graph.add("Sum", sums, "step.heard_sum")
    if beside:
        total = beside.without(graph, total, "step.heard_items")
    graph.add("Div", [total, graph.floats("step.followers", float(followers))], "step.heard")


def _cache_info(name: str, index: int, speaker: Speaker) -> onnx.ValueInfoProto:
    """Keys for even numbers, values for odd."""
    heads, size = speaker.heads, speaker.width // speaker.heads
    turned = speaker.keys_turned and index % 2 == 0
    shape: list[str | int | None] = ["batch", heads, *((size, None) if turned else (None, size))]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
