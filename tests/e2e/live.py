"""`asr serve` as a real process on a free port, and how to talk to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class LiveServer:
    """A running service; ``log`` is what it wrote so far."""

    process: subprocess.Popen[bytes]
    url: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)  # type: ignore[arg-type]

    def terminate(self, timeout_s: float = 30) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


def environment(models_dir: Path, **settings: object) -> dict[str, str]:
    """The environment of a service: nothing of ours leaks in but what is said here."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ASR_", "OTEL_"))}
    given = {f"ASR_{name.upper()}": str(value) for name, value in settings.items()}
    return {
        **inherited,
        "ASR_MODELS_DIR": str(models_dir),
        "ASR_MODELS": "tiny",
        "ASR_PORT": "0",
        "ASR_CALIBRATE": "false",
        "ASR_LOG_FORMAT": "json",
        **given,
    }


def start(models_dir: Path, log_path: Path, *, wait: bool = True, **settings: object) -> LiveServer:
    """Start `asr serve`; with ``wait`` until it is ready."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "serve"],
            env=environment(models_dir, **settings),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    server = LiveServer(process, "", log_path)
    try:
        server.url = _address(server)
        if wait:
            wait_until_ready(server)
    except BaseException:
        server.kill()
        raise
    return server


def _address(server: LiveServer) -> str:
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        found = re.search(r'"address": "(http://[^"]+)"', server.log)
        if found:
            return found.group(1)
        if server.process.poll() is not None:
            raise RuntimeError(f"asr serve ended with {server.process.returncode}:\n{server.log}")
        time.sleep(0.05)
    raise RuntimeError(f"asr serve did not listen:\n{server.log}")


def wait_until_ready(server: LiveServer, timeout_s: float = 90) -> None:
    """Until readiness is 200."""
    until_s = time.monotonic() + timeout_s
    with httpx.Client(base_url=server.url, timeout=10) as client:
        while time.monotonic() < until_s:
            if server.process.poll() is not None:
                raise RuntimeError(f"asr serve ended with {server.process.returncode}:\n{server.log}")
            try:
                if client.get("/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    raise RuntimeError(f"asr serve did not become ready:\n{server.log}")
