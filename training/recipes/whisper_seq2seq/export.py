"""WhisperSeq2Seq -> one graph: front end, encoder, greedy search as an ONNX Loop with cached keys, frames."""

from __future__ import annotations

import onnx

from training.graph import GraphBuilder
from training.recipes.whisper_ctc.export import add_encoder, add_features
from training.recipes.whisper_seq2seq.model import DecoderLayer, WhisperSeq2Seq
from training.recipes.whisper_seq2seq.placing import add_frames, add_places
from training.recipes.whisper_seq2seq.searching import add_row_of, add_search
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
    search = add_search(graph, _Speaker(model), heard, bias, limit, company=company)
    add_frames(graph, search, add_places(graph, search, counts, frames), frames)
    return graph.build("whisper_seq2seq", model.decoder.config.vocabulary)


def _layer(module: object) -> DecoderLayer:
    if not isinstance(module, DecoderLayer):
        raise TypeError(f"unknown layer {type(module).__name__}")
    return module


class _Speaker:
    """Whisper's decoder."""

    keys_turned = True

    def __init__(self, model: WhisperSeq2Seq) -> None:
        self.decoder, self.prompt = model.decoder, model.prompt
        config = model.decoder.config
        self.vocabulary, self.layers, self.heads = config.vocabulary, config.layers, config.heads
        self.width, self.positions = config.width, config.positions
        self.suppress = array(model.suppress)

    def heads_of(self, layer: int) -> list[int]:
        """Those of one layer whose attention follows the speech."""
        return self.decoder.config.heads_of(layer)

    def add_step(
        self, graph: GraphBuilder, token: str, index: str, heard: list[tuple[str, str]], bias: str | None
    ) -> tuple[str, list[str]]:
        """See `Speaker`."""
        decoder = self.decoder
        output = graph.weights("decoder.output", array(decoder.embed_tokens.weight).T)
        places = graph.weights("decoder.embed_positions", array(decoder.embed_positions.weight))
        embedded = add_row_of(graph, output, token, decoder.embed_scale)
        placed = graph.add("Gather", [places, index], "step.place", axis=0)
        values = graph.add("Add", [embedded, placed], "step.values")
        caches = []
        for number, module in enumerate(decoder.layers):
            values, grown = _add_layer(graph, number, _layer(module), values, heard[number], bias)
            caches += grown
        values = add_layer_norm(graph, "decoder.layer_norm", values, decoder.layer_norm)
        return graph.add("MatMul", [values, output], "step.logits"), caches


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
