"""A published CTC checkpoint -> bundle, as it is, without training.

    python -m training.convert FAMILY WEIGHTS --name NAME --models-dir DIR --language xx [...]
        [--calibration MANIFEST [--validation MANIFEST] [--test MANIFEST] [--texts FILE ...] [--four-bits]
        [--no-float]]

FAMILY is ``nemo`` (an archive with QuartzNet, Citrinet, Conformer or FastConformer and a CTC head),
``wav2vec2`` (the XLSR kind), ``moonshine``, or ``whisper`` (with its decoder as OpenAI publishes it, or an
encoder with a CTC head in a Lightning checkpoint). Configuration and vocabulary lie in the archive or beside
the weights. Only tensors are read: safetensors, or a pickle whose code is not run. The float32 graph is
checked against PyTorch. Recordings (``--calibration``), of which some have texts, give the bundle a graph in
INT8, or with weights of four bits, as well.
``asr models pull`` calls this.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from api.bundle import Bundle, sha256_of
from api.manifest import Source
from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from training.bundle_writer import Card, Measurements, check_card, write_bundle
from training.errors import CheckpointError, ConfigError, Int8RefusedError, in_one_line
from training.exported import Exported, agreement, exported_transformer, exported_whisper, ways_of
from training.graph import fits_one_file
from training.inference import Waveform
from training.nemo_import import exported_nemo
from training.pretrained import fill
from training.publish import Recordings, add_recordings, publish, recordings_of
from training.restricted_pickle import load_state_dict
from training.vocabulary import casing_steps

MAX_WINDOW_S = 30.0


def from_wav2vec2(weights: Path) -> Exported:
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
    return exported_transformer(
        network,
        graph,
        vocabulary,
        frame_stride_s=config.stride_samples / 16_000,
        max_window_s=MAX_WINDOW_S,
        min_samples=config.min_samples,
        text_normalisation=casing_steps(vocabulary),
    )


def wav2vec2_vocabulary(folder: Path, outputs: int, config: dict[str, Any]) -> Vocabulary:
    """Characters by id; the word delimiter becomes the space, the pad token is the blank.

    Raises CheckpointError.
    """
    tokens: list[str] = [f"<unused_{index}>" for index in range(outputs)]
    special = set(range(outputs))
    for token, index in _read_json(folder / "vocab.json").items():
        if not isinstance(index, int):
            raise CheckpointError(
                f"vocab.json: {token!r} has {type(index).__name__}, no id; where it holds a vocabulary per "
                "language, leave the one that the network writes"
            )
        if index < outputs:
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
    if special >= set(range(outputs)) - {blank}:
        raise CheckpointError(f"vocab.json: names no character for any of the {outputs} outputs")
    tokens[blank] = BLANK_TOKEN
    tokens = [SPACE_MARK if token == "|" else token for token in tokens]  # noqa: S105
    return Vocabulary(tuple(tokens), blank, "chars", frozenset(special - {blank}))


def from_whisper(weights: Path, *, fixed: bool = True) -> Exported:
    """``encoder.*`` and ``ctc_head.*`` of a Lightning checkpoint; Whisper's config and tokenizer beside it.

    ``fixed``: run on 30 padded seconds, as such heads are trained. Whether a checkpoint keeps its accuracy on
    true lengths, which cost less, has to be measured.
    """
    from transformers import WhisperConfig

    from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc, head_shape, read_published
    from training.tokenizer import ByteLevelCodec, load_tokenizer

    state = read_published(weights)
    hidden, outputs = head_shape(state)
    described = _read_json(weights.with_name("config.json"))
    encoder = EncoderConfig.from_transformers(WhisperConfig(**described))
    network = WhisperCtc(encoder, outputs, hidden=hidden, fixed=fixed)
    fill(network, state)
    vocabulary = ByteLevelCodec(load_tokenizer(str(weights.parent)), outputs).vocabulary
    return exported_whisper(network.eval(), vocabulary, ("nfc",))


def from_whisper_with_decoder(weights: Path, languages: Sequence[str]) -> Exported:
    """Whisper as OpenAI publishes it, told to write one language; configuration and tokenizer beside it."""
    from training.compression.publish import in_four_bits
    from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe

    if len(languages) != 1:
        raise ConfigError(f"--language {' '.join(languages)}: such a model is told one language to write")
    for name in ("config.json", "generation_config.json"):
        _read_json(weights.with_name(name))
    recipe = WhisperSeq2SeqRecipe.of_base(str(weights.parent), languages[0])
    codec, facts = recipe.codec(), recipe.facts()
    network = recipe.network(codec).eval()
    graph = recipe.export(network)
    made = exported_transformer(
        network,
        graph,
        codec.vocabulary,
        frame_stride_s=facts.frame_stride_s,
        max_window_s=facts.max_window_s,
        min_samples=facts.min_samples,
        text_normalisation=casing_steps(codec.vocabulary),
    )
    return replace(
        made,
        ways=ways_of(recipe.quantized),
        decoder=facts.decoder,
        four_bits=lambda _, calibration: in_four_bits(network, calibration),
        agreement=lambda clips: agreement(network, graph, clips, recipe.compared),
    )


def _whisper(weights: Path, languages: Sequence[str]) -> Exported:
    """Either kind."""
    whole = any(name.startswith("model.decoder.") for name in load_state_dict(weights))
    return from_whisper_with_decoder(weights, languages) if whole else from_whisper(weights)


def from_moonshine(weights: Path) -> Exported:
    """Moonshine as `transformers` stores it; configuration and tokenizer lie beside the weights."""
    from training.moonshine.checkpoint import Published
    from training.moonshine.publish import exported_published

    for name in ("config.json", "tokenizer.json"):
        _read_json(weights.with_name(name))
    if weights.name != "model.safetensors":  # which is what the folder is read for
        raise CheckpointError(f"{weights.name}: expected model.safetensors")
    published = Published(str(weights.parent))
    return exported_published(published.network, published.tokens)


FAMILIES: dict[str, Callable[[Path, Sequence[str]], Exported]] = {
    "moonshine": lambda weights, languages: from_moonshine(weights),
    "nemo": lambda weights, languages: exported_nemo(weights),
    "wav2vec2": lambda weights, languages: from_wav2vec2(weights),
    "whisper": _whisper,
}
"""What reads weights, told the languages of the bundle."""


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


def _noise() -> list[Waveform]:
    rng = np.random.default_rng(0)
    return [rng.normal(0.0, 0.1, samples).astype(np.float32) for samples in (32_000, 20_480)]


def convert(
    family: str,
    weights: Path,
    name: str,
    models_dir: Path,
    card: Card,
    recordings: Recordings | None = None,
    *,
    keep_float: bool = True,
    four_bits: bool = False,
) -> Bundle:
    """Write the bundle, with INT8 or four bits where there are recordings.

    Raises TrainingError, BundleError, OSError.
    """
    check_card(name, card)
    made = FAMILIES[family](weights, card.languages)
    made = made.in_four_bits() if four_bits else made
    card = replace(card, text_normalisation=made.text_normalisation)
    if recordings is not None:
        try:
            return publish(made, name, models_dir, card, recordings, keep_float=keep_float)
        except Int8RefusedError as error:
            if not fits_one_file(made.graph):
                raise
            raise Int8RefusedError(f"{error}\nWithout --calibration it is converted in float32.") from error
    if not fits_one_file(made.graph):
        raise CheckpointError(
            f"{weights.name}: {made.parameters / 1e6:.0f} million weights are too many for a float32 graph, "
            "which holds 2 GB; name recordings with texts (--calibration), and it is made in INT8"
        )
    notes = {"Export": f"PyTorch against ONNX on noise: {made.agreement(_noise())}."}
    graphs = made.graphs({"float32": made.graph.SerializeToString()}, "float32")
    return write_bundle(models_dir, name, graphs, made.vocabulary, card, Measurements(notes=notes))


def _recordings(given: argparse.Namespace) -> Recordings | None:
    """None for float32 alone, which nothing is measured on. Raises ConfigError, FileNotFoundError."""
    if given.calibration is not None:
        return recordings_of(given)
    for name in ("validation", "test", "texts", "no_float", "four_bits"):
        if getattr(given, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} needs --calibration: without it nothing is measured"
            )
    return None


@in_one_line("convert", ValueError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 2 with one message for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m training.convert", description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("weights", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--language", nargs="+", required=True, metavar="xx", help="ISO 639-1 or 639-3")
    parser.add_argument("--title", default="", help="of the model; default: its name here")
    parser.add_argument("--licence", default="see the source", help="of the weights")
    parser.add_argument("--url", default="", help="where the weights were published")
    parser.add_argument("--revision", default="", help="of the weights; default: their SHA-256")
    add_recordings(parser)
    parser.add_argument("--four-bits", action="store_true", help="weights of four bits in place of INT8")
    parser.add_argument("--no-float", action="store_true", help="leave float32 out where there is less")
    given = parser.parse_args(arguments)
    if not given.weights.is_file():
        raise FileNotFoundError(f"{given.weights}: no such file of weights")
    card = Card(
        title=given.title or given.name,
        languages=tuple(given.language),
        source=Source(
            title=given.title or given.weights.name,
            url=given.url,
            revision=given.revision or sha256_of(given.weights),
        ),
        licence=given.licence,
        summary=f"Converted from a published checkpoint: {given.url or given.weights.name}.",
    )
    recordings = _recordings(given)
    bundle = convert(
        given.family,
        given.weights,
        given.name,
        given.models_dir,
        card,
        recordings,
        keep_float=not given.no_float,
        four_bits=given.four_bits,
    )
    print(f"{bundle.path}: verified")
    return 0


if __name__ == "__main__":
    sys.exit(main())
