"""Error rates of our models and of pocketsphinx on the shared English test sets, in one table.

    python -m training.bench_wer [--models NAME ...] [--systems bundles pocketsphinx] [--limit N] [--jobs 2]

pocketsphinx 5 (its default English model, decoded offline, one utterance at a time) is the one other English
recogniser that `pip install` brings with a model. Ours decode as the service does; capitals and punctuation
are no errors. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from api.bundle import list_bundles, load_bundle
from training.arguments import positive
from training.calibration import manifest_rows, manifest_waveforms, shared_folder
from training.errors import in_one_line
from training.evaluate import ErrorRates, Recogniser, Utterance, bundle_recogniser, error_rates, plainly
from training.inference import Waveform
from training.text import plain_normaliser

SAMPLE_RATE_HZ = 16_000
TEACHER = "en-quartznet15x5"
DEFAULT_MODELS = (
    "en-moonshine-tiny",
    "en-whisper-tiny",
    "en-whisper-tiny-ctc",
    "en-quartznet-small",
    TEACHER,
)


@dataclass(frozen=True)
class Score:
    """One system on one test set."""

    system: str
    test_set: str
    rates: ErrorRates
    real_time_factor: float
    """Processing time over audio time, on one thread."""


def pocketsphinx_text(waveform: Waveform) -> str:
    """pocketsphinx's best hypothesis for (samples,) float32; see `plain_words`."""
    decoder = _pocketsphinx()
    samples = np.clip(np.round(waveform * 32767.0), -32768, 32767).astype("<i2")
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    return plain_words(hypothesis.hypstr if hypothesis is not None else "")


def plain_words(text: str) -> str:
    """Lowercase words without pronunciation variants, "the(2)", and the full stops of letters, "b."."""
    return re.sub(r"\(\d+\)|\.(?=[ (]|$)", "", text).lower()


@cache
def _pocketsphinx() -> Any:
    import pocketsphinx

    return pocketsphinx.Decoder(samprate=SAMPLE_RATE_HZ, loglevel="FATAL")


@cache
def _bundle(models_dir: Path, name: str) -> Recogniser:
    recogniser = bundle_recogniser(load_bundle(models_dir, name))
    recogniser(np.zeros(SAMPLE_RATE_HZ, np.float32))  # compiles the decoder, which is not what is measured
    return recogniser


@dataclass(frozen=True)
class System:
    """A recogniser that a worker process can build for itself."""

    label: str
    models_dir: Path | None = None
    name: str = ""
    taught: tuple[str, ...] = ()
    """The bundle's text normalisation."""

    def recogniser(self) -> Recogniser:
        """Built once per process."""
        return pocketsphinx_text if self.models_dir is None else _bundle(self.models_dir, self.name)


def _recognise(task: tuple[System, Waveform]) -> tuple[str, float]:
    system, waveform = task
    recognise = system.recogniser()
    start = time.process_time()
    text = recognise(waveform)
    return text, time.process_time() - start


