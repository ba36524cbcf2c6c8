"""The client against scripted answers: forms on the wire, retries, typed errors, streams, cancellation."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from email.message import Message
from email.parser import BytesParser

import httpx
import pytest

from tests.ui.service import TRANSCRIPT, Script, Sleeps, client_for, envelope, sse
from ui import errors
from ui.client import AudioFile, Options
from ui.transcript import Delta, Transcript

FILE = AudioFile("speech é.wav", b"RIFF-bytes", "audio/wav")


def form_of(request: httpx.Request) -> list[tuple[str, bytes]]:
    """Name and content of every part, in the order sent."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parsed = BytesParser().parsebytes(head + request.content)
    parts = [part for part in parsed.get_payload() if isinstance(part, Message)]  # type: ignore[union-attr]
    return [
        (str(part.get_param("name", header="content-disposition")), part.get_payload(decode=True))  # type: ignore[misc]
        for part in parts
    ]


async def test_transcribe_sends_every_option_and_the_file_last() -> None:
    script = Script(httpx.Response(200, json=TRANSCRIPT, headers={"x-request-id": "req-7"}))
    options = Options(model="en-small", language="en", hotwords=("fox", "hound"), beam=8)
    async with client_for(script, api_key="secret") as client:
        transcript = await client.transcribe(FILE, options)
    parts = form_of(script.requests[0])
    assert parts[-1] == ("file", b"RIFF-bytes")
    assert parts[:-1] == [
        ("model", b"en-small"),
        ("language", b"en"),
        ("hotwords[]", b"fox"),
        ("hotwords[]", b"hound"),
        ("beam", b"8"),
        ("timestamps", b"true"),
    ]
    assert script.requests[0].headers["authorization"] == "Bearer secret"
    assert transcript.text == "the quick brown fox"
    assert [word.text for word in transcript.words] == ["the", "quick", "brown", "fox"]
    assert transcript.words[2].confidence == 0.5
    assert transcript.request_id == "req-7"


async def test_no_key_means_no_authorization_header() -> None:
    script = Script(httpx.Response(200, json=TRANSCRIPT))
    async with client_for(script) as client:
        await client.transcribe(FILE)
    assert "authorization" not in script.requests[0].headers


async def test_trace_context_is_sent_and_its_id_kept() -> None:
    script = Script(httpx.Response(200, json=TRANSCRIPT))
    async with client_for(script) as client:
        transcript = await client.transcribe(FILE)
    found = re.fullmatch(r"00-([0-9a-f]{32})-[0-9a-f]{16}-0[13]", script.requests[0].headers["traceparent"])
    assert found is not None
    assert transcript.trace_id == found[1]


async def test_retries_share_one_trace() -> None:
    script = Script(envelope(503, "not_ready"), httpx.Response(200, json=TRANSCRIPT))
    async with client_for(script) as client:
        await client.transcribe(FILE)
    first, second = (request.headers["traceparent"] for request in script.requests)
    assert first == second


async def test_server_timing_becomes_stage_seconds() -> None:
    header = 'decode;dur=12.5, queue;desc="waiting, in line";dur=3, inference;dur=40'
    script = Script(httpx.Response(200, json=TRANSCRIPT, headers={"server-timing": header}))
    async with client_for(script) as client:
        transcript = await client.transcribe(FILE)
    assert transcript.stages_s == {"decode": 0.0125, "queue": 0.003, "inference": 0.04}


@pytest.mark.parametrize(
    ("headers", "waited_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({}, 0.5),
        ({"retry-after": "soon"}, 0.5),
    ],
)
async def test_busy_is_retried_after_the_time_it_asks_for(headers: dict[str, str], waited_s: float) -> None:
    sleeps = Sleeps()
    script = Script(envelope(429, "queue_full", **headers), httpx.Response(200, json=TRANSCRIPT))
    waits: list[tuple[float, str]] = []
    async with client_for(script, sleeps) as client:
        await client.transcribe(FILE, on_wait=lambda s, error: waits.append((s, type(error).__name__)))
    assert sleeps == [waited_s]
    assert waits == [(waited_s, "BusyError")]
    assert form_of(script.requests[1])[-1] == ("file", b"RIFF-bytes")


async def test_it_gives_up_after_two_retries_and_says_how_long_to_wait() -> None:
    sleeps = Sleeps()
    script = Script(envelope(429, "queue_full", **{"retry-after": "3"}))
    async with client_for(script, sleeps) as client:
        with pytest.raises(errors.BusyError) as caught:
            await client.transcribe(FILE)
    assert len(script.requests) == 3
    assert sleeps == [3.0, 3.0]
    assert caught.value.retry_after_s == 3.0
    assert caught.value.request_id == "req-1"


