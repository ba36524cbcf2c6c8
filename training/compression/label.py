"""Stage 2: what the large network writes for every cached utterance, and how sure it is of each token.

    python -m training.compression.label --base BASE --cache CACHE --texts TEXTS --out LABELS

BASE is a Whisper as `transformers` stores it (a folder, or its name on the hub). Writes ``vocabulary.json``
(the tokens that are kept), ``labels.jsonl`` (text and tokens per utterance) and ``likely.raw`` (the likeliest
tokens at each place, and their probabilities). Where somebody wrote down what was said, those are the words,
in the large network's capitals and punctuation. Where nobody did, another model may say the words
(``--words-by``): two networks that were taught apart and hear the same are seldom both wrong. Interrupted, it
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from api.bundle import load_bundle
from training.arguments import positive
from training.compression.network import decode, evaluating, greedy, heard, listen
from training.compression.vocabulary import (
    CutVocabulary,
    cut_vocabulary,
    unchanged_share,
    written_whole_words,
)
from training.distillation.label import length_batches
from training.errors import ConfigError, DataError, in_one_line
from training.evaluate import Recogniser, bundle_recogniser
from training.files import in_utf8
from training.recipes.whisper_ctc.frontend import SAMPLE_RATE_HZ, WINDOW_SAMPLES, WhisperLogMel, own_in_range
from training.recipes.whisper_seq2seq.model import WhisperSeq2Seq
from training.recipes.whisper_seq2seq.recipe import WhisperSeq2SeqRecipe

SILENCE_SAMPLES = 8 * SAMPLE_RATE_HZ
"""Appended to what the large network hears: as good as 30 s for an English one (docs/experiments.md)."""
TOKENS_PER_S = 12.5
LIKELY = 24
"""Tokens whose probabilities are kept per place."""
MOST_DIFFERENT = 0.5
"""Of the words: where a known text differs more, the large network did not understand the utterance."""
MOST_APART = 0.27
"""Of another model's words: where the large network wrote more of them differently, neither is believed."""
DOUBTED = -1e4
"""Certainty of what is not to be learned."""
BATCH_SAMPLES = 16 * 15 * SAMPLE_RATE_HZ
SPELLED = re.compile(r"(?<![\w'])(?:[a-z] )+[a-z](?![\w'])", re.IGNORECASE)
"""Letters one by one."""
PART = 2_000
"""Utterances between which batches are made, so that a stopped labelling has a fair sample."""
Likely = np.dtype([("token", np.uint16, LIKELY), ("probability", np.float16, LIKELY)])


@dataclass(frozen=True)
class Label:
    """What a student is to write for one utterance of the cache."""

    index: int
    text: str
    tokens: tuple[int, ...]
    """Without the end."""
    likely: int
    """Where its places begin in ``likely.raw``: one per token, and one for the end."""
    certainty: float
    """Mean log-probability of the large network per token, words that are in pieces now left out."""
    understood: bool
    """Whether its probabilities are worth following."""


class Large:
    """The network that is made small, with its tokenizer."""

    def __init__(self, base: str, language: str) -> None:
        recipe = WhisperSeq2SeqRecipe.of_base(base, language)
        codec = recipe.codec()
        self.tokenizer, self.vocabulary = codec.tokenizer, codec.vocabulary
        self.network: WhisperSeq2Seq = recipe.network(codec).eval()
        self.frontend = WhisperLogMel(self.network.encoder.config.bands)

    def hear(self, clips: Sequence[npt.NDArray[np.int16]]) -> tuple[list[str], Tensor, Tensor]:
        """Texts, audio states, and what is added to the scores of frames that a clip does not have."""
        waveforms = [torch.from_numpy(clip.astype(np.float32) / 32768.0)[:WINDOW_SAMPLES] for clip in clips]
        lengths = torch.tensor([min(len(w) + SILENCE_SAMPLES, WINDOW_SAMPLES) for w in waveforms])
        padded = torch.zeros(len(clips), int(lengths.max()))
        for row, waveform in zip(padded, waveforms, strict=True):
            row[: len(waveform)] = waveform
        log_mel, counts = self.frontend.log_mel(padded, lengths)
        audio, _, missing = listen(self.network, own_in_range(log_mel, counts), counts)
        limits = [int(len(w) / SAMPLE_RATE_HZ * TOKENS_PER_S) + 2 for w in waveforms]
        found = greedy(self.network, audio, missing, self.network.prompt, limits)
        return [self.vocabulary.decode(tokens).strip() for tokens in found], audio, missing

    def judge(
        self, cut: CutVocabulary, tokens: Sequence[Sequence[int]], audio: Tensor, missing: Tensor
    ) -> Tensor:
        """Log-probabilities of the kept tokens after each of the given ones: (batch, longest + 1, kept)."""
        prompt, longest = self.network.prompt, max(map(len, tokens))
        given = torch.full((len(tokens), len(prompt.ids) + longest), prompt.end)
        given[:, : len(prompt.ids)] = torch.tensor(prompt.ids)
        kept = torch.tensor(cut.ids[: cut.texts + 1])
        for row, item in zip(given, tokens, strict=True):
            row[len(prompt.ids) : len(prompt.ids) + len(item)] = kept[torch.tensor(item, dtype=torch.int64)]
        states = decode(self.network, given, heard(self.network, audio), missing)[:, len(prompt.ids) - 1 :]
        output = self.network.decoder.embed_tokens.weight[kept].to(states.dtype)
        return functional.linear(states, output).float().log_softmax(dim=-1)


