"""A recording, or a stretch of one, as samples."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from training.data.length import is_mp3_without_length
from training.errors import DataError

Samples = npt.NDArray[np.float32]
ROUNDING_S = 0.01


class UndecodableAudioError(DataError):
    """The file exists and holds no audio that can be decoded."""


def load_waveform(
    path: Path, sample_rate_hz: int, offset_s: float = 0.0, duration_s: float | None = None
) -> Samples:
    """Mono samples in [-1, 1] at `sample_rate_hz`, shape (samples,), float32.

    `duration_s` from `offset_s` on are read; everything where it is None or not above zero (NeMo's rule), or
    where the file ends within ROUNDING_S after it, for manifests round.
    wav, flac, ogg and mp3 go through libsndfile, anything else (m4a, webm, opus in odd containers) through
    FFmpeg's libraries, and so does an mp3 that does not state its length.
    Raises FileNotFoundError, UndecodableAudioError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recording")
    return _load(path, str(path), sample_rate_hz, offset_s, duration_s)


def decode_waveform(
    content: bytes, name: str, sample_rate_hz: int, offset_s: float = 0.0, duration_s: float | None = None
) -> Samples:
    """As `load_waveform`, of a file's content. Raises UndecodableAudioError, which says the `name`."""
    return _load(io.BytesIO(content), name, sample_rate_hz, offset_s, duration_s)


def _load(
    source: Path | BinaryIO, name: str, sample_rate_hz: int, offset_s: float, duration_s: float | None
) -> Samples:
    try:
        if is_mp3_without_length(source):
            samples, rate_hz = _read_av(source, name, offset_s, duration_s)
        else:
            samples, rate_hz = _read_soundfile(source, offset_s, duration_s)
    except soundfile.LibsndfileError:
        samples, rate_hz = _read_av(source, name, offset_s, duration_s)
    if samples.size == 0:
        raise UndecodableAudioError(f"{name}: no samples")
    return _at_rate(samples, rate_hz, sample_rate_hz)


def _at_rate(samples: Samples, rate_hz: int, wanted_hz: int) -> Samples:
    if rate_hz != wanted_hz:
        samples = soxr.resample(samples, rate_hz, wanted_hz)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _read_soundfile(
    source: Path | BinaryIO, offset_s: float, duration_s: float | None
) -> tuple[Samples, int]:
    with soundfile.SoundFile(source) as file:
        rate_hz = int(file.samplerate)
        start, stop = _span(offset_s, duration_s, rate_hz, file.frames)
        if start:
            file.seek(start)
        samples = file.read(-1 if stop is None else stop - start, dtype="float32", always_2d=True)
    return samples.mean(axis=1), rate_hz


def _read_av(
    source: Path | BinaryIO, name: str, offset_s: float, duration_s: float | None
) -> tuple[Samples, int]:
    blocks: list[npt.NDArray[Any]] = []
    if not isinstance(source, Path):
        source.seek(0)  # libsndfile has read some of it
    try:
        with av.open(str(source) if isinstance(source, Path) else source, "r") as container:
            if not container.streams.audio:
                raise UndecodableAudioError(f"{name}: holds no audio stream")
            stream = container.streams.audio[0]
            rate_hz = int(stream.rate)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate_hz)
            for frame in container.decode(stream):
                blocks += [part.to_ndarray().reshape(-1) for part in resampler.resample(frame)]
            blocks += [part.to_ndarray().reshape(-1) for part in resampler.resample(None)]
    except (av.FFmpegError, ValueError) as error:
        raise UndecodableAudioError(f"{name}: {error}") from error
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    start, stop = _span(offset_s, duration_s, rate_hz, len(samples))
    return samples[start:stop].astype(np.float32), rate_hz


def _span(offset_s: float, duration_s: float | None, rate_hz: int, frames: int) -> tuple[int, int | None]:
    """First frame of the stretch that is wanted, and the frame it stops before; None: read to the end."""
    start = min(round(offset_s * rate_hz), frames)
    if not duration_s or duration_s <= 0:
        return start, None
    stop = start + round(duration_s * rate_hz)
    return start, stop if stop + ROUNDING_S * rate_hz < frames else None
