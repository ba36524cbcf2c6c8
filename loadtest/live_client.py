"""What programs that speak live to the service have in common: their WebSocket, pieces and events."""

from __future__ import annotations

import base64
import json
from typing import Any

from websockets.asyncio.client import connect

from loadtest.clips import SAMPLE_RATE_HZ

PIECE_S = 0.1


def opened(address: str, path: str) -> connect:
    """A WebSocket to the service at `address` (host and port); use with ``async with``."""
    return connect(f"ws://{address}{path}", proxy=None, open_timeout=120.0)


def pieces(data: bytes, piece_s: float = PIECE_S) -> list[bytes]:
    """`data` (16-bit mono at 16 kHz) in messages of `piece_s` seconds."""
    size = round(piece_s * SAMPLE_RATE_HZ) * 2
    return [data[at : at + size] for at in range(0, len(data), size)]


def update(**audio_input: Any) -> str:
    """The realtime API's ``session.update`` for such pieces, with more settings of the input."""
    given = {"format": {"type": "audio/pcm", "rate": SAMPLE_RATE_HZ}, **audio_input}
    return json.dumps({"type": "session.update", "session": {"audio": {"input": given}}})


def append(piece: bytes) -> str:
    """The realtime API's event that brings one piece."""
    return json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(piece).decode()})
