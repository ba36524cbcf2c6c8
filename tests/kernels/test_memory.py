"""The C code on its own, under the sanitizers, against plain references: no byte outside of the buffers."""

from __future__ import annotations

import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from api.kernels import build

HERE = Path(build.__file__).parent
FUZZED = [
    "depthwise_avx2",
    "depthwise_vnni",
    "four_bits_avx2",
    "four_bits_vnni",
    "frames",
    "head_input",
    "mel",
    "pointwise_avx2",
    "pointwise_vnni",
    "weights",
]


@pytest.mark.parametrize("operator", FUZZED)
def test_no_byte_outside_of_the_buffers(tmp_path: Path, operator: str) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("no C compiler for x86-64 here")
    program = tmp_path / "fuzz"
    flags = [
        "-std=gnu11",
        "-O1",
        "-ffp-contract=off",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    # It includes the file that it looks into.
    code = [str(HERE / name) for name in build.CODE if name != f"{operator}.c"]
    source = Path(__file__).with_name(f"fuzz_{operator}.c")
    command = [compiler, *flags, "-pthread", f"-I{HERE}", "-o", str(program), str(source), *code, "-lm"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode != 0 and "san" in built.stderr:
        pytest.skip(f"{compiler} has no sanitizers here")
    assert built.returncode == 0, built.stderr
    seed = str(random.randrange(2**31))  # printed with a failure
    done = subprocess.run([program, "3", seed], capture_output=True, text=True, timeout=120)
    if done.stdout.startswith("skipped"):
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 10
