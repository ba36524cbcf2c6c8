"""Stage 4: the small network as a bundle whose graph has weights of four bits, behind the gate of any other.

    python -m training.compression.publish --run RUN --name en-whisper-tiny --card CARD.json \\
        --calibration MANIFEST --validation MANIFEST [--test MANIFEST]
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from training.compression import rounding
from training.compression.network import PRECISE, coarse_weights, round_into
from training.compression.train import network_of, read_state
from training.compression.vocabulary import CutVocabulary
from training.equalise import equalise
from training.errors import CheckpointError, in_one_line
from training.exported import DYNAMIC_RANGES, Exported, agreement
from training.four_bits import halve, quantize_to_four_bits
from training.inference import Waveform, spoken
from training.publish import add_gate, add_recordings, gate_of, publish, read_card, recordings_of
from training.quantize import Gate
from training.recipes.whisper_ctc.model import MAX_WINDOW_S, MIN_SAMPLES
from training.recipes.whisper_seq2seq.export import FRAME_STRIDE_S, export_graph
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq
from training.rounding import MADE_UP_FOR
from training.transformer_quantize import products
from training.vocabulary import casing_steps

WAY = "weights of four bits in groups of 128"
WIDENED = "those of the audio in 8 bits once loaded"
"""Half as fast again, but ranges are found anew for each batch: one clip in ten of a batch of two has another
text than alone (docs/quantization.md), one in a hundred where every row is rounded by itself."""
OF_AUDIO = re.compile(r"encoder\.|.*\.encoder_attn\.[kv]_proj$").match
"""Products whose input is every frame of the audio; all others see a token at a time."""
CLIPS = 24
"""That are listened to for each layer."""
HALVED = ("encoder.conv1.weight", "decoder.embed_positions", *(f"{name}.weight" for name in PRECISE))
"""Large weights that have no four bits."""


def four_bit_graph(
    graph: onnx.ModelProto, network: WhisperSeq2Seq, *, widened: bool = False
) -> onnx.ModelProto:
    """The graph of a network whose weights are rounded, with those weights in four bits."""
    coarse = {name.removesuffix(".weight") for name in coarse_weights(network)}
    names = {name.removesuffix(".product"): name for name in products(graph)}
    names["decoder.embed_tokens"] = names.pop("step.logits")
    chosen = {name: product for name, product in names.items() if name in coarse}
    of_audio = {product for name, product in chosen.items() if widened and OF_AUDIO(name)}
    small = onnx.ModelProto()
    small.CopyFrom(graph)
    quantize_to_four_bits(small, set(chosen.values()), of_audio)
    halve(small, HALVED)
    return small


def in_four_bits(
    network: WhisperSeq2Seq, calibration: Sequence[Waveform]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The way to four bits of a network that never heard of them, told what it writes itself."""
    network = copy.deepcopy(network)
    heard = [rounding.heard_by(network, clip) for clip in calibration[:CLIPS]]
    equalise(network)
    rounding.round_layers(network, heard)
    yield MADE_UP_FOR, four_bit_graph(export_graph(network, company=True), network)


def exported_small(network: WhisperSeq2Seq, cut: CutVocabulary, *, widened: bool = False) -> Exported:
    """A network whose weights are rounded already: float32 and four bits differ in what they multiply.

    With `widened` the products of the audio are dynamic INT8, see WIDENED.
    """
    graph = export_graph(network, company=True)

    def ways(
        float_graph: onnx.ModelProto, calibration: Sequence[Waveform]
    ) -> Iterator[tuple[str, onnx.ModelProto]]:
        small = four_bit_graph(float_graph, network, widened=widened)
        yield f"{WAY}, {WIDENED}" if widened else WAY, small

    vocabulary = cut.vocabulary()
    return Exported(
        graph,
        vocabulary,
        parameters=sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad),
        frame_stride_s=FRAME_STRIDE_S,
        max_window_s=MAX_WINDOW_S,
        min_samples=MIN_SAMPLES,
        agreement=lambda clips: agreement(network, graph, clips, partial(spoken, blank_id=cut.end)),
        ways=ways,
        ways_described="The network was made with the rounded weights, so the float32 graph has them as well."
        + (DYNAMIC_RANGES if widened else " Inputs are rounded to 8 bits row by row."),
        exact_batches=False,
        decoder=True,
        text_normalisation=casing_steps(vocabulary),
        form="int4",
    )


def served_state(run: Path, command: str) -> dict[str, Any]:
    """What a run left, or what `command` made of its last step. Raises CheckpointError.

    Where it learned through the rounding its weights may be rounded one by one; else `command` comes first.
    """
    path, better = run / "last.pt", run / rounding.NAME
    state = read_state(path)
    rounded = read_state(better) if better.is_file() else None
    if rounded is not None and rounded["counters"] == state["counters"]:
        return rounded
    if not state["config"].get("rounded", True):
        told = f"python -m {command} --run {run} --cache CACHE --labels LABELS"
        raise CheckpointError(f"{path}: learned in float32, to be rounded first: {told}")
    return state


def load_run(run: Path) -> tuple[WhisperSeq2Seq, CutVocabulary]:
    """The averaged network of a run, rounded as it is served. Raises CheckpointError."""
    state = served_state(run, "training.compression.rounding")
    cut = CutVocabulary.load(run / "vocabulary.json")
    network = network_of(state, cut)
    round_into(network, network, coarse_weights(network))
    return network, cut


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
    parser.add_argument("--widened", action="store_true", help="faster, and items of a batch are not alone")
    add_gate(parser, Gate(min_speed=1.0))
    arguments = parser.parse_args(given)
    bundle = publish(
        exported_small(*load_run(arguments.run), widened=arguments.widened),
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
