"""Compiling: whole or not at all, and without a compiler a line that says what is missing."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from api.kernels import build

HERE = Path(build.__file__).parent

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the kernels are for Linux on x86-64"
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The script and its sources in a folder of their own, with nothing compiled."""
    for name in ("build.py", *build.SOURCES):
        shutil.copy(HERE / name, tmp_path / name)
    return tmp_path


def run(
    copy: Path, *arguments: str, path: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    # -S: without the environment's packages, so that no ziglang is found either.
    command = [sys.executable, "-S", str(copy / "build.py"), *arguments]
    paths = {"PATH": "/usr/bin:/bin" if path is None else path}
    return subprocess.run(command, capture_output=True, text=True, env=paths | environment)


def test_compiles_once(copy: Path) -> None:
    if build.find_compiler() is None:
        pytest.skip("no C compiler here")
    first, second = run(copy, "--required"), run(copy, "--required")
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + first.stderr
    assert first.stdout.startswith("Compiled")
    assert second.stdout == ""
    assert ctypes.CDLL(str(copy / build.LIBRARY)).RegisterCustomOps


def test_every_source_is_named() -> None:
    """What is not named is not compiled, or a change of it is not noticed."""
    assert {path.name for path in HERE.glob("*.[ch]")} == set(build.SOURCES)


def test_without_a_compiler(copy: Path) -> None:
    done = run(copy, path=str(copy))
    assert done.returncode == 0
    assert "install gcc" in done.stdout
    assert run(copy, "--required", path=str(copy)).returncode == 1
    assert not (copy / build.LIBRARY).exists()


def test_a_compiler_that_fails(copy: Path) -> None:
    (copy / build.CODE[0]).write_text("this is not C\n")
    if build.find_compiler() is None:
        pytest.skip("no C compiler here")
    done = run(copy, "--required")
    assert done.returncode == 1
    assert "error" in done.stdout
    assert not list(copy.glob("*.so")), "half a library"


def test_a_compiler_that_is_not_there(copy: Path) -> None:
    done = run(copy, CC="no-such-compiler -v")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no-such-compiler" in done.stdout


def test_a_changed_source_is_compiled_again(copy: Path) -> None:
    if build.find_compiler() is None:
        pytest.skip("no C compiler here")
    run(copy, "--required")
    later = (copy / build.LIBRARY).stat().st_mtime + 10
    os.utime(copy / "onnxruntime_abi.h", (later, later))
    assert run(copy).stdout.startswith("Compiled")


def test_half_a_library_never_takes_the_place_of_a_whole_one(copy: Path) -> None:
    whole = copy / build.LIBRARY
    whole.write_bytes(b"the old library")
    os.utime(whole, (0, 0))
    compiler = copy / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho half > "$2"\nexit 1\n')
    compiler.chmod(0o755)
    assert run(copy, "--required", CC=str(compiler)).returncode == 1
    assert whole.read_bytes() == b"the old library"
    assert {path.name for path in copy.iterdir()} == {"build.py", *build.SOURCES, build.LIBRARY, "compiler"}


def test_a_command_line_that_is_none(copy: Path) -> None:
    done = run(copy, CC="gcc '")
    assert (done.returncode, done.stderr) == (0, "")
    assert "quotation" in done.stdout
