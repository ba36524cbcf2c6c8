"""How many CPU cores this process may use: the cgroup's quota (version 2 and 1) and the affinity mask.

``os.cpu_count`` and ONNX Runtime see the host's cores. A container with a limit of two on a machine of 64
would start 64 threads, use up its quota in the first milliseconds of each period and sleep for the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_SELF_CGROUP = Path("/proc/self/cgroup")


def cpu_limit_cores(root: Path = CGROUP_ROOT, membership: Path = PROC_SELF_CGROUP) -> float:
    """Cores granted, fractions included: the least of affinity and every quota from our group up to the root.

    ``root``: where cgroups are mounted. ``membership``: lines ``id:controllers:/path``. What cannot be read
    does not limit.
    """
    limits = [float(_affinity())]
    limits.extend(_quotas(root, membership))
    return min(limits)


def usable_cores(limit_cores: float | None = None) -> int:
    """Whole cores to run threads on: the limit rounded down, at least one.

    Rounded down because a thread more than the quota carries is throttled for a part of every period, which
    costs more latency than the fraction of a core gains throughput.
    """
    limit = cpu_limit_cores() if limit_cores is None else limit_cores
    return max(1, math.floor(limit + 1e-6))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        return os.cpu_count() or 1


def _quotas(root: Path, membership: Path) -> Iterator[float]:
    own_v2, own_v1 = _own_groups(membership)
    for group in _upwards(own_v2):
        yield from _quota_v2(root / group / "cpu.max")
    for controller in ("cpu", "cpu,cpuacct"):
        for group in _upwards(own_v1):
            folder = root / controller / group
            yield from _quota_v1(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _own_groups(membership: Path) -> tuple[str, str]:
    """Our group in the unified hierarchy and in version 1's cpu hierarchy; the root where none is named."""
    unified = cpu = ""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return unified, cpu
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            unified = path
        elif "cpu" in controllers.split(","):
            cpu = path
    return unified, cpu


def _upwards(group: str) -> Iterator[str]:
    """The group, its parents and the root, relative; a container's path may lie outside of its mount."""
    path = PurePosixPath("/" + group.strip("/"))
    parts = [part for part in path.parts[1:] if part != ".."]
    for length in range(len(parts), -1, -1):
        yield "/".join(parts[:length])


def _quota_v2(path: Path) -> Iterator[float]:
    try:
        quota, period = path.read_text().split()[:2]
        if quota != "max" and int(quota) > 0 and int(period) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return


def _quota_v1(quota_file: Path, period_file: Path) -> Iterator[float]:
    try:
        quota, period = int(quota_file.read_text()), int(period_file.read_text())
        if quota > 0 and period > 0:
            yield quota / period
    except (OSError, ValueError):
        return
