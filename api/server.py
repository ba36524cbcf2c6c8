"""uvicorn with what it lacks for hostile clients and for stops that lose nothing. One process, one loop.

- A connection that sends no complete request head in time, or one that floods it, is closed; so is one whose
  chunked body goes on without a byte of body. Trailers are no headers: they are dropped.
- When all connections are in use, the one that has been idle longest makes room; without an idle one the new
  connection gets 503 with Retry-After.
- What is left of a refused body is discarded for a few seconds, so that the caller can read the refusal.
- An offer to go on in another protocol than WebSocket is passed over; uvicorn loses the body behind it.
- SIGTERM, SIGHUP and SIGINT: readiness fails at once, the listener goes on for the grace period and until
  Prometheus, where it scrapes, has counted the last request (neither after SIGINT), then HTTP drains. The
  kernel is told to let no connection in any more before the listener closes, so that none is reset.
  The process ends with status 0; a second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import math
import os
import signal
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import FrameType
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request

from api.errors import AsrError, InvalidRequestError, RetryLaterError
from api.live.connection import PING_TIMEOUT
from api.service import Service
from api.settings import Settings
from api.telemetry import Telemetry

_MAX_HEAD_BYTES = 64 * 1024  # of a head; and of trailers and chunk extensions
_LINGER_S = 5.0
_LAST_SCRAPE_WAIT_S = 30.0  # twice the usual scrape interval
_LAST_REQUEST_S = 0.5  # what a connection that was let in has to send its request when the server stops
_LAST_HANDSHAKES_S = 0.1  # for handshakes under way, and for taking what they leave to accept
_SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>; the socket module does not name it
_BACKLOG = 2048
_MAX_MESSAGE_BYTES = 4 * 2**20  # of a WebSocket: a minute of 24 kHz in base64
_MAX_EXTRA_FRAMES = 5000  # pings, pongs and fragments between two pings of ours, 20 seconds apart
_FED_BYTES = 4096  # to a WebSocket's parser at a time: up to 700 frames, which take 15 ms
START_FAILED = 3


class _HeadTooLargeError(InvalidRequestError):
    status = 431
    default_code = "request_head_too_large"


class _ConnectionsFullError(RetryLaterError):
    default_code = "too_many_connections"


class _Parser(httptools.HttpRequestParser):
    """Reads a request that offers another protocol once more, without the offer.

    Java's HttpClient offers HTTP/2 with every request, and a server may ignore that (RFC 9110, section 7.8);
    but httptools takes what follows such a head for the other protocol's.
    """

    def __init__(self, protocol: GuardedProtocol) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn's own
        self._protocol = protocol

    def feed_data(self, data: Any) -> None:
        while True:
            try:
                super().feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                head = self._protocol.take_head_without_offer()
                if not head:
                    raise
                data = head + data[offer.args[0] :]


class GuardedProtocol(HttpToolsProtocol):
    """One connection. What it refuses the application never sees, so it is counted here."""

    telemetry: Telemetry
    max_connections = 2048
    head_timeout_s = 15.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._undelivered_bytes = 0  # since a head, a piece of body or an end: no more than a head may have
        self._in_head = True  # or before it
        self._head_began = False
        self._deaf = False
        self._head_without_offer = b""
        self._last_request = False
        self._closes_after_body = False
        self._idle_since_s = time.monotonic()
        self.parser = _Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answers = _AnswerTransport(self.loop, transport, self.close_after_body)
        if len(self.connections) > self.max_connections and not self._make_room():
            self._refuse(_ConnectionsFullError("All connections are in use."))
            return
        self._arm(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)
        self._answers.let_go()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._deaf:
            return
        if self._in_head and not self._head_began:
            data = data.lstrip(b"\r\n")  # some clients end a body with one (RFC 9112, section 2.2)
            if not data:
                return
        self._undelivered_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self._deaf:
            return
        if self._undelivered_bytes > _MAX_HEAD_BYTES:
            if self._in_head:
                self._refuse(_HeadTooLargeError(f"The request head is longer than {_MAX_HEAD_BYTES} bytes."))
            else:
                self._refuse_rest()
        elif self._head_began and self._timer is None:  # of a further request on a kept connection
            self._arm(self.head_timeout_s)

    def on_message_begin(self) -> None:
        self._head_began = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_began:  # else a trailer, which uvicorn would add to the request's headers
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._undelivered_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        if self.transport.is_closing():  # the parser goes on to the end of what it was given
            return
        method = self.parser.get_method()
        if self.parser.should_upgrade() and not self._should_upgrade() and method != b"CONNECT":
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
            lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            self._head_without_offer = b"\r\n".join([*lines, b"", b""])
            return
        self._in_head = self._head_began = False
        self._undelivered_bytes = 0
        self._disarm()
        self._unset_keepalive_if_required()
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = self._answers  # type: ignore[assignment]
            if self._last_request:
                self.cycle.keep_alive = False

    def take_head_without_offer(self) -> bytes:
        """The last head, where it offered another protocol that is passed over; empty where not."""
        head, self._head_without_offer = self._head_without_offer, b""
        return head

    def on_message_complete(self) -> None:
        if self._head_without_offer:
            return
        discarded = self._discards_body
        self._in_head = True
        self._undelivered_bytes = 0
        super().on_message_complete()
        if not discarded or self.transport.is_closing():
            return
        self._disarm()
        if self._closes_after_body:
            self.transport.close()
            return
        # uvicorn's timer of the idle connection ended with the first bytes after the answer.
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_response_complete(self) -> None:
        self._answers.flush()
        self._idle_since_s = time.monotonic()
        if self._discards_body and not self.transport.is_closing():
            self._arm(_LINGER_S)
        super().on_response_complete()

    def close_after_body(self) -> None:
        """Close; if the last request is answered and its body still arrives, after that or ``_LINGER_S``.

        To close with bytes unread resets the connection, and the caller may lose the answer to that.
        """
        if self._discards_body:
            self._closes_after_body = True
        else:
            self.transport.close()

    @property
    def _discards_body(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete and not self._in_head

    def shutdown(self) -> None:
        """Close when nothing is under way. A request that is on its way in is still answered.

        To close a connection whose first bytes were not read yet would reset it.
        """
        if self._discards_body:
            self._closes_after_body = True
            return
        waits_for_request = self.cycle is None or (self._head_began and not self._deaf)
        if waits_for_request and not self.transport.is_closing():
            self._last_request = True
            self._arm(min(_LAST_REQUEST_S, self.head_timeout_s))
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequestError(msg))

    @property
    def idle_since_s(self) -> float | None:
        """Since when nothing happens here; None while a request is being read or answered."""
        if self._answers_request:
            return None
        return self._idle_since_s if self._in_head and not self._head_began else None

    @property
    def _answers_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _make_room(self) -> bool:
        idle = [
            (other.idle_since_s, id(other), other)
            for other in self.connections
            if other is not self and isinstance(other, GuardedProtocol) and other.idle_since_s is not None
        ]
        if not idle:
            return False
        min(idle)[2].transport.close()
        return True

    def _refuse(self, error: AsrError) -> None:
        """An answer without the application, and the end of the connection.

        While a request is being answered, its answer comes first and nothing more is heard.
        """
        self._disarm()
        self.telemetry.refused(error.status, error.code)
        if self._answers_request:
            self._hear_no_more()
        else:
            self._answer_and_close(error)

    def _refuse_rest(self) -> None:
        """The end of a connection whose request goes on, but brings no more body.

        Not counted here: the application knows of the request, and that it ended early.
        """
        if self.pipeline:  # an earlier request is being answered
            self._hear_no_more()
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self._answer_and_close(
                _HeadTooLargeError(f"Trailers or chunk extensions are longer than {_MAX_HEAD_BYTES} bytes.")
            )

    def _hear_no_more(self) -> None:
        """Close the connection after the answers to what was heard so far."""
        self._deaf = True
        self.cycle.keep_alive = False

    def _answer_and_close(self, error: AsrError) -> None:
        if not self.transport.is_closing():
            body = json.dumps(error.to_body()).encode()
            phrase = {400: "Bad Request", 431: "Request Header Fields Too Large"}.get(
                error.status, "Service Unavailable"
            )
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                "x-request-id": uuid.uuid4().hex,
                **error.headers(),
            }
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self._answers.flush()
            self.transport.write(f"HTTP/1.1 {error.status} {phrase}\r\n{head}\r\n".encode() + body)
        self.transport.close()

    def _arm(self, timeout_s: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(timeout_s, self._expired)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._head_began:  # else it is an idle connection
            self.telemetry.refused(HTTPStatus.REQUEST_TIMEOUT, "request_head_timeout")
            if self._answers_request:
                self._hear_no_more()
                return
        self.transport.close()


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's, with what it lacks.

    - A flood of pings or of tiny fragments is cut off. uvicorn reads on while they come, answers every ping,
      and keeps every fragment: one caller could stop the loop for seconds and fill the memory.
    - When the application is done, so is the connection, also where the caller does not read its end.
    - A handshake that is none is counted, and answered also where its head is too much for the parser.
    - No line of log repeats the address with its query, where a key may stand.
    - A caller that sends faster than it is heard is not taken for dead: its pong waits behind its messages.
    - A refused handshake is no error of ours.
    - The application is told how a connection ended: uvicorn says 1005 of each that ended without a close.
    """

    telemetry: Telemetry

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = logging.getLogger("uvicorn.websocket")
        self.logger.setLevel(logging.WARNING)
        self._extra_frames = 0
        self._heard_of = False  # since the last ping, or since its answer was given more time

    def data_received(self, data: bytes) -> None:
        self._heard_of = True
        for at in range(0, len(data), _FED_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[at : at + _FED_BYTES])
            if not self.handshake_initiated and self.conn.handshake_exc is not None:
                self.telemetry.refused(HTTPStatus.BAD_REQUEST, "invalid_handshake")
                self.transport.write(b"".join(self.conn.data_to_send()))
                self.transport.close()

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if self.response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            self.telemetry.refused(self.response.status_code, "invalid_handshake")

    def handle_cont(self, event: Frame) -> None:
        if self._is_fair():
            super().handle_cont(event)

    def handle_ping(self) -> None:
        if self._is_fair():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        if self._is_fair():
            super().handle_pong(event)

    def send_keepalive_ping(self) -> None:
        self._extra_frames, self._heard_of = 0, False
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """No pong: wait on while nothing is read, or something was, which it may still be behind.

        Reading goes on once the application has taken what waits. A peer that is dead then stays silent, and
        is let go after one more ``ping_timeout``.
        """
        if self.close_sent or self.transport.is_closing():
            super().keepalive_timeout()
        elif (self.read_paused or self._heard_of) and self.ping_timeout is not None:
            self._extra_frames, self._heard_of = 0, False
            self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)
        else:
            code = CloseCode.INTERNAL_ERROR
            self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": PING_TIMEOUT})
            super().keepalive_timeout()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.handshake_complete and not self.close_sent and self.conn.close_rcvd is None:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": CloseCode.ABNORMAL_CLOSURE})
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(self.close_timeout + _LINGER_S, self.transport.abort)

    def _is_fair(self) -> bool:
        """Whether this frame, which brings no message, is one of as many as may come between our pings."""
        self._extra_frames += 1
        if self._extra_frames > _MAX_EXTRA_FRAMES and not self.transport.is_closing():
            self.conn.fail(CloseCode.POLICY_VIOLATION, "too many pings or fragments")
            self.handle_parser_exception()
        return not self.transport.is_closing()


