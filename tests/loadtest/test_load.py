"""The load generator's own client against a real server, and against one that breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loadtest.load import Answer, Clip, Poster, closed_loop, make_form, open_loop, send, summarise
from loadtest.processes import api_server
from tests.tiny_bundle import make_bundle, sing, wav

TEXT = "bad cafe"
CLIP = Clip("clip.wav", wav(sing(TEXT)), 1.0)
FORM = make_form(CLIP, {"model": "tiny"})


def test_both_loops_get_every_answer_of_the_service(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    refused = make_form(CLIP, {"model": "nobody-has-this"})
    with api_server("tiny", tmp_path) as running:
        url = f"{running.url}/transcribe"
        closed, elapsed_s = asyncio.run(closed_loop(url, [FORM], clients=3, duration_s=1.0))
        opened, _ = asyncio.run(open_loop(url, [FORM], rate_per_s=30.0, duration_s=1.0))
        bad, _ = asyncio.run(closed_loop(url, [refused], clients=1, duration_s=0.1))
    for answer in (*closed, *opened):
        assert (answer.status, answer.text) == (200, TEXT)
        assert answer.stages_ms["inference"] > 0
        assert answer.latency_s > 0
    assert summarise(closed, elapsed_s).succeeded == len(closed) > 3
    assert {answer.status for answer in bad} == {404}


@asynccontextmanager
async def server_that(
    answer: Callable[[asyncio.StreamWriter], None], connections: list[int]
) -> AsyncIterator[str]:
    """Reads whole requests and lets `answer` write what it likes."""

    handlers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        connections.append(1)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                assert await reader.readexactly(length) == FORM.body
                answer(writer)
        writer.close()
        await writer.wait_closed()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/transcribe?x=1"
    finally:
        listening.close()
        await asyncio.gather(*handlers)


async def ask(answer: Callable[[asyncio.StreamWriter], None], times: int = 2) -> tuple[list[Answer], int]:
    connections: list[int] = []
    async with server_that(answer, connections) as url, Poster(url, timeout_s=5.0) as client:
        answers = [await send(client, FORM) for _ in range(times)]
    return answers, len(connections)


def write(head: str, body: bytes = b"") -> Callable[[asyncio.StreamWriter], None]:
    return lambda writer: writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)


async def test_a_connection_serves_many_requests() -> None:
    refusal = write("HTTP/1.1 429 Too Many Requests\nRetry-After: 3\nContent-Length: 2", b"{}")
    answers, connections = await ask(refusal, times=5)
    assert [(answer.status, answer.retry_after_s) for answer in answers] == [(429, 3.0)] * 5
    assert connections == 1


async def test_a_connection_that_the_server_closes_is_not_used_again() -> None:
    body = b'{"text": "abc"}'
    once = write(f"HTTP/1.1 200 OK\nConnection: close\nContent-Length: {len(body)}", body)
    answers, connections = await ask(once)
    assert [answer.text for answer in answers] == ["abc", "abc"]
    assert connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda writer: writer.close(),
        lambda writer: (write("HTTP/1.1 200 OK\nContent-Length: 9", b"{}")(writer), writer.close()),
        write("HTTP/1.1 200 OK\nTransfer-Encoding: chunked"),
        write("HTTP/1.1 200 OK\nContent-Length: 2", b"{]"),
    ],
    ids=["closed", "cut short", "no length", "no JSON"],
)
async def test_what_breaks_is_status_zero(answer: Callable[[asyncio.StreamWriter], None]) -> None:
    answers, _ = await ask(answer)
    assert [answer.status for answer in answers] == [0, 0]


def test_the_address_must_be_http() -> None:
    with pytest.raises(ValueError, match="https://x/transcribe: expected http://host:port/path"):
        Poster("https://x/transcribe")