def spelled(word: str) -> str:
    """The letters of a word, for comparing."""
    return re.sub(r"[^\w']", "", word.lower())


def in_the_style_of(written: str, words: Sequence[str]) -> str:
    """Known words (lower case, no punctuation) with capitals and punctuation of what a network wrote."""
    written = re.sub(r"([.,?!;:])\1+", r"\1", re.sub(r"(\w)-(\w)", r"\1 \2", written))
    theirs = [word for word in written.split() if spelled(word)]
    found: list[str] = []
    matcher = difflib.SequenceMatcher(None, [spelled(word) for word in theirs], list(words), autojunk=False)
    for change, start, stop, first, last in matcher.get_opcodes():
        if change == "equal":
            found += theirs[start:stop]
        elif change == "replace" and stop - start == last - first:
            found += [_like(theirs[start + i], words[first + i]) for i in range(last - first)]
        elif change in ("replace", "insert"):
            found += words[first:last]
    text = re.sub(r"\bi\b(?=$|[ ',.?!])", "I", " ".join(found))
    text = SPELLED.sub(_spelled_in_capitals, text)
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text.rstrip(",;:") + "."


def _spelled_in_capitals(letters: re.Match[str]) -> str:
    """But not "am I a", which are two words."""
    found = letters.group()
    return found if set(found.lower()) <= set("ai ") else found.upper()


def _like(model: str, word: str) -> str:
    ending = re.search(r"[.,?!;:]+$", model)
    return (word.capitalize() if model[:1].isupper() else word) + (ending.group() if ending else "")


def difference(written: str, words: Sequence[str]) -> float:
    """Share of the known words that a network did not write, 0 to 1."""
    theirs = [spelled(word) for word in written.replace("-", " ").split()]
    matcher = difflib.SequenceMatcher(None, theirs, list(words), autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    return 1.0 - same / max(1, len(words))


def label(
    large: Large, cut: CutVocabulary, cache: Path, out: Path, workers: int, other: Recogniser | None = None
) -> None:
    """Write what is still missing of ``labels.jsonl`` and ``likely.raw``.

    `other` says the words of utterances that nobody wrote down. A clip that the large network does not hear
    whole, or a text that it has no positions for, is labelled with no tokens, so that nothing learns it.
    """
    most_tokens = large.network.most_tokens
    too_long = f"texts of more than {most_tokens} tokens"
    not_whole = f"clips of more than {WINDOW_SAMPLES / SAMPLE_RATE_HZ:g} s"
    rows = json.loads((cache / "index.json").read_text(encoding="utf-8"))
    pcm = np.memmap(cache / "pcm.i16", np.int16, mode="r")
    tokenizer = cut.tokenizer()
    done = read_labels(out)
    waiting = set(range(len(rows))) - {one.index for one in done}
    batches = list(length_batches_of([row["pcm_samples"] for row in rows], waiting))

    def words_of(index: int, clip: npt.NDArray[np.int16]) -> list[str]:
        text: str = rows[index]["text"]
        if text or other is None:
            return text.split()
        said = other(clip.astype(np.float32) / 32768.0)
        return [word for word in map(spelled, said.replace("-", " ").split()) if word]

    def left_out(clip: npt.NDArray[np.int16], tokens: list[int]) -> str:
        if len(clip) > WINDOW_SAMPLES:
            return not_whole
        return too_long if len(tokens) > most_tokens else ""

    def answers(batch: list[int]) -> list[tuple[Label, npt.NDArray[Any], str]]:
        clips = [pcm[(start := rows[i]["pcm_start"]) : start + rows[i]["pcm_samples"]] for i in batch]
        with evaluating(large.network):
            written, audio, missing = large.hear(clips)
            known = [words_of(index, clip) for index, clip in zip(batch, clips, strict=True)]
            texts = [in_the_style_of(w, k) if k else w for w, k in zip(written, known, strict=True)]
            tokens = [tokenizer.encode(f" {text}").ids if text else [] for text in texts]
            reasons = [left_out(clip, ids) for clip, ids in zip(clips, tokens, strict=True)]
            tokens = [[] if reason else ids for reason, ids in zip(reasons, tokens, strict=True)]
            judged = large.judge(cut, tokens, audio, missing)
        found = []
        for item, index in enumerate(batch):
            wanted = torch.tensor([*tokens[item], cut.end])
            mine = judged[item, : len(wanted)]
            likely = np.zeros(len(wanted), Likely)
            values, places = mine.exp().topk(min(LIKELY, mine.shape[1]), dim=-1)
            likely["token"][:, : places.shape[1]] = places.numpy()
            likely["probability"][:, : values.shape[1]] = values.numpy()
            whole = torch.tensor([*written_whole_words(large.tokenizer, tokenizer, f" {texts[item]}"), True])
            whole = whole[-len(wanted) :]
            likely["probability"][~whole.numpy()] = 0.0
            certainty = float(mine.gather(1, wanted[:, None])[whole].mean())
            apart = difference(written[item], known[item]) if known[item] else 0.0
            understood = apart <= MOST_DIFFERENT
            if other is not None and not rows[index]["text"]:
                certainty = 0.0 if known[item] and apart <= MOST_APART else DOUBTED
            if reasons[item]:
                certainty = DOUBTED
            one = Label(index, texts[item], tuple(tokens[item]), 0, round(certainty, 4), understood)
            found.append((one, likely, reasons[item]))
        return found

    unlearned: Counter[str] = Counter()
    place = sum(len(one.tokens) + 1 for one in done)
    with (
        (out / "labels.jsonl").open("a", encoding="utf-8") as lines,
        (out / "likely.raw").open("ab") as raw,
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=len(waiting), unit="clip", desc="label", mininterval=2) as bar,
    ):
        raw.truncate(place * Likely.itemsize)
        for start in range(0, len(batches), workers):
            for several in pool.map(answers, batches[start : start + workers]):
                for one, likely, reason in several:
                    unlearned[reason] += bool(reason)
                    raw.write(likely.tobytes())
                    raw.flush()
                    lines.write(json.dumps(asdict(one) | {"likely": place}, ensure_ascii=False) + "\n")
                    lines.flush()
                    place += len(likely)
                bar.update(len(several))
    if reasons := [f"{count} {reason}" for reason, count in sorted(unlearned.items()) if reason]:
        print(f"{out / 'labels.jsonl'}: not to be learned: {', '.join(reasons)}")


