"""Ways to open an encoded file: libsndfile for wav and flac, FFmpeg's libraries (PyAV) for the rest.

A wav of 16-bit samples behind the shortest header, the most usual one, needs neither.
All give blocks of ``float32 (samples, channels)`` with the block's own sample rate, and never more at once
than about a megabyte, whatever the file's header claims. Which is faster was measured: soundfile on wav and
flac, PyAV on mp3, ogg, opus, m4a and webm.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
from numpy.typing import NDArray

from api.errors import UndecodableAudioError

BLOCK_VALUES = 1 << 18  # float32 values per block, all channels together: 1 MiB
_FLAC_BLOCK_VALUES = 1 << 14
GAP_S = 0.05  # between samples, by their time stamps: less is rounding, or a clock that runs unevenly
_PLAIN_WAV = struct.Struct("<4sI4s 4sIHHIIHH 4sI")  # RIFF, the fmt chunk, the head of the data chunk
_PLAIN_WAV_CHANNELS = 8
_MOST_CHUNKS = 64  # that are looked at in a wav, up to its data

_CUT_SHORT = re.compile(
    r"data\s*:\s*(\d+)\s*\(should be"
)  # libsndfile's log on a wav shorter than its header
_STREAMED_LENGTH_BYTES = (
    0x7FFF_0000  # programs that write to a pipe claim this much or more and mean "unknown"
)


@dataclass(frozen=True, slots=True)
class Block:
    """Decoded audio: ``samples`` is float32 (samples, channels) in [-1, 1] at ``sample_rate_hz``.

    ``start_s``: where they stand on the file's time line; None in files whose samples just follow each other.
    """

    samples: NDArray[np.float32]
    sample_rate_hz: int
    start_s: float | None = None


class Source(Protocol):
    """An opened file that can be read once."""

    container: str
    warnings: list[str]

    def blocks(self) -> Iterator[Block]:
        """Decoded blocks in order. Raises UndecodableAudioError."""

    def close(self) -> None:
        """Release the decoder; the file itself stays open."""


def open_source(file: BinaryIO) -> Source:
    """Open by the file's bytes, never by a name or a content type. Raises UndecodableAudioError."""
    if (plain := PlainWavSource.of(file)) is not None:
        return plain
    head = file.read(4)
    file.seek(0)
    if not head:
        raise UndecodableAudioError("The file is empty.", code="empty_file")
    if head in (b"RIFF", b"RF64", b"fLaC"):
        goes_on = head == b"RIFF" and _goes_on_behind_its_data(file)
        try:
            source = SoundfileSource(file)
        except soundfile.SoundFileError:  # a codec libsndfile lacks, or damage that FFmpeg may step over
            file.seek(0)
        else:
            if source.frames or not goes_on:
                if goes_on:
                    source.warnings.append("The file goes on behind the audio that its header tells of.")
                return source
            # A recorder that is cut off leaves a length of zero. FFmpeg finds all that is there.
            source.close()
            file.seek(0)
    return _with_ffmpeg(file)


def _with_ffmpeg(file: BinaryIO) -> Source:
    """Its libraries are loaded when a file needs them: they take 17 MB, and many services get wav only."""
    from api.ffmpeg import AvSource

    return AvSource(file)


def _goes_on_behind_its_data(file: BinaryIO) -> bool:
    """Whether a wav holds something else than a further chunk behind its data chunk: its length is wrong.

    ``file`` stands at its start, before and after.
    """
    size_bytes = file.seek(0, io.SEEK_END)
    name, at = b"", 12
    for _ in range(_MOST_CHUNKS):
        name, chunk_bytes = _chunk_at(file, at)
        at += 8 + chunk_bytes + chunk_bytes % 2
        if name in (b"data", b""):
            break
    behind, behind_bytes = _chunk_at(file, at)
    file.seek(0)
    if name != b"data" or not behind:
        return False
    is_chunk = behind.isascii() and behind.decode().isprintable()
    return not (is_chunk and at + 8 + behind_bytes <= size_bytes)


