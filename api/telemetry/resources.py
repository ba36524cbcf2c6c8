"""What the kernel grants this process, and what is used of it: read from the cgroup, versions 2 and 1."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.cgroup import CGROUP_ROOT

# A version 1 cgroup without a limit reports a number near 2**63.
_NO_LIMIT = 1 << 60

# Of version 2 and of version 1: the limit, the usage, and the line of memory.stat that may be given back.
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def memory_limit_bytes(root: Path = CGROUP_ROOT) -> int:
    """The cgroup's memory limit in bytes; the machine's memory where there is none.

    `root` is where the cgroup file system is mounted. Inside a container that is the container's own group.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, *_ in _FILES:
        if granted := _limit(root / limit):
            return min(granted, total)
    return total


def memory_used_bytes(root: Path = CGROUP_ROOT) -> int | None:
    """Bytes that count against the cgroup's limit; None where it has none, or does not tell.

    More than the process's own memory: files on a tmpfs (the spool, with Compose) are the container's, too.
    Without what the kernel would take back first, the file pages that nobody has read for a while: this is
    the working set of cAdvisor and kubelet. Without a limit the numbers may be those of the whole machine.
    """
    for limit, usage, statistics, reclaimable in _FILES:
        if _limit(root / limit):
            try:
                used = int((root / usage).read_text())
                fields = dict(line.split() for line in (root / statistics).read_text().splitlines())
                return max(0, used - int(fields[reclaimable]))
            except (OSError, ValueError, KeyError):
                return None
    return None


def _limit(path: Path) -> int | None:
    """The limit that stands in this file, None where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and 0 < int(text) < _NO_LIMIT else None


class MemoryCollector(Collector):
    """``asr_memory_used_bytes``, read at every scrape; no sample where `memory_used_bytes` knows none."""

    def __init__(self, root: Path = CGROUP_ROOT) -> None:
        self._root = root

    def describe(self) -> Iterable[Metric]:
        return (self._family(),)

    def collect(self) -> Iterable[Metric]:
        used = memory_used_bytes(self._root)
        if used is not None:
            family = self._family()
            family.add_metric((), used)
            yield family

    @staticmethod
    def _family() -> GaugeMetricFamily:
        text = (
            "Memory that counts against the cgroup's limit, tmpfs included; nothing where there is no limit."
        )
        return GaugeMetricFamily("asr_memory_used_bytes", text, labels=())
