"""A picture of a sound for the player: peaks for the waveform, tiles of a mel spectrogram as PNG.

Files are read in blocks, so that memory stays flat for an hour of audio. The spectrogram is a log-mel one
with the HTK mel scale (Young et al., The HTK Book, section 5.4), a Hann window of 25 ms and 64 bands up to
8 kHz; it is for the eye only and is not what the model sees.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image

MELS = 64
COLUMNS_PER_S = 50.0
MAX_COLUMNS = 36_000
TILE_COLUMNS = 4096
TOP_HZ = 8000.0
_FLOOR_DB = 70.0
_SILENCE_DB = -100.0  # of no sound at all, see `_log_mel`
_BLOCK_S = 10.0
# As in the service: no playlist, session description or script may make FFmpeg open files, hosts or ports.
_FFMPEG_OPTIONS = {
    "format_whitelist": "aac,aiff,amr,amrnb,amrwb,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,"
    "mj2,mp3,mpeg,mpegts,ogg,w64,wav,wv",
    "protocol_whitelist": "none",
    "max_streams": "16",
}
_ANCHORS = [(0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)]
_MAX_ALLOCATION_BYTES = 32 * 2**20  # a header of a kilobyte can claim tables of gigabytes
_READ_FRAMES = 1 << 14
# Where sound begins late or pauses: the same as in the service (`api/ffmpeg.py`), whose words stand below.
_GAP_S = 0.05
_LONGEST_DELAY_S = 0.2
_LONGEST_S = 7200.0  # a later time stamp is taken for a broken one
# PyAV trips over streams that appear late with an IndexError.
_UNREADABLE = (soundfile.SoundFileError, av.FFmpegError, RuntimeError, ValueError, IndexError)

Floats = NDArray[np.float32]


class UnreadableSoundError(ValueError):
    """Neither libsndfile nor FFmpeg can read the bytes. The transcript may exist all the same."""


@dataclass(frozen=True)
class SoundPicture:
    """``peaks``: one byte per column of ``1 / columns_per_s`` seconds, 255 in the loudest.

    ``tiles``: PNG images of the same columns side by side, each ``columns_per_tile`` wide (the last one less)
    and 64 mel bands high, low tones at the bottom.
    """

    duration_s: float
    peaks: bytes
    tiles: tuple[bytes, ...]
    columns_per_s: float
    columns_per_tile: int = TILE_COLUMNS


def picture_of(data: bytes) -> SoundPicture:
    """Draw the sound in ``data``.

    Raises:
        UnreadableSoundError: it cannot be decoded, or holds no sound.
    """
    columns: list[Floats] = []
    peaks: list[Floats] = []
    samples, rate = 0, 0
    left_over: Floats = np.zeros(0, np.float32)
    for block, block_rate in blocks(data):
        rate = rate or block_rate
        samples += len(block)
        block = np.concatenate([left_over, block])
        hop = max(1, round(rate / COLUMNS_PER_S))
        whole = len(block) // hop
        left_over = block[whole * hop :]
        if whole:
            frames = block[: whole * hop].reshape(whole, hop)
            peaks.append(np.abs(frames).max(axis=1))
            columns.append(_log_mel(block[: whole * hop], hop, rate))
    if not peaks:
        raise UnreadableSoundError("There is no sound in this file.")
    duration_s = samples / rate
    pool = max(1, -(-sum(map(len, peaks)) // MAX_COLUMNS))
    level = _pooled(np.concatenate(peaks)[:, None], pool)[:, 0]
    decibels = _pooled(np.concatenate(columns), pool)
    loudest = float(level.max()) or 1.0
    return SoundPicture(
        duration_s=duration_s,
        peaks=np.round(level / loudest * 255).astype(np.uint8).tobytes(),
        tiles=_tiles(decibels),
        columns_per_s=len(level) / duration_s,
    )


def duration_of(data: bytes) -> float | None:
    """Length in seconds as the file's header tells it, quickly; None when it does not."""
    try:
        return float(soundfile.info(io.BytesIO(data)).duration)
    except (soundfile.LibsndfileError, RuntimeError):
        pass
    try:
        with _opened_by_ffmpeg(data) as container:
            return container.duration / av.time_base if container.duration else None
    except (av.FFmpegError, ValueError):
        return None


def media_type(data: bytes) -> str | None:
    """The type under which browsers play these bytes, judged by their beginning; None when unknown."""
    head = data[:16]
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "audio/wav"
    if head[:4] == b"fLaC":
        return "audio/flac"
    if head[:4] == b"OggS":
        return "audio/ogg"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "audio/webm"
    if head[4:8] == b"ftyp":
        return "audio/mp4"
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return "audio/mpeg"
    return None


def blocks(data: bytes) -> Iterator[tuple[Floats, int]]:
    """Mono float32 blocks and their rate in Hz, at the file's own rate; of a damaged file what can be read.

    Raises:
        UnreadableSoundError: see the class.
    """
    failure: Exception | None = None
    readers = [_read_with_libsndfile, _read_with_ffmpeg]
    if media_type(data) == "audio/mpeg":  # libsndfile's decoder complains on stderr of frames that are sound
        readers.reverse()
    for read in readers:
        waiting: list[Floats] = []
        held, rate, found = 0, 0, False
        try:
            for part, rate in read(data):
                waiting.append(np.nan_to_num(part))
                held += len(part)
                if held >= rate * _BLOCK_S:
                    yield np.concatenate(waiting), rate
                    waiting, held, found = [], 0, True
        except _UNREADABLE as error:
            failure = error
        if held:
            yield np.concatenate(waiting), rate
        if held or found:
            return
    raise UnreadableSoundError("The sound in this file cannot be read.") from failure


