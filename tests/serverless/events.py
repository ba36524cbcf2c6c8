"""Events as Lambda gives them, with a recording and a key in them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import soxr

from tests.tiny_bundle import SAMPLE_RATE_HZ

EVENTS = Path(__file__).resolve().parents[2] / "serverless" / "events"
SECRET = "a-secret-of-the-test"


def event(name: str) -> dict[str, Any]:
    """One of ``serverless/events``."""
    return json.loads((EVENTS / f"{name}.json").read_text())


def posted(path: str, audio: bytes, **fields: str) -> dict[str, Any]:
    """An HTTP API event with the body that a real client makes."""
    request = httpx.Request("POST", f"https://lambda{path}", data=fields, files={"file": ("a.bin", audio)})
    made = event("http_api")
    made["rawPath"] = made["requestContext"]["http"]["path"] = path
    made["headers"] |= {
        "content-type": request.headers["content-type"],
        "authorization": f"Bearer {SECRET}",
    }
    made["headers"]["content-length"] = str(len(request.read()))
    made["body"] = base64.b64encode(request.read()).decode()
    return made


def coded(samples: np.ndarray, container: str, codec: str, rate_hz: int) -> bytes:
    """Compressed audio, by FFmpeg's libraries inside PyAV: there is no ffmpeg program in the image."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate_hz, layout="mono")
        resampled = soxr.resample(samples, SAMPLE_RATE_HZ, rate_hz).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(resampled[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate_hz)
        for part in resampler.resample(frame):
            for packet in stream.encode(part):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return sink.getvalue()
