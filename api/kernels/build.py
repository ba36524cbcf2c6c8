"""Compile the operators: ``python api/kernels/build.py``, with nothing but the standard library.

Takes ``CC``, else the first of cc, gcc and clang, else the package ``ziglang``. Without any the service runs
all the same, on ONNX Runtime's own operators: that is a line to read, not a failure.
The library holds the instructions of all processors and chooses when it is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_COMPILER = "no C compiler: install gcc, or the Python package ziglang, and run make again"
CODE = (
    *("depthwise.c", "depthwise_avx2.c", "depthwise_vnni.c", "four_bits.c", "four_bits_avx2.c"),
    *("four_bits_vnni.c", "frames.c", "head_input.c", "mel.c"),
    *("operator.c", "pointwise.c", "pointwise_avx2.c", "pointwise_vnni.c", "processor.c", "weights.c"),
)
HEADERS = (
    "depthwise.h",
    "four_bits.h",
    "onnxruntime_abi.h",
    "operator.h",
    "pointwise.h",
    "processor.h",
    "weights.h",
)
SOURCES = (*CODE, *HEADERS)
LIBRARY = "asr_kernels.so"
# A product and a sum that become one operation round once: other bits than ONNX Runtime's.
FLAGS = (
    *("-std=gnu11", "-O2", "-ffp-contract=off", "-g0", "-s", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-fstack-protector-strong", "-Wl,-z,relro,-z,now"),
)
# zig compiles for the machine it runs on unless told otherwise; an image runs elsewhere.
ZIG_FLAGS = ("-target", f"{platform.machine()}-linux-gnu.2.28", "-mcpu=baseline")


def find_compiler() -> list[str] | None:
    """Command line of a C compiler; None if there is none."""
    if wanted := os.environ.get("CC"):
        return shlex.split(wanted)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def compile_library(
    compiler: list[str],
    sources: Sequence[Path],
    target: Path,
    libraries: Sequence[str] = (),
    objection: Callable[[Path], str] = lambda library: "",
) -> str:
    """Write a library; what the compiler or ``objection`` says against it, empty if all is well."""
    zig = ZIG_FLAGS if "ziglang" in compiler or Path(compiler[0]).name == "zig" else ()
    # Whole or not at all, also beside another build: a service may be loading the old one.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".kernels-") as folder:
        fresh = Path(folder) / target.name
        command = [*compiler, *zig, *FLAGS, "-o", str(fresh), *map(str, sources), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not fresh.is_file():
            return done.stderr.strip() or f"{shlex.join(command)}: exit status {done.returncode}"
        if problem := objection(fresh):
            return problem
        fresh.replace(target)
    return ""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--required", action="store_true", help="fail where the kernels cannot be compiled")
    arguments = parser.parse_args()
    try:
        problem = _build()
    except (OSError, ValueError) as error:  # a compiler that is not there, a command line that is none
        problem = str(error)
    if not problem:
        return 0
    print(f"No kernels of our own ({problem}); ONNX Runtime's are used, a third slower or more.")
    return 1 if arguments.required else 0


def _build() -> str:
    """Why there is no library; empty if there is one."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"they are for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    target = HERE / LIBRARY
    changed = max((HERE / name).stat().st_mtime for name in (*SOURCES, Path(__file__).name))
    if target.is_file() and target.stat().st_mtime >= changed:
        return ""
    compiler = find_compiler()
    if compiler is None:
        return NO_COMPILER
    problem = compile_library(compiler, [HERE / name for name in CODE], target)
    if problem:
        return problem
    print(f"Compiled {target.name} with {compiler[0]}")
    return ""


if __name__ == "__main__":
    sys.exit(main())
