"""The door: API keys, rate limits, room in the queue, and the headers that keep browsers from harm.

Pure ASGI, no copies.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import AsrError, AuthenticationError, PermissionDeniedError, RateLimitedError, to_response
from api.keys import KEY_SUBPROTOCOL, ApiKey, find_key
from api.telemetry import TRANSCRIPTION_ROUTES, current_record, is_transcription

# Open without a key: probes, and what has a switch of its own.
_OPEN_PATHS = frozenset({"/", "/metrics", "/docs", "/openapi.json"})
_MAX_BUCKETS = 10_000

_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]


class SecurityHeaders:
    """The same protective headers on every answer, errors included.

    While the service drains, each answer also closes its connection: callers that keep connections then open
    their next one elsewhere, and none sends a request into a connection that is about to go.
    """

    def __init__(self, app: ASGIApp, is_draining: Callable[[], bool]) -> None:
        self.app = app
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                headers.extend(_SECURITY_HEADERS)
                if self._is_draining():
                    headers.append((b"connection", b"close"))
            await send(message)

        await self.app(scope, receive, send_with_headers)


class _Bucket(NamedTuple):
    """Tokens left at a time, and the latest time that a refused request was told."""

    tokens: float
    at_s: float
    promised_s: float


class RateLimiter:
    """Token buckets: ``per_minute`` requests a minute, bursts of a tenth of that (at least one).

    Requests that are refused together are told different times, a token apart, so that all who obey get one;
    but never more than a burst later than the first of them, whatever a caller goes on asking.
    """

    def __init__(self, per_minute: int) -> None:
        self.rate_per_s = per_minute / 60
        self.burst = max(1.0, per_minute / 10)
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, caller: str, now_s: float) -> None:
        """Take one token of ``caller``. Raises RateLimitedError saying when the next one is there."""
        last = self._buckets.pop(caller, _Bucket(self.burst, now_s, 0.0))
        tokens = min(self.burst, last.tokens + max(0.0, now_s - last.at_s) * self.rate_per_s)
        allowed, promised_s = tokens >= 1.0, last.promised_s
        if not allowed:
            next_s = now_s + (1.0 - tokens) / self.rate_per_s
            latest_s = next_s + self.burst / self.rate_per_s
            promised_s = min(latest_s, max(next_s, promised_s + 1.0 / self.rate_per_s))
        self._buckets[caller] = _Bucket(tokens - allowed, now_s, promised_s)
        while len(self._buckets) > _MAX_BUCKETS:  # the longest silent has a full bucket by now, or soon
            self._buckets.popitem(last=False)
        if not allowed:
            wait_s = promised_s - now_s
            raise RateLimitedError(
                f"More than {self.rate_per_s * 60:.0f} requests a minute; wait {wait_s:.1f} s.",
                retry_after_s=wait_s,
            )


class Access:
    """401 without a known key where keys are configured, 429 above the rate limit; no body is read first.

    ``check_room`` is asked before a transcription: it raises 429 while the queue is full, 503 before the
    models are loaded and after the drain. Behind the router a refusal costs half as much again, which counts
    when most callers are refused.

    WebSockets take a key and a token as requests do. Browsers let any page open one to any address, without
    what CORS does for requests, so an ``Origin`` must be one of `origins` or this service's own, which
    websocket-client and others send that are no browsers.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[ApiKey],
        rate_limit_per_minute: int,
        check_room: Callable[[], None],
        origins: Sequence[str] = (),
    ) -> None:
        self.app = app
        self._origins = frozenset(origins)
        self._check_room = check_room
        self._keys = tuple(keys)
        self._limiter = RateLimiter(rate_limit_per_minute) if rate_limit_per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_socket = scope["type"] == "websocket"
        if not _needs_key(scope):
            await self.app(scope, receive, send)
            return
        try:
            if is_socket:
                self._check_origin(scope)
            caller = self._authenticate(scope)
            record = current_record()
            if record is not None:
                record.caller = caller
            if self._keys:
                scope.setdefault("state", {})["key_name"] = caller
            if self._limiter is not None and (is_socket or scope["path"] in TRANSCRIPTION_ROUTES):
                self._limiter.take(caller, time.monotonic())
            if is_transcription(scope):
                self._check_room()
        except AsrError as error:
            record = current_record()
            if record is not None:
                record.failed(error.code, error.status)
            await to_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_origin(self, scope: Scope) -> None:
        own = {bytes(value).lower() for name, value in scope["headers"] if name == b"host"}
        for name, value in scope["headers"]:
            if name != b"origin" or bytes(value).lower().partition(b"://")[2] in own:
                continue
            if not self._origins & {"*", bytes(value).decode("latin-1")}:
                raise PermissionDeniedError(
                    "Pages of this origin may not open live sessions; ASR_CORS_ORIGINS lists those that may."
                )

    def _authenticate(self, scope: Scope) -> str:
        """Name of the key, or the caller's address where no keys are configured."""
        if not self._keys:
            client = scope.get("client")
            return str(client[0]) if client else "unknown"
        secret = _bearer(scope)
        if secret is None:
            raise AuthenticationError(
                "An API key is needed: send it as Authorization: Bearer <key>.", code="missing_api_key"
            )
        key = find_key(self._keys, secret)
        if key is None:
            raise AuthenticationError("The API key is not known.")
        return key.name


def _needs_key(scope: Scope) -> bool:
    if scope["type"] == "http":
        return scope["method"] != "OPTIONS" and not is_open(scope["path"])
    return bool(scope["type"] == "websocket")


def is_open(path: str) -> bool:
    """Whether this address answers without a key."""
    return path in _OPEN_PATHS or path == "/health" or path.startswith("/health/")


def _bearer(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, secret = bytes(value).decode("utf-8", "surrogateescape").partition(" ")
            if scheme.lower() == "bearer":
                return secret.strip()
        if name == b"x-api-key":
            return bytes(value).decode("utf-8", "surrogateescape").strip()
    # Where browsers and OpenAI's clients put it when they open a WebSocket.
    for offered in scope.get("subprotocols", ()):
        if offered.startswith(KEY_SUBPROTOCOL):
            return str(offered).removeprefix(KEY_SUBPROTOCOL)
    return None
