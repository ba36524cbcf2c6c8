"""Types for argparse: a value out of range ends with the option's name, before any work."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An integer from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return number
