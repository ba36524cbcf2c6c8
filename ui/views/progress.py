"""What is being worked on: the text so far, how far along, and a way to stop."""

from __future__ import annotations

import html
import math
import time

import streamlit as st

from ui.session import Session
from ui.strings import Strings
from ui.views.format import clock, plain, shortened
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
            said = strings("progress.done_of", done=done, total=len(tasks))
            st.html(bar_html(html.escape(said), done / len(tasks)))
        shown = sorted(running, key=lambda task: task.state is State.WAITING)[:LISTED]
        for task in shown:
            _one(session, task, alone=len(running) == 1)
        if len(running) > 1 and st.button(
            strings("progress.cancel_all"), icon=":material/cancel:", key="cancel_all"
        ):
            session.work.cancel_all()
            session.vanished += 1
            st.rerun()


def bar_html(label: str, share: float) -> str:
    """A bar with ``label`` (HTML) above it as its name; Streamlit's own are all named "progress"."""
    bar = f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<label class="asr-progress"><span>{label}</span>{bar}</label>'


def _one(session: Session, task: Task, *, alone: bool) -> None:
    strings = session.strings
    words, button = st.columns([5, 1] if alone else [4, 1], vertical_alignment="center")
    with words:
        share = min(1.0, task.heard_s / task.duration_s) if task.heard_s and task.duration_s else 0.0
        name, status = html.escape(task.name), html.escape(_status(task, strings))
        st.html(bar_html(f"<strong>{name}</strong>: {status}", share))
        if task.text:
            st.html(f'<p class="asr-partial" aria-live="polite">{html.escape(task.text)}</p>')
    label = strings("progress.cancel")
    if not alone:  # by ear, buttons of one name cannot be told apart
        label = strings("progress.cancel_one", name=plain(shortened(task.name)))
    with button:
        cancel = st.button(label, icon=":material/cancel:", key=f"cancel.{task.id}", width="stretch")
    if cancel:
        session.work.cancel(task)
        session.vanished += 1
        st.rerun()


def _status(task: Task, strings: Strings) -> str:
    if task.state is State.WAITING:
        return strings("progress.waiting")
    if task.retry_at is not None:
        return strings("progress.retry", seconds=max(1, math.ceil(task.retry_at - time.monotonic())))
    if task.heard_s is not None and task.duration_s:
        return strings("progress.heard", heard=clock(task.heard_s), total=clock(task.duration_s))
    return strings("progress.listening")
