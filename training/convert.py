"""A published CTC checkpoint -> bundle, as it is, without training.

    python -m training.convert FAMILY WEIGHTS --name NAME --models-dir DIR --language xx [...]

FAMILY is ``nemo`` (a QuartzNet archive), ``wav2vec2`` (the XLSR kind) or ``whisper`` (an encoder with a CTC
head in a Lightning checkpoint). Configuration and vocabulary lie beside the weights. Only tensors are read:
safetensors, or a pickle whose code is not run. The bundle holds the float32 graph, checked against PyTorch;
INT8 needs recordings to measure its accuracy on, which a recipe's ``quantize`` stage or
``training.nemo_import`` does. ``asr models pull`` calls this.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from api.bundle import Bundle
from api.manifest import Source
from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from training.bundle_writer import Card, Graphs, Measurements, check_card, write_bundle
from training.errors import CheckpointError, QualityGateError, in_one_line
from training.inference import Waveform, compare, cpu_session, run_graph
from training.pretrained import fill
from training.restricted_pickle import load_state_dict
from training.torch_inference import run_torch

TOLERANCE = 1e-4
"""Largest difference of a posterior between PyTorch and ONNX."""


@dataclass(frozen=True)
class Converted:
    """A network's graph and what the bundle must say of it."""

    graph: onnx.ModelProto
    vocabulary: Vocabulary
    parameters: int
    frame_stride_s: float
    max_window_s: float
    min_samples: int
    agreement: str
    text_normalisation: tuple[str, ...] = ("nfc", "lowercase")


def from_nemo(archive: Path) -> Converted:
    """QuartzNet from a NeMo archive."""
    from training.export import MIN_SAMPLES, check_agreement, export_graph
    from training.nemo import read_nemo
    from training.nemo_import import as_checkpoint

    checkpoint = as_checkpoint(read_nemo(archive))
    graph = export_graph(checkpoint.model, checkpoint.frontend)
    agreement = check_agreement(checkpoint.model, checkpoint.frontend, graph, _noise())
    return Converted(
        graph,
        checkpoint.vocabulary,
        checkpoint.model.parameter_count(),
        frame_stride_s=checkpoint.model.config.stride * checkpoint.frontend.hop_s,
        max_window_s=20.0,
        min_samples=MIN_SAMPLES,
        agreement=agreement.describe(),
    )


def from_wav2vec2(weights: Path) -> Converted:
    """``Wav2Vec2ForCTC`` of the XLSR kind; config.json and vocab.json lie beside the weights."""
    from transformers import Wav2Vec2Config as PublishedConfig

    from training.recipes.wav2vec2_ctc.export import export_graph
    from training.recipes.wav2vec2_ctc.model import Wav2Vec2Config, Wav2Vec2Ctc, from_published

    described = _read_json(weights.with_name("config.json"))
    if not _read_json(weights.with_name("preprocessor_config.json")).get("do_normalize", False):
        raise CheckpointError("preprocessor_config.json: do_normalize is false; the graph normalises")
    config = Wav2Vec2Config.from_transformers(PublishedConfig(**described))
    state = from_published(load_state_dict(weights))
    if "head.weight" not in state:
        raise CheckpointError(f"{weights.name}: has no lm_head; it was not fine-tuned for CTC")
    network = Wav2Vec2Ctc(config, len(state["head.weight"]))
    fill(network, state, optional=("masked",))
    vocabulary = wav2vec2_vocabulary(weights.parent, len(state["head.weight"]), described)
    graph = export_graph(network.eval())
    return Converted(
        graph,
        vocabulary,
        _parameters(network),
        frame_stride_s=config.stride_samples / 16_000,
        max_window_s=30.0,
        min_samples=config.min_samples,
        agreement=_agreement(network, graph),
    )


def wav2vec2_vocabulary(folder: Path, outputs: int, config: dict[str, Any]) -> Vocabulary:
    """Characters by id; the word delimiter becomes the space, the pad token is the blank."""
    tokens: list[str] = [f"<unused_{index}>" for index in range(outputs)]
    special = set(range(outputs))
    for token, index in _read_json(folder / "vocab.json").items():
        if isinstance(index, int) and index < outputs:
            tokens[index] = token
            if not (len(token) > 1 and token[0] in "<[" and token[-1] in ">]"):
                special.discard(index)
    named = folder / "special_tokens_map.json"
    pad = _read_json(named).get("pad_token") if named.is_file() else None
    name = pad.get("content") if isinstance(pad, dict) else pad
    blank = tokens.index(name) if name in tokens else config.get("pad_token_id")
    if not isinstance(blank, int) or not 0 <= blank < outputs:
        raise CheckpointError(
            f"the pad token {name!r} is not one of the {outputs} outputs; it is the CTC blank"
        )
    tokens[blank] = BLANK_TOKEN
    tokens = [SPACE_MARK if token == "|" else token for token in tokens]  # noqa: S105
    return Vocabulary(tuple(tokens), blank, "chars", frozenset(special - {blank}))


