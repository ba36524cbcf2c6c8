"""Network -> verified bundle: export, agreement check, quantization behind its gate, manifest, model card.

    python -m training.publish CHECKPOINT --name en-whisper-tiny-ctc --models-dir models --card card.json \\
        --calibration MANIFEST --validation MANIFEST [--test MANIFEST] [--texts FILE ...] [--keep-float]

`--card` names a JSON file with what no program can know: title, languages, source, licence, training data,
limits. Nothing replaces an existing bundle before the new one has passed verification.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from api.bundle import Bundle, load_bundle
from api.decoding import in_words
from api.manifest import Evaluation, GraphName, Speed
from training.bundle_writer import (
    Card,
    Measurements,
    add_graph_without_vnni,
    add_measurements,
    append_measurements,
    check_card,
    write_bundle,
)
from training.calibration import check_there, manifest_rows, manifest_waveforms, validation_clips
from training.checkpoint import Checkpoint, load_checkpoint
from training.errors import ConfigError, in_one_line
from training.evaluate import bundle_recogniser, error_rates, plainly, recognise_all
from training.export import MIN_SAMPLES, check_agreement, export_graph
from training.exported import Exported, exported_conformer, exported_whisper
from training.graph import fits_one_file
from training.inference import Waveform, quiet_run_s, served_session
from training.ngram import fit_texts
from training.provenance import hardware
from training.quantize import Gate, Outcome, quantize, static_convolutions
from training.recipes.quartznet_ctc.model import QuartzNet
from training.recipes.whisper_ctc.model import WhisperCtc
from training.text import plain_normaliser
from training.vocabulary import casing_steps

SPEED_CLIP_S = 5.0


@dataclass(frozen=True)
class Recordings:
    """Manifests that publishing listens to; to calibrate and validate, up to the bundle's window only."""

    calibration: Path
    """Training audio; its texts are not looked at."""
    validation: Path
    """Audio with texts for the gate; never a test set."""
    texts: tuple[Path, ...] = ()
    """Manifests or plain text to make a language model of; it ships where it earns its place. What is said in
    `validation` and `test` is left out of it."""
    test: Path | None = None
    """Test sets, told apart by `source` and `language`; measured only after the choice is made."""
    calibration_clips: int = 48
    validation_clips: int = 120


