"""Raw audio as it comes over a wire -> float32 mono at the model's sample rate."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from api.audio import Resampler
from api.errors import InvalidValueError

FloatArray = NDArray[np.float32]
Encoding = Literal["audio/pcm", "audio/pcmu", "audio/pcma"]


def _mu_law() -> FloatArray:
    """The 256 values of G.711's mu-law (ITU-T G.711, table 2a), full scale 1."""
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4) & 7, (code & 15).astype(np.int32)
    magnitude = (((mantissa << 3) + 132) << exponent) - 132
    return (np.where(code & 128, -magnitude, magnitude) / 32768).astype(np.float32)


def _a_law() -> FloatArray:
    """The 256 values of G.711's A-law (ITU-T G.711, table 1a), full scale 1."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = (code >> 4) & 7, (code & 15).astype(np.int32)
    low = (mantissa << 4) + 8
    magnitude = np.where(exponent == 0, low, (low + 256) << np.maximum(exponent, 1) - 1)
    return (np.where(code & 128, magnitude, -magnitude) / 32768).astype(np.float32)


_G711 = {"audio/pcmu": _mu_law(), "audio/pcma": _a_law()}


class PcmInput:
    """A stream of mono samples: 16-bit little-endian (``audio/pcm``) or G.711 bytes.

    Pieces may end anywhere, also in the middle of a sample. `after` is an input of the same caller, before:
    where its last sample was sent by half, the other half comes here.
    """

    def __init__(
        self, encoding: Encoding, input_rate_hz: int, sample_rate_hz: int, after: PcmInput | None = None
    ) -> None:
        self._encoding = encoding
        self._table = _G711.get(encoding)
        self._rates_hz = (input_rate_hz, sample_rate_hz)
        self._odd: bytes = after._odd if after is not None and after._encoding == encoding else b""
        self._resampler = self._new_resampler()

    def feed(self, data: bytes) -> FloatArray:
        """float32 (n,) of what ``data`` completes; the resampler keeps the last milliseconds."""
        if self._table is not None:
            samples = self._table[np.frombuffer(data, np.uint8)]
        else:
            data = self._odd + data
            whole = len(data) & ~1
            self._odd = data[whole:]
            samples = np.frombuffer(data[:whole], "<i2").astype(np.float32) / np.float32(32768)
        if self._resampler is None or not len(samples):
            return samples
        return self._resampler.feed(samples)

    def flush(self) -> FloatArray:
        """The resampler's last samples; what comes next begins anew. Half a sample waits for the rest."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        tail = self._resampler.finish()
        self._resampler = self._new_resampler()
        return tail

    def clear(self) -> FloatArray:
        """As `flush`, and half a sample is forgotten."""
        self._odd = b""
        return self.flush()

    def _new_resampler(self) -> Resampler | None:
        input_rate_hz, sample_rate_hz = self._rates_hz
        return None if input_rate_hz == sample_rate_hz else Resampler(input_rate_hz, sample_rate_hz)


def check_rate(value: object, param: str) -> int:
    """A sample rate in Hz that a caller sent, as a number or the text of one.

    Raises InvalidValueError outside 8 to 48 kHz.
    """
    try:
        rate_hz = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        rate_hz = math.nan
    if not (8000 <= rate_hz <= 48000 and rate_hz.is_integer()):
        shown = f"{value!r:.40}" if isinstance(value, int | float | str) else "this"
        raise InvalidValueError(f"{param}: {shown} is not a sample rate from 8000 to 48000 Hz.", param=param)
    return int(rate_hz)
