"""Correct the text, and take it away as TXT, SRT, VTT, JSON or one ZIP."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import streamlit as st

from ui.alignment import TextTooLongError, corrected
from ui.exports import FORMATS, stem, to_txt, to_zip
from ui.session import Session
from ui.transcript import Transcript
from ui.work import Task

_ON_ITS_WAY_S = 0.5


def render(session: Session, task: Task, transcript: Transcript) -> None:
    """The text to correct, and the downloads of what it has become."""
    strings = session.strings
    key = f"edit.{task.id}.{transcript.id}"
    original = to_txt(transcript).rstrip("\n")
    if key not in st.session_state:  # also after another file was looked at: Streamlit forgets hidden widgets
        st.session_state[key] = session.edits.get(key, original)

    def keep() -> None:
        session.edits[key] = st.session_state[key]

    with st.expander(strings("result.correct"), icon=":material/edit:", key=f"open.{key}"):
        text = st.text_area(
            strings("result.correct"),
            key=key,
            height=180,
            help=strings("result.correct_help"),
            label_visibility="collapsed",
            on_change=keep,
        )
        session.edits[key] = text
        changed = text.split() != original.split()

        def undo() -> None:
            session.edits[key] = st.session_state[key] = original

        if changed:
            st.button(strings("result.undo"), icon=":material/undo:", on_click=undo, key=f"undo.{key}")
    st.markdown(f"**{strings('result.download')}**")
    if changed:
        st.caption(strings("result.changed"))
    columns = st.columns(len(FORMATS))
    for column, (ending, (_, write)) in zip(columns, FORMATS.items(), strict=True):
        with column:
            content = _latest(session, partial(_written, write, session, task, transcript))
            _button(session, task, ending, content, key=f"download.{ending}.{task.id}", width="stretch")


def text_only(session: Session, task: Task, text: str) -> None:
    """The text of a file that has no transcript."""
    _button(session, task, "txt", f"{text}\n", key=f"download.heard.{task.id}")


def _button(
    session: Session,
    task: Task,
    ending: str,
    content: str | Callable[[], str | bytes],
    *,
    key: str,
    width: Literal["content", "stretch"] = "content",
) -> None:
    st.download_button(
        ending.upper(),
        content,
        file_name=f"{stem(task.name)}.{ending}",
        mime=FORMATS[ending][0],
        help=session.strings("result.download_one", format=ending.upper()),
        icon=":material/download:",
        on_click="ignore",
        key=key,
        width=width,
    )


def zip_of_all(session: Session, tasks: list[Task]) -> None:
    """One ZIP of every file that has a transcript, corrected texts included."""
    done = [(task, task.transcript) for task in tasks if task.transcript is not None]
    if len(done) < 2:
        return

    def archive() -> bytes:
        return to_zip((task.name, final(session, task, transcript)) for task, transcript in done)

    st.download_button(
        session.strings("result.download_zip", count=len(done)),
        _latest(session, archive),
        file_name="transcripts.zip",
        mime="application/zip",
        icon=":material/folder_zip:",
        on_click="ignore",
        key="download.zip",
    )


def _written(write: Callable[[Transcript], str], session: Session, task: Task, transcript: Transcript) -> str:
    return write(final(session, task, transcript))


def _latest(session: Session, make: Callable[[], str | bytes]) -> Callable[[], str | bytes]:
    """``make``, once a correction that the same click commits has come in.

    A box of text tells its words when the person leaves it, and a click on a download is such a moment. The
    page has then yet to run again: what it has made before lacks the last words.
    """

    def content() -> str | bytes:
        before, waited_until = dict(session.edits), time.monotonic() + _ON_ITS_WAY_S
        while session.edits == before and time.monotonic() < waited_until:
            time.sleep(0.02)
        return make()

    return content


def final(session: Session, task: Task, transcript: Transcript) -> Transcript:
    """The transcript to take away: as the person corrected it, else as the service gave it."""
    text = session.edits.get(f"edit.{task.id}.{transcript.id}")
    if text is None or text.split() == transcript.text.split():
        return transcript
    try:
        return corrected(transcript, text)
    except TextTooLongError:
        return transcript