@pytest.mark.parametrize("headers", [{"retry-after": "90"}, {"x-should-retry": "false"}])
async def test_a_long_wait_or_a_plain_no_is_not_retried(headers: dict[str, str]) -> None:
    script = Script(envelope(503, "draining", **headers))
    async with client_for(script) as client:
        with pytest.raises(errors.NotReadyError):
            await client.transcribe(FILE)
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "invalid_request", errors.BadRequestError),
        (400, "undecodable_audio", errors.UndecodableAudioError),
        (401, "invalid_api_key", errors.AccessError),
        (404, "model_not_found", errors.UnknownModelError),
        (413, "upload_too_large", errors.UploadTooLargeError),
        (422, "invalid_value", errors.InvalidValueError),
        (422, "audio_too_long", errors.AudioTooLongError),
        (500, "internal_error", errors.ServerFaultError),
    ],
)
async def test_each_status_is_its_own_error_and_is_not_retried(
    status: int, code: str, kind: type[errors.ApiStatusError]
) -> None:
    script = Script(envelope(status, code, "because"))
    async with client_for(script) as client:
        with pytest.raises(errors.ApiStatusError) as caught:
            await client.transcribe(FILE)
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.code, caught.value.status) == ("because", code, status)
    assert len(script.requests) == 1


async def test_a_proxys_html_error_still_has_its_status() -> None:
    async with client_for(Script(httpx.Response(413, text="<html>too big</html>"))) as client:
        with pytest.raises(errors.UploadTooLargeError):
            await client.transcribe(FILE)


@pytest.mark.parametrize(
    ("failure", "kind", "attempts"),
    [
        (httpx.ConnectError("refused"), errors.ApiUnreachableError, 3),
        (httpx.ReadTimeout("slow"), errors.ApiTimeoutError, 1),
    ],
)
async def test_nobody_listening_is_asked_again_and_silence_is_not(
    failure: httpx.TransportError, kind: type[errors.ApiError], attempts: int
) -> None:
    script = Script(failure)
    async with client_for(script) as client:
        with pytest.raises(kind):
            await client.transcribe(FILE)
    assert len(script.requests) == attempts


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="hello"),
        httpx.Response(200, json=["not", "a", "transcript"]),
        httpx.Response(200, json={**TRANSCRIPT, "duration": "long"}),
        httpx.Response(200, json={**TRANSCRIPT, "words": [{"word": "no times"}]}),
    ],
)
async def test_an_answer_outside_the_contract_is_told(answer: httpx.Response) -> None:
    async with client_for(Script(answer)) as client:
        with pytest.raises(errors.ApiProtocolError):
            await client.transcribe(FILE)


async def test_batch_keeps_order_and_puts_errors_in_place() -> None:
    failed = {"error": {"message": "not audio", "type": "t", "param": None, "code": "undecodable_audio"}}
    results = [{"index": 0, "transcription": TRANSCRIPT}, failed]
    script = Script(httpx.Response(200, json={"results": results}))
    async with client_for(script) as client:
        first, second = await client.transcribe_batch([FILE, AudioFile("b.txt", b"text")])
    assert isinstance(first, Transcript)
    assert isinstance(second, errors.UndecodableAudioError)
    assert [name for name, _ in form_of(script.requests[0])][-2:] == ["files", "files"]


async def test_stream_yields_text_then_the_transcript() -> None:
    done = {"type": "transcript.text.done", **TRANSCRIPT, "usage": {"type": "duration", "seconds": 2.5}}
    content = b": ping\n\n" + sse(
        {"type": "transcript.text.delta", "delta": "the quick"},
        {"type": "transcript.text.delta", "delta": " brown\u2028fox"},
        done,
    )
    script = Script(httpx.Response(200, content=content, headers={"content-type": "text/event-stream"}))
    async with client_for(script) as client:
        heard = [item async for item in client.stream(FILE, Options(hotwords=("fox",)))]
    assert heard[:2] == [Delta("the quick"), Delta(" brown\u2028fox")]
    assert isinstance(heard[2], Transcript)
    assert len(heard[2].words) == 4
    parts = form_of(script.requests[0])
    assert ("stream", b"true") in parts
    assert ("hotwords[]", b"fox") in parts
    assert parts[-1][0] == "file"


