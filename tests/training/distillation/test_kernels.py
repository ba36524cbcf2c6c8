"""Compiling the kernels when another process does, or was killed while it did."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from training.distillation.kernels import build_folder, one_at_a_time


def test_the_folder_is_one_per_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = build_folder()
    assert folder.is_relative_to(tmp_path)
    assert torch.__version__ in str(folder)


def test_what_a_killed_compilation_left_is_taken_away(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    killed = textwrap.dedent(
        f"""
        import os, pathlib, signal
        from training.distillation.kernels import one_at_a_time
        with one_at_a_time(pathlib.Path({str(folder)!r})):
            pathlib.Path({str(folder / "lock")!r}).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    assert (folder / "lock").exists()
    with one_at_a_time(folder):
        assert not (folder / "lock").exists()


def test_a_second_process_waits(tmp_path: Path) -> None:
    waiting = textwrap.dedent(
        f"""
        import pathlib
        from training.distillation.kernels import one_at_a_time
        print("asks", flush=True)
        with one_at_a_time(pathlib.Path({str(tmp_path)!r})):
            print("has it", flush=True)
        """
    )
    with one_at_a_time(tmp_path):
        second = subprocess.Popen([sys.executable, "-c", waiting], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline() == "asks\n"
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.3)
    assert second.stdout.readline() == "has it\n"
    assert second.wait(60) == 0
    second.stdout.close()
