"""A character n-gram language model from texts, and its weights for one model, chosen on validation audio.

    python -m training.ngram MODELS_DIR NAME --texts MANIFEST|TEXT ... --validation MANIFEST

measures a bundle's greedy text, its beam search, and the beam search with a language model of the texts, over
a grid of weights. With `--write` the bundle gets the language model where that earns its place (`MIN_GAIN`);
`training.publish --texts` does the same on the way to a bundle.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from api.beam import beam_search
from api.bundle import load_bundle
from api.ngram import NgramModel, NgramTable, weigh
from api.normalise import APOSTROPHES, lower, normalise, upper
from api.vocabulary import Vocabulary
from training.arguments import positive
from training.bundle_writer import LanguageModel, add_language_model
from training.calibration import manifest_rows, validation_clips
from training.errors import DataError, in_one_line
from training.evaluate import Utterance, error_rates, greedy_text
from training.files import in_utf8
from training.inference import LogProbs, Waveform, cpu_session, run_graph
from training.kneser_ney import ORDER, character_ngrams
from training.text import STEPS, normaliser, plain_normaliser

BEAM = 32
WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.2)
BONUSES = (0.5, 1.0, 1.5, 2.0, 2.5)
MIN_GAIN = 0.03
"""Share of the word errors of greedy decoding that a language model must remove to be shipped."""
MIN_WRITTEN = 0.5
"""Share of the words with capitals or punctuation that must stay so: error rates do not see them."""


@dataclass(frozen=True)
class Trial:
    """Word error rate (fraction of one) of one way to decode; weight 0 is without a language model.

    `written`: words with capitals or punctuation, as a share of those in greedy texts.
    """

    beam: int
    weight: float
    bonus: float
    wer: float
    written: float = 1.0


@dataclass(frozen=True)
class Fit:
    """The best language model found, and every trial; `best.weight` is 0 where none helped."""

    table: NgramTable
    greedy_wer: float
    trials: tuple[Trial, ...]
    order: int = ORDER

    @property
    def best(self) -> Trial:
        """The trial with the fewest errors that writes as the model does; the first of equals."""
        kept = [trial for trial in self.trials if trial.weight == 0 or trial.written >= MIN_WRITTEN]
        return min(kept, key=lambda trial: trial.wer)

    @property
    def earns_its_place(self) -> bool:
        """Whether it removes enough of greedy decoding's errors."""
        return self.best.weight > 0 and self.best.wer <= (1.0 - MIN_GAIN) * self.greedy_wer

    def shipped(self) -> LanguageModel | None:
        """What goes into the bundle, if anything does."""
        best = self.best
        if not self.earns_its_place:
            return None
        return LanguageModel(self.table, self.order, best.weight, best.bonus, best.beam)

    def note(self) -> str:
        """For the model's card."""
        verdict = "shipped" if self.earns_its_place else "left out"
        count = len(self.table.edge_state)
        return (
            f"Character {self.order}-grams of the texts given, {count:,} of them; {verdict}. "
            "Chosen on validation audio, whose texts the language model has not seen.\n\n" + self.markdown()
        )

    def markdown(self) -> str:
        """All trials as a table."""
        lines = ["| decoding | weight | bonus | WER |", "|---|---|---|---|", _row("greedy", self.greedy_wer)]
        for trial in self.trials:
            with_model = trial.weight > 0
            name = f"beam {trial.beam}" + (", language model" if with_model else "")
            lines.append(_row(name, trial.wer, *((trial.weight, trial.bonus) if with_model else ())))
        return "\n".join(lines)


def _row(name: str, wer: float, weight: float | None = None, bonus: float | None = None) -> str:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:g}"

    return f"| {name} | {cell(weight)} | {cell(bonus)} | {wer:.2%} |"


def fit(
    table: NgramTable,
    vocabulary: Vocabulary,
    log_probs: Sequence[LogProbs],
    references: Sequence[str],
    beam: int = BEAM,
    order: int = ORDER,
    plain: Callable[[str], str] = str,
) -> Fit:
    """Try every weight and bonus on validation audio; `log_probs` (frames, vocabulary) each.

    `plain` is what the references went through, for the texts that are compared with them.
    """

    def tried(decode: Callable[[LogProbs], str], label: str) -> tuple[float, int]:
        """Word error rate, and how many words have what `plain` takes away."""
        heard = [decode(values) for values in tqdm(log_probs, desc=label, unit="clip", disable=None)]
        rates = error_rates(list(map(Utterance, references, map(plain, heard))))
        return rates.wer, sum(plain(word) != word for text in heard for word in text.split())

    def searched(weight: float, bonus: float) -> Trial:
        guide = weigh(table, vocabulary, weight, bonus) if weight else None
        label = f"weight {weight}, bonus {bonus}" if weight else f"beam {beam}"
        wer, written = tried(lambda values: beam_text(values, vocabulary, beam, guide), label)
        return Trial(beam, weight, bonus, wer, written / greedy_written if greedy_written else 1.0)

    greedy_wer, greedy_written = tried(lambda values: greedy_text(values, vocabulary), "greedy")
    trials = [searched(0.0, 0.0), *(searched(weight, bonus) for weight in WEIGHTS for bonus in BONUSES)]
    return Fit(table, greedy_wer, tuple(trials), order)


