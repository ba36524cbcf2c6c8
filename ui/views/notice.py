"""The notice on top while the service cannot be used, and the looks that bring it and take it away."""

from __future__ import annotations

import streamlit as st

from ui.problems import explain_state
from ui.service import Service
from ui.session import Session

LOOK_EVERY_S = 2.0
IDLE_LOOK_EVERY_S = 15.0


def render(session: Session, service: Service) -> None:
    """Say what is wrong and what to do; the page runs again once the state has changed."""
    problem = explain_state(service.state, service.problem, session.strings)
    show = st.error if service.state in ("down", "failed") else st.warning
    show(f"**{problem.title}** {problem.advice}", icon=":material/cloud_off:")
    _watching(LOOK_EVERY_S, session, service)


def watch(session: Session, service: Service) -> None:
    """Notice on a page that nobody touches that a usable service has gone."""
    _watching(IDLE_LOOK_EVERY_S, session, service)


def _watching(every_s: float, session: Session, shown: Service) -> None:
    st.fragment(_watch, run_every=every_s)(session, shown, every_s / 2)


def _watch(session: Session, shown: Service, max_age_s: float) -> None:
    now = session.look_at_service(max_age_s=max_age_s)
    if (now.state, type(now.problem)) != (shown.state, type(shown.problem)):
        st.rerun()
