"""A cache of generated noise, a tiny random Whisper, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from training.compression import label
from training.distillation.cache import write_mel, write_pcm
from training.distillation.dataset import read_utterances
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
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    lines = []
    for number in range(10):
        duration_s = float(generator.uniform(0.8, 1.6))
        soundfile.write(folder / f"{number}.flac", generator.normal(0, 0.1, int(duration_s * 16000)), 16000)
        row = {"audio_filepath": f"{number}.flac", "duration": duration_s, "speaker": f"s{number % 6}"}
        lines.append(json.dumps(row | {"text": "good morning" if number % 5 else "", "source": "noise"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = folder / "cache"
    out.mkdir()
    write_pcm(read_utterances(folder / "manifest.jsonl"), folder, out)
    with torch.inference_mode():
        write_mel(out)
    return out


@pytest.fixture(scope="session")
def labels(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 2, by its command."""
    out = tmp_path_factory.mktemp("labels")
    (out / "texts.txt").write_text(TEXTS, encoding="utf-8")
    given = ["--base", str(base), "--cache", str(cache), "--texts", str(out / "texts.txt")]
    assert label.main([*given, "--tokens", str(TOKENS), "--workers", "1", "--out", str(out)]) == 0
    return out
