"""Model, language and hotwords: only what the service really offers."""

from __future__ import annotations

import streamlit as st

from ui.client import Options
from ui.service import Service
from ui.session import Session
from ui.strings import language_name
from ui.work import Task


def render(session: Session, service: Service) -> Options:
    """Draw the options; return what the next file is sent with."""
    strings = session.strings
    with st.expander(strings("options.title"), icon=":material/tune:"):
        names: list[str] = [model.name for model in service.models]
        left, right = st.columns(2)
        with left:
            model = st.selectbox(strings("options.model"), names, key="option_model", disabled=not names)
        offered = service.model(model)
        codes: list[str | None] = [None, *(offered.languages if offered else ())]
        # One box for each language of the page: Streamlit remembers a choice by the words that it showed.
        key = f"option_language.{model}.{strings.language}"
        chosen = session.options
        # None there would be no choice at all, and not the first of the list.
        if key not in st.session_state and chosen.model == model and chosen.language in codes[1:]:
            st.session_state[key] = chosen.language
        with right:
            language = st.selectbox(
                strings("options.language"),
                codes,
                format_func=lambda code: language_name(code) if code else strings("options.any"),
                key=key,
            )
        decoder = offered is not None and bool(offered.details.get("decoder"))
        hotwords = st.text_input(
            strings("options.hotwords"),
            help=strings("options.hotwords_decoder" if decoder else "options.hotwords_help"),
            key="option_hotwords",
            disabled=decoder,
        )
        options = Options(model or None, language, () if decoder else parse_hotwords(hotwords))
        task = session.work.find(session.shown)
        offer = task is not None and _differs(session, task, options)
        if task is not None and offer and st.button(strings("options.again"), icon=":material/replay:"):
            session.await_(session.work.again(task, options))
            session.vanished += 1
            st.rerun()
    return options


def _differs(session: Session, task: Task, options: Options) -> bool:
    """Whether this sound is still there and has not been sent with these options."""
    if not task.over or task.audio is None:
        return False
    same = (other for other in session.work.tasks if other.audio is task.audio)
    return all(other.options != options for other in same)


def parse_hotwords(text: str) -> tuple[str, ...]:
    """Words separated by commas, semicolons or line ends, without repetitions, in order."""
    parts = text.replace(";", ",").replace("\n", ",").split(",")
    return tuple(dict.fromkeys(word for part in parts if (word := " ".join(part.split()))))
