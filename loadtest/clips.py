"""Audio for benchmarks: real speech where ../shared is, else the committed sample; cut to given lengths."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from loadtest.load import Clip
from loadtest.processes import ROOT

SAMPLE = ROOT / "samples" / "hello.flac"
SAMPLE_RATE_HZ = 16000


def shared_dir() -> Path:
    """The folder of test speech: ASR_SHARED_DIR, or `shared` beside the checkout."""
    return Path(os.environ.get("ASR_SHARED_DIR") or ROOT.parent / "shared")


def speech(minimum_s: float, test_set: str = "libriother") -> tuple[NDArray[np.float32], str]:
    """At least `minimum_s` seconds of mono speech at 16 kHz, float32 in [-1, 1], and where it comes from."""
    manifest = shared_dir() / "speech" / "test" / "manifest.jsonl"
    paths = [SAMPLE]
    if manifest.is_file():
        rows = (json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines())
        paths = [manifest.parent / row["audio_filepath"] for row in rows if row["source"] == test_set]
    parts: list[NDArray[np.float32]] = []
    total = 0
    while total < minimum_s * SAMPLE_RATE_HZ:
        samples, rate_hz = soundfile.read(paths[len(parts) % len(paths)], dtype="float32", always_2d=True)
        mono = soxr.resample(samples.mean(axis=1), rate_hz, SAMPLE_RATE_HZ).astype(np.float32)
        parts.append(mono)
        total += len(mono)
    return np.concatenate(parts), test_set if manifest.is_file() else SAMPLE.name


def wav_clip(name: str, samples: NDArray[np.float32]) -> Clip:
    """`samples` (16 kHz mono) as a 16-bit WAV file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return Clip(f"{name}.wav", buffer.getvalue(), len(samples) / SAMPLE_RATE_HZ)


def cut_clips(lengths_s: Sequence[float]) -> tuple[list[Clip], str]:
    """One clip for each length, taken one after the other from the speech."""
    samples, source = speech(sum(lengths_s))
    clips, start = [], 0
    for number, length_s in enumerate(lengths_s):
        size = round(length_s * SAMPLE_RATE_HZ)
        clips.append(wav_clip(f"clip{number:02d}", samples[start : start + size]))
        start += size
    return clips, source
