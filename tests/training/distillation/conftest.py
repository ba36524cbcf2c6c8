"""A cache of generated noise with a random teacher's answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from training.distillation import label
from training.distillation.cache import write_mel, write_pcm
from training.distillation.dataset import ALPHABET, VOCABULARY_SIZE, read_utterances
from training.frontend import FrontendConfig
from training.nemo import NemoModel
from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNet, QuartzNetConfig

UTTERANCES = 12


def tiny_teacher() -> QuartzNet:
    """A random network of the teacher's kind: stride 2, three blocks, wide last layers."""
    torch.manual_seed(3)
    blocks = (
        BlockConfig(32, 1, 5, stride=2),
        BlockConfig(160, 1, 5, residual=True),
        BlockConfig(160, 1, 5, dilation=2),
        BlockConfig(160, 1, 1, separable=False),
    )
    return QuartzNet(QuartzNetConfig(VOCABULARY_SIZE, blocks)).eval()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1 and 2 on generated noise: six speakers, a text for half of the utterances."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    lines = []
    for number in range(UTTERANCES):
        duration_s = float(generator.uniform(0.8, 1.6))
        samples = generator.normal(0, 0.1, int(duration_s * 16000))
        soundfile.write(folder / f"{number}.flac", samples, 16000)
        row = {"audio_filepath": f"{number}.flac", "duration": duration_s, "speaker": f"s{number % 6}"}
        lines.append(json.dumps(row | {"text": "hello there" if number % 2 else "", "source": "noise"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = folder / "cache"
    out.mkdir()
    write_pcm(read_utterances(folder / "manifest.jsonl"), folder, out)
    with torch.inference_mode():
        write_mel(out)
    with pytest.MonkeyPatch.context() as patch:
        teacher = NemoModel(tiny_teacher(), FrontendConfig(), tuple(ALPHABET))
        patch.setattr(label, "read_nemo", lambda path: teacher)
        label.label(folder / "teacher.nemo", out, budget_s=4.0)
    return out
