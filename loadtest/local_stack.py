"""The service and the real monitoring programs as processes on loopback: free ports, a folder of their own.

Used by the demonstration and by the tests. The programs are Debian's ``prometheus``,
``prometheus-alertmanager`` and ``prometheus-node-exporter``; their system services and default ports are not
touched.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

ROOT = Path(__file__).resolve().parent.parent
MONITORING = ROOT / "monitoring"
READY_TIMEOUT_S = 180.0  # importing takes a second; a machine that trains a model meanwhile, a minute


class MissingProgramError(Exception):
    """A program that this machine does not have; the message says what to install."""


class NotReadyError(Exception):
    """A process ended, or did not become ready in time; the message ends with its last words."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def find_program(name: str, package: str) -> str:
    """Its path. Raises MissingProgramError."""
    path = shutil.which(name)
    if path is None:
        raise MissingProgramError(f"{name} is not installed (Debian package {package})")
    return path


@dataclass(frozen=True)
class Process:
    """One running program that answers on `url` and writes to `log`."""

    name: str
    popen: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def address(self) -> str:
        """Host and port, as scrape targets are written."""
        return self.url.removeprefix("http://")

    def wait_ready(self, path: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until GET `path` answers 200. Raises NotReadyError."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            if self.popen.poll() is not None:
                raise NotReadyError(f"{self.name} ended with {self.popen.returncode}:\n{self.last_words()}")
            try:
                if httpx.get(self.url + path, timeout=2.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        raise NotReadyError(f"{self.name} was not ready after {timeout_s:g} s:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def log_lines(self) -> list[dict[str, Any]]:
        """The log's JSON lines."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, then wait; returns the exit status. Kills, and raises, after `timeout_s`."""
        self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise


class LocalStack:
    """Starts processes; stops them all, and removes their folder, at the end of the ``with`` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(".")

    def __enter__(self) -> Self:
        name = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="asr-stack-"))
        self.folder = Path(name)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(
        self, name: str, command: Sequence[str], port: int, env: Mapping[str, str] | None = None
    ) -> Process:
        """Run `command`, which serves HTTP on `port`."""
        log = self.folder / f"{name}-{port}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                list(command),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(os.environ if env is None else env),
                cwd=ROOT,
            )
        self._stack.callback(_stop, popen)
        return Process(name, popen, f"http://127.0.0.1:{port}", log)

    def api(self, settings: Mapping[str, str], port: int | None = None) -> Process:
        """`asr serve` with these ``ASR_*`` and ``OTEL_*`` variables and none of the caller's."""
        port = port or free_port()
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("ASR_", "OTEL_"))
        }
        env = {**inherited, "ASR_PORT": str(port), "ASR_LOG_FORMAT": "json", **settings}
        command = [sys.executable, "-c", "import sys; from api.cli import main; sys.exit(main())", "serve"]
        process = self.start("api", command, port, env)
        process.wait_ready("/health/ready")
        return process

    def prometheus(
        self,
        scrapes: Mapping[str, Sequence[str]],
        *,
        interval_s: float = 1.0,
        alertmanager: Process | None = None,
    ) -> Process:
        """Prometheus with the project's own rules and alerts; `scrapes` gives each job its targets."""
        program = find_program("prometheus", "prometheus")
        port = free_port()
        interval = f"{round(interval_s * 1000)}ms"
        config: dict[str, Any] = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
            },
            "rule_files": [
                str(MONITORING / "prometheus" / folder / "*.yml") for folder in ("rules", "alerts")
            ],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": list(targets)}]}
                for job, targets in scrapes.items()
            ],
        }
        if alertmanager is not None:
            target = {"targets": [alertmanager.address]}
            config["alerting"] = {"alertmanagers": [{"static_configs": [target]}]}
        path = self.folder / f"prometheus-{port}.yml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [
            program,
            f"--config.file={path}",
            f"--storage.tsdb.path={self.folder / f'tsdb-{port}'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
            "--log.level=warn",
        ]
        process = self.start("prometheus", command, port)
        process.wait_ready("/-/ready")
        return process

    def alertmanager(self, config: Mapping[str, Any]) -> Process:
        """Alertmanager with `config`, without a cluster."""
        program = find_program("prometheus-alertmanager", "prometheus-alertmanager")
        port = free_port()
        path = self.folder / f"alertmanager-{port}.yml"
        path.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        command = [
            program,
            f"--config.file={path}",
            f"--storage.path={self.folder / f'alertmanager-{port}'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]
        process = self.start("alertmanager", command, port)
        process.wait_ready("/-/ready")
        return process

    def node_exporter(self) -> Process:
        """The machine's own metrics."""
        program = find_program("prometheus-node-exporter", "prometheus-node-exporter")
        port = free_port()
        command = [program, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        process = self.start("node-exporter", command, port)
        process.wait_ready("/metrics")
        return process


def _stop(popen: subprocess.Popen[bytes]) -> None:
    if popen.poll() is None:
        popen.terminate()
        try:
            popen.wait(20)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


class PrometheusApi:
    """Queries to a running Prometheus."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30.0)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of `expression`, now. Raises ValueError with Prometheus's own words."""
        answer = self._client.post("/api/v1/query", data={"query": expression}).json()
        if answer["status"] != "success":
            raise ValueError(f"{answer.get('error')}: {expression}")
        result = answer["data"]["result"]
        return result if answer["data"]["resultType"] != "scalar" else [{"metric": {}, "value": result}]

    def value(self, expression: str) -> float | None:
        """The one value of `expression`; None where there is none."""
        result = self.query(expression)
        return float(result[0]["value"][1]) if result else None

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of any other endpoint under /api/v1."""
        return self._client.get(f"/api/v1/{path}", params=parameters).json()["data"]

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
