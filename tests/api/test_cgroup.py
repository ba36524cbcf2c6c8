"""The CPU limit as cgroups of both versions write it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from api.cgroup import cpu_limit_cores, usable_cores

HOST_CORES = len(os.sched_getaffinity(0))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit(tmp_path: Path) -> float:
    return cpu_limit_cores(tmp_path / "cgroup", tmp_path / "self")


def test_without_a_limit_it_is_the_affinity(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/a/b\n")
    write(tmp_path / "cgroup/cpu.max", "max 100000\n")
    assert limit(tmp_path) == HOST_CORES


def test_version_2_in_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/\n")
    write(tmp_path / "cgroup/cpu.max", "50000 100000\n")
    assert limit(tmp_path) == 0.5


def test_version_2_takes_the_least_of_the_group_and_its_parents(tmp_path: Path) -> None:
    write(tmp_path / "self", "0::/pod/container\n")
    write(tmp_path / "cgroup/pod/container/cpu.max", "max 100000\n")
    write(tmp_path / "cgroup/pod/cpu.max", "25000 100000\n")
    write(tmp_path / "cgroup/cpu.max", "max 100000\n")
    assert limit(tmp_path) == 0.25


@pytest.mark.parametrize("controller", ["cpu", "cpu,cpuacct"])
def test_version_1(tmp_path: Path, controller: str) -> None:
    write(tmp_path / "self", "4:memory:/x\n3:cpu,cpuacct:/docker/1\n")
    folder = tmp_path / "cgroup" / controller / "docker/1"
    write(folder / "cpu.cfs_quota_us", "75000\n")
    write(folder / "cpu.cfs_period_us", "100000\n")
    assert limit(tmp_path) == 0.75


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    write(tmp_path / "self", "3:cpu:/\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert limit(tmp_path) == HOST_CORES


@pytest.mark.parametrize("text", ["", "rubbish", "0 100000", "100000 0", "-5 100000"])
def test_what_makes_no_sense_does_not_limit(tmp_path: Path, text: str) -> None:
    write(tmp_path / "cgroup/cpu.max", text)
    assert limit(tmp_path) == HOST_CORES


def test_a_quota_cannot_grant_more_than_the_affinity(tmp_path: Path) -> None:
    write(tmp_path / "cgroup/cpu.max", f"{100000 * (HOST_CORES + 7)} 100000")
    assert limit(tmp_path) == HOST_CORES


@pytest.mark.parametrize(
    ("cores", "threads"), [(0.25, 1), (1.0, 1), (1.9, 1), (2.0, 2), (2.5, 2), (7.9999999, 8)]
)
def test_whole_cores_are_rounded_down_but_never_to_none(cores: float, threads: int) -> None:
    assert usable_cores(cores) == threads


@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_a_real_process_with_a_narrower_affinity() -> None:
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", "from api.cgroup import cpu_limit_cores; print(cpu_limit_cores())"]
    answer = subprocess.run(
        ["taskset", "-c", str(core), *command], capture_output=True, text=True, check=True, timeout=60
    )
    assert float(answer.stdout) == 1.0
