"""Compile the decoders' loops ahead of time: ``python -m api.compiled.build``, with numba and a C compiler.

Numba writes one object file, for any processor of this kind; the C compiler links it. The library needs the
C library and nothing else: neither numba nor Python's own interface, of whatever version.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from api import compiled
from api.compiled import Export

LOOP = "loop_"
HEAD = """
#include <stdint.h>
#define PUBLIC __attribute__((visibility("default")))
/* The beginning of numpy's PyArrayObject, which is part of its binary interface. */
typedef struct {{ intptr_t head[2]; char *data; int dimensions; intptr_t *shape, *strides; }} array;
PUBLIC const char *asr_made_of(void) {{ return "{}"; }}
PUBLIC const void *asr_data_of(const array *given) {{ return given->data; }}
"""


def object_code(exports: Sequence[Export]) -> bytes:
    """An ELF object with every export under its symbol, ``LOOP`` in front."""
    from numba.core.compiler import Flags, compile_extra
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target
    from numba.core.sigutils import normalize_signature

    flags = Flags()
    flags.no_compile = True  # not into this process
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = compiled.OPTIONS["error_model"]
    with global_compiler_lock:
        context = cpu_target.target_context.with_aot_codegen("asr_decoding", cpu_name="generic")
        library = context.codegen().create_library("asr_decoding")
        for export in exports:
            arguments, returned = normalize_signature(export.signature)
            result = compile_extra(
                *(cpu_target.typing_context, context, export.function, arguments, returned, flags),
                locals={},
                library=library,
            )
            library.get_function(result.fndesc.llvm_func_name).name = LOOP + export.symbol
        library.finalize()
        code: bytes = library.emit_native_object()
        return code


def glue(export: Export) -> str:
    """C that takes `export`'s arrays as Python has them and calls the compiled loop.

    Numba's calling convention: a pointer to the result, one to what was raised, then the arguments. Of an
    array that is two owners (none), the numbers of items and of bytes per item, the address, shape, strides.
    """
    _, arguments = compiled.parse(export.signature)
    scalars = {"int64": "int64_t", "float64": "double"}
    declared, taken, passed = ["void *", "void **"], ["void *result"], ["result", "&raised"]
    for number, (name, dimensions) in enumerate(arguments):
        if not dimensions:
            declared.append(scalars[name])
            taken.append(f"{scalars[name]} a{number}")
            passed.append(f"a{number}")
            continue
        axes = range(dimensions)
        declared += ["void *", "void *", "intptr_t", "intptr_t", "void *", *["intptr_t"] * 2 * dimensions]
        taken.append(f"const array *a{number}")
        passed += ["0", "0", "*".join(f"a{number}->shape[{axis}]" for axis in axes)]
        passed += [str(np.dtype(name).itemsize), f"a{number}->data"]
        passed += [f"a{number}->{what}[{axis}]" for what in ("shape", "strides") for axis in axes]
    return (
        f"extern int32_t {LOOP}{export.symbol}({', '.join(declared)});\n"
        f"PUBLIC int32_t {export.symbol}({', '.join(taken)}) {{\n"
        f"  void *raised;\n  return {LOOP}{export.symbol}({', '.join(passed)});\n}}\n"
    )


def build(target: Path) -> str:
    """Write the library; what stands against it, empty if all is well."""
    # Loads ONNX Runtime, which to find that all is well is too much.
    from api.kernels.build import NO_COMPILER, compile_library, find_compiler

    if sys.platform != "linux":
        return f"that is for Linux, this is {sys.platform}"
    if (compiler := find_compiler()) is None:
        return NO_COMPILER
    made_of = compiled.sources()  # before they are read: what changes meanwhile counts as newer
    with tempfile.TemporaryDirectory() as folder:
        code, text = Path(folder, "loops.o"), Path(folder, "glue.c")
        exports = compiled.load_modules()
        code.write_bytes(object_code(exports))
        text.write_text(HEAD.format(made_of) + "".join(map(glue, exports)), encoding="ascii")
        problem = compile_library(
            compiler, [code, text], target, ["-lm"], lambda library: compiled.open_library(library)[1]
        )
    if not problem:
        print(f"Compiled {target.name} with {compiler[0]}")
    return problem


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--required", action="store_true", help="fail where they cannot be compiled")
    arguments = parser.parse_args()
    target, compiled.LIBRARY = compiled.LIBRARY, Path(os.devnull)  # whatever is there, here numba is asked
    try:
        if target.is_file() and not compiled.open_library(target)[1]:
            return 0
        problem = build(target)
    except Exception as error:  # numba, the compiler, the folder: whatever it is, the service runs without
        problem = f"{type(error).__name__}: {error}"
    if not problem:
        return 0
    print(f"The decoders are not compiled ahead ({problem}); numba does it when the service starts.")
    return 1 if arguments.required else 0


if __name__ == "__main__":
    sys.exit(main())
