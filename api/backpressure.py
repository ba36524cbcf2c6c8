"""How fast the queue drains, and when a refused caller can come back. No threads; time is passed in."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable

HALF_LIFE_S = 10.0
PRIOR_WEIGHT_S = 2.0
MAX_RETRY_S = 300.0
MARGIN = 1.1  # of time: measured rates wander by about a tenth
MARGIN_S = 0.2


class DrainRate:
    """Audio-seconds finished per second of wall time while there is more to do than workers.

    An exponentially weighted mean over saturated time only: an idle service is not a slow one. Starts from
    the rate that calibration measured.
    """

    def __init__(self, prior: float) -> None:
        self._audio_s = prior * PRIOR_WEIGHT_S
        self._time_s = PRIOR_WEIGHT_S
        self._last_s: float | None = None

    @property
    def per_s(self) -> float:
        """Audio-seconds per second."""
        return self._audio_s / self._time_s

    def finished(self, audio_s: float, now_s: float, *, saturated: bool) -> None:
        """A batch of ``audio_s`` is done; ``saturated``: work is still waiting behind it."""
        if self._last_s is not None:
            elapsed_s = max(0.0, now_s - self._last_s)
            decay = math.exp2(-elapsed_s / HALF_LIFE_S)
            self._audio_s = self._audio_s * decay + audio_s
            self._time_s = self._time_s * decay + elapsed_s
        self._last_s = now_s if saturated else None


class RetrySchedule:
    """Gives each refused caller a time of its own, as if it stood in line.

    Were all told "when the queue has room", all would come back at once and all but a few would be refused
    again. The line moves at the drain rate. It is forgotten when the queue runs low, because then those who
    were told to come have not.

    Callers take turns in it: who has one place stands behind the first of everybody else, not behind all that
    one caller took by asking again and again without waiting. Where all have equally many (a place each, or
    one proxy in front of all), that is the order in which they came.

    Nothing else tells one who does not wait from many who do: a hundred refusals look the same. A bound on
    the line's length, in queues, breaks the promise to those who obey: at three times the capacity for two
    minutes, with 16 queues 34 % of them succeed at their next try, with 4 queues 18 %, instead of 78 %.
    """

    def __init__(self) -> None:
        self._line_end_s = 0.0
        self._places: list[tuple[float, int, Hashable]] = []  # a heap: until when, a number of its own, whose
        self._places_of: Counter[Hashable] = Counter()
        self._given = 0

    def retry_after_s(
        self, audio_s: float, overflow_s: float, rate: float, now_s: float, caller: Hashable = None
    ) -> float:
        """Seconds until ``audio_s`` fits: ``overflow_s`` audio-seconds must drain first, at ``rate``.

        ``caller``: whose turn it is; all of whom nothing is known are one.
        """
        self._forget_due(now_s)
        first_s = now_s + max(0.0, overflow_s) / rate
        end_s = max(self._line_end_s, first_s)
        start_s = max(first_s, now_s + (self._line_end_s - now_s) * self._share_ahead(caller))
        wait_s = (start_s - now_s) * MARGIN + MARGIN_S
        if wait_s > MAX_RETRY_S:
            return MAX_RETRY_S
        self._line_end_s = end_s + audio_s / rate
        self._given += 1
        self._places_of[caller] += 1
        heapq.heappush(self._places, (now_s + wait_s, self._given, caller))
        return wait_s

    def _share_ahead(self, caller: Hashable) -> float:
        """How much of the line is ahead of the caller's next place, if each in turn has one."""
        own = self._places_of.get(caller, 0)
        callers = len(self._places_of) + (own == 0)
        return min(1.0, callers * (own + 1) / (len(self._places) + 1))

    def _forget_due(self, now_s: float) -> None:
        """Free the places of those whose time has come."""
        while self._places and self._places[0][0] <= now_s:
            caller = heapq.heappop(self._places)[2]
            self._places_of[caller] -= 1
            if not self._places_of[caller]:
                del self._places_of[caller]

    def queue_ran_low(self, now_s: float) -> None:
        """Forget the line."""
        self._line_end_s = now_s
        self._places.clear()
        self._places_of.clear()
