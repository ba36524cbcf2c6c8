"""Where sound comes in: files, the microphone, the sample."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import streamlit as st

from ui.client import AudioFile
from ui.service import Service
from ui.session import Session
from ui.views.format import duration

SAMPLE = Path(__file__).parent.parent / "samples" / "en.flac"
_RATE_HZ = 16_000
_WAV_HEADER_BYTES = 44


def render(session: Session, service: Service) -> list[AudioFile]:
    """Draw the inputs; return what is new since the last run, and empty the upload box for the next drop."""
    strings = session.strings
    left, right = st.columns([3, 2], gap="large")
    with left:
        uploads = st.file_uploader(
            strings("input.upload"),
            accept_multiple_files=True,
            help=strings("input.upload_help"),
            key=f"upload.{session.uploads}",
        )
    with right:
        recording = st.audio_input(strings("input.record"), key="recording", sample_rate=_RATE_HZ)
        st.caption(strings("input.record_limit", duration=duration(longest_recording_s(service), strings)))
        sample = st.button(
            strings("input.sample"),
            help=strings("input.sample_help"),
            icon=":material/graphic_eq:",
            width="stretch",
            disabled=not service.usable,
        )
    st.caption(strings("input.privacy"))
    new = [_file(upload) for upload in uploads]
    if new:
        session.uploads += 1
    if recording is not None:
        taken = hashlib.sha256(recording.getvalue()).hexdigest()
        if taken not in session.taken:
            session.taken.add(taken)
            new.append(_file(recording))
    if sample:
        new.append(AudioFile("sample.flac", SAMPLE.read_bytes(), "audio/flac"))
    return new


def longest_recording_s(service: Service) -> float:
    """How long one may speak: a longer recording is refused as a whole, and only after it was spoken."""
    limit_bytes = int(st.get_option("server.maxUploadSize")) * 2**20
    if service.max_upload_bytes:
        limit_bytes = min(limit_bytes, service.max_upload_bytes)
    return max(0, limit_bytes - _WAV_HEADER_BYTES) / (2 * _RATE_HZ)  # mono, 16 bits


def _file(upload: Any) -> AudioFile:
    return AudioFile(upload.name, upload.getvalue(), upload.type or "application/octet-stream")
