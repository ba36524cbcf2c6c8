"""Settings every test shares."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
from hypothesis import settings

# Shared machines pause: a slow example is no failure, and pytest-timeout ends what hangs.
settings.register_profile("asr", deadline=None)
settings.load_profile("asr")

_DEFAULT_ENVIRONMENT = ctypes.c_void_p(-1)  # FE_DFL_ENV of GNU's C library


@pytest.fixture(autouse=True)
def _subnormal_floats() -> None:
    """ONNX Runtime leaves its calling thread flushing them to zero, and hypothesis refuses such a thread."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libm.so.6").fesetenv(_DEFAULT_ENVIRONMENT)
