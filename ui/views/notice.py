"""The notice on top while the service cannot be used. It looks again by itself."""

from __future__ import annotations

import streamlit as st

from ui.problems import explain_state
from ui.service import Service
from ui.session import Session

LOOK_EVERY_S = 2.0


def render(session: Session, service: Service) -> None:
    """Say what is wrong and what to do; the page runs again once the state has changed."""
    problem = explain_state(service.state, service.problem, session.strings)
    show = st.error if service.state in ("down", "failed") else st.warning
    show(f"**{problem.title}** {problem.advice}", icon=":material/cloud_off:")
    _watch(session, service)


@st.fragment(run_every=LOOK_EVERY_S)
def _watch(session: Session, shown: Service) -> None:
    now = session.look_at_service(max_age_s=LOOK_EVERY_S / 2)
    if (now.state, type(now.problem)) != (shown.state, type(shown.problem)):
        st.rerun()