def _read_with_libsndfile(data: bytes) -> Iterator[tuple[Floats, int]]:
    """In short reads: one that meets damage is lost as a whole."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        for part in file.blocks(_READ_FRAMES, dtype="float32", always_2d=True):
            yield part.mean(axis=1), file.samplerate


def _read_with_ffmpeg(data: bytes) -> Iterator[tuple[Floats, int]]:
    with _opened_by_ffmpeg(data) as container:
        if not container.streams.audio:
            return
        resampler = av.AudioResampler(format="flt", layout="mono")
        given_s = 0.0
        delay_s: float | None = None
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:  # as in the service: there may be more behind the damage
                continue
            for frame in frames:
                if (stamp_s := _stamp_s(container, frame)) is not None:
                    if delay_s is None:
                        delay_s = stamp_s if stamp_s < _LONGEST_DELAY_S else 0.0
                    gap_s = stamp_s - delay_s - given_s
                    if gap_s > _GAP_S and given_s + gap_s <= _LONGEST_S:
                        yield from _silence(gap_s, frame.sample_rate)
                        given_s += gap_s
                for part in resampler.resample(frame):
                    given_s += part.samples / part.sample_rate
                    yield part.to_ndarray().reshape(-1).astype(np.float32, copy=False), part.sample_rate


def _stamp_s(container: av.container.InputContainer, frame: av.AudioFrame) -> float | None:
    """Seconds from the beginning of the file to a frame; None where nothing tells."""
    if frame.pts is None or not frame.time_base or container.start_time is None:
        return None
    return float(frame.pts * frame.time_base) - container.start_time / av.time_base


def _silence(duration_s: float, rate: int) -> Iterator[tuple[Floats, int]]:
    missing = round(duration_s * rate)
    for at in range(0, missing, rate):
        yield np.zeros(min(rate, missing - at), np.float32), rate


def _opened_by_ffmpeg(data: bytes) -> closing[av.container.InputContainer]:
    _limit_ffmpeg_memory()
    return closing(av.open(io.BytesIO(data), mode="r", options=_FFMPEG_OPTIONS))


@cache
def _limit_ffmpeg_memory() -> None:
    """Bound each allocation of the loaded libavutil; PyAV does not expose ``av_max_alloc``. Linux only."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for library in {line.split(maxsplit=5)[-1] for line in lines if "libavutil" in line}:
        ctypes.CDLL(library).av_max_alloc(ctypes.c_size_t(_MAX_ALLOCATION_BYTES))


def _log_mel(block: Floats, hop: int, rate: int) -> Floats:
    """(samples,) -> float32 (columns, MELS) in decibels, one column per hop."""
    window = max(hop, round(0.025 * rate))
    size = 1 << (window - 1).bit_length()
    padded = np.pad(block, (window // 2, window))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(block) : hop]
    taper = np.hanning(window).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(frames * taper, size)))
    mels = power @ _filters(size, rate).T + 10 ** (_SILENCE_DB / 10)
    decibels: Floats = (10 * np.log10(mels)).astype(np.float32)
    return decibels


def _filters(size: int, rate: int) -> Floats:
    """Triangular mel filters, float32 (MELS, size // 2 + 1)."""
    top_hz = min(TOP_HZ, rate / 2)
    mel_edges = np.linspace(0, 2595 * np.log10(1 + top_hz / 700), MELS + 2)
    edges_hz = 700 * (10 ** (mel_edges / 2595) - 1)
    bins_hz = np.fft.rfftfreq(size, 1 / rate)[None, :]
    low, mid, high = (edges_hz[i : i + MELS, None] for i in range(3))
    rising = (bins_hz - low) / (mid - low)
    falling = (high - bins_hz) / (high - mid)
    filters = np.maximum(0, np.minimum(rising, falling))
    nearest = np.abs(bins_hz - mid).argmin(axis=1)  # low bands can be narrower than one bin
    empty = filters.sum(axis=1) == 0
    filters[np.flatnonzero(empty), nearest[empty]] = 1.0
    return filters.astype(np.float32)


def _pooled(values: Floats, pool: int) -> Floats:
    """(rows, width) -> (ceil(rows / pool), width): the largest of each ``pool`` rows."""
    return np.maximum.reduceat(values, np.arange(0, len(values), pool), axis=0)


def _tiles(decibels: Floats) -> tuple[bytes, ...]:
    top = max(float(decibels.max()), _SILENCE_DB + _FLOOR_DB)  # where nothing is heard, nothing shines
    shade = np.clip((decibels - top + _FLOOR_DB) / _FLOOR_DB, 0, 1) * 255
    image = np.flipud(shade.astype(np.uint8).T)
    steps = np.linspace(0, 255, len(_ANCHORS))
    channels = [np.interp(np.arange(256), steps, [anchor[i] for anchor in _ANCHORS]) for i in range(3)]
    palette = np.stack(channels, axis=1).astype(np.uint8).tobytes()
    tiles = []
    for start in range(0, image.shape[1], TILE_COLUMNS):
        tile = Image.fromarray(np.ascontiguousarray(image[:, start : start + TILE_COLUMNS]))
        tile.putpalette(palette)
        out = io.BytesIO()
        tile.save(out, format="PNG")
        tiles.append(out.getvalue())
    return tuple(tiles)