def beam_text(log_probs: LogProbs, vocabulary: Vocabulary, beam: int, guide: NgramModel | None) -> str:
    """Text of (frames, vocabulary) by the service's own beam search."""
    decoded = beam_search(log_probs, vocabulary.blank_id, beam, guide=guide)[0]
    return vocabulary.decode(decoded.token_ids.tolist())


def read_texts(
    paths: Sequence[Path], vocabulary: Vocabulary, steps: Sequence[str], language: str, without: Sequence[str]
) -> list[str]:
    """Texts of manifests (`.jsonl`, `.json`) and of files with one text a line, in the model's spelling.

    `steps` are the bundle's text normalisation. A letter that the vocabulary has in the other case only takes
    that, and an apostrophe the plain form; what it cannot spell at all becomes a space. For a byte-level
    vocabulary each character stands for one byte of the text's UTF-8. Texts that are measured on (`without`)
    are left out, however they are written: recordings of one sentence by several speakers are common.
    Raises DataError for a file that is not there, ManifestError for one that is not UTF-8 and for a line that
    is no row.
    """
    known = {" ", *(character for unit in vocabulary.units if isinstance(unit, str) for character in unit)}
    outside = re.compile(f"[^{re.escape(''.join(known))}]") if len(known) > 1 else None

    def nearest(found: re.Match[str]) -> str:
        character = found[0]
        others = (lower(character, language), upper(character, language), character.translate(APOSTROPHES))
        return next((other for other in others if known.issuperset(other)), " ")

    def spelled(text: str) -> str:
        for step in steps:
            # the service's lower and upper case follow the language
            by_language = step in ("lowercase", "uppercase")
            text = normalise(text, (step,), language) if by_language else STEPS.get(step, str)(text)
        text = " ".join((outside.sub(nearest, text) if outside else text).split())
        return text.encode().decode("latin-1") if vocabulary.kind == "bpe" else text

    plain = normaliser(language, yo=False)
    left_out = {form(text) for text in without for form in (plain, spelled)}
    texts: list[str] = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file of texts")
        if path.suffix in (".jsonl", ".json"):  # NeMo's manifests have either name
            texts += [row["text"] for row in manifest_rows(path, with_text=True)]
        else:
            with in_utf8(path):
                texts += path.read_text(encoding="utf-8-sig").splitlines()
    kept = (spelled(text) for text in texts if plain(text) not in left_out)
    return [text for text in kept if text and text not in left_out]


def fit_texts(
    paths: Sequence[Path],
    vocabulary: Vocabulary,
    steps: Sequence[str],
    language: str,
    graph: bytes | Path,
    validation: Sequence[tuple[Waveform, str]],
    order: int = ORDER,
    beam: int = BEAM,
    without: Sequence[str] = (),
) -> Fit:
    """A language model of the texts in `paths`, tried on what `graph` hears in `validation`.

    `steps` and `language` as in `read_texts`, which also says what is raised. Texts in `without` (those of
    test sets) are left out, as those of `validation` are.
    """
    references = [text for _, text in validation]
    texts = read_texts(paths, vocabulary, steps, language, without=[*references, *without])
    table = character_ngrams(texts, order)
    session = cpu_session(graph)
    log_probs = [run_graph(session, [clip])[0] for clip, _ in tqdm(validation, desc="infer", disable=None)]
    return fit(table, vocabulary, log_probs, references, beam, order, plain_normaliser(language, steps))


@in_one_line("ngram")
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Does a language model of these texts help a bundle?")
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("name")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="manifests or plain text files")
    parser.add_argument("--validation", type=Path, required=True, help="manifest with texts")
    parser.add_argument("--limit", type=positive, help="at most this many utterances")
    parser.add_argument("--order", type=positive, default=ORDER)
    parser.add_argument("--beam", type=positive, default=BEAM)
    parser.add_argument("--write", action="store_true", help="into the bundle, where it earns its place")
    given = parser.parse_args(arguments)
    bundle = load_bundle(given.models_dir, given.name)
    manifest = bundle.manifest
    clips = validation_clips(
        given.validation,
        manifest.sample_rate_hz,
        given.limit,
        longest_s=manifest.max_window_s,
        language=manifest.languages[0],
        taught=manifest.text_normalisation,
    )
    found = fit_texts(
        given.texts,
        bundle.vocabulary,
        manifest.text_normalisation,
        manifest.languages[0],
        bundle.graph_path(),
        clips,
        given.order,
        given.beam,
    )
    table = found.table
    print(f"{len(table.fail)} contexts, {len(table.edge_state)} n-grams; {len(clips)} utterances\n")
    print(found.markdown())
    language_model = found.shipped()
    if given.write and language_model is not None:
        add_language_model(given.models_dir, given.name, language_model, found.note())
    print(json.dumps(found.best.__dict__ | {"greedy_wer": found.greedy_wer}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
