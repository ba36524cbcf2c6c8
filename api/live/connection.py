"""One WebSocket: its place among the others, its limits, and its end when the service stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import chain
from types import TracebackType
from typing import Any, Self

import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from api.errors import (
    AsrError,
    ClientDisconnected,
    DrainingError,
    InvalidRequestError,
    StreamTimeoutError,
    public,
)
from api.keys import KEY_SUBPROTOCOL
from api.live.recogniser import Recogniser
from api.service import Service
from api.telemetry.metrics import SESSION_ENDS

_log = structlog.get_logger("api.live")

NORMAL, POLICY, FAILED, RESTART = 1000, 1008, 1011, 1012
"""Close codes of RFC 6455, section 7.4.1, and of its registry at IANA."""

PING_TIMEOUT = "keepalive ping timeout"
"""The reason beside 1011 where a pong did not come: ours, and that of Python's `websockets`, which leaves
with 1011 after any exception."""

_ENDS = {
    1002: "protocol_error",
    1003: "protocol_error",
    1006: "lost",
    1007: "protocol_error",
    1008: "protocol_error",
    1009: "message_too_large",
    1012: "draining",
}
"""What the server closes with where it is not the application that closes, 1006 for no close at all. All
other codes are the caller's, and a good-bye."""

_WRITE_TIMEOUT_S = 60.0  # a caller that does not read is let go
_FIND_END_S = 0.1


