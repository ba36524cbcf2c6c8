"""Stage 1 of distillation and compression on generated noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from training.distillation.cache import write_mel, write_pcm
from training.distillation.dataset import read_utterances


def noise_cache(folder: Path, texts: Sequence[str]) -> Path:
    """`folder`/cache of a manifest beside it: an utterance per text, which may be empty, of six speakers."""
    generator = np.random.default_rng(0)
    lines = []
    for number, text in enumerate(texts):
        duration_s = float(generator.uniform(0.8, 1.6))
        soundfile.write(folder / f"{number}.flac", generator.normal(0, 0.1, int(duration_s * 16000)), 16000)
        row = {"audio_filepath": f"{number}.flac", "duration": duration_s, "speaker": f"s{number % 6}"}
        lines.append(json.dumps(row | {"text": text, "source": "noise"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = folder / "cache"
    out.mkdir()
    write_pcm(read_utterances(folder / "manifest.jsonl"), folder, out)
    with torch.inference_mode():
        write_mel(out)
    return out
