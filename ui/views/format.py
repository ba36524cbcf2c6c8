"""Numbers as people read them."""

from __future__ import annotations

from ui.strings import Strings

NAME_CHARACTERS = 40


def clock(seconds: float) -> str:
    """``1:05`` or ``1:01:05``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float, strings: Strings) -> str:
    """Seconds under a minute with one decimal, else a clock."""
    return f"{strings.number(seconds, '.1f')} {strings('unit.s')}" if seconds < 60 else clock(seconds)


def milliseconds(seconds: float, strings: Strings) -> str:
    """A stage's time: ``0.4 ms``, ``37 ms``, ``1.20 s``."""
    if seconds >= 1:
        return f"{strings.number(seconds, '.2f')} {strings('unit.s')}"
    return f"{strings.number(seconds * 1000, '.1f' if seconds < 0.01 else '.0f')} {strings('unit.ms')}"


def percent(share: float) -> str:
    """``87 %``."""
    return f"{share * 100:.0f} %"


def count(number: float, strings: Strings) -> str:
    """A large count with a unit: ``18.9 M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{strings.number(number / limit, '.3g')} {unit}"
    return strings.number(number, "g")


def shortened(name: str) -> str:
    """A long file name without its middle: files of one series differ at the end."""
    if len(name) <= NAME_CHARACTERS:
        return name
    half = NAME_CHARACTERS // 2
    return f"{name[: half - 1]}…{name[-half:]}"


def plain(text: str) -> str:
    """Any text, a file's name for one, as Markdown that shows it letter by letter."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]()<>#+-.!|~$:&" else letter for letter in text)
