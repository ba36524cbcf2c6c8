"""Connections that are kept: after a refusal, idle, and with a request behind the one that is answered."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.processes import LiveServer
from tests.e2e.live import start
from tests.e2e.raw_http import body, head, read_answer
from tests.tiny_bundle import sing, wav

SIZE = 300_000
ALIVE = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def live(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = start(models_dir, tmp_path_factory.mktemp("connections") / "log", keep_alive_s=1)
    yield server
    server.kill()


def refused_while_sending(live: LiveServer) -> socket.socket:
    """A connection whose request was answered with 404 before its body, which has been sent since."""
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    connection.sendall(f"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: {SIZE}\r\n\r\n".encode())
    connection.sendall(bytes(1000))
    assert read_answer(connection)[0] == 404
    connection.sendall(bytes(SIZE - 1000))
    return connection


def test_a_refused_body_does_not_cost_the_connection(live: LiveServer) -> None:
    with refused_while_sending(live) as connection:
        connection.sendall(ALIVE)
        assert read_answer(connection)[0] == 200


def test_an_idle_connection_ends_after_a_refused_body_too(live: LiveServer) -> None:
    with refused_while_sending(live) as connection:
        assert connection.recv(1) == b""


def test_a_slow_request_behind_another_has_all_its_time(live: LiveServer) -> None:
    """Its head came while the one before was worked on; then its body takes longer than a refused one may."""
    first, second = body(wav(sing("abc"))), body(wav(sing("fade")))
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as connection:
        connection.sendall(head(len(first)) + first + head(len(second)) + second[:1000])
        assert b"abc" in read_answer(connection)[2]
        time.sleep(5.5)
        connection.sendall(second[1000:])
        assert b"fade" in read_answer(connection)[2]


@pytest.mark.parametrize("connection", ["Upgrade, HTTP2-Settings", "upgrade\r\nConnection: keep-alive"])
def test_an_offer_of_http_2_costs_neither_body_nor_connection(live: LiveServer, connection: str) -> None:
    """Java's HttpClient makes one with every request; so does curl --http2."""
    offer = f"\r\nConnection: {connection}\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n\r\n".encode()
    form = body(wav(sing("face")))
    offering = head(len(form)).replace(b"\r\n\r\n", offer)
    asking = ALIVE.replace(b"\r\n\r\n", offer)
    with socket.create_connection(("127.0.0.1", live.port), timeout=20) as wire:
        wire.sendall(offering + form + offering + form[:1000])
        assert b'"face"' in read_answer(wire)[2]
        wire.sendall(form[1000:])
        assert b'"face"' in read_answer(wire)[2]
        wire.sendall(asking[:-30])
        time.sleep(0.1)
        wire.sendall(asking[-30:])
        assert read_answer(wire)[0] == 200
