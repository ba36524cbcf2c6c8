"""The last scrape of a process that stops.

Counters live in memory: what happens between Prometheus's last scrape and the exit would be lost. A stop
therefore waits, for at most one scrape interval, until Prometheus has seen the last request. Nobody waits
where nobody scrapes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Sent by Prometheus with each scrape; a person with curl does not hold up a stop.
SCRAPER_HEADER = "x-prometheus-scrape-timeout-seconds"
LONGEST_WAIT_S = 60.0
GAPS = 4


class ScrapeWatch:
    """Remembers what Prometheus has not seen yet. Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_s: float | None = None
        # The longest of the last few: after a scrape that came late the next one comes soon, and says little
        # about the one after it.
        self._gaps_s: deque[float] = deque(maxlen=GAPS)
        self._unseen = False

    @property
    def active(self) -> bool:
        """Whether Prometheus has ever come by."""
        return self._last_s is not None

    def changed(self) -> None:
        """A request was counted."""
        self._unseen = True

    def scraped(self) -> None:
        """Prometheus is being given the numbers as they are."""
        now_s = self._clock()
        if self._last_s is not None:
            self._gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        self._unseen = False

    def pending(self) -> bool:
        """True while it is worth waiting: something is unseen, and the next scrape is not overdue."""
        if not self._unseen or self._last_s is None:
            return False
        interval_s = min(LONGEST_WAIT_S, max(self._gaps_s, default=LONGEST_WAIT_S))
        return self._clock() - self._last_s < 1.5 * interval_s + 1.0