def add_recordings(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Options that name recordings: what INT8 is found and measured on."""
    parser.add_argument("--calibration", type=Path, required=required, help="manifest of training audio")
    parser.add_argument(
        "--validation",
        type=Path,
        required=required,
        help="manifest with texts, for the gate" + ("" if required else "; default: as --calibration"),
    )
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[], help="texts for a language model (manifests or plain)"
    )
    parser.add_argument("--test", type=Path, help="manifest of test sets, for manifest and card")


def add_gate(parser: argparse.ArgumentParser, usual: Gate) -> None:
    """Options that say what a smaller graph must reach."""
    parser.add_argument("--min-speed", type=float, default=usual.min_speed, help="over float32")
    parser.add_argument(
        "--max-wer-increase",
        type=float,
        default=usual.max_wer_increase,
        help="absolute, on the validation set",
    )


def gate_of(given: argparse.Namespace) -> Gate:
    """What the options of `add_gate` say."""
    return Gate(given.min_speed, given.max_wer_increase)


def recordings_of(given: argparse.Namespace) -> Recordings:
    """What the options of `add_recordings` name. Raises FileNotFoundError."""
    for path in (given.calibration, given.validation, given.test, *given.texts):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{path}: no such manifest{' or text' * (path in given.texts)}")
    return Recordings(
        given.calibration, given.validation or given.calibration, tuple(given.texts), given.test
    )


def exported_checkpoint(checkpoint: Checkpoint, max_window_s: float = 20.0) -> Exported:
    """A checkpoint of any kind; INT8 has to give in a batch what it gives alone."""
    model = checkpoint.model
    if isinstance(model, QuartzNet):
        return _exported_quartznet(model, checkpoint, max_window_s)
    if isinstance(model, WhisperCtc):
        steps = casing_steps(checkpoint.vocabulary)
        return exported_whisper(model, checkpoint.vocabulary, steps, max_window_s, exact_batches=True)
    from training.conformer_graph import export_graph as export_conformer

    graph = export_conformer(model, tables=False)
    return exported_conformer(model, graph, checkpoint.vocabulary, max_window_s, exact_batches=True)


def _exported_quartznet(model: QuartzNet, checkpoint: Checkpoint, max_window_s: float) -> Exported:
    """QuartzNet or Citrinet, whose work is convolutions."""
    graph = export_graph(model, checkpoint.frontend)
    return Exported(
        graph,
        checkpoint.vocabulary,
        parameters=model.parameter_count(),
        frame_stride_s=model.config.stride * checkpoint.frontend.hop_s,
        max_window_s=max_window_s,
        min_samples=MIN_SAMPLES,
        agreement=lambda clips: check_agreement(model, checkpoint.frontend, graph, clips).describe(),
        ways=static_convolutions,
        ways_described=(
            "Static, U8 activations, S8 weights per channel; front end, first block and head stay float."
        ),
        exact_batches=True,
        text_normalisation=casing_steps(checkpoint.vocabulary),
        sample_rate_hz=checkpoint.frontend.sample_rate_hz,
    )


def publish(
    made: Exported,
    name: str,
    models_dir: Path,
    card: Card,
    recordings: Recordings,
    *,
    keep_float: bool = False,
    gate: Gate | None = None,
) -> Bundle:
    """Make the bundle. Raises ConfigError, QualityGateError, BundleError, DataError, FileNotFoundError."""
    check_card(name, card)
    _check_test(recordings.test, card.languages)
    graph, vocabulary = made.graph, made.vocabulary
    language, normalisation = card.languages[0], card.text_normalisation
    calibration = _calibration(made, recordings)
    agreement = made.agreement(calibration[:4])
    print(f"PyTorch against ONNX: {agreement}")
    validation = _validation(made, recordings, language, normalisation)
    plain = plain_normaliser(language, normalisation)
    outcome = _smaller(made, calibration, validation, plain, gate)
    files: dict[GraphName, bytes | Path] = {made.form: outcome.chosen.graph.SerializeToString()}
    if keep_float and fits_one_file(graph):
        files["float32"] = graph.SerializeToString()
    notes = {
        "Export": f"PyTorch against ONNX: {agreement}.",
        "Quantization": _quantization(made, outcome),
    }
    language_model = None
    if recordings.texts:
        found = fit_texts(
            recordings.texts,
            vocabulary,
            card.text_normalisation,
            card.languages[0],
            files[made.form],
            validation,
            without=_texts(recordings.test),
        )
        language_model = found.shipped()
        notes["Language model"] = found.note()
        print(found.markdown())
    graphs = made.graphs(files, made.form)
    written = Measurements(notes=notes)
    bundle = write_bundle(models_dir, name, graphs, vocabulary, card, written, language_model)
    measurements = Measurements(
        _evaluate(bundle, recordings.test), _speed(bundle, bundle.manifest.graphs), notes
    )
    return add_measurements(models_dir, name, card, measurements)


def _check_test(test: Path | None, languages: Sequence[str]) -> None:
    """What is measured last is looked at first: a failure then would leave a bundle without its numbers."""
    if test is not None:
        check_there(test, languages)


def _calibration(made: Exported, recordings: Recordings) -> list[Waveform]:
    sound = manifest_waveforms(
        recordings.calibration,
        made.sample_rate_hz,
        recordings.calibration_clips,
        longest_s=made.max_window_s,
    )
    return [clip for clip, _ in sound]


def _validation(
    made: Exported, recordings: Recordings, language: str, normalisation: Sequence[str]
) -> list[tuple[Waveform, str]]:
    return validation_clips(
        recordings.validation,
        made.sample_rate_hz,
        recordings.validation_clips,
        longest_s=made.max_window_s,
        language=language,
        taught=normalisation,
    )


def _smaller(
    made: Exported,
    calibration: Sequence[Waveform],
    validation: Sequence[tuple[Waveform, str]],
    plain: Callable[[str], str],
    gate: Gate | None,
) -> Outcome:
    """The best of a network's ways, behind the gate."""
    gate = gate or Gate()
    if not made.exact_batches:
        gate = replace(gate, max_batch_difference=math.inf)
    outcome = quantize(
        made.graph,
        made.vocabulary,
        calibration,
        validation,
        gate,
        ways=made.ways,
        plain=plain,
        form=made.form,
    )
    print(outcome.table())
    return outcome


def add_four_bits(
    made: Exported, name: str, models_dir: Path, recordings: Recordings, gate: Gate | None = None
) -> Bundle:
    """Give a bundle of this network a graph of four bits as well, which processors without VNNI take.

    Its gate is that of a graph in INT8. Raises ConfigError, QualityGateError, BundleError, DataError,
    FileNotFoundError.
    """
    made, manifest = made.in_four_bits(), load_bundle(models_dir, name).manifest
    _check_test(recordings.test, manifest.languages)
    language, normalisation = manifest.languages[0], manifest.text_normalisation
    calibration = _calibration(made, recordings)
    validation = _validation(made, recordings, language, normalisation)
    outcome = _smaller(made, calibration, validation, plain_normaliser(language, normalisation), gate)
    content = outcome.chosen.graph.SerializeToString()
    bundle = add_graph_without_vnni(models_dir, name, made.form, content)
    evaluated = (found for found in manifest.evaluation if not found.decoding.endswith(f", {made.form}"))
    timed = (found for found in manifest.speed if found.graph != made.form)
    measured = Measurements(
        (*evaluated, *_evaluate(bundle, recordings.test, made.form)),
        (*timed, *_speed(bundle, [made.form])),
        {"Four bits": _quantization(made, outcome)},
    )
    return append_measurements(models_dir, name, measured)


def _quantization(made: Exported, outcome: Outcome) -> str:
    return (
        f"{made.ways_described} Measured on {outcome.float_rates.utterances} validation utterances; speed on "
        "one thread, runs taking turns.\n\n" + outcome.table()
    )


def _texts(test: Path | None) -> list[str]:
    return [] if test is None else [row["text"] for row in manifest_rows(test, with_text=True)]


def _evaluate(bundle: Bundle, test: Path | None, graph: GraphName | None = None) -> tuple[Evaluation, ...]:
    """Error rates of a graph on each test set in its languages: greedy, then the default way."""
    if test is None:
        return ()
    languages = bundle.manifest.languages
    rows = manifest_rows(test, with_text=True)
    named = {(row.get("source"), row.get("language", languages[0])) for row in rows}
    graph = graph or bundle.manifest.default_graph
    ways = {"greedy": bundle_recogniser(bundle, graph, beam=0)}
    if bundle.guide is not None:
        ways[in_words(bundle, bundle.default_beam)] = bundle_recogniser(bundle, graph)
    found = []
    for given, language in sorted((pair for pair in named if pair[1] in languages), key=str):
        rate_hz, source = bundle.manifest.sample_rate_hz, given or test.stem
        clips = manifest_waveforms(test, rate_hz, with_text=True, source=given, language=language)
        plain = plain_normaliser(language, bundle.manifest.text_normalisation)
        for decoding, recogniser in ways.items():
            rates = error_rates(plainly(recognise_all(recogniser, clips, source), plain))
            interval = f"[{rates.wer_low:.2%}, {rates.wer_high:.2%}]"
            print(f"{source} ({language}), {decoding}: WER {rates.wer:.2%} {interval}")
            found.append(
                Evaluation(
                    test_set=source,
                    language=language,
                    utterances=rates.utterances,
                    wer=round(rates.wer, 4),
                    cer=round(rates.cer, 4),
                    decoding=f"{decoding}, {graph}",
                )
            )
    return tuple(found)


def _speed(bundle: Bundle, graphs: Iterable[GraphName]) -> tuple[Speed, ...]:
    """Real-time factor of graphs on one thread."""
    samples = round(SPEED_CLIP_S * bundle.manifest.sample_rate_hz)
    clip = np.random.default_rng(0).normal(0.0, 0.05, samples).astype(np.float32)
    speeds = []
    for graph in graphs:
        (seconds,) = quiet_run_s([served_session(Path(bundle.graph_path(graph)))], clip)
        speeds.append(
            Speed(
                hardware=hardware(),
                threads=1,
                graph=graph,
                clip_s=SPEED_CLIP_S,
                rtf=round(seconds / SPEED_CLIP_S, 5),
            )
        )
    return tuple(speeds)


def read_card(path: Path) -> Card:
    """The card's JSON file. Raises ConfigError naming the field."""
    try:
        return TypeAdapter(Card).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where or 'card'}: {first['msg']}") from error