def length_batches_of(samples: Sequence[int], waiting: set[int]) -> Iterator[list[int]]:
    """Utterances of similar length, a random part of the cache at a time."""
    order = [int(index) for index in np.random.default_rng(0).permutation(len(samples)) if index in waiting]
    for start in range(0, len(order), PART):
        part = sorted(order[start : start + PART], key=samples.__getitem__)
        lengths = [samples[index] + SILENCE_SAMPLES for index in part]
        yield from ([part[place] for place in batch] for batch in length_batches(lengths, BATCH_SAMPLES))


def read_labels(folder: Path) -> list[Label]:
    """Those that are there. A last line that was cut short is dropped from the file."""
    path = folder / "labels.jsonl"
    if not path.is_file():
        return []
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        path.write_text(whole, encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    return [Label(**(row | {"tokens": tuple(row["tokens"])})) for row in rows]


def likely_tokens(folder: Path) -> npt.NDArray[Any]:
    """``likely.raw``: (places,) of `Likely`."""
    return np.memmap(folder / "likely.raw", Likely, mode="r")


def counted_texts(paths: Iterable[Path]) -> list[tuple[str, float]]:
    """Lines of plain text, once each, or as often as a number behind a tab says.

    Raises DataError, also for another encoding than UTF-8.
    """
    found = []
    for path in paths:
        with in_utf8(path):
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        for number, line in enumerate(lines, 1):
            text, tab, often = line.strip().partition("\t")
            try:
                found.append((text, float(often) if tab else 1.0))
            except ValueError:
                raise DataError(f"{path}:{number}: {often!r} behind the tab is no number") from None
    return found


@in_one_line("label")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="Whisper: a folder, or its name on the hub")
    parser.add_argument("--language", default="en", metavar="xx")
    parser.add_argument("--cache", type=Path, required=True, help="made by training.distillation.cache")
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        required=True,
        help="plain text that chooses the tokens, or words, tab, how often",
    )
    parser.add_argument("--tokens", type=positive, default=24_575, help="of text to keep")
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--words-by", metavar="BUNDLE", help="folder of a model that hears what has no text")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    large = Large(arguments.base, arguments.language)
    path = arguments.out / "vocabulary.json"
    if path.is_file():
        cut = CutVocabulary.load(path)
        if cut.texts > arguments.tokens:
            raise ConfigError(f"{path} has {cut.texts} tokens of text, asked for {arguments.tokens}")
    else:
        texts = counted_texts(arguments.texts)
        cut = cut_vocabulary(large.tokenizer, large.network.prompt, texts, arguments.tokens)
        cut.save(path)
        share = unchanged_share(large.tokenizer, cut, (text for text, _ in texts))
        print(f"{path}: {cut.texts} tokens of text; {share:.0%} of the words there are written as before")
    other = None
    if arguments.words_by:
        folder = Path(arguments.words_by)
        other = bundle_recogniser(load_bundle(folder.parent, folder.name), beam=0)
    label(large, cut, arguments.cache, arguments.out, arguments.workers, other)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