def from_whisper(weights: Path, *, fixed: bool = True) -> Converted:
    """``encoder.*`` and ``ctc_head.*`` of a Lightning checkpoint; Whisper's config and tokenizer beside it.

    ``fixed``: run on 30 padded seconds, as such heads are trained. Whether a checkpoint keeps its accuracy on
    true lengths, which cost less, has to be measured.
    """
    from transformers import WhisperConfig

    from training.recipes.whisper_ctc.export import export_graph
    from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc, head_shape, read_published
    from training.tokenizer import ByteLevelCodec, load_tokenizer

    state = read_published(weights)
    hidden, outputs = head_shape(state)
    described = _read_json(weights.with_name("config.json"))
    encoder = EncoderConfig.from_transformers(WhisperConfig(**described))
    network = WhisperCtc(encoder, outputs, hidden=hidden, fixed=fixed)
    fill(network, state)
    vocabulary = ByteLevelCodec(load_tokenizer(str(weights.parent)), outputs).vocabulary
    graph = export_graph(network.eval())
    return Converted(
        graph,
        vocabulary,
        _parameters(network),
        frame_stride_s=0.02,
        max_window_s=30.0,
        min_samples=400,
        agreement=_agreement(network, graph),
        text_normalisation=("nfc",),
    )


FAMILIES: dict[str, Callable[[Path], Converted]] = {
    "nemo": from_nemo,
    "wav2vec2": from_wav2vec2,
    "whisper": from_whisper,
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing beside the weights") from None
    except ValueError as error:
        raise CheckpointError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: expected an object")
    return content


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _noise() -> list[Waveform]:
    rng = np.random.default_rng(0)
    return [rng.normal(0.0, 0.1, samples).astype(np.float32) for samples in (32_000, 20_480)]


def _agreement(network: nn.Module, graph: onnx.ModelProto) -> str:
    """PyTorch against ONNX on a padded batch of noise. Raises QualityGateError above the tolerance."""
    clips = _noise()
    found = compare(run_torch(network, clips), run_graph(cpu_session(graph.SerializeToString()), clips))
    if not found.worst_posterior <= TOLERANCE:  # NaN is no agreement either
        raise QualityGateError(f"PyTorch and ONNX disagree, tolerance {TOLERANCE:.0e}: {found.describe()}")
    return found.describe()


def convert(family: str, weights: Path, name: str, models_dir: Path, card: Card) -> Bundle:
    """Write the bundle. Raises TrainingError, BundleError, FileNotFoundError."""
    check_card(name, card)
    made = FAMILIES[family](weights)
    opset = next(entry.version for entry in made.graph.opset_import if entry.domain == "")
    graphs = Graphs(
        files={"float32": made.graph.SerializeToString()},
        default="float32",
        opset=opset,
        parameters=made.parameters,
        frame_stride_s=made.frame_stride_s,
        max_window_s=made.max_window_s,
        min_samples=made.min_samples,
    )
    notes = {"Export": f"PyTorch against ONNX on noise: {made.agreement}."}
    return write_bundle(models_dir, name, graphs, made.vocabulary, card, Measurements(notes=notes))


@in_one_line("convert", ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 with one message for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m training.convert", description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("weights", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--language", nargs="+", required=True, metavar="xx", help="ISO 639-1")
    parser.add_argument("--title", default="")
    parser.add_argument("--licence", default="see the source")
    parser.add_argument("--url", default="")
    parser.add_argument("--revision", default=None)
    given = parser.parse_args(arguments)
    title = given.title or given.name
    card = Card(
        title=title,
        languages=tuple(given.language),
        source=Source(title=title, url=given.url, revision=given.revision),
        licence=given.licence,
        summary=f"Converted from a published checkpoint: {given.url or given.weights.name}.",
    )
    bundle = convert(given.family, given.weights, given.name, given.models_dir, card)
    print(f"{bundle.path}: verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