class _AnswerTransport:
    """What uvicorn writes the answers of one connection to.

    What is written in one turn of the event loop is sent together: uvicorn writes head and body apart, and
    uvloop would send both at once, which wakes the caller twice. Closing waits for the rest of a refused
    body.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, close: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._close = close
        self._held: list[bytes] = []
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Send ``data`` at the end of this turn, or when ``flush`` is called before."""
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)

    def flush(self) -> None:
        """Send what was written so far; a connection that is gone takes nothing any more."""
        held, self._held = self._held, []
        if held and not self.is_closing():
            self._transport.write(b"".join(held))

    def close(self) -> None:
        """Called at the end of an answer that ends the connection, and when no answer can be finished."""
        self.flush()
        self._close()

    def let_go(self) -> None:
        """The connection is gone. What it held is freed now: garbage collections are rare (``asr serve``)."""
        self._close = self._transport.close


class Server(uvicorn.Server):
    """uvicorn.Server with the stop described above."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._exit_at_s: float | None = None
        self._waits_for_scrape = False
        self.failed = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGHUP too: it would end the process with what it accepted. Not where nohup has it ignored."""
        main = threading.current_thread() is threading.main_thread()
        with contextlib.ExitStack() as stack:
            if main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                before = signal.signal(signal.SIGHUP, self.handle_exit)
                stack.callback(signal.signal, signal.SIGHUP, before)
            with super().capture_signals():
                yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: leave at once."""
        if self._exit_at_s is not None:
            self.should_exit = self.force_exit = True
            return
        self._waits_for_scrape = sig != signal.SIGINT
        grace_s = 0.0 if sig == signal.SIGINT else self._service.settings.drain_grace_s
        self._exit_at_s = time.monotonic() + grace_s
        self._service.drain()

    def fail(self) -> None:
        """A model was refused: stop, with a status that says so."""
        self.failed = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take every connection that the kernel has let in, and stop.

        A closed listener resets the connections that nobody has accepted, and new ones come between any look
        at them and the close. So the kernel drops new SYNs first: their senders try again after a second and
        find a closed port, which says that nothing was taken. Handshakes have ``_LAST_HANDSHAKES_S``.

        The last requests are refused, with Retry-After: Prometheus has come by for the last time, and an
        answer given now would be missing from its sums.
        """
        self._service.refuse_new()
        for server in self.servers:
            for listener in server.sockets:
                _drop_new_connections(listener.fileno())
        await asyncio.sleep(_LAST_HANDSHAKES_S)
        # uvicorn would cut them off; told by ``refuse_new``, they transcribe what they heard and close.
        until_s = time.monotonic() + self._service.settings.drain_timeout_s
        while self._service.has_streams and not self.force_exit:
            await asyncio.sleep(0.05)
            if time.monotonic() >= until_s:
                break
        left_s = max(1.0, until_s - time.monotonic())  # of the same time, and enough for the last requests
        self.config.timeout_graceful_shutdown = math.ceil(left_s)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._exit_at_s is not None and time.monotonic() >= self._exit_at_s:
            self.should_exit = self.should_exit or not self._unseen_by_prometheus()
        return await super().on_tick(counter)

    def _unseen_by_prometheus(self) -> bool:
        """Whether to stay up for one more scrape, after SIGTERM."""
        service = self._service
        scrapes = service.telemetry.scrapes
        if not self._waits_for_scrape or not scrapes.active:
            return False
        wait_s = min(service.settings.drain_timeout_s, _LAST_SCRAPE_WAIT_S)
        if self._exit_at_s is None or time.monotonic() >= self._exit_at_s + wait_s:
            return False
        return service.in_progress > 0 or scrapes.pending()