async def test_a_plain_done_event_gives_text_and_duration() -> None:
    done = {"type": "transcript.text.done", "text": "hi", "usage": {"type": "duration", "seconds": 1.5}}
    async with client_for(Script(httpx.Response(200, content=sse(done)))) as client:
        heard = [item async for item in client.stream(FILE)]
    assert isinstance(heard[0], Transcript)
    assert (heard[0].text, heard[0].duration_s, heard[0].words) == ("hi", 1.5, ())


async def test_an_error_inside_the_stream_is_typed() -> None:
    frames = sse(
        {"type": "transcript.text.delta", "delta": "the"},
        {"error": {"message": "late", "type": "server_error", "param": None, "code": "deadline_exceeded"}},
    )
    async with client_for(Script(httpx.Response(200, content=frames))) as client:
        with pytest.raises(errors.DeadlineError):
            _ = [item async for item in client.stream(FILE)]


DELTA = b'data: {"type": "transcript.text.delta", "delta": "the"}\n\n'


@pytest.mark.parametrize("content", [b"", DELTA, b"data: {\n\n"])
async def test_a_stream_that_breaks_off_is_an_error(content: bytes) -> None:
    async with client_for(Script(httpx.Response(200, content=content))) as client:
        with pytest.raises(errors.ApiProtocolError):
            _ = [item async for item in client.stream(FILE)]


class Endless(httpx.AsyncByteStream):
    """A body that says one event and then nothing; remembers whether it was closed."""

    closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield DELTA
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.closed = True


async def test_cancelling_closes_the_connection() -> None:
    body = Endless()
    heard = asyncio.Event()

    async def listen() -> None:
        client = client_for(Script(httpx.Response(200, stream=body)))
        async with client, aclosing(client.stream(FILE)) as items:
            async for _ in items:
                heard.set()

    task = asyncio.create_task(listen())
    await heard.wait()
    assert not body.closed
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert body.closed


async def test_models_languages_and_information() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        answers: dict[str, object] = {
            "/models": {"models": [{"name": "b", "languages": ["en"]}, {"name": "a", "default": True}]},
            "/languages": {"languages": [{"code": "vi", "name": "Vietnamese", "models": ["b"]}]},
            "/": {"name": "asr"},
        }
        return httpx.Response(200, json=answers[request.url.path])

    async with client_for(handler) as client:
        models = await client.models()
        (language,) = await client.languages()
        assert (await client.information())["name"] == "asr"
    assert [(model.name, model.is_default) for model in models] == [("a", True), ("b", False)]
    assert (language.code, language.models) == ("vi", ("b",))


@pytest.mark.parametrize(
    ("answer", "state", "ready"),
    [
        (httpx.Response(200, json={"status": "ready"}), "ready", True),
        (httpx.Response(503, json={"status": "starting"}), "starting", False),
        (httpx.Response(503, json={"status": "draining"}), "draining", False),
    ],
)
async def test_health_answers_even_when_not_ready(answer: httpx.Response, state: str, ready: bool) -> None:
    async with client_for(Script(answer)) as client:
        health = await client.health()
    assert (health.state, health.ready) == (state, ready)


@pytest.mark.parametrize("answer", [httpx.Response(200, text="<html>"), httpx.Response(200, json={"ok": 1})])
async def test_another_server_at_the_address_is_told(answer: httpx.Response) -> None:
    async with client_for(Script(answer)) as client:
        with pytest.raises(errors.ApiProtocolError):
            await client.health()


async def test_load_sums_the_metrics() -> None:
    text = "\n".join(
        [
            "# HELP asr_queue_depth waiting",
            "asr_queue_depth 3",
            'asr_worker_busy_ratio{worker="0"} 0.5',
            'asr_worker_busy_ratio{worker="1"} 1.0',
            'asr_requests_total{route="/a b",outcome="ok"} 4 # {trace_id="x"} 1',
            'asr_requests_total{route="/b",outcome="error"} 2',
            "asr_queue_audio_seconds NaN",
        ]
    )
    async with client_for(Script(httpx.Response(200, text=text))) as client:
        load = await client.load()
    assert load.queue_depth == 3
    assert load.worker_busy == 0.75
    assert load.requests == 6
    assert load.queue_audio_s is None
    assert load.inflight is None


def test_transcript_survives_its_own_json() -> None:
    first = Transcript.from_json(TRANSCRIPT)
    assert Transcript.from_json(json.loads(json.dumps(first.to_json()))) == first
