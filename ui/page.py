"""READ FIRST: the page from top to bottom.

heading         title, language of the page
notice          only while the service cannot be used: what is wrong, looked at again by itself
Transcribe      input -> options -> progress -> result
Overview        the service now, its models, what this session has sent
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from ui.background import Background
from ui.components.announcer import announce
from ui.components.document import document
from ui.session import Session, session_for
from ui.settings import UiSettings
from ui.strings import NAMES, Strings, language_for
from ui.views import inputs, notice, options, overview, progress, result

_COMPONENTS = Path(__file__).parent / "components"


def render(settings: UiSettings, background: Background) -> None:
    """Draw the whole page once; Streamlit calls this at every interaction."""
    st.set_page_config(page_title="Speech to text", page_icon=str(_COMPONENTS / "icon.png"), layout="wide")
    st.html(_COMPONENTS / "page.css")
    session = session_for(settings, background)
    _heading(session)
    spoken = st.container(key="spoken")
    service = session.look_at_service()
    strings = session.strings
    with st.container():  # keeps its place while it comes and goes
        if service.usable:
            notice.watch(session, service)
        else:
            notice.render(session, service)
    transcribe, look = st.tabs(
        [strings("tab.transcribe"), strings("tab.overview")],
        key=f"tabs.{strings.language}",
        on_change="rerun",
    )
    if look.open:
        with look:
            overview.render(session, service)
    with transcribe:  # always drawn: Streamlit forgets what was typed into widgets that are not
        new = inputs.render(session, service)
        session.options = options.render(session, service)
        if new:
            session.await_(session.work.add(new, session.options)[0])
            st.rerun()  # with an empty upload box
        with st.container():  # keeps its place, or what somebody types in below would be built anew
            if any(session.work.running):
                progress.render(session)
        result.render(session, service)
    session.announcements.look(session.work.tasks, strings)  # after the results: what it says is on the page
    with spoken:
        announce(session.announcements.text, session.announcements.number)


def _heading(session: Session) -> None:
    title, choice = st.columns([4, 1], vertical_alignment="bottom")
    with choice:
        asked = language_for(st.query_params.get("lang") or st.context.locale)
        codes, key = list(NAMES), "page_language"
        code = st.selectbox(
            Strings(st.session_state.get(key, asked))("page.language"),  # chosen just now, or at first sight
            codes,
            index=codes.index(asked),
            format_func=NAMES.__getitem__,
            key=key,
        )
    session.strings = Strings(code)
    document(code, session.strings("page.title"), session.vanished)
    with title:
        st.title(session.strings("page.title"), anchor=False)
        st.markdown(session.strings("page.subtitle"))
