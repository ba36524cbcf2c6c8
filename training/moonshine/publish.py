"""Stage 4: the small network as a bundle whose graph has weights of four bits, behind the gate of any other.

    python -m training.moonshine.publish --run RUN --name en-moonshine-tiny --card CARD.json \\
        --calibration MANIFEST --validation MANIFEST [--test MANIFEST]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import torch

from training.compression import rounding
from training.compression.network import coarse_weights, round_into
from training.compression.publish import CLIPS, served_state
from training.equalise import equalise
from training.errors import in_one_line
from training.exported import DYNAMIC_RANGES, Exported, agreement, ways_of
from training.four_bits import halve, quantize_to_four_bits
from training.inference import Waveform, spoken
from training.moonshine.corpus import MoonshineCorpus
from training.moonshine.export import export_graph
from training.moonshine.model import FRAME_STRIDE_S, MAX_WINDOW_S, MIN_SAMPLES, Moonshine
from training.moonshine.train import network_of
from training.moonshine.vocabulary import Tokens
from training.publish import add_gate, add_recordings, gate_of, publish, read_card, recordings_of
from training.quantize import Gate
from training.transformer_quantize import decoder_candidates, products
from training.vocabulary import casing_steps

WAY = "weights of four bits in groups of 128, of 32 where those are not whole"


def four_bit_graph(graph: onnx.ModelProto, network: Moonshine) -> onnx.ModelProto:
    """The graph of a network whose weights are rounded, with those weights in four bits."""
    coarse = {name.removesuffix(".weight") for name in coarse_weights(network)}
    names = {name.removesuffix(".product"): name for name in products(graph)}
    names["decoder.embed_tokens"] = names.pop("step.logits")
    small = onnx.ModelProto()
    small.CopyFrom(graph)
    quantize_to_four_bits(small, {product for name, product in names.items() if name in coarse})
    biases = {tensor.name for tensor in small.graph.initializer if tensor.name.endswith("fc1.bias")}
    halve(small, {"encoder.conv1.weight", *biases})
    return small


def in_four_bits(
    network: Moonshine, calibration: Sequence[Waveform]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The way to four bits of a network that never heard of them, told what it writes itself."""
    network = copy.deepcopy(network)
    heard = [_heard_by(network, clip) for clip in calibration[:CLIPS]]
    equalise(network)
    rounding.round_layers(network, heard)
    yield f"{WAY}, made up for", four_bit_graph(export_graph(network, company=True), network)


def _heard_by(network: Moonshine, clip: Waveform) -> rounding.Heard:
    """A recording (samples,) with the network's own text."""
    waveform, lengths = torch.from_numpy(clip)[None], torch.tensor([len(clip)])
    with torch.inference_mode():
        steps, found, _ = network.generate(waveform, lengths)
    text = steps[:, : int(found)].argmax(dim=-1)
    return waveform, lengths, torch.cat([torch.tensor([network.prompt.ids]), text], dim=1)


def exported_small(network: Moonshine, tokens: Tokens) -> Exported:
    """A network whose weights are rounded already: float32 and four bits differ in what they multiply."""
    graph = export_graph(network, company=True)

    def ways(
        float_graph: onnx.ModelProto, calibration: Sequence[Waveform]
    ) -> Iterator[tuple[str, onnx.ModelProto]]:
        yield WAY, four_bit_graph(float_graph, network)

    described = "The network was made with the rounded weights, so the float32 graph has them as well."
    made = _exported(network, tokens, graph)
    return replace(
        made, ways=ways, ways_described=f"{described} Inputs are rounded to 8 bits row by row.", form="int4"
    )


def exported_published(network: Moonshine, tokens: Tokens) -> Exported:
    """A network as it was published."""
    made = _exported(network, tokens, export_graph(network))
    return replace(made, four_bits=lambda _, calibration: in_four_bits(network, calibration))


int8_candidates = partial(decoder_candidates, convolutions=False)
"""The ways to INT8. What the convolutions are given has a few samples far above all others, of which 8 bits
for a whole batch leave nothing: base had half of its words wrong."""


def _exported(network: Moonshine, tokens: Tokens, graph: onnx.ModelProto) -> Exported:
    """In INT8, if nothing else is said."""
    vocabulary = tokens.vocabulary()
    return Exported(
        graph,
        vocabulary,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        frame_stride_s=FRAME_STRIDE_S,
        max_window_s=MAX_WINDOW_S,
        min_samples=MIN_SAMPLES,
        agreement=lambda clips: agreement(network, graph, clips, partial(spoken, blank_id=tokens.end)),
        ways=ways_of(int8_candidates),
        ways_described="Matrix products with constant weights: S8 weights per channel, U8 activations."
        + DYNAMIC_RANGES,
        exact_batches=False,
        decoder=True,
        text_normalisation=casing_steps(vocabulary),
    )


def load_run(run: Path) -> tuple[Moonshine, Tokens]:
    """The averaged and rounded network of a run. Raises CheckpointError."""
    state = served_state(run, "training.moonshine.rounding")
    tokens = Tokens.load(run / MoonshineCorpus.cut_name)
    network = network_of(state, tokens)
    round_into(network, network, coarse_weights(network))
    return network, tokens


@in_one_line("publish")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--card", type=Path, required=True)
    add_recordings(parser, required=True)
    add_gate(parser, Gate(min_speed=1.0))
    arguments = parser.parse_args(given)
    bundle = publish(
        exported_small(*load_run(arguments.run)),
        arguments.name,
        arguments.models_dir,
        read_card(arguments.card),
        recordings_of(arguments),
        gate=gate_of(arguments),
    )
    print(f"{bundle.path}: verified")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
