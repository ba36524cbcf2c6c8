"""What the kernel grants this process: read from the cgroup, versions 2 and 1."""

from __future__ import annotations

import os
from pathlib import Path

# A version 1 cgroup without a limit reports a number near 2**63.
_NO_LIMIT = 1 << 60


def memory_limit_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """The cgroup's memory limit in bytes; the machine's memory where there is none.

    `root` is where the cgroup file system is mounted. Inside a container that is the container's own group.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and 0 < int(text) < _NO_LIMIT:
            return min(int(text), total)
    return total
