"""Numbers as people read them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """``1:05`` or ``1:01:05``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Seconds under a minute with one decimal, else a clock."""
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def milliseconds(seconds: float) -> str:
    """A stage's time: ``0.4 ms``, ``37 ms``, ``1.2 s``."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"


def percent(share: float) -> str:
    """``87 %``."""
    return f"{share * 100:.0f} %"


def count(number: float) -> str:
    """A large count with a unit: ``18.9 M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:g}"
