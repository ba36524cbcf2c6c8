"""Encoded bytes -> float32 mono waveform at the model's sample rate, in blocks of bounded size.

Nothing here trusts a header: lengths are counted on decoded samples, so a file that claims four gigabytes, or
one that unpacks to a week of silence, costs what it really holds, and at most ``max_audio_s`` of eight
channels at 48 kHz.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import soxr
from numpy.typing import NDArray

from api.audio_sources import BLOCK_VALUES, GAP_S, Block, PlainWavSource, open_source
from api.errors import AudioTooLongError, UndecodableAudioError

MIN_SAMPLE_RATE_HZ = 1_000
MAX_SAMPLE_RATE_HZ = 768_000
_SAMPLES_PER_S = 8 * 48_000  # of all channels together that each second of the longest file may have
_QUICK_BYTES = 1 << 19  # 16 s of mono at 16 kHz: under a millisecond
_CANCELLED = 0.1  # level of the mean over that of the loudest channel, -20 dB


@dataclass(frozen=True, slots=True)
class Waveform:
    """A whole decoded file: ``samples`` is float32 (n,) in [-1, 1] at ``sample_rate_hz``."""

    samples: NDArray[np.float32]
    sample_rate_hz: int
    duration_s: float
    container: str
    warnings: tuple[str, ...] = field(default=())


class Resampler:
    """A stream of float32 (n,) mono samples at another rate, clipped to full scale."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._stream = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")

    def feed(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """What ``samples`` bring; the last milliseconds come with the next."""
        return _within_full_scale(self._stream.resample_chunk(samples))

    def finish(self) -> NDArray[np.float32]:
        """The last samples; nothing can be fed after them."""
        return _within_full_scale(self._stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True))


def is_quick(file: BinaryIO, sample_rate_hz: int) -> bool:
    """Whether ``file``, which is left at its start, is read faster than a thread is asked to do it.

    That is a short wav with nothing to decode or resample, so no caller makes this slow.
    """
    plain = PlainWavSource.of(file) if file.seek(0, io.SEEK_END) <= _QUICK_BYTES else None
    file.seek(0)
    return plain is not None and plain.sample_rate_hz == sample_rate_hz


