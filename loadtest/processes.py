"""Servers under test as real processes: started, waited for, measured and always stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
STOP_TIMEOUT_S = 30.0


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Running:
    """One server process and where it answers."""

    base_url: str
    process: psutil.Process
    ready_s: float

    def rss_mb(self) -> float:
        """Resident memory of the process and its children now, MB (10^6 bytes)."""
        processes = [self.process, *self.process.children(recursive=True)]
        return float(sum(process.memory_info().rss for process in processes)) / 1e6

    def cpu_s(self) -> float:
        """CPU seconds (user and system) of the process and its children so far."""
        processes = [self.process, *self.process.children(recursive=True)]
        times = [process.cpu_times() for process in processes]
        return float(sum(each.user + each.system for each in times))


@contextlib.contextmanager
def server(
    command: Sequence[str],
    port: int,
    ready_path: str,
    environment: Mapping[str, str],
    timeout_s: float = 120.0,
) -> Iterator[Running]:
    """Run `command` until the block ends; it must answer 200 on `ready_path` within `timeout_s`.

    Raises RuntimeError with the end of its output when it stops early or is not ready in time.
    """
    base_url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        started_s = time.perf_counter()
        child = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(base_url + ready_path, timeout=2.0, trust_env=False).status_code == 200:
                        break
                if child.poll() is not None or time.perf_counter() - started_s > timeout_s:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-3000:]
                    raise RuntimeError(f"{' '.join(command)} did not become ready:\n{tail}")
                time.sleep(0.02)
            yield Running(base_url, psutil.Process(child.pid), time.perf_counter() - started_s)
        finally:
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def api_server(model: str, models_dir: Path, **settings: str) -> contextlib.AbstractContextManager[Running]:
    """The service itself on a free port, with one model and any ASR_* setting (without its prefix)."""
    port = free_port()
    environment = {
        "ASR_HOST": "127.0.0.1",
        "ASR_PORT": str(port),
        "ASR_MODELS": model,
        "ASR_MODELS_DIR": str(models_dir),
        "ASR_DRAIN_GRACE_S": "0",
        **{f"ASR_{name.upper()}": value for name, value in settings.items()},
    }
    return server([sys.executable, "-m", "api.cli", "serve"], port, "/health/ready", environment)


def hardware() -> str:
    """Processor and cores, for the line under a table."""
    model = "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {sys.version.split()[0]}"