def score(
    system: System, test_set: str, clips: Sequence[tuple[Waveform, str]], jobs: int, language: str = "en"
) -> Score:
    """Run one system over a set, `jobs` utterances at a time, each on one thread."""
    tasks = [(system, waveform) for waveform, _ in clips]
    if jobs == 1:
        answers = [_recognise(task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs) as pool:
            answers = list(pool.map(_recognise, tasks, chunksize=4))
    pairs = [Utterance(reference, text) for (_, reference), (text, _) in zip(clips, answers, strict=True)]
    audio_s = sum(len(waveform) for waveform, _ in clips) / SAMPLE_RATE_HZ
    rates = error_rates(plainly(pairs, plain_normaliser(language, system.taught)))
    return Score(system.label, test_set, rates, sum(spent for _, spent in answers) / audio_s)


def make_teacher(models_dir: Path) -> None:
    """Import the teacher's archive where it lies beside the project; takes minutes and needs torch."""
    archive = shared_folder() / "models" / "quartznet15x5_en.nemo"
    heard = shared_folder() / "speech" / "train" / "manifest.jsonl"
    if archive.is_file():
        print(f"making {TEACHER} from {archive.name}", file=sys.stderr)
        command = [sys.executable, "-m", "training.convert", "nemo", archive, "--name", TEACHER]
        command += ["--models-dir", models_dir, "--language", "en", "--calibration", heard]
        subprocess.run([str(part) for part in command], check=False)


def find_systems(models_dir: Path, models: Sequence[str], wanted: Sequence[str]) -> list[System]:
    """The systems that are there; says on stderr which are not."""
    systems = []
    if TEACHER in models and "bundles" in wanted and TEACHER not in list_bundles(models_dir):
        make_teacher(models_dir)
    for name in models if "bundles" in wanted else ():
        if name in list_bundles(models_dir):
            bundle = load_bundle(models_dir, name)
            label = f"{name} ({bundle.manifest.default_graph})"
            systems.append(System(label, models_dir, name, bundle.manifest.text_normalisation))
        else:
            print(f"{name}: not in {models_dir}", file=sys.stderr)
    if "pocketsphinx" in wanted:
        systems.append(System("pocketsphinx 5, default model"))
    return systems


def table(scores: Sequence[Score]) -> str:
    """Markdown: one row per system, one column per test set."""
    sets = list(dict.fromkeys(entry.test_set for entry in scores))
    sizes = {entry.test_set: entry.rates.utterances for entry in scores}
    lines = [
        "| WER [95 % interval] / CER | "
        + " | ".join(f"{name} ({sizes[name]})" for name in sets)
        + " | RTF |",
        "|---" * (len(sets) + 2) + "|",
    ]
    for system in dict.fromkeys(entry.system for entry in scores):
        own = {entry.test_set: entry for entry in scores if entry.system == system}
        cells = [
            f"{own[name].rates.wer:.1%} [{own[name].rates.wer_low:.1%}, {own[name].rates.wer_high:.1%}] "
            f"/ {own[name].rates.cer:.1%}"
            for name in sets
        ]
        factor = float(np.mean([entry.real_time_factor for entry in own.values()]))
        lines.append(f"| {system} | " + " | ".join(cells) + f" | {factor:.4f} |")
    return "\n".join(lines)


@in_one_line("bench-wer")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Word error rates against pocketsphinx on the shared test sets."
    )
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument(
        "--systems", nargs="+", choices=["bundles", "pocketsphinx"], default=["bundles", "pocketsphinx"]
    )
    parser.add_argument("--manifest", type=Path, help="default: the shared test sets")
    parser.add_argument("--language", default="en")
    parser.add_argument("--limit", type=positive, help="at most this many utterances of each set")
    parser.add_argument("--jobs", type=positive, default=2, help="processes, one utterance each")
    given = parser.parse_args(arguments)
    manifest = given.manifest or shared_folder() / "speech" / "test" / "manifest.jsonl"
    if not manifest.is_file():
        print(f"bench-wer: {manifest}: no such manifest; set ASR_SHARED_DIR or --manifest", file=sys.stderr)
        return 2
    systems = find_systems(given.models_dir, given.models, given.systems)
    rows = manifest_rows(manifest, with_text=True, language=given.language)
    scores = []
    # as `training.publish` names them
    for source in sorted({row.get("source") for row in rows}, key=str):
        test_set = source or manifest.stem
        clips = manifest_waveforms(
            manifest,
            SAMPLE_RATE_HZ,
            given.limit,
            with_text=True,
            language=given.language,
            source=source,
        )
        for system in systems:
            scores.append(score(system, test_set, clips, given.jobs, given.language))
            print(f"{test_set}, {system.label}: {scores[-1].rates.wer:.1%}", file=sys.stderr)
    print(table(scores))
    print(json.dumps({"scores": [asdict(entry) for entry in scores]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
