"""Serves the recorded exposition of cAdvisor: its two samples, joined by a straight line through time.

Or another page of metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECORDING = Path(__file__).with_name("cadvisor_recording.txt")
APART_S = 40.0


def exposition(elapsed_s: float) -> str:
    """The recording as it would read `elapsed_s` after its first sample."""
    lines = []
    for line in RECORDING.read_text(encoding="utf-8").splitlines():
        if line.startswith("# TYPE"):
            lines.append(line)
        elif not line.startswith("#"):
            name, first, second = line.rsplit(" ", 2)
            value = float(first) + (float(second) - float(first)) * elapsed_s / APART_S
            lines.append(f"{name} {value!r}")
    return "\n".join(lines) + "\n"


class RecordingServer:
    """`GET` anything on a free loopback port; a context manager. `page` gets the seconds since its start."""

    def __init__(self, page: Callable[[float], str] = exposition) -> None:
        start_s = time.monotonic()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = page(time.monotonic() - start_s).encode()
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> RecordingServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
