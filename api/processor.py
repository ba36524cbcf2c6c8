"""What the processors of this machine say that they can do."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def processor_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Names of the instructions that all of them have, as Linux calls them; none where nothing is said."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    each = [frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return frozenset.intersection(*each) if each else frozenset()
