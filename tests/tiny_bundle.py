"""A real bundle of a few kilobytes whose model hears tones: each letter is a frequency, the space is one too.

It makes exact statements possible that no speech model allows: the text of a waveform is known, so cutting,
formats and batching can be checked to the letter. Everything else about it is what a shipped bundle has: an
ONNX graph with masked convolutions, a manifest, sha256 sums.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import soundfile
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from api.ngram import NgramTable

SAMPLE_RATE_HZ = 16_000
FRAME = 320
TOKENS = ("<blank>", "▁", *"abcdefgh")
TONES_HZ = {token: 500 + 250 * index for index, token in enumerate(TOKENS[1:])}
MAX_WINDOW_S = 4.0
TONE_S = 0.08
GAP_S = 0.06
_BLANK_LEVEL = float(np.log(0.003))  # power under which a tone is no tone
_SHARPNESS = 3.0


def make_bundle(folder: Path, name: str = "tiny", *, languages: tuple[str, ...] = ("en", "tr")) -> Path:
    """Write the bundle to ``folder / name`` and return that path."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS), encoding="utf-8")
    onnx.save(_graph(), path / "model.onnx")
    (path / "README.md").write_text(f"# {name}\n\nHears tones. For tests.\n", encoding="utf-8")
    digests = {
        file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in ("model.onnx", "vocab.txt")
    }
    manifest = {
        "schema_version": 1,
        "name": name,
        "version": "1",
        "languages": list(languages),
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "frame_stride_s": FRAME / SAMPLE_RATE_HZ,
        "max_window_s": MAX_WINDOW_S,
        "blank_id": 0,
        "vocabulary": {
            "kind": "chars",
            "size": len(TOKENS),
            "file": "vocab.txt",
            "word_separator": "▁",
            "special_ids": [],
        },
        "text_normalisation": ["nfc", "lowercase"],
        "input": {"kind": "waveform", "min_samples": FRAME},
        "graphs": {"float32": {"file": "model.onnx", "opset": 17}},
        "default_graph": "float32",
        "files": digests,
        "source": {"title": "tones", "url": "https://example.org/tones", "revision": None},
        "licence": "Apache-2.0",
        "training_data": [],
        "evaluation": [],
        "speed": [],
        "git_commit": None,
        "parameters": 2 * FRAME * (len(TOKENS) - 1),
    }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return path


def add_language_model(
    path: Path, table: NgramTable, weight: float = 1.0, bonus: float = 0.5, beam: int = 8
) -> None:
    """Give the bundle at ``path`` a language model for its beam search."""
    table.save(path / "ngram.npz")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    entry = {"file": "ngram.npz", "order": 3, "weight": weight, "bonus": bonus, "beam": beam}
    manifest["language_model"] = entry
    manifest["files"]["ngram.npz"] = hashlib.sha256((path / "ngram.npz").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _graph() -> onnx.ModelProto:
    """log_probs = log_softmax(sharpness * log(power at each tone)), the blank at a constant level."""
    time_s = np.arange(FRAME) / SAMPLE_RATE_HZ
    window = np.hanning(FRAME)
    window *= 2 / window.sum()
    angles = 2 * np.pi * np.array(list(TONES_HZ.values()))[:, None] * time_s
    initial = {
        "cosine": (window * np.cos(angles)).astype(np.float32)[:, None, None, :],
        "sine": (window * np.sin(angles)).astype(np.float32)[:, None, None, :],
        "tiny": np.array(1e-6, np.float32),
        "sharpness": np.array(_SHARPNESS, np.float32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "last": np.array([1], np.int64),
        "zero_f": np.array(0.0, np.float32),
        "blank_level": np.array(_BLANK_LEVEL * _SHARPNESS, np.float32),
        "frame": np.array(FRAME, np.int64),
        "channel_axes": np.array([1, 2], np.int64),
        "height_axis": np.array([2], np.int64),
    }
    conv = {"kernel_shape": [1, FRAME], "strides": [1, FRAME]}
    node = helper.make_node
    nodes = [
        node("Shape", ["waveform"], ["shape"]),
        node("Gather", ["shape", "one"], ["samples"]),
        node("Range", ["zero", "samples", "one"], ["position"]),
        node("Unsqueeze", ["lengths", "last"], ["length_column"]),
        node("Less", ["position", "length_column"], ["mask"]),
        node("Where", ["mask", "waveform", "zero_f"], ["masked"]),
        node("Unsqueeze", ["masked", "channel_axes"], ["image"]),
        node("Conv", ["image", "cosine"], ["real"], **conv),
        node("Conv", ["image", "sine"], ["imaginary"], **conv),
        node("Mul", ["real", "real"], ["real2"]),
        node("Mul", ["imaginary", "imaginary"], ["imaginary2"]),
        node("Add", ["real2", "imaginary2"], ["power"]),
        node("Add", ["power", "tiny"], ["above_zero"]),
        node("Log", ["above_zero"], ["level"]),
        node("Mul", ["level", "sharpness"], ["tones4"]),
        node("Squeeze", ["tones4", "height_axis"], ["tones"]),
        node("ReduceMax", ["tones"], ["loudest"], axes=[1], keepdims=1),
        node("Mul", ["loudest", "zero_f"], ["zeros"]),
        node("Add", ["zeros", "blank_level"], ["blank"]),
        node("Concat", ["blank", "tones"], ["logits"], axis=1),
        node("Transpose", ["logits"], ["frames_first"], perm=[0, 2, 1]),
        node("LogSoftmax", ["frames_first"], ["log_probs"], axis=2),
        node("Div", ["lengths", "frame"], ["frame_lengths"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tones",
        [
            helper.make_tensor_value_info("waveform", TensorProto.FLOAT, ["batch", "samples"]),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["batch", "frames", len(TOKENS)]),
            helper.make_tensor_value_info("frame_lengths", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in initial.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def sing(
    text: str, *, sample_rate_hz: int = SAMPLE_RATE_HZ, amplitude: float = 0.3, lead_s: float = 0.1
) -> NDArray[np.float32]:
    """The waveform of ``text`` (letters a to h and single spaces), float32 (samples,)."""
    silence = np.zeros(round(lead_s * sample_rate_hz), np.float32)
    gap = np.zeros(round(GAP_S * sample_rate_hz), np.float32)
    time_s = np.arange(round(TONE_S * sample_rate_hz)) / sample_rate_hz
    parts = [silence]
    for character in text:
        tone = np.sin(2 * np.pi * TONES_HZ["▁" if character == " " else character] * time_s)
        parts += [(amplitude * tone).astype(np.float32), gap]
    return np.concatenate([*parts, silence])


def recite(sentences: Sequence[str], pause_s: float = 0.4) -> NDArray[np.float32]:
    """Sentences with a pause after each: where a long file may be cut without touching a word."""
    pause = np.zeros(round(pause_s * SAMPLE_RATE_HZ), np.float32)
    return np.concatenate([part for sentence in sentences for part in (sing(sentence + " "), pause)])


def wav(samples: NDArray[np.float32], sample_rate_hz: int = SAMPLE_RATE_HZ, subtype: str = "PCM_16") -> bytes:
    """float32 (samples,) or (samples, channels) as a wav file."""
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate_hz, format="WAV", subtype=subtype)
    return file.getvalue()
