"""Notes of what happened, made in passing and worked off later, many in a row.

An observation or a span takes few instructions, but on code and data that the inference before it has pushed
out of the processor's caches: half a millisecond per request, most of it waiting for memory. A note is a
tuple in a queue. A thread works the notes off twice a second, when only the first of each kind is cold;
whoever reads the metrics works off what is left before that, so that nobody sees a number without what has
happened until then.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVarTuple

import structlog

_log = structlog.get_logger("api.telemetry")

EVERY_S = 0.5
IDLE_TURNS = 20
"""Turns without a note after which the thread ends; the next note starts another."""
MOST_NOTES = 20_000
"""Notes that may wait, about 10 MB; more are worked off by whoever makes them."""

Args = TypeVarTuple("Args")
Note = tuple[Callable[..., None], tuple[object, ...]]
"""A function and its arguments."""


def write(function: Callable[..., None], args: tuple[object, ...]) -> None:
    """Call ``function(*args)``; a bad note must not take others along."""
    try:
        function(*args)
    except Exception as error:
        _log.error("telemetry_failed", exc_info=error)


class Journal:
    """All methods may be called from any thread."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._notes: deque[Note] = deque()
        self._working = threading.Lock()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def note(self, function: Callable[[*Args], None], *args: *Args) -> None:
        """Have ``function(*args)`` called later, once, in the order of the notes."""
        self._notes.append((function, args))
        if self._thread is None:
            self._start()
        if len(self._notes) > MOST_NOTES:
            self.work_off()

    def work_off(self) -> None:
        """Returns when everything noted before this call is done."""
        with self._working:
            for _ in range(len(self._notes)):
                write(*self._notes.popleft())

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="telemetry", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # no thread can be had just now; the next note tries again
                    self._thread = None

    def _work(self) -> None:
        idle = 0
        while idle < IDLE_TURNS:
            time.sleep(self._every_s)
            idle = 0 if self._notes else idle + 1
            self.work_off()
        self._thread = None
        if self._notes:  # made while this thread still seemed to be there
            self._start()
