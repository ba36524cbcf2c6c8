"""What leaves a connection, and when; the rest of the server is tested as a process (tests/e2e)."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket
from uvicorn.server import ServerState
from websockets.asyncio.client import connect as connect_socket
from websockets.exceptions import InvalidStatus

from api.live.connection import PING_TIMEOUT
from api.server import GuardedProtocol, GuardedWebSocket

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK, END = b"3\r\nabc\r\n", b"0\r\n\r\n"
PIECE = b"a" * 16_384
FLOODS = {
    "one trailer": (b"0\r\nx: ", PIECE),
    "many trailers": (b"0\r\n", b"x: y\r\n" * 2700),
    "a chunk extension": (b"1;x=", PIECE),
}
floods = pytest.mark.parametrize(("start", "piece"), list(FLOODS.values()), ids=list(FLOODS))


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

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Refusals:
    """Stands for the telemetry."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def refused(self, _status: int, code: str) -> None:
        self.codes.append(code)


class Guarded(GuardedProtocol):
    telemetry: Refusals  # type: ignore[assignment]


@functools.cache
def configured(app: ASGIApp) -> uvicorn.Config:
    config = uvicorn.Config(app, log_config=None, access_log=False)
    config.load()
    return config


def connect(app: ASGIApp, *, head_timeout_s: float = 60) -> tuple[Guarded, Wire]:
    protocol, wire = Guarded(configured(app), ServerState(), {}), Wire()
    protocol.telemetry = Refusals()
    protocol.head_timeout_s = head_timeout_s
    protocol.connection_made(wire)
    return protocol, wire


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """What of a request reached the application."""
    request = Request(scope, receive)
    body = await request.body()
    seen = {"body": body.decode(), "headers": [name for name, _ in request.headers.items()]}
    await JSONResponse(seen)(scope, receive, send)


def seen(wire: Wire) -> list[dict[str, object]]:
    answers = b"".join(wire.sent).split(b"HTTP/1.1 200 OK\r\n")[1:]
    return [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]


