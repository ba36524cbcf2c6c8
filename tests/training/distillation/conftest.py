"""A cache of generated noise with a random teacher's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.noise_cache import noise_cache
from training.distillation import label
from training.distillation.dataset import ALPHABET, VOCABULARY_SIZE
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
    out = noise_cache(folder, ["hello there" if number % 2 else "" for number in range(UTTERANCES)])
    with pytest.MonkeyPatch.context() as patch:
        teacher = NemoModel(tiny_teacher(), FrontendConfig(), tuple(ALPHABET))
        patch.setattr(label, "read_nemo", lambda path: teacher)
        label.label(folder / "teacher.nemo", out, budget_s=4.0)
    return out
