"""Ways to damage an audio file, each decided by a random generator alone, so that a number names a mutant.

Blind damage (bits, ranges, cuts, repeats, zeros) mostly stops at a checksum or a magic number. Aimed damage
overwrites sizes, counts and offsets where each container keeps them (RIFF chunks, MP4 boxes, EBML elements,
FLAC metadata, Ogg pages, transport packets), and Ogg pages get a right checksum again in half of the cases.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Mapping

EXTREMES = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFF0,
            0xFFFF_FFFF, 0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)  # fmt: skip
MAX_BYTES = 1 << 20

# A place worth hitting: (pattern, where its numbers may begin after the pattern's start, widths in bytes).
_RIFF = re.compile(
    rb"RIFF|RF64|WAVE|fmt |data|fact|LIST|ds64|FORM|COMM|SSND|\.snd|wvpk|caff|desc|pakt|strh|avih|idx1|movi"
)
_MP4 = re.compile(
    rb"ftyp|moov|mvhd|trak|tkhd|edts|elst|mdia|mdhd|hdlr|minf|stbl|stsd|stts|stsc|stsz|stco|co64|mdat|esds|mp4a"
    rb"|alac|samr|damr|udta|meta|ilst|moof|traf|trun|sgpd|sbgp|free|wave|chan"
)
_EBML = re.compile(
    rb"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\x15\x49\xa9\x66|\x16\x54\xae\x6b|\x1f\x43\xb6\x75|\x11\x4d\x9b\x74"
    rb"|\x1c\x53\xbb\x6b|\xae|\xe1|\xb5|\x9f|\x63\xa2|\xa3|\x86"
)
_OGG = re.compile(rb"OggS")
_CODEC = re.compile(
    rb"OpusHead|\x01vorbis|\x05vorbis|fLaC|\x7fFLAC|Xing|Info|LAME|ID3|FLV|\xff[\xf1-\xfd]|\x47[\x40-\x5f]"
)
_ASF = re.compile(
    rb"\x30\x26\xb2\x75|\x91\x07\xdc\xb7|\xa1\xdc\xab\x8c|\x36\x26\xb2\x75|\xb5\x03\xbf\x5f|riff\x2e\x91\xcf\x11"
)
_STRUCTURES = (_RIFF, _MP4, _EBML, _OGG, _CODEC, _ASF)


def ogg_crc(page: bytes) -> int:
    """Checksum of an Ogg page whose checksum field is zero (RFC 3533: polynomial 04c11db7, not reflected)."""
    crc = 0
    for byte in page:
        crc = ((crc << 8) & 0xFFFF_FFFF) ^ _CRC_TABLE[(crc >> 24) ^ byte]
    return crc


def _crc_entry(value: int) -> int:
    value <<= 24
    for _ in range(8):
        value = ((value << 1) ^ 0x04C1_1DB7 if value & 0x8000_0000 else value << 1) & 0xFFFF_FFFF
    return value


_CRC_TABLE = tuple(_crc_entry(value) for value in range(256))


def seal_ogg(data: bytes, serial: int | None = None) -> bytes:
    """Every Ogg page with a right checksum, and with this serial number where one is given."""
    starts = [found.start() for found in _OGG.finditer(data)]
    sealed = bytearray(data)
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        if end - start < 27:
            continue
        if serial is not None:
            struct.pack_into("<I", sealed, start + 14, serial)
        struct.pack_into("<I", sealed, start + 22, 0)
        struct.pack_into("<I", sealed, start + 22, ogg_crc(bytes(sealed[start:end])))
    return bytes(sealed)


Mutation = Callable[[bytearray, random.Random, bytes], bytearray]


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, but every other time near the start, where the headers are."""
    span = len(data) if rng.random() < 0.5 else min(len(data), 512)
    return rng.randrange(span)


def bit_flips(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """Up to 32 single bits."""
    for _ in range(rng.randint(1, 32)):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return data


def byte_range(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """A run of random bytes."""
    start = _place(data, rng)
    size = min(len(data) - start, rng.choice((1, 4, 16, 64, 256, 2048)))
    data[start : start + size] = rng.randbytes(size)
    return data


def zero_run(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """A run of zeros, or of ones."""
    start = _place(data, rng)
    size = min(len(data) - start, rng.choice((1, 4, 16, 64, 256, 2048)))
    data[start : start + size] = bytes([rng.choice((0x00, 0xFF))]) * size
    return data


def truncation(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """The beginning only, or the end only."""
    cut = _place(data, rng)
    return data[: max(1, cut)] if rng.random() < 0.8 else data[cut:]


def duplication(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """A part of the file again, once or many times, there or elsewhere."""
    start = _place(data, rng)
    part = data[start : start + rng.choice((1, 8, 64, 512, 4096))]
    times = min(rng.choice((1, 1, 2, 16, 256)), max(1, (MAX_BYTES - len(data)) // max(1, len(part))))
    where = start if rng.random() < 0.5 else _place(data, rng)
    return data[:where] + part * times + data[where:]


def removal(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """A hole."""
    start = _place(data, rng)
    size = rng.choice((1, 4, 16, 64, 256, 2048))
    return data[:start] + data[start + size :] or data[:1]


def splice(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """The head of one format and the tail of another, or a piece of one inside the other."""
    at, from_ = _place(data, rng), rng.randrange(len(other))
    if rng.random() < 0.5:
        return data[: max(1, at)] + other[from_:]
    return data[:at] + other[from_ : from_ + rng.choice((8, 64, 512, 4096))] + data[at:]


def size_field(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """An extreme number in, before or after the name of a chunk, box, element or page."""
    found = [match.start() for match in rng.choice(_STRUCTURES).finditer(data)]
    found = found or [match.start() for pattern in _STRUCTURES for match in pattern.finditer(data)]
    at = (
        rng.choice(found) + rng.choice((-8, -4, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 26, 27, 28))
        if found
        else 0
    )
    return _write_extreme(data, rng, at)


def extreme_number(data: bytearray, rng: random.Random, other: bytes) -> bytearray:
    """An extreme number anywhere."""
    return _write_extreme(data, rng, _place(data, rng))


def _write_extreme(data: bytearray, rng: random.Random, at: int) -> bytearray:
    width = rng.choice((1, 2, 3, 4, 4, 4, 8))
    value = rng.choice((*EXTREMES, len(data), len(data) - 1, len(data) + 1)) & ((1 << 8 * width) - 1)
    at = max(0, min(at, len(data) - width))
    data[at : at + width] = value.to_bytes(width, "big" if rng.random() < 0.5 else "little")
    return data


MUTATIONS: tuple[Mutation, ...] = (
    bit_flips, byte_range, zero_run, truncation, duplication, removal, splice, size_field, size_field,
    size_field, extreme_number,
)  # fmt: skip


def mutant(seeds: Mapping[str, bytes], base_seed: int, number: int) -> tuple[str, str, bytes]:
    """The ``number``-th mutant of a run: format, what was done to it, bytes. The formats take turns."""
    rng = random.Random(f"{base_seed}:{number}")
    names = list(seeds)
    name = names[number % len(names)]
    data, done = bytearray(seeds[name]), []
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        mutate = rng.choice(MUTATIONS)
        data = mutate(data, rng, seeds[rng.choice(names)])
        done.append(mutate.__name__)
    if b"OggS" in data and rng.random() < 0.5:
        data = bytearray(seal_ogg(bytes(data)))
        done.append("sealed")
    return name, ", ".join(done), bytes(data[:MAX_BYTES])