class AudioReader:
    """One file as an iterator over float32 (n,) mono blocks at ``sample_rate_hz``; read once, by one thread.

    ``duration_s`` is the length decoded so far at the file's own rate: the true length once exhausted.
    Iterating raises UndecodableAudioError (also when there is not a single sample) and AudioTooLongError.
    """

    def __init__(self, file: BinaryIO, *, sample_rate_hz: int, max_audio_s: float) -> None:
        self.sample_rate_hz = sample_rate_hz
        self.max_audio_s = max_audio_s
        self.duration_s = 0.0
        self._source = open_source(file)
        self._resampler: Resampler | None = None
        self._rate_hz = 0
        self._samples = 0  # at this rate
        self._before_s = 0.0  # length of what came at other rates
        self._max_samples = int(_SAMPLES_PER_S * max_audio_s)  # in all channels together
        self._all_samples = 0
        self._ignored_gap = False

    @property
    def container(self) -> str:
        """Container format by the file's bytes."""
        return self._source.container

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the caller should know about a file that was only partly readable."""
        jump = (
            f"The file's time stamps jump beyond {self.max_audio_s:g} seconds; times after it are too early."
        )
        return (*self._source.warnings, jump) if self._ignored_gap else tuple(self._source.warnings)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for block in self._source.blocks():
            if block.sample_rate_hz != self._rate_hz:
                yield from self._flush()
                self._change_rate(block.sample_rate_hz)
            for part in self._in_place(block):
                self._count(part)
                mono = mix_down(part.samples)
                if self._resampler is not None:
                    mono = self._resampler.feed(mono)
                if len(mono):
                    yield mono
        if self.duration_s == 0.0:
            raise UndecodableAudioError("The file holds no audio samples.", code="no_audio_samples")
        yield from self._flush()

    def _change_rate(self, rate_hz: int) -> None:
        if not MIN_SAMPLE_RATE_HZ <= rate_hz <= MAX_SAMPLE_RATE_HZ:
            raise UndecodableAudioError(
                f"A sample rate of {rate_hz} Hz is not supported; it may be {MIN_SAMPLE_RATE_HZ} to "
                f"{MAX_SAMPLE_RATE_HZ} Hz."
            )
        self._rate_hz, self._samples, self._before_s = rate_hz, 0, self.duration_s
        if rate_hz != self.sample_rate_hz:
            self._resampler = Resampler(rate_hz, self.sample_rate_hz)

    def _in_place(self, block: Block) -> Iterator[Block]:
        """``block``, behind silence where the sound begins late or pauses: times are the file's own."""
        gap_s = block.start_s - self.duration_s if block.start_s is not None else 0.0
        missing = round(gap_s * block.sample_rate_hz) if gap_s > GAP_S else 0
        if missing and self.duration_s + gap_s > self.max_audio_s:
            self._ignored_gap, missing = True, 0  # a broken stamp is no cause to refuse what can be heard
        for at in range(0, missing, BLOCK_VALUES):
            silence = np.zeros((min(BLOCK_VALUES, missing - at), 1), dtype=np.float32)
            yield Block(silence, block.sample_rate_hz)
        yield block

    def _count(self, block: Block) -> None:
        """Samples and not seconds, the sum of which is inexact: a file of the allowed length is no longer."""
        self._samples += len(block.samples)
        self._all_samples += block.samples.size
        self.duration_s = self._before_s + self._samples / self._rate_hz
        if self.duration_s > self.max_audio_s:
            raise AudioTooLongError(self.max_audio_s)
        if self._all_samples > self._max_samples:
            raise AudioTooLongError(self.max_audio_s, limit_samples=self._max_samples)

    def _flush(self) -> Iterator[NDArray[np.float32]]:
        """The resampler's last samples, when the file ends or changes its rate."""
        if self._resampler is not None:
            tail = self._resampler.finish()
            self._resampler = None
            if len(tail):
                yield tail

    def close(self) -> None:
        """Release the decoder."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _within_full_scale(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Clipped to [-1, 1]: the resampler overshoots where loud sound jumps, up to twice full scale."""
    return np.clip(samples, -1.0, 1.0, out=samples)


def mix_down(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 (n, channels) -> float32 (n,): the mean of the channels, clipped to [-1, 1].

    Where channels cancel each other (one wire of a stereo cable swapped, some telephone recorders), the mean
    is silence; the loudest channel is taken instead.

    Raises UndecodableAudioError on samples that are not numbers: text made from them would be invented.
    """
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    low, high = float(mono.min()), float(mono.max())  # NaN or infinity anywhere shows in one of the two
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UndecodableAudioError(
            "The audio holds samples that are not numbers (NaN or infinity).", code="not_finite_samples"
        )
    if samples.shape[1] > 1:
        levels = np.abs(samples).mean(axis=0)
        if np.abs(mono).mean() < _CANCELLED * levels.max():
            mono = samples[:, levels.argmax()]
            low, high = float(mono.min()), float(mono.max())
    if low < -1.0 or high > 1.0:
        mono = np.clip(mono, -1.0, 1.0)
    return np.ascontiguousarray(mono, dtype=np.float32)


def decode(source: bytes | BinaryIO, *, sample_rate_hz: int, max_audio_s: float = 7200.0) -> Waveform:
    """A whole file at once, for short audio and for offline tools.

    Raises UndecodableAudioError and AudioTooLongError.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with AudioReader(file, sample_rate_hz=sample_rate_hz, max_audio_s=max_audio_s) as reader:
        blocks = list(reader)
        samples = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
        return Waveform(samples, sample_rate_hz, reader.duration_s, reader.container, reader.warnings)
