"""Events become ASGI requests, and what an application answers becomes what the gateway expects."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response

from serverless.gateway import answer

EVENTS = Path(__file__).resolve().parents[2] / "serverless" / "events"


def event(name: str = "http_api", **headers: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((EVENTS / f"{name}.json").read_text())
    made["headers"] |= headers
    return made


def test_an_unexpected_error_gets_the_applications_answer() -> None:
    """Starlette answers it and raises it again for the server's log; the gateway's 500 says nothing."""
    app = FastAPI()

    @app.exception_handler(Exception)
    async def said(_: Request, __: Exception) -> Response:
        return Response('{"error": {"code": "internal"}}', 500)

    @app.post("/transcribe")
    async def broken() -> None:
        raise RuntimeError("a defect")

    found = asyncio.run(answer(app, event()))
    assert (found["statusCode"], json.loads(found["body"])["error"]["code"]) == (500, "internal")


def test_an_error_without_an_answer_is_raised() -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        asyncio.run(answer(broken, event()))


def test_a_header_that_comes_twice_is_joined_but_for_cookies() -> None:
    app = FastAPI()

    @app.post("/transcribe")
    async def twice() -> Response:
        made = Response("")
        for name, value in (
            ("vary", "Origin"),
            ("vary", "Accept"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
        ):
            made.headers.append(name, value)
        return made

    found = asyncio.run(answer(app, event()))
    assert found["headers"]["vary"] == "Origin, Accept"
    assert found["cookies"] == ["a=1", "b=2"]
    first = event("rest_api") | {"path": "/transcribe", "httpMethod": "POST"}
    assert asyncio.run(answer(app, first))["multiValueHeaders"]["vary"] == ["Origin", "Accept"]


@pytest.mark.parametrize(("given", "sent"), [("Ð\x98Ð²Ð°Ð½", "Иван"), ("Иван", "Иван"), ("caf\xe9", None)])
def test_headers_beyond_ascii_are_passed_on(given: str, sent: str | None) -> None:
    """Read by the gateway as Latin-1 or as UTF-8: the application gets the client's bytes."""
    app = FastAPI()
    seen: list[bytes] = []

    @app.post("/transcribe")
    async def headers(request: Request) -> None:
        seen.extend(value for name, value in request.headers.raw if name == b"x-user")

    assert asyncio.run(answer(app, event(**{"X-User": given})))["statusCode"] == 200
    assert seen == [sent.encode() if sent else b"caf\xe9"]
