"""How long a recording says that it is, which tells of files that were cut off."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import soundfile

PLAIN_WAVE = (1, 3, 0xFFFE)
"""Format tags of integer, float and extensible samples, whose byte rate is exact."""
UNKNOWN_BYTES = 0x7FFFF000
"""A data chunk of as many bytes or more was written to a pipe, and nobody knew its size."""
XING_BYTES = 512
"""Reaches over the first frame's header and side information to where its length is stated."""


def stated_s(path: Path) -> float | None:
    """Seconds by the header of a WAV or MP3 file; None where it does not say, and for other files."""
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            return _wave_s(file)
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError:
        return None
    return info.frames / info.samplerate if info.format == "MP3" and not is_mp3_without_length(path) else None


def is_mp3_without_length(source: Path | BinaryIO) -> bool:
    """Whether an MP3 file has no header of Xing's; libsndfile then guesses a length, and reads no more.

    A stream is left at its start.
    """
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:
            # four bytes of seven bits
            file.seek(10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        frame = file.read(XING_BYTES)
        file.seek(0)
    # eleven bits of synchronisation, any version, layer III
    is_mp3 = len(frame) > 2 and frame[0] == 0xFF and frame[1] & 0xE6 == 0xE2
    return is_mp3 and b"Xing" not in frame and b"Info" not in frame


def _wave_s(file: BinaryIO) -> float | None:
    """Of what follows "WAVE"."""
    byte_rate = 0
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", header)
        if name == b"data":
            return size / byte_rate if byte_rate and 0 < size < UNKNOWN_BYTES else None
        if name == b"fmt " and len(form := file.read(16)) == 16:
            tag, _, _, rate = struct.unpack("<HHII", form[:12])
            byte_rate = rate if tag in PLAIN_WAVE else 0
            size -= 16
        file.seek(size + size % 2, 1)
    return None
