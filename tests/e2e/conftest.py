"""One service with the tone model for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.processes import LiveServer
from tests.e2e.live import start
from tests.tiny_bundle import make_bundle


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder, "tiny")
    make_bundle(folder, "other", languages=("vi",))
    return folder


@pytest.fixture(scope="session")
def server(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")
    spool = folder / "spool"
    spool.mkdir()
    live = start(models_dir, folder / "log", models="tiny,other", spool_dir=spool, max_audio_s=600)
    yield live
    live.kill()


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with server.client() as http:
        yield http


@pytest.fixture
def launch() -> Iterator[Callable[..., LiveServer]]:
    """``start``, and whatever was started is gone after the test, however it ends."""
    started: list[LiveServer] = []

    def run(*arguments: object, **settings: object) -> LiveServer:
        live = start(*arguments, **settings)  # type: ignore[arg-type]
        started.append(live)
        return live

    yield run
    for live in started:
        live.kill()
