"""Small random networks and synthetic sound for the tests of export, quantization and publishing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import nn

from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from training.checkpoint import Checkpoint
from training.frontend import FrontendConfig
from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNet, QuartzNetConfig

VOCABULARY = Vocabulary((SPACE_MARK, *"abcd", BLANK_TOKEN), blank_id=5)

CONFIGS = {
    "quartznet": QuartzNetConfig(
        6,
        (
            BlockConfig(16, 1, 11, stride=2),
            BlockConfig(16, 2, 9, residual=True),
            BlockConfig(24, 1, 7, dilation=2),
            BlockConfig(32, 1, 1, separable=False),
        ),
    ),
    "citrinet": QuartzNetConfig(
        6,
        (
            BlockConfig(16, 1, 5),
            BlockConfig(24, 2, 7, stride=2, residual=True, squeeze_excitation=True, stride_last=True),
            BlockConfig(24, 2, 7, residual=True, squeeze_excitation=True),
            BlockConfig(32, 1, 9),
        ),
    ),
    "stride four, two frames a step": QuartzNetConfig(
        6,
        (
            BlockConfig(16, 1, 11, stride=4, separable=False),
            BlockConfig(16, 2, 9, residual=True),
            BlockConfig(32, 1, 1, separable=False),
        ),
        upsample=2,
    ),
}


def random_network(config: QuartzNetConfig, seed: int = 0) -> QuartzNet:
    """Random weights, and normalisations that have seen data: every folding mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = QuartzNet(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                assert tensor is not None
                values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
                tensor.data.copy_(values)
    return model


def random_checkpoint(name: str = "quartznet") -> Checkpoint:
    """One of CONFIGS with the small vocabulary."""
    return Checkpoint(random_network(CONFIGS[name]), FrontendConfig(), VOCABULARY, {"hours": 1.5})


def chirps(count: int, seed: int = 0) -> list[npt.NDArray[np.float32]]:
    """Sliding tones with noise between 0.6 and 2 s, no two alike."""
    generator = np.random.default_rng(seed)
    clips = []
    for _ in range(count):
        samples = int(generator.integers(9_600, 32_000))
        time_s = np.arange(samples) / 16_000
        low, slope = generator.uniform(100, 1500), generator.uniform(-300, 1500)
        tone = 0.3 * np.sin(2 * np.pi * (low + slope * time_s) * time_s)
        clips.append((tone + generator.normal(0, 0.01, samples)).astype(np.float32))
    return clips


def write_corpus(folder: Path, clips: list[npt.NDArray[np.float32]], text: str = "ab cd") -> Path:
    """wav files and their manifest, two test sets in turn."""
    rows = []
    for index, clip in enumerate(clips):
        soundfile.write(folder / f"{index}.wav", clip, 16_000)
        row = {"audio_filepath": f"{index}.wav", "text": text, "duration": len(clip) / 16_000}
        rows.append(row | {"source": ("first", "second")[index % 2], "language": "en"})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
