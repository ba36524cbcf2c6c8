"""What one browser session remembers between two runs of the page. It ends with the session."""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from ui.announcements import Announcements
from ui.background import Background
from ui.client import Options
from ui.service import Service, look
from ui.settings import UiSettings
from ui.strings import Strings
from ui.work import Task, Work

_KEY = "asr_session"
LOOK_AGAIN_S = 5.0
PATIENCE_S = 0.5


@dataclass
class Session:
    """``uploads``: how often the upload box has been emptied; ``taken``: digests of recordings already sent.

    ``edits`` and ``references``: what was typed for each result, because Streamlit forgets hidden widgets.
    ``vanished``: how often a button was pressed that takes itself off the page.
    ``shown``: the task on the screen; ``awaited``: those to look at next, once they are over.
    """

    settings: UiSettings
    background: Background
    work: Work
    strings: Strings = field(default_factory=Strings)
    options: Options = field(default_factory=Options)
    uploads: int = 0
    vanished: int = 0
    taken: set[str] = field(default_factory=set)
    edits: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    shown: str | None = None
    awaited: list[str] = field(default_factory=list)
    announcements: Announcements = field(default_factory=Announcements)
    service: Service | None = None
    looking: Future[Service] | None = None
    looked_at: float = 0.0

    def look_at_service(self, *, max_age_s: float = LOOK_AGAIN_S) -> Service:
        """The service as it was at most ``max_age_s`` seconds ago, or as it was seen last while it is slow.

        The look goes on beside the page then: a service that hangs must not hold up what does not need it.
        """
        if self.service is None:
            self.looked_at = time.monotonic()
            self.service = self.background.call(look(self.background.client))
        self._take_look()
        if self.looking is None and time.monotonic() - self.looked_at >= max_age_s:
            self.looked_at = time.monotonic()
            self.looking = self.background.start(look(self.background.client))
            wait([self.looking], PATIENCE_S)
            self._take_look()
        return self.service

    def _take_look(self) -> None:
        if self.looking is not None and self.looking.done():
            seen, self.looking = self.looking, None
            self.service = seen.result()

    def await_(self, task: Task) -> None:
        """Show ``task`` once it is over, or say that it is where a text must stay on the screen."""
        self.awaited = [*(one for one in self.awaited if one != task.id), task.id]

    def show(self, task: Task) -> None:
        """Put ``task`` on the screen."""
        self.shown = task.id
        self.awaited = [one for one in self.awaited if one != task.id]


def session_for(settings: UiSettings, background: Background) -> Session:
    """This browser session's memory, made at its first run."""
    found = st.session_state.get(_KEY)
    if isinstance(found, Session):
        return found
    context = get_script_run_ctx()
    session_id = context.session_id if context else ""

    def alive() -> bool:
        return not runtime.exists() or runtime.get_instance().is_active_session(session_id)

    session = Session(settings, background, Work(background, settings.parallel_files, alive))
    st.session_state[_KEY] = session
    return session
