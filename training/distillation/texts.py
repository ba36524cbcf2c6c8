"""Texts of the training speakers, for a language model: written ones, else the teacher's where it was sure.

    python -m training.distillation.texts --cache CACHE --out texts.txt

One line each. The held-out speakers' texts are not among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training.distillation.dataset import decode_ids
from training.distillation.examples import Corpus
from training.distillation.trainer import TrainConfig
from training.errors import in_one_line


def training_texts(corpus: Corpus) -> list[str]:
    """Normalised texts of the training split in the cache's order, without the empty ones."""
    return [decode_ids(corpus.texts[index]) for index in corpus.train if corpus.texts[index]]


@in_one_line("texts")
def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    texts = training_texts(Corpus(arguments.cache, TrainConfig.min_confidence))
    arguments.out.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    print(f"{arguments.out}: {len(texts)} texts, {sum(len(text.split()) for text in texts)} words")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
