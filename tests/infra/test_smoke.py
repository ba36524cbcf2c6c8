"""docker/smoke.sh against a service that runs: it asks where callers do, and notices who is not there."""

from __future__ import annotations

import os
import subprocess
import threading
import time
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
        yield servers.api_with("en-moonshine-tiny", ROOT / "models", calibrate="false")


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


# Answers what it is told to, and notes what it was asked.
KUBECTL = """#!/bin/bash
echo "$*" >>"${0%/*}/calls"
case " $* " in
  *' port-forward '*) echo "Forwarding from 127.0.0.1:$FORWARDED -> 8000"; exec sleep 60 ;;
  *'{.spec.type}'*) echo "$TYPE" ;;
  *' asr-api '*) echo "$API" ;;
  *) echo "$PAGE" ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path) -> Path:
    """The folder that it is in."""
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    return tmp_path


def test_it_asks_the_load_balancers_of_a_cluster(api: LiveServer, page_port: int, kubectl: Path) -> None:
    """A page of its own exists only where one is published."""
    at_page = f"127.0.0.1:{page_port}"
    for where, status in (
        ({"API": api.address, "PAGE": ""}, 0),
        ({"API": api.address, "PAGE": at_page}, 0),
        ({"API": api.address, "PAGE": f"127.0.0.1:{free_port()}"}, 1),
        ({"API": "", "PAGE": at_page, "TYPE": "LoadBalancer"}, 1),
    ):
        done = smoke("kubernetes", {"KUBECONFIG": "/config", **where}, path=kubectl)
        assert done.returncode == status, done.stdout + done.stderr
    assert "has no public address" in done.stderr


def test_it_reaches_a_service_that_is_inside_the_cluster_only(api: LiveServer, kubectl: Path) -> None:
    """overlays/dev; a kubectl that went on forwarding would hold this test up."""
    inside = {"KUBECONFIG": "/config", "TYPE": "ClusterIP", "API": "", "PAGE": ""}
    started = time.monotonic()
    done = smoke("kubernetes", {**inside, "FORWARDED": str(api.port)}, path=kubectl)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 30


def test_it_asks_the_cluster_that_was_deployed_to(api: LiveServer, kubectl: Path) -> None:
    """Not whichever kubectl's context is at: a rollback follows from the answer."""
    record = kubectl / "revisions"
    record.write_text("cluster uid /some where/config\n")
    where = {"API": api.address, "PAGE": "", "KUBECONFIG": "", "REVISIONS_FILE": str(record)}
    assert smoke("kubernetes", where, path=kubectl).returncode == 0
    calls = (kubectl / "calls").read_text().splitlines()
    assert calls
    assert all(line.startswith("--kubeconfig /some where/config ") for line in calls)
    terraform = kubectl / "terraform"
    terraform.write_text("#!/bin/bash\necho '{}'\n")
    terraform.chmod(0o755)
    record.unlink()
    done = smoke("kubernetes", where, path=kubectl)
    assert done.returncode == 1
    assert "nothing was deployed from here" in done.stderr
