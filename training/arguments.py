"""Types for argparse: a value out of range ends with the option's name, before any work."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """An integer from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number


def positive_s(text: str) -> float:
    """Seconds, more than 0."""
    seconds = float(text)
    if not 0.0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 seconds")
    return seconds


def share(text: str) -> float:
    """A part of a whole, more than 0 and at most 1."""
    part = float(text)
    if not 0.0 < part <= 1.0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and at most 1")
    return part
