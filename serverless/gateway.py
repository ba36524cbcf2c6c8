"""API Gateway events -> the service's own ASGI application -> answers.

Both event formats are read: 2.0 (HTTP APIs, function URLs) and 1.0 (REST APIs). Source: AWS, "Working with
AWS Lambda proxy integrations for HTTP APIs", payload format versions.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote, urlencode

import structlog

_log = structlog.get_logger("serverless.gateway")

Message = MutableMapping[str, Any]
Application = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


def is_http(event: MutableMapping[str, Any]) -> bool:
    """Whether an event is a request of API Gateway or of a function URL."""
    return "requestContext" in event and ("rawPath" in event or "httpMethod" in event)


def scope_of(event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The ASGI scope of a request event."""
    second = event.get("version") == "2.0"
    context = event.get("requestContext") or {}
    if second:
        method = context["http"]["method"]
        address = context["http"].get("sourceIp", "")
        path = _without_stage(event.get("rawPath") or "/", context.get("stage"))
        query = event.get("rawQueryString") or ""
        pairs = list((event.get("headers") or {}).items())
        if cookies := event.get("cookies"):
            pairs.append(("cookie", "; ".join(cookies)))
    else:
        method = event["httpMethod"]
        address = (context.get("identity") or {}).get("sourceIp", "")
        path = event.get("path") or "/"
        query = urlencode(_many(event, "multiValueQueryStringParameters", "queryStringParameters"))
        pairs = _many(event, "multiValueHeaders", "headers")
    headers = [(name.lower().encode("latin-1"), _header_bytes(value)) for name, value in pairs]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": unquote(path),
        "raw_path": path.encode("utf-8"),
        "query_string": query.encode("utf-8"),
        "root_path": "",
        "headers": headers,
        "client": (address, 0),
        "server": (dict(pairs).get("host") or context.get("domainName") or "lambda", 443),
    }


def _header_bytes(value: str) -> bytes:
    """What the client sent: the gateway has read the bytes as Latin-1 or, where they are none, as UTF-8."""
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode("utf-8")


def _without_stage(path: str, stage: str | None) -> str:
    """A named stage of an HTTP API is part of its raw path."""
    prefix = f"/{stage}"
    if stage and stage != "$default" and (path == prefix or path.startswith(prefix + "/")):
        return path[len(prefix) :] or "/"
    return path


def _many(event: MutableMapping[str, Any], several: str, single: str) -> list[tuple[str, str]]:
    """Format 1.0 lists values twice; the list that may hold several per name wins."""
    if found := event.get(several):
        return [(name, value) for name, values in found.items() for value in values]
    return list((event.get(single) or {}).items())


def body_of(event: MutableMapping[str, Any]) -> bytes:
    """The request's body. Raises ValueError where it says base64 and is not."""
    body = event.get("body") or ""
    if event.get("isBase64Encoded"):
        return base64.b64decode(body, validate=True)
    return str(body).encode("utf-8")


async def answer(application: Application, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Run one request through the application; a streamed answer is collected whole.

    Starlette answers an unexpected error with status 500 and raises it again, for the server's log: the
    answer counts. Only an error without an answer is raised here.
    """
    body = body_of(event)
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    parts: list[bytes] = []
    start: Message = {}

    async def receive() -> Message:
        if not requests:
            await asyncio.Event().wait()  # the caller behind the gateway never leaves early
        return requests.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    scope = scope_of(event)
    try:
        await application(scope, receive, send)
    except Exception:
        if not start:
            raise
        _log.exception("request_failed", path=scope["path"])
    return _reply(start, b"".join(parts), second=event.get("version") == "2.0")


def _reply(start: Message, content: bytes, *, second: bool) -> dict[str, Any]:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in start.get("headers", [])]
    try:
        body, encoded = content.decode("utf-8"), False
    except UnicodeDecodeError:
        body, encoded = base64.b64encode(content).decode("ascii"), True
    reply: dict[str, Any] = {"statusCode": start["status"], "body": body, "isBase64Encoded": encoded}
    if second:
        joined: dict[str, str] = {}
        for name, value in headers:
            if name != "set-cookie":  # the one header whose values may not be joined (RFC 9110, 5.3)
                joined[name] = f"{joined[name]}, {value}" if name in joined else value
        reply["headers"] = joined
        if cookies := [value for name, value in headers if name == "set-cookie"]:
            reply["cookies"] = cookies
    else:
        grouped: dict[str, list[str]] = {}
        for name, value in headers:
            grouped.setdefault(name, []).append(value)
        reply["multiValueHeaders"] = grouped
    return reply
