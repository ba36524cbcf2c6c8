"""The decoders' loops as machine code: compiled ahead of time where a C compiler was, else by numba.

A function of these is numba's Python over arrays that its caller has made: it allocates nothing, raises
nothing and takes and returns numbers and contiguous arrays that it may write to. ``build.py`` has numba
compile all of them into one library, which is called through ``ctypes``. A process that has that library
never imports numba: it starts a second sooner and holds 125 MB less (docs/adr/0010). Without it, or when it
was made of other sources, numba compiles each function when it is first called and keeps that beside the
sources.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from api.errors import InstallationError

MODULES = ("ctc", "hotwords", "ngram", "prefix_search")
"""Of the package ``api``: where the compiled functions are."""

LIBRARY = Path(__file__).with_name("asr_decoding.so")
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

Function = Callable[..., Any]

SCALARS: dict[str, Any] = {"int64": ctypes.c_int64, "float64": ctypes.c_double}
_ARGUMENT = re.compile(r"(\w+)(?:\[((?::,)*)::1\])?")


@dataclass(frozen=True, slots=True)
class Export:
    """One function of the library. ``signature`` in numba's words: ``int64(float32[:,::1], int64)``."""

    name: str
    signature: str
    function: Function

    @property
    def symbol(self) -> str:
        """Its name in the library."""
        return "asr_" + self.name.strip("_")


exports: list[Export] = []
"""What the modules have defined so far."""


def compiled(signature: str) -> Callable[[Function], Any]:
    """Decorator of a function that Python calls; `signature` as in ``Export``, scalars int64 and float64."""

    def decorate(function: Function) -> Any:
        export = Export(function.__name__, signature, function)
        exports.append(export)
        loaded = library()
        return _called_in(loaded, export) if loaded is not None else _by_numba(function)

    return decorate


def inner(*, inline: bool = False) -> Callable[[Function], Any]:
    """Decorator of a function that only compiled ones call."""

    def decorate(function: Function) -> Any:
        if library() is not None:
            return function
        return _by_numba(function, inline="always" if inline else "never")

    return decorate


def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are to be left to numba."""
    return _opened()[0]


def unusable() -> str:
    """Why the library that is there is not used; empty where there is none, or it is used."""
    # Told by who loads the models: these modules are imported before there is a log.
    return _opened()[1]


@cache
def _opened() -> tuple[ctypes.CDLL | None, str]:
    return open_library(LIBRARY) if LIBRARY.is_file() else (None, "")


def open_library(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """A library and nothing, or None and why it must not be used."""
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.asr_made_of.restype = ctypes.c_char_p
        loaded.asr_data_of.restype = ctypes.c_void_p
        loaded.asr_data_of.argtypes = [ctypes.py_object]
    except (OSError, AttributeError) as error:
        return None, str(error)
    probe = np.zeros(1)
    if loaded.asr_made_of() != sources().encode():
        return None, "made of other sources"
    if loaded.asr_data_of(probe) != probe.ctypes.data:
        return None, "made for arrays that look otherwise"
    return loaded, ""


def sources() -> str:
    """What identifies the code that a library is made of: a hash of the sources, in hexadecimal."""
    here = Path(__file__)
    paths = [here, here.with_name("build.py"), *(here.parent.parent / f"{name}.py" for name in MODULES)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def load_modules() -> list[Export]:
    """Every export, whoever has imported what so far."""
    for name in MODULES:
        importlib.import_module(f"api.{name}")
    return exports


def _by_numba(function: Function, **options: Any) -> Any:
    try:
        from numba import njit
    except ModuleNotFoundError as error:
        reason = unusable() or "not there"
        raise InstallationError(
            f"the decoders are compiled neither ahead ({LIBRARY}: {reason}) nor by numba, "
            "which is not installed; build the image again, or run make kernels where numba is"
        ) from error
    return njit(cache=True, **OPTIONS, **options)(function)


def parse(signature: str) -> tuple[str, list[tuple[str, int]]]:
    """The type that is returned; dtype and number of dimensions of each argument. Raises ValueError."""
    returned, _, rest = signature.rstrip(")").partition("(")
    arguments = []
    for text in re.split(r", ", rest):
        match = _ARGUMENT.fullmatch(text)
        if match is None or (match[2] is None and text not in SCALARS):
            raise ValueError(f"{signature}: {text!r} is neither a number nor a contiguous array")
        arguments.append((match[1], 0 if match[2] is None else 1 + match[2].count(":")))
    if returned not in SCALARS:
        raise ValueError(f"{signature}: returns {returned!r}, expected {' or '.join(SCALARS)}")
    return returned, arguments


def _called_in(loaded: ctypes.CDLL, export: Export) -> Any:
    """`export` in the library, with its arguments looked at first: C does not. The GIL is released."""
    returned, arguments = parse(export.signature)
    kinds = [(np.dtype(name), dimensions) if dimensions else None for name, dimensions in arguments]
    function = loaded[export.symbol]
    function.restype = ctypes.c_int32
    types = [ctypes.py_object if dimensions else SCALARS[name] for name, dimensions in arguments]
    function.argtypes = [ctypes.c_void_p, *types]
    result_type = SCALARS[returned]

    def call(*given: Any) -> Any:
        if len(given) != len(kinds):
            raise TypeError(f"{export.name}: {len(given)} arguments, expected {export.signature}")
        for value, kind in zip(given, kinds, strict=True):
            if kind and not (
                isinstance(value, np.ndarray)
                and value.dtype == kind[0]
                and value.ndim == kind[1]
                and value.flags.c_contiguous
            ):
                given_as = f"{getattr(value, 'dtype', type(value).__name__)} {np.shape(value)}"
                raise TypeError(f"{export.name}: {given_as}, expected contiguous {export.signature}")
        result = result_type()
        if (status := function(ctypes.addressof(result), *given)) != 0:
            raise RuntimeError(f"{export.name} ended with status {status}")
        return result.value

    return call