class Connection:
    """``async with Connection(...) as connection``: accepted, counted, and closed at the end.

    Entering raises what ``Service.enter_stream`` does, before the WebSocket is accepted. Leaving swallows
    every error: the caller is told by a last message, which ``error_message`` makes, and by the closing code.
    """

    def __init__(
        self,
        websocket: WebSocket,
        service: Service,
        protocol: str,
        error_message: Callable[[AsrError], dict[str, Any]],
        subprotocols: Sequence[str] = (),
    ) -> None:
        self.id = f"sess_{uuid.uuid4().hex}"
        self.audio_s = 0.0
        self.model: str | None = None
        self._utterances = 0
        self._open: set[Recogniser] = set()
        self._counted: AsrError | None = None
        self._websocket = websocket
        self._service = service
        self._protocol = protocol
        self._error_message = error_message
        self._subprotocols = subprotocols
        self._sending = asyncio.Lock()
        self._start_s = time.monotonic()
        self._closing: asyncio.Task[Any] | None = None
        self._end = "closed"
        self._close_code: int | None = None

    async def __aenter__(self) -> Self:
        self._service.enter_stream(self)
        try:
            await self._websocket.accept(subprotocol=self._chosen_subprotocol())
        except BaseException:
            self._service.leave_stream(self)
            raise
        self._closing = asyncio.create_task(self._service.closing.wait())
        self._service.telemetry.metrics.stream_sessions.labels(self._protocol).inc()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            if error is None:
                await self._close(NORMAL)
            elif isinstance(error, Exception):
                await self._fail(error)
            else:
                self._end = "error"
        finally:
            if self._closing is not None:
                self._closing.cancel()
            self._service.telemetry.metrics.stream_sessions.labels(self._protocol).dec()
            self._service.leave_stream(self)
            self._count(error)
            self._log()
        return isinstance(error, Exception)

    def _chosen_subprotocol(self) -> str | None:
        """One of ours where it is offered, else the one that holds the key, else none.

        A browser that offers some and is answered with none fails the handshake ("establish a WebSocket
        connection" in WHATWG's WebSockets standard).
        """
        offered: Sequence[str] = self._websocket.scope.get("subprotocols", ())
        ours = (name for name in self._subprotocols if name in offered)
        keys = (name for name in offered if name.startswith(KEY_SUBPROTOCOL))
        return next(chain(ours, keys), None)

    def utterance_began(self, recogniser: Recogniser) -> None:
        """It ends with ``utterance_ended`` or ``utterance_dropped``; otherwise the caller left too early."""
        self._open.add(recogniser)

    def utterance_dropped(self, recogniser: Recogniser) -> None:
        """The caller wants no transcript."""
        self._open.discard(recogniser)

    def utterance_ended(self, recogniser: Recogniser, ended_s: float, error: AsrError | None = None) -> None:
        """Count one that is about to be told, or has failed; ``ended_s`` is of ``time.perf_counter``."""
        self._open.discard(recogniser)
        self._utterances += 1
        self._counted = error
        status, code = (200, None) if error is None else (error.status, error.code)
        elapsed_s = time.perf_counter() - ended_s
        self._service.telemetry.utterance_ended(
            self._protocol, recogniser.model_name, elapsed_s=elapsed_s, status=status, code=code
        )

    async def _fail(self, error: Exception) -> None:
        if not isinstance(error, AsrError):
            _log.error("unhandled_exception", exc_info=error)
        shown = public(error, self.id)
        if isinstance(error, ClientDisconnected):
            await self._find_end()
        else:
            self._end = shown.code
        if shown is not self._counted and not isinstance(shown, _NO_FAILURES):
            self._service.telemetry.session_failed(self._protocol, shown.status, shown.code)
        with contextlib.suppress(ClientDisconnected):
            if not isinstance(error, ClientDisconnected):  # otherwise nobody reads: the server closes
                await self.send(self._error_message(shown))
                await self._close(_CLOSE_CODES.get(type(shown), POLICY if shown.status < 500 else FAILED))

    async def _find_end(self) -> None:
        """Why what was sent reached nobody: it is told behind the messages that wait to be read."""
        self._end = "unread"
        with contextlib.suppress(TimeoutError, RuntimeError):
            async with asyncio.timeout(_FIND_END_S):
                while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
                    pass
                self._left(message)

    def _left(self, message: Mapping[str, Any]) -> None:
        """Keep how the connection ended, of ASGI's ``websocket.disconnect``."""
        code = self._close_code = int(message.get("code", 1005))
        is_late = code == FAILED and message.get("reason") == PING_TIMEOUT
        self._end = "ping_timeout" if is_late else _ENDS.get(code, "closed")

    def _count(self, error: BaseException | None) -> None:
        """The end, and the utterances that nobody waited for."""
        telemetry, end = self._service.telemetry, self._end
        if end not in SESSION_ENDS:
            end = "invalid" if isinstance(error, AsrError) and error.status < 500 else "error"
        telemetry.session_ended(self._protocol, end)
        if error is None or isinstance(error, ClientDisconnected):
            gone = ClientDisconnected()
            for recogniser in self._open:
                telemetry.utterance_ended(
                    self._protocol, recogniser.model_name, elapsed_s=0.0, status=gone.status, code=gone.code
                )

    async def messages(self) -> AsyncIterator[str | bytes]:
        """What the caller sends, until it leaves.

        Raises StreamTimeoutError where nothing comes for too long, or the session lasts too long, and
        DrainingError when the service stops.
        """
        settings = self._service.settings
        until_s = self._start_s + settings.stream_max_s
        while True:
            left_s, idle_s = until_s - time.monotonic(), settings.stream_idle_timeout_s
            message = await self._receive(min(left_s, idle_s)) if left_s > 0 else None
            if message is None and left_s <= idle_s:
                raise StreamTimeoutError(f"The session has lasted {settings.stream_max_s:g} seconds.")
            if message is None:
                raise StreamTimeoutError(f"Nothing came for {idle_s:g} seconds.")
            if message["type"] == "websocket.disconnect":
                self._left(message)
                return
            data = message.get("bytes")
            yield data if data is not None else message.get("text", "")

    async def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """The next ASGI message, None after ``timeout_s``. Raises DrainingError when the service stops."""
        if self._closing is None:
            raise RuntimeError("not entered")
        if not self._closing.done():
            receiving = asyncio.ensure_future(self._websocket.receive())
            await asyncio.wait(
                {receiving, self._closing}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if receiving.done():
                return dict(receiving.result())
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
        if self._closing.done():
            raise DrainingError("The service is shutting down; connect again.")
        return None

    async def send(self, message: dict[str, Any]) -> None:
        """One JSON text message. Raises ClientDisconnected where nobody reads it."""
        try:
            async with self._sending, asyncio.timeout(_WRITE_TIMEOUT_S):
                # Escaped: a caller's half of a surrogate pair, given back in an error, has no form in UTF-8.
                await self._websocket.send_text(json.dumps(message))
        except (WebSocketDisconnect, RuntimeError, TimeoutError) as error:
            raise ClientDisconnected("The client does not read its stream.") from error

    async def _close(self, code: int) -> None:
        # Where that fails it was closed from the other side.
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(_WRITE_TIMEOUT_S):
                await self._websocket.close(code)

    def _log(self) -> None:
        fields: dict[str, Any] = {"protocol": self._protocol, "session_id": self.id, "end": self._end}
        caller = self._websocket.scope.get("state", {}).get("key_name")
        if caller is not None:
            fields["caller"] = caller
        if self.model is not None:
            fields["model"] = self.model
        if self._close_code is not None:
            fields["close_code"] = self._close_code
        _log.info(
            "stream",
            duration_s=round(time.monotonic() - self._start_s, 2),
            audio_s=round(self.audio_s, 2),
            utterances=self._utterances,
            **fields,
        )


def json_object(text: str, problem: str) -> dict[str, Any]:
    """The object that `text` is. Raises InvalidRequestError, with `problem` where it is not JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(problem) from None
    if not isinstance(value, dict):
        raise InvalidRequestError("The message is not a JSON object.")
    return value


_CLOSE_CODES = {DrainingError: RESTART, StreamTimeoutError: POLICY}
_NO_FAILURES = (ClientDisconnected, DrainingError, StreamTimeoutError)
"""How sessions end that did nothing wrong and got what they came for."""
