"""Stage 1: what a large Moonshine writes for every cached utterance, and how sure it is of each token.

    python -m training.moonshine.label --base BASE --cache CACHE --texts TEXTS --out LABELS

BASE is a Moonshine as `transformers` stores it (a folder, or its name on the hub); all of one language write
with the same tokens, so moonshine-base may teach moonshine-tiny. Writes ``tokens.json`` (the tokens that are
kept), ``labels.jsonl`` and ``likely.raw`` as :mod:`training.compression.label` does: known words in the large
network's capitals and punctuation, else its own. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from training.arguments import positive
from training.compression.label import (
    DOUBTED,
    LIKELY,
    MOST_DIFFERENT,
    Label,
    Likely,
    counted_texts,
    difference,
    in_the_style_of,
    length_batches_of,
    read_labels,
)
from training.compression.network import evaluating
from training.distillation.kernels import working_dtype
from training.errors import ConfigError, in_one_line
from training.moonshine.checkpoint import Published
from training.moonshine.corpus import MoonshineCorpus, padded
from training.moonshine.model import MAX_WINDOW_S, SAMPLE_RATE_HZ
from training.moonshine.search import greedy_of
from training.moonshine.vocabulary import Tokens, cut_tokens, written_as_before

LONGEST_SAMPLES = int(MAX_WINDOW_S * SAMPLE_RATE_HZ)


class Judge:
    """The large network, and what is learned of it."""

    def __init__(self, large: Published, cut: Tokens) -> None:
        self.network, self.whole_vocabulary = large.network, large.tokens.vocabulary()
        self.cut, self.whole, self.ours = cut, large.tokens.tokenizer(), cut.tokenizer()
        self.kept = torch.tensor(cut.ids)
        self.output = large.network.decoder.embed_tokens.weight[self.kept].clone()

    def answers(
        self, clips: Sequence[Tensor], known: Sequence[list[str]]
    ) -> list[tuple[Label, npt.NDArray[Any]]]:
        """Labels, whose places have yet to be found, of clips whose words may be known."""
        with (
            evaluating(self.network),
            torch.autocast("cpu", torch.bfloat16, enabled=working_dtype() is torch.bfloat16),
        ):
            audio, counts, bias = self.network.encoder(*padded(list(clips)))
            written = [
                self.whole_vocabulary.decode(ids) for ids in greedy_of(self.network, audio, counts, bias)
            ]
            texts = [in_the_style_of(w, k) if k else w for w, k in zip(written, known, strict=True)]
            tokens = [self.ours.encode(text, add_special_tokens=False).ids if text else [] for text in texts]
            tokens = [ids if len(ids) < self.network.shape.positions else [] for ids in tokens]
            judged = self._judged(tokens, audio, bias)
        found = []
        for place, (text, ids) in enumerate(zip(texts, tokens, strict=True)):
            wanted = torch.tensor([*ids, self.cut.end])
            mine = judged[place, : len(wanted)]
            whole = torch.tensor([*written_as_before(self.whole, self.ours, text if ids else ""), True])
            certainty = float(mine.gather(1, wanted[:, None])[whole].mean()) if ids else DOUBTED
            apart = difference(written[place], known[place]) if known[place] else 0.0
            label = Label(-1, text, tuple(ids), -1, round(certainty, 4), apart <= MOST_DIFFERENT)
            found.append((label, _likely(mine, whole)))
        return found

    def _judged(self, tokens: Sequence[Sequence[int]], audio: Tensor, bias: Tensor) -> Tensor:
        """Log-probabilities of the kept tokens after each of the given ones: (batch, longest + 1, kept)."""
        start, longest = int(self.kept[self.cut.start]), max(map(len, tokens))
        given = torch.full((len(tokens), 1 + longest), start)
        for row, item in zip(given, tokens, strict=True):
            row[1 : 1 + len(item)] = self.kept[torch.tensor(item, dtype=torch.int64)]
        states = self.network.decoder.states(given, audio, bias)
        logits = functional.linear(states, self.output).float()
        logits[..., self.cut.start] = -1e9
        return logits.log_softmax(dim=-1)


def _likely(log_probs: Tensor, whole: Tensor) -> npt.NDArray[Any]:
    """The likeliest tokens of each place (places, kept), nothing where a word is in other pieces now."""
    found = np.zeros(len(log_probs), Likely)
    values, tokens = log_probs.exp().topk(min(LIKELY, log_probs.shape[1]), dim=-1)
    found["token"][:, : tokens.shape[1]] = tokens.numpy()
    found["probability"][:, : values.shape[1]] = values.numpy()
    found["probability"][~whole.numpy()] = 0.0
    return found


def label(judge: Judge, cache: Path, out: Path, workers: int) -> None:
    """Write what is still missing of ``labels.jsonl`` and ``likely.raw``; clips beyond a window have none."""
    rows = json.loads((cache / "index.json").read_text(encoding="utf-8"))
    pcm = np.memmap(cache / "pcm.i16", np.int16, mode="r")
    done = read_labels(out)
    short = {index for index, row in enumerate(rows) if row["pcm_samples"] <= LONGEST_SAMPLES}
    waiting = short - {one.index for one in done}
    batches = list(length_batches_of([row["pcm_samples"] for row in rows], waiting))

    def clip(index: int) -> Tensor:
        start, count = rows[index]["pcm_start"], rows[index]["pcm_samples"]
        return torch.from_numpy(pcm[start : start + count].astype(np.float32) / 32768.0)

    def several(batch: list[int]) -> list[tuple[Label, npt.NDArray[Any]]]:
        known = [rows[index]["text"].split() for index in batch]
        return judge.answers([clip(index) for index in batch], known)

    place = sum(len(one.tokens) + 1 for one in done)
    with (
        (out / "labels.jsonl").open("a", encoding="utf-8") as lines,
        (out / "likely.raw").open("ab") as raw,
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        tqdm(total=len(waiting), unit="clip", desc="label", mininterval=2) as bar,
    ):
        raw.truncate(place * Likely.itemsize)
        for first in range(0, len(batches), workers):
            part = batches[first : first + workers]
            for batch, found in zip(part, pool.map(several, part), strict=True):
                for index, (one, likely) in zip(batch, found, strict=True):
                    raw.write(likely.tobytes())
                    raw.flush()
                    line = asdict(one) | {"index": index, "likely": place}
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                    lines.flush()
                    place += len(likely)
                bar.update(len(batch))


@in_one_line("label")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="Moonshine: a folder, or its name on the hub")
    parser.add_argument("--cache", type=Path, required=True, help="made by training.distillation.cache")
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        required=True,
        help="plain text that chooses the tokens, or words, tab, how often",
    )
    parser.add_argument("--tokens", type=positive, default=16_000, help="of text to keep")
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    large = Published(arguments.base)
    path = arguments.out / MoonshineCorpus.cut_name
    if path.is_file():
        cut = Tokens.load(path)
        if len(cut.spelled()) > arguments.tokens:
            raise ConfigError(f"{path} has {len(cut.spelled())} tokens of text, asked for {arguments.tokens}")
    else:
        cut = cut_tokens(large.tokens.described, counted_texts(arguments.texts), arguments.tokens)
        cut.save(path)
    label(Judge(large, cut), arguments.cache, arguments.out, arguments.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
