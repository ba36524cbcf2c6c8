"""Where a bundle says that it comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from training.provenance import git_commit, hardware


def test_the_commit_is_that_of_the_code_not_of_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = git_commit()
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "of somebody else"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert git_commit() == ours


def test_a_machine_without_git_publishes_without_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training image has none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None


def test_hardware_names_processor_and_cores() -> None:
    name, _, cores = hardware().rpartition(", ")
    assert name
    assert int(cores.removesuffix(" cores")) >= 1