@in_one_line("publish")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Export, quantize, verify and publish a checkpoint as a bundle."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--card", type=Path, help="needed but for --add-four-bits")
    add_recordings(parser, required=True)
    parser.add_argument("--max-window-s", type=float, default=20.0)
    parser.add_argument("--four-bits", action="store_true", help="weights of four bits in place of INT8")
    parser.add_argument(
        "--add-four-bits",
        action="store_true",
        help="give the bundle, which is there, such a graph for processors without VNNI",
    )
    parser.add_argument("--keep-float", action="store_true", help="ship the float32 graph as well")
    add_gate(parser, Gate())
    given = parser.parse_args(arguments)
    made = exported_checkpoint(load_checkpoint(given.checkpoint), given.max_window_s)
    if given.add_four_bits:
        bundle = add_four_bits(made, given.name, given.models_dir, recordings_of(given), gate_of(given))
        print(f"{bundle.path}: verified")
        return 0
    if given.card is None:
        raise ConfigError("--card is needed: title, languages, source, licence of the model")
    bundle = publish(
        made.in_four_bits() if given.four_bits else made,
        given.name,
        given.models_dir,
        read_card(given.card),
        recordings_of(given),
        keep_float=given.keep_float,
        gate=gate_of(given),
    )
    print(f"{bundle.path}: verified")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