def _drop_new_connections(listener_fd: int) -> None:
    """Have the kernel ignore SYNs to a listening TCP socket; handshakes under way end as usual.

    A classic BPF program on the TCP header (Linux, socket(7), no privilege needed): drop the segment if SYN
    is among its flags. Where there is no such filter, the gap stays between the last accept and the close.
    """
    load_byte, jump_if_bits, pass_on = 0x30, 0x45, 0x06
    flags_at, syn, whole, nothing = 13, 0x02, 0xFFFF_FFFF, 0
    steps = [
        (load_byte, 0, 0, flags_at),
        (jump_if_bits, 0, 1, syn),
        (pass_on, 0, 0, nothing),
        (pass_on, 0, 0, whole),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    header = struct.pack("HP", len(steps), ctypes.addressof(program))
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(listener_fd)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)


def make_server(app: FastAPI, settings: Settings) -> Server:
    """The server for an application of ``create_app``."""
    service: Service = app.state.service
    attributes = {
        "telemetry": service.telemetry,
        "max_connections": settings.max_connections,
        "head_timeout_s": settings.head_timeout_s,
    }
    protocol = type("BoundProtocol", (GuardedProtocol,), attributes)
    socket_protocol = type("BoundWebSocket", (GuardedWebSocket,), {"telemetry": service.telemetry})
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws=socket_protocol,
        ws_max_size=_MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,  # sound hardly shrinks, and a small message could unpack to a large one
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
        proxy_headers=True,
        forwarded_allow_ips=settings.forwarded_allow_ips,
    )
    return Server(config, service)
