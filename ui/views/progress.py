"""What is being worked on: the text so far, how far along, and a way to stop."""

from __future__ import annotations

import html
import math
import time

import streamlit as st

from ui.session import Session
from ui.strings import Strings
from ui.views.format import clock, plain
from ui.work import State, Task

REFRESH_S = 0.3
LISTED = 6


def render(session: Session) -> None:
    """Show the running tasks and refresh them; the whole page runs again whenever one of them is over."""
    over = sum(task.over for task in session.work.tasks)
    _running(session, over)


@st.fragment(run_every=REFRESH_S)
def _running(session: Session, over_before: int) -> None:
    strings, tasks = session.strings, session.work.tasks
    running = list(session.work.running)
    if sum(task.over for task in tasks) != over_before or not running:
        st.rerun()
    with st.container(border=True, key="progress"):
        if len(running) > 1:
            done = len(tasks) - len(running)
            st.progress(done / len(tasks), strings("progress.done_of", done=done, total=len(tasks)))
        shown = sorted(running, key=lambda task: task.state is State.WAITING)[:LISTED]
        for task in shown:
            _one(session, task)
        if len(running) > 1 and st.button(
            strings("progress.cancel_all"), icon=":material/cancel:", key="cancel_all"
        ):
            session.work.cancel_all()
            st.rerun()


def _one(session: Session, task: Task) -> None:
    strings = session.strings
    words, button = st.columns([5, 1], vertical_alignment="center")
    with words:
        share = min(1.0, task.heard_s / task.duration_s) if task.heard_s and task.duration_s else 0.0
        st.progress(share, f"**{plain(task.name)}**: {_status(task, strings)}")
        if task.text:
            st.html(f'<p class="asr-partial" aria-live="polite">{html.escape(task.text)}</p>')
    with button:
        cancel = st.button(
            strings("progress.cancel"), icon=":material/cancel:", key=f"cancel.{task.id}", width="stretch"
        )
    if cancel:
        session.work.cancel(task)
        st.rerun()


def _status(task: Task, strings: Strings) -> str:
    if task.state is State.WAITING:
        return strings("progress.waiting")
    if task.retry_at is not None:
        return strings("progress.retry", seconds=max(1, math.ceil(task.retry_at - time.monotonic())))
    if task.heard_s is not None and task.duration_s:
        return strings("progress.heard", heard=clock(task.heard_s), total=clock(task.duration_s))
    return strings("progress.listening")