def _chunk_at(file: BinaryIO, at: int) -> tuple[bytes, int]:
    """Name and length in bytes of a RIFF chunk; no name where there is no room for its head."""
    file.seek(at)
    head = file.read(8)
    return (head[:4], int.from_bytes(head[4:], "little")) if len(head) == 8 else (b"", 0)


class PlainWavSource:
    """A wav that is 44 bytes of header and 16-bit samples to its last byte: nothing to decode."""

    container = "wav"

    def __init__(self, file: BinaryIO, channels: int, sample_rate_hz: int) -> None:
        """``file`` stands at its first sample."""
        self.sample_rate_hz = sample_rate_hz
        self.warnings: list[str] = []
        self._file = file
        self._channels = channels

    @classmethod
    def of(cls, file: BinaryIO) -> PlainWavSource | None:
        """``file`` as such a wav; None, and the file at its start, where it is anything else."""
        data_bytes = file.seek(0, io.SEEK_END) - _PLAIN_WAV.size
        file.seek(0)
        head = file.read(_PLAIN_WAV.size)
        if data_bytes > 0:
            channels, rate_hz = struct.unpack_from("<HI", head, 22)
            frame_bytes = 2 * channels
            fmt = (b"fmt ", 16, 1, channels, rate_hz, rate_hz * frame_bytes, frame_bytes, 16)
            expected = (b"RIFF", data_bytes + 36, b"WAVE", *fmt, b"data", data_bytes)
            few = 1 <= channels <= _PLAIN_WAV_CHANNELS
            if _PLAIN_WAV.unpack(head) == expected and few and data_bytes % frame_bytes == 0:
                return cls(file, channels, rate_hz)
        file.seek(0)
        return None

    def blocks(self) -> Iterator[Block]:
        frames = BLOCK_VALUES // self._channels
        while data := self._file.read(2 * frames * self._channels):
            samples = np.frombuffer(data, "<i2").reshape(-1, self._channels)
            yield Block(_in_floats(samples), self.sample_rate_hz)

    def close(self) -> None:
        """Nothing to release."""


class SoundfileSource:
    """wav and flac through libsndfile."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rescue: Source | None = None
        self._sound = soundfile.SoundFile(file)
        # After each read soundfile would seek to where it is; in a flac this decodes the block once more.
        self._sound.seekable = lambda: False
        self.container = str(self._sound.format).lower()
        self.frames = int(self._sound.frames)
        self.warnings: list[str] = []
        claim = _CUT_SHORT.search(str(self._sound.extra_info))
        if claim and int(claim.group(1)) < _STREAMED_LENGTH_BYTES:
            self.warnings.append(
                "The file is shorter than its header says; the audio that is there was used."
            )

    def blocks(self) -> Iterator[Block]:
        sound, found = self._sound, False
        # A damaged flac loses the whole read that meets the damage, so its reads are short.
        values = _FLAC_BLOCK_VALUES if self.container == "flac" else BLOCK_VALUES
        frames = max(1, values // sound.channels)
        # libsndfile gives floats one by one through a small buffer, the file's own integers at once.
        dtype = "int16" if sound.subtype == "PCM_16" else "float32"
        # A header that claims a length it does not have ends the loop by an empty read, like any other file.
        while True:
            try:
                samples = sound.read(frames, dtype=dtype, always_2d=True)
            except soundfile.SoundFileError:
                if not found:  # FFmpeg steps over damage, so there may be audio behind it
                    yield from self._rescued()
                    return
                self.warnings.append("The file is damaged; the audio before the damage was used.")
                return
            if len(samples) == 0:
                return
            found = True
            yield Block(_in_floats(samples), sound.samplerate)

    def _rescued(self) -> Iterator[Block]:
        self._file.seek(0)
        self._rescue = _with_ffmpeg(self._file)
        yield from self._rescue.blocks()
        self.warnings.append("The file is damaged; what could be decoded was used.")

    def close(self) -> None:
        self._sound.close()
        if self._rescue is not None:
            self._rescue.close()


def _in_floats(samples: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.float32]:
    """int16 as float32 in [-1, 1), exactly as libsndfile does it."""
    if samples.dtype == np.int16:
        return samples * np.float32(1 / 32768)
    return np.asarray(samples, dtype=np.float32)
