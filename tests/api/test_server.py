"""What leaves a connection, and when; the rest of the server is tested as a process (tests/e2e)."""

from __future__ import annotations

import asyncio

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from api.server import GuardedProtocol

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Wire(asyncio.Transport):
    """Keeps every write apart."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert not self.closed
        self.sent.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def connect(app: ASGIApp) -> tuple[GuardedProtocol, Wire]:
    config = uvicorn.Config(app, log_config=None, access_log=False)
    config.load()
    protocol, wire = GuardedProtocol(config, ServerState(), {}), Wire()
    protocol.connection_made(wire)
    return protocol, wire


async def some_turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_head_and_body_leave_together() -> None:
    protocol, wire = connect(Response(b"all of it"))
    protocol.data_received(REQUEST)
    await some_turns()
    (answer,) = wire.sent
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\nall of it")
    protocol.data_received(REQUEST)
    await some_turns()
    assert len(wire.sent) == 2, "a kept connection answers again"
    protocol.connection_lost(None)


async def test_what_is_ready_does_not_wait_for_what_is_not() -> None:
    goes_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await goes_on.wait()
        await send({"type": "http.response.body", "body": b"two"})

    protocol, wire = connect(app)
    protocol.data_received(REQUEST)
    await some_turns()
    assert [part[-3:] for part in wire.sent] == [b"one"]
    goes_on.set()
    await some_turns()
    assert wire.sent[1:] == [b"two"]
    protocol.connection_lost(None)


async def test_an_answer_is_sent_before_its_connection_closes() -> None:
    protocol, wire = connect(Response(b"the end", headers={"connection": "close"}))
    protocol.data_received(REQUEST)
    await some_turns()
    assert b"".join(wire.sent).endswith(b"the end")
    assert wire.closed
    protocol.connection_lost(None)


async def test_a_connection_that_is_gone_takes_nothing() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        wire.close()

    protocol, wire = connect(app)
    protocol.data_received(REQUEST)
    await some_turns()
    assert wire.sent == []
    protocol.connection_lost(None)
