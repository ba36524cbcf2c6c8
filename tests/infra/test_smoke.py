"""docker/smoke.sh against a service that runs: it asks where callers do, and notices who is not there."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loadtest.processes import LiveServer, Servers, free_port
from tests.infra.render import ROOT
from tests.tiny_bundle import make_bundle

Done = subprocess.CompletedProcess[str]


class Page(BaseHTTPRequestHandler):
    """The page's own health, as Streamlit answers."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/_stcore/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def api() -> Iterator[LiveServer]:
    """On 127.0.0.1 only."""
    with Servers() as servers:
        yield servers.api_with("en-whisper-tiny", ROOT / "models", calibrate="false")


@pytest.fixture(scope="module")
def page_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def smoke(where: str, environment: dict[str, str], path: Path | None = None) -> Done:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ASR_")}
    search = f"{path}:{os.environ['PATH']}" if path is not None else os.environ["PATH"]
    return subprocess.run(
        [ROOT / "docker/smoke.sh", where, "--timeout-s", "2"],
        env=kept | {"ENV_FILE": "/nonexistent", "PATH": search} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_asks_where_the_env_file_publishes(api: LiveServer, page_port: int, tmp_path: Path) -> None:
    settings = tmp_path / "settings.env"
    for address, ui_port, fails in (
        ("127.0.0.1", page_port, ""),
        ("127.0.0.1", free_port(), "/_stcore/health: not ready"),
        ("0.0.0.0", page_port, "/health/ready: not ready"),  # by loopback it would answer
        ("127.0.0.2", page_port, "http://127.0.0.2:"),
    ):
        settings.write_text(
            f"ASR_PUBLISH_ADDRESS={address}\nASR_API_PORT={api.port}\nASR_UI_PORT={ui_port}\n"
        )
        done = smoke("compose", {"ENV_FILE": str(settings)})
        assert (done.returncode == 0) == (not fails), done.stdout + done.stderr
        assert fails in done.stderr
    without_page = smoke("compose", {"ASR_API_PORT": str(api.port), "PARTS": "base,api"})
    assert without_page.returncode == 0, without_page.stderr
    assert smoke("compose", {"URL": api.url, "ASR_API_PORT": str(free_port())}).returncode == 0


def test_a_service_that_hears_nothing_is_no_good(tmp_path: Path) -> None:
    make_bundle(tmp_path)  # knows tones only
    with Servers() as servers:
        deaf = servers.api_with("tiny", tmp_path, calibrate="false")
        done = smoke("compose", {"URL": deaf.url})
    assert done.returncode == 1
    assert "no text in hello.flac" in done.stderr


def test_it_asks_the_load_balancers_of_a_cluster(api: LiveServer, page_port: int, tmp_path: Path) -> None:
    """kubectl answers what it is told to; a page of its own exists only where one is published."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/bash\ncase " $* " in *" asr-api "*) echo "$API" ;; *) echo "$PAGE" ;; esac\n')
    kubectl.chmod(0o755)
    at_page = f"127.0.0.1:{page_port}"
    for where, status in (
        ({"API": api.address, "PAGE": ""}, 0),
        ({"API": api.address, "PAGE": at_page}, 0),
        ({"API": api.address, "PAGE": f"127.0.0.1:{free_port()}"}, 1),
        ({"API": "", "PAGE": at_page}, 1),
    ):
        done = smoke("kubernetes", where, path=tmp_path)
        assert done.returncode == status, done.stdout + done.stderr
    assert "has no public address" in done.stderr
