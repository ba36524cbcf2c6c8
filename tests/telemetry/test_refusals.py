"""Requests that are refused before the application sees them are on /metrics too: a real server, sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from loadtest.local_stack import LocalStack
from loadtest.processes import LiveServer
from tests.telemetry.live import metric_sum, settings, stack

__all__ = ["stack"]

LINE = b"POST /transcribe HTTP/1.1\r\nhost: here\r\n"
SOCKET = (
    b"GET /vosk HTTP/1.1\r\nhost: here\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\n"
)
KEY = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@pytest.fixture
def api(stack: LocalStack) -> LiveServer:
    return stack.api(settings(stack.folder / "models", ASR_KEEP_ALIVE_S="1", ASR_HEAD_TIMEOUT_S="1"))


@contextmanager
def connection(api: LiveServer) -> Iterator[socket.socket]:
    host, port = api.address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        yield sock


def answer_to(api: LiveServer, sent: bytes) -> bytes:
    """Everything that comes back until the server closes; b"" where it just closes."""
    with connection(api) as sock:
        sock.sendall(sent)
        answer = b""
        while part := sock.recv(65536):
            answer += part
        return answer


def refused(api: LiveServer, outcome: str) -> float:
    return metric_sum(api, "asr_requests_total", route="unmatched", model="unknown", outcome=outcome)


@pytest.mark.parametrize(
    ("sent", "status", "outcome"),
    [
        (b"not http at all\r\n\r\n", b"400", "invalid"),
        (LINE + b"x-long: " + b"a" * 70_000, b"431", "invalid"),
        (LINE + b"x-unfinished: ", b"", "cancelled"),
        (SOCKET + b"\r\n", b"400", "invalid"),
        (SOCKET + KEY + b"cookie: " + b"a" * 9000 + b"\r\n\r\n", b"431", "invalid"),
    ],
    ids=["malformed", "head too large", "head too slow", "no handshake", "handshake too large"],
)
def test_a_refused_head_is_counted_once(api: LiveServer, sent: bytes, status: bytes, outcome: str) -> None:
    before = metric_sum(api, "asr_requests_total")
    assert [refused(api, each) for each in ("invalid", "rejected", "cancelled")] == [0, 0, 0]
    assert answer_to(api, sent)[9:12] == status
    assert refused(api, outcome) == 1
    assert metric_sum(api, "asr_requests_total") == before + 1
    assert metric_sum(api, "asr_inflight_requests") == 0


def test_a_refused_head_behind_a_good_request_is_counted(api: LiveServer) -> None:
    answer = answer_to(api, b"GET /health/live HTTP/1.1\r\nhost: here\r\n\r\n" + b"not http at all\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert refused(api, "invalid") == 1


def test_a_connection_that_sent_nothing_is_no_request(api: LiveServer) -> None:
    assert answer_to(api, b"GET /health/live HTTP/1.1\r\nhost: here\r\n\r\n")  # idles, then it is closed
    with connection(api) as sock:
        assert sock.recv(1) == b""
    assert metric_sum(api, "asr_requests_total") == 0


def test_refusals_for_want_of_connections_are_counted_with_their_reason(stack: LocalStack) -> None:
    api = stack.api(settings(stack.folder / "models", ASR_MAX_CONNECTIONS="16", ASR_HEAD_TIMEOUT_S="20"))
    with ExitStack() as held:
        for _ in range(16):
            held.enter_context(connection(api)).sendall(LINE)  # no idle one can make room
        time.sleep(0.3)
        for _ in range(3):
            answer = httpx.get(f"{api.url}/health/live")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
    until_s = time.monotonic() + 10
    while refused(api, "rejected") < 3 and time.monotonic() < until_s:
        time.sleep(0.1)
    assert refused(api, "rejected") == 3
    assert metric_sum(api, "asr_rejections_total", reason="too_many_connections") == 3
    assert metric_sum(api, "asr_rejections_total") == 3
