"""Slow, broken and malicious clients: no worker stuck, no file left behind, no 500, and others are served."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loadtest.processes import LiveServer
from tests.e2e.live import start
from tests.e2e.raw_http import body, head, read_answer
from tests.tiny_bundle import recite, sing, wav

AUDIO = wav(sing("abc"))
BIG = wav(recite(["head bad cafe"] * 200))  # over a megabyte: spooled to disk


@pytest.fixture(scope="module")
def live(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "spool").mkdir()
    server = start(
        models_dir,
        folder / "log",
        spool_dir=folder / "spool",
        upload_idle_timeout_s=1,
        upload_timeout_s=3,
        max_connections=200,
        head_timeout_s=3,
    )
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _calm_afterwards(live: LiveServer) -> Iterator[None]:
    """After each test: nothing in progress, nothing spooled, no error of ours, and the service answers."""
    yield
    with live.client() as client:
        until_s = time.monotonic() + 15
        while _unsettled(summary := client.get("/health").json()) or _open_spools(live):
            assert time.monotonic() < until_s, (summary, _open_spools(live))
            time.sleep(0.1)
        assert client.post("/transcribe", files={"file": AUDIO}).json()["text"] == "abc"
    assert "Traceback" not in live.log
    assert '"status": 500' not in live.log


def _unsettled(summary: dict[str, Any]) -> bool:
    return bool(summary["requests_in_progress"] or summary["queue"]["claimed_audio_s"])


def _open_spools(live: LiveServer) -> list[str]:
    """Unlinked spool files that the process still holds, and linked ones that should not be there."""
    return live.spool_files(live.log_path.parent / "spool")


def connect(live: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=10)


def metric(live: LiveServer, pattern: str) -> float:
    with live.client() as client:
        text = client.get("/metrics").text
    return sum(float(value) for value in re.findall(pattern + r" ([0-9.e+]+)$", text, re.MULTILINE))


def test_stalled_upload_is_told_and_let_go(live: LiveServer) -> None:
    payload = body(BIG)
    with connect(live) as connection:
        connection.sendall(head(len(payload)) + payload[:2_000_000])
        status, _, answer = read_answer(connection)
    assert status == 408
    assert json.loads(answer)["error"]["code"] == "upload_timeout"


def test_dripping_upload_ends_at_the_total_limit(live: LiveServer) -> None:
    payload = body(AUDIO)
    with connect(live) as connection:
        connection.sendall(head(len(payload)))
        start_s = time.monotonic()
        connection.settimeout(0.3)
        for byte in payload[:100]:
            connection.sendall(bytes([byte]))
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                pass
        assert time.monotonic() - start_s < 10
        assert read_answer(connection)[0] == 408


def test_head_that_never_ends_is_closed(live: LiveServer) -> None:
    with connect(live) as connection:
        connection.sendall(b"POST /transcribe HTTP/1.1\r\nhost: x\r\n")
        connection.settimeout(25)
        assert connection.recv(1) == b""


@pytest.mark.parametrize("flood", [b"x-filler: " + b"y" * 900 + b"\r\n", b"a: b\r\n"])
def test_header_floods_are_refused(live: LiveServer, flood: bytes) -> None:
    with connect(live) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
        try:
            for _ in range(20_000):
                connection.sendall(flood)
        except OSError:
            pass
        with contextlib.suppress(ConnectionError):  # reset while we were still sending: refused as well
            assert read_answer(connection)[0] == 431


@pytest.mark.parametrize(
    ("start", "flood"),
    [(b"0\r\nx: ", b"y" * 65_536), (b"0\r\n", b"x: y\r\n" * 10_000), (b"1;x=", b"y" * 65_536)],
    ids=["one trailer", "many trailers", "a chunk extension"],
)
def test_floods_behind_a_body_are_refused(live: LiveServer, start: bytes, flood: bytes) -> None:
    before = metric(live, r"asr_requests_total\{[^}]*\}")
    cancelled = metric(live, r'asr_requests_total\{[^}]*outcome="cancelled"[^}]*\}')
    with connect(live) as connection:
        connection.sendall(head(None) + b"3\r\n--b\r\n" + start)
        with contextlib.suppress(OSError):
            for _ in range(1000):
                connection.sendall(flood)
            pytest.fail("all of it was read")
        with contextlib.suppress(ConnectionError):
            assert read_answer(connection)[0] == 431
    until_s = time.monotonic() + 10
    while metric(live, r'asr_requests_total\{[^}]*outcome="cancelled"[^}]*\}') <= cancelled:
        assert time.monotonic() < until_s
        time.sleep(0.1)
    assert metric(live, r"asr_requests_total\{[^}]*\}") == before + 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GARBAGE\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\r\n" * 50,
    ],
)
def test_garbage_gets_400_with_the_envelope_or_nothing(live: LiveServer, request_bytes: bytes) -> None:
    with connect(live) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        try:
            status, headers, answer = read_answer(connection)
        except ConnectionError:
            return
    assert status == 400
    assert headers["x-request-id"]
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("sent", [0.0, 0.3, 0.99])
def test_body_shorter_than_said_and_then_gone(live: LiveServer, sent: float) -> None:
    before = metric(live, r'asr_requests_total\{[^}]*outcome="cancelled"[^}]*\}')
    payload = body(BIG)
    with connect(live) as connection:
        connection.sendall(head(len(payload)) + payload[: int(sent * len(payload))])
        time.sleep(0.2)
    until_s = time.monotonic() + 10
    while metric(live, r'asr_requests_total\{[^}]*outcome="cancelled"[^}]*\}') <= before:
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_body_longer_than_said(live: LiveServer) -> None:
    payload = body(AUDIO)
    with connect(live) as connection:
        connection.sendall(head(len(payload)) + payload + b"and more, and more")
        status, headers, answer = read_answer(connection)
        assert (status, json.loads(answer)["text"]) == (200, "abc")
        assert headers["connection"] == "close"
        assert connection.recv(1) == b""


def test_caller_that_leaves_while_the_engine_works(live: LiveServer) -> None:
    """The queued windows of a long file are dropped; the counters say so."""
    before = metric(live, r'asr_requests_total\{[^}]*outcome="cancelled"[^}]*\}')
    recording = wav(recite(["head bad cafe"] * 250))
    with httpx.Client(base_url=live.url, timeout=httpx.Timeout(10, read=0.05)) as client:
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/transcribe", files={"file": recording}, data={"beam": "64"})
    until_s = time.monotonic() + 15
    while metric(live, r'asr_requests_total\{[^}]*outcome="cancelled"[^}]*\}') < before + 3:
        assert time.monotonic() < until_s
        time.sleep(0.1)
    assert metric(live, "asr_queue_depth") == 0


def test_caller_that_leaves_a_stream(live: LiveServer) -> None:
    with live.client() as client:
        for _ in range(3):
            with client.stream(
                "POST", "/transcribe", files={"file": BIG[:1_500_000]}, data={"stream": "true", "beam": "64"}
            ) as response:
                next(response.iter_lines())
    until_s = time.monotonic() + 10
    while metric(live, r'asr_stream_sessions\{protocol="sse"\}') != 0:
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_idle_connections_make_room_for_new_ones(live: LiveServer) -> None:
    idle = [connect(live) for _ in range(400)]  # twice max_connections
    try:
        with live.client() as client:
            for _ in range(5):
                assert client.get("/health/live").status_code == 200
                assert client.post("/transcribe", files={"file": AUDIO}).status_code == 200
    finally:
        for connection in idle:
            connection.close()


def test_connections_in_use_are_not_dropped_but_new_ones_refused(live: LiveServer) -> None:
    busy = [connect(live) for _ in range(198)]
    try:
        for connection in busy:
            connection.sendall(head(10_000))
        time.sleep(0.3)
        refused = 0
        for _ in range(10):
            with connect(live) as extra:
                extra.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
                try:
                    status, headers, _ = read_answer(extra)
                except ConnectionError:
                    continue
                if status == 503:
                    refused += 1
                    assert int(headers["retry-after"]) >= 1
            busy.append(connect(live))
            busy[-1].sendall(head(10_000))
            time.sleep(0.02)
        assert refused > 0
    finally:
        for connection in busy:
            connection.close()


def test_memory_and_descriptors_stay_flat(live: LiveServer) -> None:
    process = psutil.Process(live.process.pid)
    with live.client() as client:

        def burst(count: int) -> None:
            for index in range(count):
                client.post("/transcribe", files={"file": AUDIO if index % 5 else b"no audio" * 500})
                if index % 20 == 0:
                    client.post("/transcribe", files={"file": BIG})

        burst(60)
        before_bytes, before_files = process.memory_info().rss, process.num_fds()
        burst(240)
        assert process.memory_info().rss - before_bytes < 20_000_000
        assert process.num_fds() <= before_files + 2
