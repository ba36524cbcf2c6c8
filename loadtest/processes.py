"""Servers under test as real processes: started, waited for, measured and always stopped.

Benchmarks and tests start `asr serve`, and whatever else answers HTTP on loopback, here and nowhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
SERVE = (sys.executable, "-m", "api.cli", "serve")
READY_TIMEOUT_S = 180.0  # importing takes a second; a machine that trains a model meanwhile, a minute
STOP_TIMEOUT_S = 60.0
SETTINGS = ("ASR_", "OTEL_", "STREAMLIT_")

Found = TypeVar("Found")


class NotReadyError(RuntimeError):
    """A process ended, or did not become ready in time; the message ends with its last words."""


def free_port() -> int:
    """A TCP port on loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` and the caller's own, but for the caller's settings of our programs: none leaks in."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)} | {
        **variables
    }


def asr_variables(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings by their field's name, as the service's variables: ``ASR_`` in front, upper case."""
    return {f"ASR_{name.upper()}": str(value) for name, value in settings.items()}


@dataclass
class LiveServer:
    """One process that serves HTTP on loopback and writes to `log_path`."""

    name: str
    process: psutil.Popen
    log_path: Path
    ready_path: str
    given_port: int | None = None
    """The one to use where it listens on several; else the system is asked."""
    ready_s: float = float("nan")
    """Seconds from the start until `wait_ready` returned."""
    _started_s: float = field(default_factory=time.perf_counter)

    @cached_property
    def port(self) -> int:
        """The port that it listens on, once it does. Raises NotReadyError.

        The system is asked, not the log: that works at any log level, and with any program. So a program may
        choose its own port, and none that is free now is taken by another a moment later.
        """
        return self.given_port or self._wait(self._listening, READY_TIMEOUT_S)

    @property
    def address(self) -> str:
        """Host and port, as scrape targets are written."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Where it answers, without a slash at the end."""
        return f"http://{self.address}"

    def client(self, **options: Any) -> httpx.Client:
        """Requests to it, which wait up to a minute unless `options` say otherwise; close it after use."""
        return httpx.Client(base_url=self.url, **{"timeout": 60.0, "trust_env": False, **options})

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until GET `ready_path` answers 200. Raises NotReadyError."""
        with self.client(timeout=10.0) as client:

            def ready() -> bool | None:
                with contextlib.suppress(httpx.TransportError):
                    return client.get(self.ready_path).status_code == 200 or None
                return None

            self._wait(ready, timeout_s)
        self.ready_s = time.perf_counter() - self._started_s

    def _listening(self) -> int | None:
        with contextlib.suppress(psutil.Error):
            for each in self.process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN:
                    return int(each.laddr.port)
        return None

    def _wait(self, look: Callable[[], Found | None], timeout_s: float) -> Found:
        until_s = time.monotonic() + timeout_s
        while (found := look()) is None:
            if (status := self.process.poll()) is not None:
                raise NotReadyError(f"{self.name} ended with {status}:\n{self.log[-3000:]}")
            if time.monotonic() > until_s:
                raise NotReadyError(f"{self.name} was not ready after {timeout_s:g} s:\n{self.log[-3000:]}")
            time.sleep(0.02)
        return found

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log_lines(self) -> list[dict[str, Any]]:
        """The log's JSON lines."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    def rss_mb(self) -> float:
        """Resident memory of the process and its children now, MB (10^6 bytes)."""
        return float(sum(each.memory_info().rss for each in self._processes())) / 1e6

    def cpu_s(self) -> float:
        """CPU seconds (user and system) of the process and its children so far."""
        return float(sum(sum(each.cpu_times()[:2]) for each in self._processes()))

    def busiest_threads_s(self, count: int) -> float:
        """CPU seconds so far of the `count` threads that used most: of the service, its inference workers."""
        used = [thread.user_time + thread.system_time for thread in self.process.threads()]
        return float(sum(sorted(used)[-count:]))

    def spool_files(self, folder: Path) -> list[str]:
        """Files of `folder` that it holds open, unlinked or not, and then those that lie there."""
        held = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                target = str(entry.readlink())
                if target.startswith(str(folder)):
                    held.append(target)
        return held + [str(path) for path in folder.iterdir()]

    def _processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def terminate(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM if it still runs; the exit status. Kills it, and raises, after `timeout_s`."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return int(self.process.wait(timeout_s))
        except psutil.TimeoutExpired:
            self.kill()
            raise

    def stop(self) -> None:
        """As `terminate`, whatever comes of it."""
        with contextlib.suppress(psutil.TimeoutExpired):
            self.terminate()

    def kill(self) -> None:
        """SIGKILL if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def start(
    name: str,
    command: Sequence[str],
    log_path: Path,
    ready_path: str,
    variables: Mapping[str, str],
    *,
    port: int | None = None,
    cwd: Path = ROOT,
    wait: bool = True,
) -> LiveServer:
    """Run `command` with `variables` in its `environment`; with `wait`, until it is ready.

    Raises NotReadyError; then it is gone. `port`: see `LiveServer.given_port`.
    """
    with log_path.open("wb") as log:
        process = psutil.Popen(
            command,
            cwd=cwd,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = LiveServer(name, process, log_path, ready_path, port)
    try:
        if wait:
            server.wait_ready()
    except BaseException:
        server.kill()
        raise
    return server


def start_api(
    log_path: Path, variables: Mapping[str, str], *, command: Sequence[str] = SERVE, wait: bool = True
) -> LiveServer:
    """`asr serve` with these ``ASR_*`` and ``OTEL_*`` variables, on a free port unless they name one."""
    variables = {"ASR_PORT": "0", "ASR_LOG_FORMAT": "json", **variables}
    return start("asr serve", command, log_path, "/health/ready", variables, wait=wait)


class Servers:
    """Starts servers; stops them all, and removes their folder, at the end of the ``with`` block."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._count = 0
        self.folder = Path(".")

    def __enter__(self) -> Self:
        name = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="asr-servers-"))
        self.folder = Path(name)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(
        self, name: str, command: Sequence[str], ready_path: str, port: int | None = None
    ) -> LiveServer:
        """Run `command`, ready; see `start`."""
        return self._keep(start(name, command, self._log_path(name), ready_path, {}, port=port))

    def api(self, variables: Mapping[str, str], command: Sequence[str] = SERVE) -> LiveServer:
        """`asr serve`, ready; see `start_api`."""
        return self._keep(start_api(self._log_path("api"), variables, command=command))

    def api_with(self, model: str, models_dir: Path, **settings: object) -> LiveServer:
        """`asr serve` with these models and any ``ASR_*`` setting (without its prefix), ready."""
        given = {"models": model, "models_dir": models_dir, "drain_grace_s": 0, **settings}
        return self.api(asr_variables(given))

    def _log_path(self, name: str) -> Path:
        self._count += 1
        return self.folder / f"{name}-{self._count}.log"

    def _keep(self, server: LiveServer) -> LiveServer:
        self._stack.callback(server.stop)
        return server


@contextlib.contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Keep the calling thread, and the processes and threads it starts meanwhile, on these cores (Linux)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def split_cores() -> tuple[list[int], list[int]]:
    """The usable cores in two halves, for a service and for those who call it; one core serves as both."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (cores[:half], cores[half:]) if half else (cores, cores)


@contextlib.contextmanager
def api_server(model: str, models_dir: Path, **settings: object) -> Iterator[LiveServer]:
    """The service itself, ready: see `Servers.api_with`."""
    with Servers() as servers:
        yield servers.api_with(model, models_dir, **settings)


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
