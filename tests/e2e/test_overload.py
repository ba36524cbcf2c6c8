"""More than fits: refusals that say when to come back, deadlines, full disks; and service goes on."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from loadtest.processes import LiveServer
from tests.e2e.live import start
from tests.e2e.raw_http import head
from tests.tiny_bundle import recite, sing, wav

SENTENCES = ["head bad cafe", "abc", "fade"] * 3
CLIP = wav(recite(SENTENCES))
SLOW = {"beam": "64"}


@pytest.fixture(scope="module")
def narrow(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One worker, and room for five audio-seconds in the queue."""
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "spool").mkdir()
    live = start(
        models_dir,
        folder / "log",
        workers=1,
        queue_limit_audio_s=5,
        max_segments_in_flight=2,
        spool_dir=folder / "spool",
    )
    yield live
    live.kill()


def test_full_queue_is_429_with_an_honest_time(narrow: LiveServer) -> None:
    refusals: list[httpx.Response] = []
    lock = threading.Lock()

    def ask(_: int) -> int:
        """Attempts until the text is there, coming back when told to."""
        with narrow.client() as client:
            for attempt in range(1, 30):
                response = client.post("/transcribe", files={"file": CLIP})
                if response.status_code == 200:
                    assert response.json()["text"] == " ".join(SENTENCES)
                    return attempt
                with lock:
                    refusals.append(response)
                time.sleep(int(response.headers["retry-after-ms"]) / 1000)
        raise AssertionError("never let in")

    with ThreadPoolExecutor(24) as pool:
        attempts = list(pool.map(ask, range(48)))
    assert refusals, "24 callers at once must not all fit"
    assert len(attempts) == 48
    for response in refusals:
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["x-request-id"]
    assert "Traceback" not in narrow.log


def test_the_official_client_gets_through_by_itself(narrow: LiveServer) -> None:
    def ask(_: int) -> str:
        with openai.OpenAI(base_url=f"{narrow.url}/v1", api_key="unused", max_retries=12) as client:
            return client.audio.transcriptions.create(model="tiny", file=("a.wav", CLIP)).text

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(16))) == {" ".join(SENTENCES)}


def test_refused_before_the_body_is_read_where_it_would_be_refused_anyway(narrow: LiveServer) -> None:
    """With the queue full, a request is answered although its body never comes."""
    stop = threading.Event()

    def keep_busy() -> None:
        with narrow.client() as client:
            while not stop.is_set():
                client.post("/transcribe", files={"file": CLIP})

    threads = [threading.Thread(target=keep_busy) for _ in range(24)]
    for thread in threads:
        thread.start()
    try:
        until_s = time.monotonic() + 30
        while True:
            with socket.create_connection(("127.0.0.1", narrow.port)) as connection:
                connection.sendall(head(100_000))
                connection.settimeout(0.2)
                try:
                    answer = connection.recv(4096)
                except TimeoutError:
                    answer = b""  # let in: there was room just then
            if answer:
                break
            assert time.monotonic() < until_s
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"retry-after" in answer.lower()


def test_deadline_is_504(models_dir: Path, tmp_path: Path) -> None:
    live = start(models_dir, tmp_path / "log", request_timeout_s=0.05)
    try:
        with live.client() as client:
            late = client.post("/transcribe", files={"file": wav(recite(SENTENCES * 40))}, data=SLOW)
            assert late.status_code == 504
            assert late.json()["error"]["code"] == "deadline_exceeded"
    finally:
        live.kill()


def test_full_disk_is_503_and_small_files_go_on(narrow: LiveServer) -> None:
    """Without a place to spool, what is over a megabyte is asked to come back; it works again afterwards."""
    spool = narrow.log_path.parent / "spool"
    large = wav(recite(["head bad cafe"] * 30, pause_s=1.0))
    assert len(large) > 2**20
    with narrow.client() as client:
        spool.rmdir()
        refused = client.post("/transcribe", files={"file": large})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "out_of_resources"
        assert int(refused.headers["retry-after"]) >= 1
        assert client.post("/transcribe", files={"file": wav(sing("abc"))}).json()["text"] == "abc"
        spool.mkdir()
        assert client.post("/transcribe", files={"file": large}).status_code == 200
