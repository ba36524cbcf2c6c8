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
from ui.views.format import duration, plain, shortened
from ui.work import State, Task

_HEARD_HEIGHT = 320
_NAMED = 3


def render(session: Session, service: Service) -> None:
    """Show the chosen task's result, and a choice of task where there are several."""
    tasks = [task for task in reversed(session.work.tasks) if task.over]
    if not tasks:
        return
    with st.container():  # keeps its place while results come and go
        task = _choose(session, tasks)
    if task.state is State.DONE and task.transcript is not None:
        _transcript(session, task, task.transcript)
    elif task.error is not None:
        _problem(session, task, task.error, service)
    else:
        st.info(session.strings("result.cancelled"), icon=":material/cancel:")
        _again(session, task)
        _heard(session, task)
    _leave(session, task)


def _on_screen(session: Session, tasks: list[Task]) -> Task:
    """Which of ``tasks``, the newest first, to show: what was sent last, as soon as it is over.

    A text stays until the person chooses another: a box of text keeps to itself what is typed until it is
    left, and would lose it with the result that it stands in.
    """
    shown = next((task for task in tasks if task.id == session.shown), None)
    if shown is None or not (shown.transcript or shown.text):
        shown = _news(session, tasks) or shown or tasks[0]
    session.show(shown)
    return shown


def _news(session: Session, tasks: list[Task]) -> Task | None:
    """The last awaited task that is over and has not been shown."""
    over = {task.id: task for task in tasks}
    return next((over[task_id] for task_id in reversed(session.awaited) if task_id in over), None)


def _choose(session: Session, tasks: list[Task]) -> Task:
    strings = session.strings
    shown = _on_screen(session, tasks)
    if len(tasks) == 1:
        return shown
    key = "choose"
    st.session_state[key] = shown.id
    labels = _labels(session.work.tasks, strings)
    _failures(session.work.tasks, strings)

    def show(task: Task) -> None:
        session.show(task)
        session.vanished += 1

    if (news := _news(session, tasks)) is not None:
        st.button(
            strings("result.show", name=plain(shortened(news.name)), state=strings(f"state.{news.state}")),
            icon=":material/visibility:",
            key="show",
            on_click=show,
            args=(news,),
        )

    def choose() -> None:
        chosen = session.work.find(st.session_state[key])
        if chosen is not None:
            session.show(chosen)

    st.selectbox(
        strings("result.choose"),
        [task.id for task in tasks],
        format_func=lambda task_id: labels.get(task_id, task_id),
        key=key,
        on_change=choose,
    )
    downloads.zip_of_all(session, tasks[::-1])
    return shown


def _failures(tasks: Sequence[Task], strings: Strings) -> None:
    """Which files have no text; the ZIP of the others is without them."""
    failed = [shortened(task.name) for task in tasks if task.state is State.FAILED]
    if failed:
        names = ", ".join(failed[:_NAMED]) + (" …" if len(failed) > _NAMED else "")
        said = strings("result.failed", failed=len(failed), total=len(tasks), names=plain(names))
        st.warning(said, icon=":material/warning:")


def _labels(tasks: Sequence[Task], strings: Strings) -> dict[str, str]:
    """Task id -> label, no two alike: Streamlit tells the options of a box apart by their labels only."""
    labels: dict[str, str] = {}
    names: set[str] = set()
    for task in tasks:
        short, number = shortened(task.name), 1
        name = short
        while name in names:
            number += 1
            name = f"{short} ({number})"
        names.add(name)
        labels[task.id] = f"{strings(f'state.{task.state}')} – {name}"
    return labels


def _transcript(session: Session, task: Task, transcript: Transcript) -> None:
    strings = session.strings
    st.subheader(strings("result.title", name=plain(task.name)), anchor=False)
    st.caption(
        strings(
            "result.summary",
            duration=duration(transcript.duration_s, strings),
            seconds=strings.number(task.elapsed_s, ".2f"),
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
    _heard(session, task)


def _heard(session: Session, task: Task) -> None:
    """The text of a file that did not come to its end."""
    text = task.text.strip()
    if not text:
        return
    st.caption(session.strings("result.heard"))
    st.code(text, language=None, wrap_lines=True, height=_HEARD_HEIGHT if len(text) > 1000 else "content")
    downloads.text_only(session, task, text)


def _again(session: Session, task: Task) -> None:
    if task.audio is None:
        return
    if st.button(session.strings("problem.retry"), icon=":material/replay:", key=f"again.{task.id}"):
        session.await_(session.work.again(task, session.options))
        session.vanished += 1
        st.rerun()


def _leave(session: Session, task: Task) -> None:
    strings = session.strings
    one, every = st.columns(2)
    with one:
        if st.button(strings("result.remove"), icon=":material/delete:", key=f"remove.{task.id}"):
            session.work.remove(task)
            session.vanished += 1
            st.rerun()
    with every:
        tasks = list(session.work.tasks)
        if len(tasks) < 2:
            return
        with st.popover(strings("result.clear"), icon=":material/delete_sweep:"):
            st.markdown(strings("result.clear_ask"))
            if st.button(strings("result.clear_yes", count=len(tasks)), type="primary", key="clear"):
                for other in tasks:
                    session.work.remove(other)
                session.vanished += 1
                st.rerun()
