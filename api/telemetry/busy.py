"""How busy the workers were over the last seconds."""

from __future__ import annotations

import threading
import time
from collections import deque


class BusyWindow:
    """Share of the workers' time from :meth:`begin` to :meth:`end`, over a trailing window. Thread-safe.

    A window and not "since the last scrape": two scrapers must not spoil each other's value.
    """

    def __init__(self, window_s: float = 15.0) -> None:
        self.window_s = window_s
        self.workers = 0
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        self._finished: deque[tuple[float, float]] = deque()
        self._born_s = time.monotonic()

    def begin(self) -> None:
        """The worker whose thread calls this has something to do."""
        with self._lock:
            self._running[threading.get_ident()] = time.monotonic()

    def end(self) -> None:
        """It has done it."""
        with self._lock:
            now_s = time.monotonic()
            self._finished.append((self._running.pop(threading.get_ident()), now_s))
            self._prune(now_s)

    def ratio(self) -> float:
        """Busy time over available time in the window, 0 to 1."""
        with self._lock:
            now_s = time.monotonic()
            self._prune(now_s)
            start_s = max(now_s - self.window_s, self._born_s)
            busy_s = sum(end - max(begin, start_s) for begin, end in self._finished)
            busy_s += sum(now_s - max(begin, start_s) for begin in self._running.values())
            available_s = (now_s - start_s) * max(1, self.workers)
        return min(1.0, busy_s / available_s) if available_s > 0 else 0.0

    def _prune(self, now_s: float) -> None:
        while self._finished and self._finished[0][1] < now_s - self.window_s:
            self._finished.popleft()
