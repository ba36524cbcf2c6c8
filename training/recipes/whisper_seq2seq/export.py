"""WhisperSeq2Seq -> one graph: front end, encoder, greedy search as an ONNX Loop with cached keys, frames.

A step of the loop sees one token; keys and values of earlier tokens are carried from step to step, those of
the audio are computed once outside.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from training.graph import GraphBuilder
from training.recipes.whisper_ctc.export import add_encoder, add_features
from training.recipes.whisper_seq2seq.model import (
    IMPOSSIBLE,
    LEAST_REPEATED,
    LONGEST_PHRASE,
    DecoderConfig,
    DecoderLayer,
    WhisperSeq2Seq,
)
from training.recipes.whisper_seq2seq.placing import Search, add_frames, add_places
from training.transformer_graph import (
    add_attention_over,
    add_feed_forward,
    add_keys_and_memory,
    add_layer_norm,
    array,
)

FRAME_STRIDE_S = 0.04
"""Of the frames over which the tokens are spread; at most every second holds one."""


def export_graph(model: WhisperSeq2Seq, *, company: bool = False) -> onnx.ModelProto:
    """The bundle's float32 graph.

    With ``company`` a clip that is alone is searched beside an item that hears nothing. ONNX Runtime
    multiplies one row in another order than several; with weights of four bits, whose inputs are rounded, a
    clip would be given other words alone than in a batch wherever two tokens are about as likely. The
    service's own kernel multiplies each row by itself, and takes the company away (by `search.rows`).
    """
    graph = GraphBuilder()
    features, counts = add_features(graph, model.encoder.config.bands, fixed=model.fixed)
    hidden, counts, bias = add_encoder(graph, "encoder", model.encoder, features, counts, fixed=model.fixed)
    one, two = graph.ints("one", [1]), graph.ints("two", [2])
    up = graph.add("Add", [counts, one], "frames.up")
    frames = graph.add("Div", [up, two], "frames")
    limit = graph.add("Div", [frames, two], "frames.limit")
    heard = [
        add_keys_and_memory(graph, f"decoder.layers.{index}.encoder_attn", _layer(layer).encoder_attn, hidden)
        for index, layer in enumerate(model.decoder.layers)
    ]
    search = _add_search(graph, model, heard, bias, limit, company=company)
    add_frames(graph, search, add_places(graph, search, counts, frames), frames)
    return graph.build("whisper_seq2seq", model.decoder.config.vocabulary)


def _layer(module: object) -> DecoderLayer:
    if not isinstance(module, DecoderLayer):
        raise TypeError(f"unknown layer {type(module).__name__}")
    return module


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


def _add_search(
    graph: GraphBuilder,
    model: WhisperSeq2Seq,
    heard: list[tuple[str, str]],
    bias: str | None,
    limit: str,
    *,
    company: bool,
) -> Search:
    """Greedy search as a loop."""
    config, prompt = model.decoder.config, model.prompt.ids
    shape = graph.add("Shape", ["waveform"], "search.shape")
    batch = graph.add("Gather", [shape, graph.ints("zero", [0])], "search.batch", axis=0)
    longest = graph.add("ReduceMax", [limit], "search.longest", keepdims=1)
    wanted = graph.add("Add", [longest, graph.ints("search.prompt_size", [len(prompt)])], "search.wanted")
    room = graph.add("Min", [wanted, graph.ints("search.room", [config.positions - 1])], "search.steps_row")
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
    size = config.width // config.heads
    heads, none = graph.ints("search.heads", [config.heads]), graph.ints("zero", [0])
    per_head = graph.ints("search.head_size", [size])
    key_shape = graph.add("Concat", [rows, heads, per_head, none], "search.key_shape", axis=0)
    value_shape = graph.add("Concat", [rows, heads, none, per_head], "search.value_shape", axis=0)
    keys = graph.add("ConstantOfShape", [key_shape], "search.no_keys")
    values = graph.add("ConstantOfShape", [value_shape], "search.no_values")
    none_yet = graph.add("ConstantOfShape", [batch], "search.none_cut", value=_filled(0))
    phrase = graph.ints("search.longest_phrase", [LONGEST_PHRASE])
    phrases = graph.add("Concat", [batch, phrase], "search.phrase_shape", axis=0)
    recent = graph.add("ConstantOfShape", [phrases], "search.none_recent", value=_filled(-1))
    runs = graph.add("ConstantOfShape", [phrases], "search.no_runs", value=_filled(0))
    least = _add_least_repeats(graph, limit)
    body = _body(graph.inner(), model, heard, bias, limit, least, beside)
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
    return Search("search.log_probs", "search.heard", found, len(prompt))


def _filled(value: int) -> onnx.TensorProto:
    """For ConstantOfShape."""
    return helper.make_tensor("value", TensorProto.INT64, [1], [value])


def _body(
    graph: GraphBuilder,
    model: WhisperSeq2Seq,
    heard: list[tuple[str, str]],
    bias: str | None,
    limit: str,
    least: str,
    beside: _Company | None,
) -> onnx.GraphProto:
    """One step: token (batch,) and caches in, next token and longer caches out."""
    config, prompt = model.decoder.config, model.prompt
    one = graph.ints("one", [1])
    index = graph.add("Reshape", ["step.index", one], "step.index_row")
    output = graph.weights("decoder.output", array(model.decoder.embed_tokens.weight).T)
    places = graph.weights("decoder.embed_positions", array(model.decoder.embed_positions.weight))
    tokens = "step.token"
    if beside:
        tokens = graph.add("Pad", [tokens, beside.pads[1]], "step.token_rows")
    token = graph.add("Unsqueeze", [tokens, one], "step.token_column")
    embedded = graph.add("Gather", [output, token], "step.embedded_first", axis=1)
    embedded = graph.add("Transpose", [embedded], "step.embedded", perm=[1, 2, 0])
    if model.decoder.embed_scale is not None:
        scale = graph.weights("decoder.embed_scale", array(model.decoder.embed_scale))
        embedded = graph.add("Mul", [embedded, scale], "step.embedded_scaled")
    placed = graph.add("Gather", [places, index], "step.place", axis=0)
    values = graph.add("Add", [embedded, placed], "step.values")
    caches = []
    for number, module in enumerate(model.decoder.layers):
        values, grown = _add_layer(graph, number, _layer(module), values, heard[number], bias)
        caches += grown
    _add_heard(graph, config, beside)
    values = add_layer_norm(graph, "decoder.layer_norm", values, model.decoder.layer_norm)
    logits = graph.add("MatMul", [values, output], "step.logits")
    flat = graph.add("Squeeze", [logits, one], "step.flat")
    if beside:
        flat = beside.without(graph, flat, "step.flat_items")
    following = graph.add("Add", [index, one], "step.following")
    size = graph.ints("step.prompt_size", [len(prompt.ids)])
    begins = graph.add("Equal", [following, size], "step.begins")
    row = graph.add("Cast", [begins], "step.suppress_row", to=TensorProto.INT64)
    rows = graph.weights("step.suppress_rows", array(model.suppress))
    suppress = graph.add("Gather", [rows, row], "step.suppress", axis=0)
    allowed = graph.add("Add", [flat, suppress], "step.allowed")
    found = graph.add("LogSoftmax", [allowed], "step.found", axis=-1)
    best = graph.add("ArgMax", [found], "step.best", axis=-1, keepdims=0)
    prompted = graph.add("Less", [following, size], "step.prompted")
    last = graph.ints("step.prompt_last", [len(prompt.ids) - 1])
    within = graph.add("Min", [following, last], "step.within")
    forced = graph.add("Gather", [graph.ints("step.prompt", prompt.ids), within], "step.forced", axis=0)
    graph.add("Where", [prompted, forced, best], "step.next")
    blank = np.full(config.vocabulary, IMPOSSIBLE, np.float32)
    blank[prompt.end] = 0.0
    graph.add("Where", [prompted, graph.weights("step.blank", blank), found], "step.log_probs")
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
        *(_cache_info(f"step.cache_{i}", i, config.heads, config.width) for i in range(len(caches))),
    ]
    outputs = [
        helper.make_tensor_value_info("step.continue", TensorProto.BOOL, []),
        helper.make_tensor_value_info("step.next", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("step.finished", TensorProto.BOOL, ["batch"]),
        *_repeats_info("step.cut_after", "step.recent_after", "step.runs_after"),
        *(_cache_info(name, i, config.heads, config.width) for i, name in enumerate(caches)),
        helper.make_tensor_value_info("step.log_probs", TensorProto.FLOAT, ["batch", config.vocabulary]),
        helper.make_tensor_value_info("step.valid", TensorProto.BOOL, ["batch"]),
        helper.make_tensor_value_info("step.heard", TensorProto.FLOAT, ["batch", None]),
    ]
    return helper.make_graph(graph.nodes, "step", inputs, outputs)


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


def _add_heard(graph: GraphBuilder, config: DecoderConfig, beside: _Company | None) -> None:
    """Mean of the attention on the audio over the heads that follow the speech, (batch, audio frames)."""
    sums = []
    for layer in range(config.layers):
        if heads := config.heads_of(layer):
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
    graph.add("Div", [total, graph.floats("step.followers", float(config.followers))], "step.heard")


def _cache_info(name: str, index: int, heads: int, width: int) -> onnx.ValueInfoProto:
    """Keys (batch, heads, size, tokens) for even numbers, values (batch, heads, tokens, size) for odd."""
    size = width // heads
    shape: list[str | int | None] = (
        ["batch", heads, size, None] if index % 2 == 0 else ["batch", heads, None, size]
    )
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _add_layer(
    graph: GraphBuilder,
    number: int,
    layer: DecoderLayer,
    values: str,
    heard: tuple[str, str],
    bias: str | None,
) -> tuple[str, list[str]]:
    """(batch, 1, width) -> the same, and the grown caches."""
    name = f"decoder.layers.{number}"
    normal = add_layer_norm(graph, f"{name}.self_attn_layer_norm", values, layer.self_attn_layer_norm)
    key, value = add_keys_and_memory(graph, f"{name}.self_attn", layer.self_attn, normal)
    keys = graph.add("Concat", [f"step.cache_{2 * number}", key], f"{name}.keys", axis=3)
    memory = graph.add("Concat", [f"step.cache_{2 * number + 1}", value], f"{name}.values", axis=2)
    mixed = add_attention_over(graph, f"{name}.self_attn", layer.self_attn, normal, keys, memory, None)
    values = graph.add("Add", [values, mixed], f"{name}.said")
    normal = add_layer_norm(graph, f"{name}.encoder_attn_layer_norm", values, layer.encoder_attn_layer_norm)
    mixed = add_attention_over(graph, f"{name}.encoder_attn", layer.encoder_attn, normal, *heard, bias)
    values = graph.add("Add", [values, mixed], f"{name}.heard")
    normal = add_layer_norm(graph, f"{name}.final_layer_norm", values, layer.final_layer_norm)
    values = graph.add("Add", [values, add_feed_forward(graph, name, normal, layer.fc1, layer.fc2)], name)
    return values, [keys, memory]