class Slow:
    """An application that answers when it is told to."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.goes_on.wait()
        await Response(b"slow")(scope, receive, send)


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


@floods
async def test_what_follows_a_body_may_be_as_long_as_a_head(start: bytes, piece: bytes) -> None:
    protocol, wire = connect(echo)
    protocol.data_received(CHUNKED + CHUNK)
    await some_turns()
    protocol.data_received(start)
    for _ in range(4):
        assert not wire.closed
        protocol.data_received(piece)
    protocol.data_received(piece)
    assert wire.closed
    (answer,) = wire.sent
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_head_too_large"
    assert protocol.telemetry.codes == [], "the application counts it"
    protocol.connection_lost(None)


@floods
async def test_what_follows_an_answered_body_gets_no_second_answer(start: bytes, piece: bytes) -> None:
    protocol, wire = connect(Response(b"not wanted"))
    protocol.data_received(CHUNKED + CHUNK)
    await some_turns()
    protocol.data_received(start)
    for _ in range(5):
        protocol.data_received(piece)
    assert wire.closed
    assert len(wire.sent) == 1
    protocol.connection_lost(None)


@floods
async def test_what_follows_a_later_body_does_not_cost_the_answer_before(start: bytes, piece: bytes) -> None:
    app = Slow()
    protocol, wire = connect(app)
    protocol.data_received(REQUEST + CHUNKED + CHUNK + start)
    for _ in range(5):
        protocol.data_received(piece)
    assert not wire.closed
    app.goes_on.set()
    await some_turns()
    answers = b"".join(wire.sent)
    assert answers.count(b"200 OK") == 2
    assert answers.endswith(b"slow")
    assert b"connection: close" in wire.sent[-1]
    assert b"431" not in answers
    protocol.connection_lost(None)


async def test_tiny_chunks_are_a_body() -> None:
    protocol, wire = connect(echo)
    protocol.data_received(CHUNKED)
    chunk = b"1;name=value\r\na\r\n"
    for _ in range(20):
        protocol.data_received(chunk * 1000)
        protocol.data_received(chunk[:7])
        protocol.data_received(chunk[7:])
    protocol.data_received(END)
    await some_turns()
    assert seen(wire)[0]["body"] == "a" * 20 * 1001
    protocol.connection_lost(None)


async def test_trailers_are_no_headers() -> None:
    protocol, wire = connect(echo)
    for part in (CHUNKED + CHUNK + b"0\r\nauthorization: Bearer x\r\n", b"x-sum: 1\r\n\r\n", REQUEST):
        protocol.data_received(part)
        await some_turns()
    assert [answer["headers"] for answer in seen(wire)] == [["host", "transfer-encoding"], ["host"]]
    protocol.connection_lost(None)


async def test_an_empty_line_between_requests_is_nothing() -> None:
    """RFC 9112, section 2.2; the second request is cut in two at every place."""
    first, second = b"\r\n" + CHUNKED + CHUNK + b"0\r\nx: y\r\n\r\n\r\n", b"\r\n\r\n" + CHUNKED + CHUNK + END
    whole = first + second + REQUEST
    for at in range(len(whole) + 1):
        protocol, wire = connect(echo)
        protocol.data_received(whole[:at])
        await some_turns()
        protocol.data_received(whole[at:])
        await some_turns()
        assert [answer["body"] for answer in seen(wire)] == ["abc", "abc", ""]
        protocol.connection_lost(None)


@pytest.mark.parametrize("answered", [False, True])
async def test_an_empty_line_behind_a_request_costs_nothing(answered: bool) -> None:
    app = Slow()
    protocol, wire = connect(app, head_timeout_s=0.05)
    protocol.data_received(REQUEST)
    if answered:
        app.goes_on.set()
        await some_turns()
    protocol.data_received(b"\r\n")
    await asyncio.sleep(0.1)  # twice the time for a head
    app.goes_on.set()
    protocol.data_received(REQUEST)
    await some_turns()
    assert b"".join(wire.sent).count(b"200 OK") == 2
    assert protocol.telemetry.codes == []
    protocol.connection_lost(None)


@pytest.mark.parametrize("together", [False, True])
async def test_a_head_that_never_ends_does_not_cost_the_answer_before(together: bool) -> None:
    app = Slow()
    protocol, wire = connect(app, head_timeout_s=0.05)
    for part in (REQUEST + REQUEST[:9],) if together else (REQUEST, REQUEST[:9]):
        protocol.data_received(part)
    await asyncio.sleep(0.1)
    assert not wire.closed
    protocol.shutdown()
    await asyncio.sleep(0.1)
    protocol.data_received(REQUEST[9:])  # too late
    app.goes_on.set()
    await some_turns()
    (answer,) = wire.sent
    assert answer.endswith(b"slow")
    assert b"connection: close" in answer
    assert wire.closed
    assert protocol.telemetry.codes == ["request_head_timeout"]
    protocol.connection_lost(None)


async def test_a_stop_does_not_cost_the_answer_before_half_a_head() -> None:
    app = Slow()
    protocol, wire = connect(app, head_timeout_s=0.05)
    protocol.data_received(REQUEST)
    protocol.data_received(REQUEST[:9])
    protocol.shutdown()
    await asyncio.sleep(0.1)
    app.goes_on.set()
    await some_turns()
    assert b"".join(wire.sent).endswith(b"slow")
    assert wire.closed
    protocol.connection_lost(None)


async def test_garbage_behind_a_request_is_counted_once() -> None:
    app = Slow()
    protocol, wire = connect(app, head_timeout_s=0.05)
    protocol.data_received(REQUEST)
    protocol.data_received(b"nonsense\r\n\r\n")
    await asyncio.sleep(0.1)
    app.goes_on.set()
    await some_turns()
    assert b"".join(wire.sent).endswith(b"slow")
    assert wire.closed
    assert protocol.telemetry.codes == ["invalid_request"]
    protocol.connection_lost(None)


@pytest.fixture
def _no_collections() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collections")
@pytest.mark.parametrize("sent", [b"", REQUEST[:9], REQUEST, CHUNKED + CHUNK, b"nonsense\r\n\r\n"])
async def test_a_connection_that_is_gone_is_freed_without_a_collection(sent: bytes) -> None:
    protocol, wire = connect(echo)
    protocol.data_received(sent)
    await some_turns()
    protocol.connection_lost(None)
    await some_turns()
    left = weakref.ref(protocol)
    del protocol, wire
    assert left() is None


# -- WebSockets


class GuardedSocket(GuardedWebSocket):
    telemetry: Refusals = Refusals()  # type: ignore[assignment]


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, **options: Any) -> AsyncIterator[int]:
    """The port of a real server with `app`, on this loop."""
    config = uvicorn.Config(
        app, ws=GuardedSocket, log_config=None, lifespan="off", timeout_graceful_shutdown=1, **options
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


class Slowly:
    """Takes so long for each message, and keeps how the session ended."""

    def __init__(self, message_s: float = 0.0) -> None:
        self.message_s = message_s
        self.heard = 0
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.reason = ""

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await asyncio.sleep(self.message_s)
            self.heard += 1
        self.reason = message.get("reason", "")
        self.ended.set_result(message["code"])


OPENING = (
    b"GET / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
PINGS_S = {"ws_ping_interval": 0.1, "ws_ping_timeout": 0.2}


async def test_a_caller_that_sends_faster_than_it_is_heard_is_not_taken_for_dead() -> None:
    app = Slowly(message_s=0.05)
    async with serving(app, **PINGS_S) as port:
        async with connect_socket(f"ws://127.0.0.1:{port}", proxy=None, ping_interval=None) as caller:
            for _ in range(30):
                await caller.send(bytes(200_000))
        assert await asyncio.wait_for(app.ended, 10) == 1000
    assert app.heard == 30


@pytest.mark.parametrize("messages", [0, 10])
async def test_a_dead_peer_is_let_go_also_where_its_messages_waited(messages: int) -> None:
    app = Slowly(message_s=0.05)
    async with serving(app, **PINGS_S) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(OPENING)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x82\x81\0\0\0\0x" * messages)
        assert await asyncio.wait_for(app.ended, 10) == 1011
        assert app.reason == PING_TIMEOUT
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(PING_TIMEOUT.encode())
        writer.close()
    assert app.heard == messages


async def test_a_connection_that_breaks_off_is_lost_and_not_closed() -> None:
    app = Slowly()
    async with serving(app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(OPENING)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert await asyncio.wait_for(app.ended, 10) == 1006


async def test_a_refused_handshake_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await WebSocket(scope, receive, send).send_denial_response(Response(b"no", 404))

    async with serving(refuse) as port:
        with pytest.raises(InvalidStatus) as caught:
            await connect_socket(f"ws://127.0.0.1:{port}", proxy=None)
    assert (caught.value.response.status_code, caught.value.response.body) == (404, b"no")
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
