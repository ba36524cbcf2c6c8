"""Encoded files through FFmpeg's libraries (PyAV): whatever ``audio_sources.py`` has no shorter way for."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from api.audio_sources import BLOCK_VALUES, GAP_S, Block
from api.errors import UndecodableAudioError

_MAX_DAMAGED_PACKETS = 1000
_UNSAFE_PLANES = 8
_LONGEST_DELAY_S = 0.2  # the time stamps of a WMA are those of two frames later: its decoder drops the first
# FFmpeg sizes tables by counts in the header: a kilobyte of MP4 that claims eighty million samples made it
# take a gigabyte. The index of two hours of AAC at 96 kHz takes 16 MiB.
_MAX_ALLOCATION_BYTES = 32 * 2**20
# FFmpeg's own default. Where a file has more, it drops what belongs to the others, and in Matroska whole
# stretches of the rest with it.
_MAX_STREAMS = 1000

# Containers and bare streams FFmpeg may try. Playlists and other formats that name further files or hosts
# (hls, concat, dash, sdp) stay out: an upload must never make this process open anything else.
_DEMUXERS = (
    "aac,aiff,amr,amrnb,amrwb,asf,au,avi,caf,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,"
    "ogg,w64,wav,wv"
)

FORMATS = "wav, flac, mp3, ogg, opus, m4a, mp4, webm"


@cache
def limit_ffmpeg_memory() -> int:
    """Bound every single allocation of the FFmpeg libraries in this process; how many libraries were found.

    PyAV does not expose ``av_max_alloc`` (libavutil/mem.h), so it is called in the library that is loaded.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    libraries = {line.split(maxsplit=5)[-1] for line in lines if "libavutil" in line}
    for library in libraries:
        ctypes.CDLL(library).av_max_alloc(ctypes.c_size_t(_MAX_ALLOCATION_BYTES))
    return len(libraries)


class AvSource:
    """The first audio stream of a file."""

    def __init__(self, file: BinaryIO) -> None:
        limit_ffmpeg_memory()
        try:
            self._container = av.open(
                _ReadOnly(file),
                mode="r",
                metadata_errors="replace",
                options={
                    "format_whitelist": _DEMUXERS,
                    "protocol_whitelist": "none",
                    "max_streams": str(_MAX_STREAMS),
                },
            )
        except (av.error.FFmpegError, ValueError, OSError) as error:
            raise _unreadable() from error
        self.container = str(self._container.format.name)
        self.warnings: list[str] = []
        if (count := len(self._container.streams)) >= _MAX_STREAMS:
            self._container.close()
            raise UndecodableAudioError(
                f"The file holds {count} streams or more; fewer than {_MAX_STREAMS} can be read."
            )
        if not self._container.streams.audio:
            self._container.close()
            raise UndecodableAudioError("The file holds no audio stream.", code="no_audio_stream")
        self._stream = self._container.streams.audio[0]
        self._damaged_packets = 0
        self._delay_s: float | None = None  # of the decoder, in every time stamp

    def blocks(self) -> Iterator[Block]:
        """Frames are about 20 ms; they are joined into blocks while rate and channels stay the same."""
        found = False
        parts: list[NDArray[np.float32]] = []
        shape, values, start_s, end_s = (0, 0), 0, 0.0, 0.0
        for samples, rate_hz, stamp_s in self._float_frames():
            is_late = stamp_s is not None and stamp_s - end_s > GAP_S
            if parts and (shape != (rate_hz, samples.shape[1]) or values >= BLOCK_VALUES or is_late):
                yield Block(np.concatenate(parts), shape[0], start_s)
                parts, values = [], 0
            if not parts:
                start_s = end_s = end_s if stamp_s is None else stamp_s
            parts.append(samples)
            end_s += len(samples) / rate_hz
            shape, values, found = (rate_hz, samples.shape[1]), values + samples.size, True
        if parts:
            yield Block(np.concatenate(parts), shape[0], start_s)
        if self._damaged_packets and not found:
            raise _unreadable()
        if self._damaged_packets:
            self.warnings.append("The file is damaged or cut short; what could be decoded was used.")

    def _float_frames(self) -> Iterator[tuple[NDArray[np.float32], int, float | None]]:
        """float32 (samples, channels) of each frame, its sample rate in Hz, and where it is in seconds."""
        to_float = av.AudioResampler(format="flt")
        layout: tuple[str, int, str] | None = None
        for frame in self._frames():
            shape = (frame.layout.name, frame.sample_rate, frame.format.name)
            if shape != layout:  # a stream may change its mind; each part is converted for itself
                # PyAV finds the end of a planar frame's channels by a null pointer. Frames of eight or more
                # have none, and looking at one ends the process (PyAV 18): those are interleaved first.
                planar = frame.layout.nb_channels < _UNSAFE_PLANES
                to_float, layout = av.AudioResampler(format="fltp" if planar else "flt"), shape
            stamp_s = self._stamp_s(frame)
            try:
                converted = to_float.resample(frame)
            except (av.error.FFmpegError, ValueError):
                self._damaged_packets += 1
                continue
            for part in converted:
                values = np.asarray(part.to_ndarray(), dtype=np.float32)
                samples = values.T if part.format.is_planar else values.reshape(part.samples, -1)
                if len(samples):
                    yield samples, int(part.sample_rate), stamp_s
                    stamp_s = None

    def _stamp_s(self, frame: Any) -> float | None:
        """Seconds from the beginning of the file; None where the frame just follows the one before.

        So it is in files that are packets and nothing else (aac, amr).
        """
        begin_us = self._container.start_time  # of all streams: a picture may come before the sound
        if frame.pts is None or not frame.time_base or begin_us is None:
            return None
        stamp_s = float(frame.pts * frame.time_base) - begin_us / av.time_base
        if self._delay_s is None:
            self._delay_s = stamp_s if stamp_s < _LONGEST_DELAY_S else 0.0
        return stamp_s - self._delay_s

    def _frames(self) -> Iterator[Any]:
        """Decoded frames; damaged packets are counted and stepped over."""
        packets = self._container.demux(self._stream)
        while self._damaged_packets < _MAX_DAMAGED_PACKETS:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (av.error.FFmpegError, ValueError, OSError):
                self._damaged_packets += 1
                return
            except IndexError:
                # PyAV's flush stumbles over streams that FFmpeg found while reading (MPEG-TS, FLV). They
                # come after ours, which has been flushed by then.
                return
            try:
                yield from packet.decode()
            except (av.error.FFmpegError, ValueError):
                self._damaged_packets += 1

    def close(self) -> None:
        self._container.close()


class _ReadOnly(io.RawIOBase):
    """What FFmpeg may do with the upload: read, seek, tell. No name, so nothing is guessed from one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _unreadable() -> UndecodableAudioError:
    return UndecodableAudioError(f"The file is not audio that can be read. Formats: {FORMATS}.")
