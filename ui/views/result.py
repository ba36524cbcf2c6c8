"""One transcript: read it, hear it, correct it, take it away."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from ui.components.player import PlayableSound, player
from ui.errors import ApiError
from ui.problems import explain_file
from ui.service import Service
from ui.session import Session
from ui.sound import media_type
from ui.strings import Strings, language_name
from ui.transcript import Transcript
from ui.views import compare, details, downloads
from ui.views.format import duration, plain
from ui.work import State, Task


def render(session: Session, service: Service) -> None:
    """Show the chosen task's result, and a choice of task where there are several."""
    tasks = [task for task in reversed(session.work.tasks) if task.over]
    if not tasks:
        return
    task = _choose(session, tasks)
    if task.state is State.DONE and task.transcript is not None:
        _transcript(session, task, task.transcript)
    elif task.error is not None:
        _problem(session, task, task.error, service)
    else:
        st.info(session.strings("result.cancelled"), icon=":material/cancel:")
        _again(session, task)
    _leave(session, task)


def _choose(session: Session, tasks: list[Task]) -> Task:
    strings = session.strings
    if session.work.find(session.shown) is None:  # it was removed
        session.shown = tasks[0].id
    if len(tasks) == 1:
        return tasks[0]
    ids = [task.id for task in tasks]
    key = "choose"
    # What is on its way is shown as soon as it is done, unless the person chooses another one meanwhile.
    if session.shown in ids:
        st.session_state[key] = session.shown
    elif st.session_state.get(key) not in ids:
        st.session_state[key] = ids[0]

    labels = _labels(session.work.tasks, strings)

    def choose() -> None:
        session.shown = st.session_state[key]

    chosen = st.selectbox(
        strings("result.choose"),
        ids,
        format_func=lambda task_id: labels.get(task_id, task_id),
        key=key,
        on_change=choose,
    )
    downloads.zip_of_all(session, tasks[::-1])
    return next(task for task in tasks if task.id == chosen)


def _labels(tasks: Sequence[Task], strings: Strings) -> dict[str, str]:
    """Task id -> label, no two alike: Streamlit tells the options of a box apart by their labels only."""
    labels: dict[str, str] = {}
    names: set[str] = set()
    for task in tasks:
        name, number = task.name, 1
        while name in names:
            number += 1
            name = f"{task.name} ({number})"
        names.add(name)
        labels[task.id] = f"{name} – {strings(f'state.{task.state}')}"
    return labels


def _transcript(session: Session, task: Task, transcript: Transcript) -> None:
    strings = session.strings
    st.subheader(strings("result.title", name=plain(task.name)), anchor=False)
    st.caption(
        strings(
            "result.summary",
            duration=duration(transcript.duration_s, strings),
            seconds=f"{task.elapsed_s:.2f}",
            model=transcript.model,
            language=language_name(transcript.language) if transcript.language else "–",
        )
    )
    for warning in transcript.warnings:
        st.warning(strings("problem.said", message=plain(warning)), icon=":material/warning:")
    if not transcript.text.strip():
        st.info(
            f"**{strings('result.silence')}** {strings('result.silence_do')}", icon=":material/volume_off:"
        )
    _player(session, task, downloads.final(session, task, transcript))
    if transcript.text.strip():
        downloads.render(session, task, transcript)
        compare.render(session, task, transcript)
    details.render(session, task, transcript)


def _player(session: Session, task: Task, transcript: Transcript) -> None:
    if task.audio is None:
        st.markdown(f"#### {plain(transcript.text)}")
        st.caption(session.strings("result.sound_gone"))
        return
    sound = PlayableSound(task.audio.data, media_type(task.audio.data) or task.audio.content_type)
    player(f"{task.id}.{transcript.id}", transcript, sound, task.picture, session.strings)


def _problem(session: Session, task: Task, error: ApiError, service: Service) -> None:
    strings = session.strings
    problem = explain_file(error, strings, service.max_upload_bytes, empty=task.empty)
    lines = [f"**{plain(task.name)}**", f"**{problem.title}** {problem.advice}"]
    if problem.said:
        lines.append(plain(problem.said))
    st.error("\n\n".join(lines), icon=":material/error:")
    if problem.can_retry:
        _again(session, task)


def _again(session: Session, task: Task) -> None:
    if task.audio is None:
        return
    if st.button(session.strings("problem.retry"), icon=":material/replay:", key=f"again.{task.id}"):
        session.work.again(task, session.options)
        st.rerun()


def _leave(session: Session, task: Task) -> None:
    strings = session.strings
    one, every = st.columns(2)
    with one:
        if st.button(strings("result.remove"), icon=":material/delete:", key=f"remove.{task.id}"):
            session.work.remove(task)
            st.rerun()
    with every:
        if len(session.work.tasks) > 1 and st.button(
            strings("result.clear"), icon=":material/delete_sweep:", key="clear"
        ):
            for other in list(session.work.tasks):
                session.work.remove(other)
            st.rerun()
