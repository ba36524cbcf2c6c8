"""A cache of generated noise, a tiny random Whisper, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.noise_cache import noise_cache
from training.compression import label
from training.compression.corpus import LabelledCorpus
from training.recipes.rehearsal import tiny_whisper

TEXTS = "good morning the weather is fine today\nplease call me back this evening\n"
TOKENS = 300
LANGUAGE = "en"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper of one layer more than is kept, as wide as a group of weights."""
    return tiny_whisper(tmp_path_factory.mktemp("base"), LANGUAGE, width=128, layers=2)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten utterances of six speakers, two of which are held out; a text for four of five."""
    texts = ["good morning" if number % 5 else "" for number in range(10)]
    return noise_cache(tmp_path_factory.mktemp("noise"), texts)


@pytest.fixture(scope="session")
def labels(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2, by its command."""
    out = tmp_path_factory.mktemp("labels")
    (out / "texts.txt").write_text(TEXTS, encoding="utf-8")
    given = ["--base", str(base), "--cache", str(cache), "--texts", str(out / "texts.txt")]
    assert label.main([*given, "--tokens", str(TOKENS), "--workers", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def corpus(cache: Path, labels: Path) -> LabelledCorpus:
    """Cache and labels, two of six speakers held out."""
    return LabelledCorpus(cache, labels, validation_fraction=0.4)
