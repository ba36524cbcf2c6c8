"""When to ask again, and after how long.

``retry-after-ms`` and ``Retry-After`` (seconds or an HTTP date, RFC 9110 section 10.2.3) are obeyed;
without them the wait doubles from half a second and is spread at random, so that many pages do not return
at the same instant.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = frozenset({408, 429, 502, 503, 504})


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds the answer asks to wait, or None when it says nothing that can be read.

    ``headers`` is looked up in lower case (``httpx.Headers`` ignores case anyway).
    """
    milliseconds = _positive(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _positive(text)
    if seconds is not None or text is None:
        return seconds
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())


def _positive(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently.

    max_retries: attempts after the first.
    longest_wait_s: a service that asks for more is not waited for; the person is told the time instead.
    """

    max_retries: int = 2
    first_wait_s: float = 0.5
    longest_backoff_s: float = 8.0
    longest_wait_s: float = 30.0
    jitter: Callable[[], float] = random.random

    def wait_s(self, attempt: int, headers: Mapping[str, str] | None, status: int | None) -> float | None:
        """Seconds before attempt number ``attempt`` + 1 (counted from 0), or None for no further attempt.

        ``status`` is None when no connection could be made at all.
        """
        if attempt >= self.max_retries:
            return None
        headers = headers if headers is not None else {}
        if headers.get("x-should-retry", "").lower() == "false":
            return None
        if status is not None and status not in RETRIED_STATUSES:
            return None
        asked_s = retry_after_s(headers)
        if asked_s is not None:
            return asked_s if asked_s <= self.longest_wait_s else None
        backoff_s = min(self.longest_backoff_s, self.first_wait_s * 2.0**attempt)
        return backoff_s * (0.75 + 0.25 * self.jitter())
