"""How fast the queue drains, and when a refused caller can come back. No threads; time is passed in."""

from __future__ import annotations

import math

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
    """

    def __init__(self) -> None:
        self._line_end_s = 0.0

    def retry_after_s(self, audio_s: float, overflow_s: float, rate: float, now_s: float) -> float:
        """Seconds until ``audio_s`` fits: ``overflow_s`` audio-seconds must drain first, at ``rate``."""
        start_s = max(self._line_end_s, now_s + max(0.0, overflow_s) / rate)
        wait_s = (start_s - now_s) * MARGIN + MARGIN_S
        if wait_s > MAX_RETRY_S:
            return MAX_RETRY_S
        self._line_end_s = start_s + audio_s / rate
        return wait_s

    def queue_ran_low(self, now_s: float) -> None:
        """Forget the line."""
        self._line_end_s = now_s
