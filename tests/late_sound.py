"""A video whose sound does not begin with its picture, or pauses: only its time stamps tell."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

RATE_HZ = 48_000
_PICTURES_PER_S = 5


def video(container: str, codec: str, starts_s: Sequence[float]) -> bytes:
    """A picture from 0 on, and a second of a tone of 440 Hz from each of ``starts_s`` on."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        picture = out.add_stream("mpeg4", rate=_PICTURES_PER_S)
        picture.width = picture.height = 64
        picture.pix_fmt = "yuv420p"
        sound = out.add_stream(codec, rate=RATE_HZ, layout="mono")
        for number in range(round((starts_s[-1] + 1) * _PICTURES_PER_S)):
            shown = av.VideoFrame(64, 64, "yuv420p")
            shown.pts, shown.time_base = number, Fraction(1, _PICTURES_PER_S)
            out.mux(picture.encode(shown))
        tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE_HZ) / RATE_HZ, dtype=np.float32)
        step = sound.codec_context.frame_size
        for start_s in starts_s:
            for at in range(0, RATE_HZ - step + 1, step):
                piece = tone[None, at : at + step].astype(np.float32)
                heard = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
                heard.sample_rate, heard.time_base = RATE_HZ, Fraction(1, RATE_HZ)
                heard.pts = round(start_s * RATE_HZ) + at
                out.mux(sound.encode(heard))
        out.mux(picture.encode(None))
        out.mux(sound.encode(None))
    return file.getvalue()
