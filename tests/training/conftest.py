"""A small spoken corpus per language, made once per test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from training.calibration import shared_folder
from training.data.importers import from_folder
from training.data.manifest import write_manifest
from training.data.synthetic import make_corpus


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """language -> manifest of 24 utterances by 6 speakers (espeak-ng, or tones where it is absent)."""
    made: dict[str, Path] = {}

    def manifest(language: str) -> Path:
        if language not in made:
            folder = tmp_path_factory.mktemp(f"corpus_{language}")
            rows = from_folder(make_corpus(folder / "audio", language), language=language, licence="CC0-1.0")
            made[language] = write_manifest(folder / "manifest.jsonl", rows)
        return made[language]

    return manifest


@pytest.fixture(scope="session")
def teacher_archive() -> Path:
    """The English QuartzNet15x5, which lies outside the project."""
    archive = shared_folder() / "models" / "quartznet15x5_en.nemo"
    if not archive.is_file():
        pytest.skip(f"{archive} is absent (set ASR_SHARED_DIR)")
    return archive
