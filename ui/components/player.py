"""The player as a Streamlit component: sound, waveform, mel spectrogram and clickable words on one clock."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit import runtime

from ui.sound import SoundPicture
from ui.strings import Strings
from ui.transcript import Transcript

SURE_FROM = 0.9
FAIR_FROM = 0.7

_HERE = Path(__file__).parent
_STRINGS = (
    *("player", "play", "pause", "speed", "copy", "copied", "hint", "words", "legend", "fair", "unsure"),
    *("sure", "segments", "listen", "from_to", "text", "confidence", "position", "picture", "unplayable"),
)


@dataclass(frozen=True)
class PlayableSound:
    """What the browser plays: the file's own bytes and the type they are served with."""

    data: bytes
    media_type: str


def player(
    key: str, transcript: Transcript, sound: PlayableSound, picture: SoundPicture | None, strings: Strings
) -> None:
    """Show the player for one transcript. ``key`` is the same on every run for the same transcript."""
    data: dict[str, Any] = {
        "id": key,
        "language": strings.language,
        "point": strings("unit.point"),
        "language_code": transcript.language,
        "audio_url": _media_url(sound.data, sound.media_type, f"{key}.sound"),
        "duration_s": transcript.duration_s,
        "text": transcript.text,
        "words": [
            {"text": word.text, "start_s": word.start_s, "end_s": word.end_s, "confidence": word.confidence}
            for word in transcript.words
        ],
        "segments": [
            {"text": part.text, "start_s": part.start_s, "end_s": part.end_s, "confidence": part.confidence}
            for part in transcript.segments
        ],
        "picture": _picture(key, picture),
        "sure_from": SURE_FROM,
        "fair_from": FAIR_FROM,
        "strings": {name: strings(f"player.{name}") for name in _STRINGS},
    }
    _component()(key=f"{key}.player", data=data)


def _picture(key: str, picture: SoundPicture | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    tiles = [_media_url(png, "image/png", f"{key}.tile{i}") for i, png in enumerate(picture.tiles)]
    return {
        "peaks": base64.b64encode(picture.peaks).decode("ascii"),
        "tiles": tiles,
        "columns_per_s": picture.columns_per_s,
        "columns_per_tile": picture.columns_per_tile,
    }


def _media_url(data: bytes, media_type: str, name: str) -> str:
    """Where this session's browser finds ``data``; Streamlit forgets it when no session shows it."""
    if not runtime.exists():  # a test without a server
        return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
    return runtime.get_instance().media_file_mgr.add(data, media_type, name)


@st.cache_resource
def _component() -> Any:
    """Registered once for the process."""
    return st.components.v2.component(
        "asr_player",
        html=(_HERE / "player.html").read_text(encoding="utf-8"),
        css=(_HERE / "player.css").read_text(encoding="utf-8"),
        js="".join((_HERE / name).read_text(encoding="utf-8") for name in ("picture.js", "player.js")),
    )
