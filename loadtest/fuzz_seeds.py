"""Real files of every format the service decodes, made from the committed sample; the same bytes each time.

Each is about half a second, so that a hundred thousand mutants of them take minutes, not hours.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from loadtest.clips import SAMPLE, SAMPLE_RATE_HZ
from loadtest.fuzz_mutations import seal_ogg

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
LENGTH_S = 0.5
FIRST_S = 0.6  # the sample begins with silence, and silence compresses to nothing


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a seed is encoded: by libsndfile where ``codec`` names one of its subtypes, else by FFmpeg."""

    container: str
    codec: str
    rate_hz: int = SAMPLE_RATE_HZ
    channels: int = 1


RECIPES: dict[str, Recipe] = {
    "wav 8 bit": Recipe("WAV", "PCM_U8"),
    "wav 16 bit": Recipe("WAV", "PCM_16", 44_100, 2),
    "wav 24 bit": Recipe("WAV", "PCM_24"),
    "wav float": Recipe("WAV", "FLOAT", 48_000),
    "wav double": Recipe("WAV", "DOUBLE"),
    "wav extensible": Recipe("WAVEX", "PCM_16", channels=6),
    "wav a-law": Recipe("WAV", "ALAW", 8_000),
    "wav mu-law": Recipe("WAV", "ULAW", 8_000),
    "wav IMA ADPCM": Recipe("WAV", "IMA_ADPCM"),
    "wav MS ADPCM": Recipe("WAV", "MS_ADPCM"),
    "wav GSM": Recipe("WAV", "GSM610", 8_000),
    "rf64": Recipe("RF64", "PCM_16"),
    "flac": Recipe("FLAC", "PCM_16"),
    "flac stereo 24 bit": Recipe("FLAC", "PCM_24", 44_100, 2),
    "mp3": Recipe("mp3", "libmp3lame", 44_100, 2),
    "mp2": Recipe("mp2", "mp2", 44_100),
    "ogg vorbis": Recipe("OGG", "VORBIS", 44_100),
    "ogg opus": Recipe("ogg", "libopus", 48_000),
    "ogg flac": Recipe("ogg", "flac"),
    "aac": Recipe("adts", "aac"),
    "m4a": Recipe("ipod", "aac", 44_100, 2),
    "m4a 7.1": Recipe("ipod", "aac", channels=8),
    "mov 16 channels": Recipe("mov", "pcm_s16le", channels=16),
    "m4a alac": Recipe("ipod", "alac"),
    "mp4": Recipe("mp4", "aac", 48_000),
    "mov": Recipe("mov", "pcm_s16le"),
    "3gp amr": Recipe("3gp", "libopencore_amrnb", 8_000),
    "amr": Recipe("amr", "libopencore_amrnb", 8_000),
    "webm opus": Recipe("webm", "libopus", 48_000),
    "mkv vorbis": Recipe("matroska", "vorbis", 44_100, 2),
    "mkv flac": Recipe("matroska", "flac"),
    "wma": Recipe("asf", "wmav2", 44_100),
    "avi mp3": Recipe("avi", "libmp3lame", 44_100),
    "flv aac": Recipe("flv", "aac", 44_100),
    "mpeg-ts aac": Recipe("mpegts", "aac", 44_100),
    "mpeg-ps mp2": Recipe("mpeg", "mp2", 44_100),
    "aiff": Recipe("AIFF", "PCM_16"),
    "au": Recipe("AU", "ULAW", 8_000),
    "caf": Recipe("caf", "pcm_s16le"),
    "w64": Recipe("W64", "PCM_16"),
    "wavpack": Recipe("wv", "wavpack"),
}


def make_seeds() -> dict[str, bytes]:
    """Name of a format -> a whole, healthy file of it."""
    speech, rate_hz = soundfile.read(SAMPLE, dtype="float32")
    part = speech[int(FIRST_S * rate_hz) : int((FIRST_S + LENGTH_S) * rate_hz)]
    return {name: encode(recipe, part, rate_hz) for name, recipe in RECIPES.items()}


def encode(recipe: Recipe, mono: NDArray[np.float32], rate_hz: int) -> bytes:
    """float32 (samples,) in [-1, 1] at ``rate_hz`` as a file; further channels are quieter copies."""
    converted = np.asarray(soxr.resample(mono, rate_hz, recipe.rate_hz), dtype=np.float32)
    gains = np.linspace(1.0, 0.5, recipe.channels, dtype=np.float32)
    samples = np.clip(converted[:, None] * gains, -1.0, 1.0)
    if recipe.codec.isupper():
        file = io.BytesIO()
        soundfile.write(file, samples, recipe.rate_hz, format=recipe.container, subtype=recipe.codec)
        return _without_chance(file.getvalue())
    return _encode_av(recipe, samples)


def _without_chance(data: bytes) -> bytes:
    """libsndfile draws an Ogg stream's serial number, and dates the PEAK chunk of a float wav."""
    if data[:4] == b"OggS":
        return seal_ogg(data, serial=1)
    peak = data.find(b"PEAK", 0, 256)  # name, size, version, date: four bytes each
    return data if peak < 0 else data[: peak + 12] + bytes(4) + data[peak + 16 :]


def _encode_av(recipe: Recipe, samples: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    # bitexact leaves out versions, dates and the random serial numbers of Ogg and Matroska.
    options = {"fflags": "+bitexact"}
    with av.open(file, "w", format=recipe.container, options=options) as container:
        # FFmpeg's own Vorbis encoder calls itself experimental.
        stream: Any = container.add_stream(
            recipe.codec, rate=recipe.rate_hz, options={"strict": "experimental"}
        )
        if recipe.codec == "wmav2":  # has no bit rate of its own
            stream.bit_rate = 64_000
        stream.layout = layout = LAYOUTS.get(recipe.channels, f"{recipe.channels} channels")
        interleaved = np.ascontiguousarray(samples).reshape(1, -1)  # PyAV's planar frames end at 7 channels
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
        mux_audio(container, stream, frame, recipe.rate_hz)
    return file.getvalue()


def mux_audio(container: Any, stream: Any, frame: Any, rate_hz: int) -> None:
    """Encode all of an audio frame into a stream of an open container, in pieces that the codec takes."""
    frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
    fifo = av.AudioFifo()
    fifo.write(frame)
    size = stream.codec_context.frame_size or 1024
    while (piece := fifo.read(size, partial=True)) is not None:
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))
