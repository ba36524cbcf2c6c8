"""The application in process: what it says it is, and streams that break."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import pytest_asyncio
from dotenv import dotenv_values
from fastapi import FastAPI

from api import batcher, transcriber
from api.commands import serve
from api.keys import ApiKey
from api.main import create_app
from api.redaction import plain_keys
from api.settings import Settings
from tests.tiny_bundle import make_bundle, recite, sing, wav

KEY = "sk-live-0123456789abcdef"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder)
    return Settings(models_dir=folder, models=("tiny",), calibrate=False, workers=1, drain_grace_s=0)


@asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[FastAPI]:
    created = create_app(settings)
    async with created.router.lifespan_context(created):
        async with asyncio.timeout(60):
            while not created.state.service.is_ready:  # noqa: ASYNC110  it has no event to wait for
                await asyncio.sleep(0.01)
        yield created


@pytest_asyncio.fixture
async def app(settings: Settings) -> AsyncIterator[FastAPI]:
    async with started(settings) as created:
        yield created


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://x"
    )


async def test_an_unexpected_error_in_a_stream_ends_it_as_the_contract_says(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = transcriber.segments_of, []

    def third_time_unlucky(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("a secret of the house")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(transcriber, "segments_of", third_time_unlucky)
    sentences = wav(recite(["abc", "de", "fgh", "ab"] * 5, 1.0))
    async with client(app) as http:
        answer = await http.post("/transcribe", files={"file": sentences}, data={"stream": "true"})
        metrics = (await http.get("/metrics")).text
    frames = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert answer.status_code == 200
    assert frames[-1] == "[DONE]"
    error = json.loads(frames[-2])["error"]
    assert error["code"] == "internal_error"
    assert answer.headers["x-request-id"] in error["message"]
    assert "secret" not in answer.text
    assert all("delta" in frame for frame in frames[:-2])
    assert 'outcome="error"' in metrics


async def test_a_stream_that_the_end_of_the_drain_cuts_short_says_so(app: FastAPI) -> None:
    """uvicorn cancels what is not done when its time is over."""
    sentences = wav(recite(["abc", "de", "fgh", "ab"] * 5, 1.0))
    request = httpx.Request("POST", "http://x", files={"file": sentences}, data={"stream": "true"})
    parts = [{"type": "http.request", "body": request.read(), "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 2:  # the first text
            exchange.cancel()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/transcribe",
        "query_string": b"",
        "http_version": "1.1",
    }
    scope |= {"headers": [(name.lower(), value) for name, value in request.headers.raw]}
    exchange = asyncio.create_task(app(scope, receive, send))
    await exchange
    assert b"transcript.text.delta" in sent[1]["body"]
    frame, end, _ = sent[-1]["body"].split(b"\n\n")
    assert json.loads(frame.removeprefix(b"data: "))["error"]["code"] == "draining"
    assert end == b"data: [DONE]"
    assert not sent[-1].get("more_body")
    assert app.state.service.in_progress == 0


async def test_the_image_says_which_version_it_is(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASR_VERSION", "1.2.3")
    monkeypatch.setenv("ASR_REVISION", "c0ffee")
    app = create_app(settings)
    async with client(app) as http:
        assert (await http.get("/")).json()["version"] == "1.2.3"
        assert 'asr_build_info{commit="c0ffee"' in (await http.get("/metrics")).text


def test_the_log_knows_the_keys_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys_file = tmp_path / "keys"
    keys_file.write_text(f"file:{KEY}-file\nhashed:sha256={'0' * 64}\n")
    settings = Settings(api_keys_file=keys_file)
    assert plain_keys(settings) == [f"{KEY}-file"]
    (tmp_path / ".env").write_text(f"ASR_API_KEYS=a:{KEY}-dotenv,b:sha256={'1' * 64}\n")
    assert plain_keys(settings) == [f"{KEY}-dotenv", f"{KEY}-file"]
    monkeypatch.setenv("ASR_API_KEYS", f"c:{KEY}-environment")
    assert plain_keys(settings) == [f"{KEY}-environment", f"{KEY}-file"]


def test_the_log_knows_keys_of_a_variable_in_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("asr_api_keys", f"a:{KEY}-lower")
    settings = Settings()
    assert [key.name for key in settings.api_keys] == ["a"]
    assert plain_keys(settings) == [f"{KEY}-lower"]


def test_tracing_variables_may_stand_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-the-environment")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "gone after this test")
    del os.environ["OTEL_TRACES_SAMPLER_ARG"]
    (tmp_path / ".env").write_text("OTEL_SERVICE_NAME=from-the-file\nOTEL_TRACES_SAMPLER_ARG=0.5\nPATH=/x\n")
    serve._read_tracing_variables(dotenv_values(serve.ENV_FILE))
    assert os.environ["OTEL_SERVICE_NAME"] == "from-the-environment"
    assert os.environ["OTEL_TRACES_SAMPLER_ARG"] == "0.5"
    assert os.environ["PATH"] != "/x"


async def test_the_documents_tell_that_a_key_is_needed_and_where_none_is(settings: Settings) -> None:
    guarded = create_app(Settings(models_dir=settings.models_dir, api_keys=(ApiKey.parse(f"someone:{KEY}"),)))
    async with client(guarded) as http:
        document = (await http.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert document["security"] == [{"key": []}]
        paths = [(path, verb) for path in document["paths"] for verb in document["paths"][path]]
        told = {path for path, verb in paths if "security" not in document["paths"][path][verb]}
        asked = {path for path, verb in paths if (await http.request(verb, path)).status_code == 401}
        assert told == asked
        assert "/transcribe" in asked
        assert "curl -H &quot;Authorization: Bearer" in (await http.get("/docs")).text
    async with client(create_app(settings)) as http:
        assert "security" not in (await http.get("/openapi.json")).json()
        assert "Authorization" not in (await http.get("/docs")).text


async def batch(app: FastAPI, *files: bytes) -> httpx.Response:
    parts = [("files", (f"{index}.wav", content)) for index, content in enumerate(files)]
    async with client(app) as http:
        return await http.post("/transcribe/batch", files=parts)


async def test_files_that_are_too_large_together_are_told_of_that_limit(settings: Settings) -> None:
    small = settings.model_copy(update={"max_upload_bytes": 2**20, "max_body_bytes": 2 * 2**20})
    async with started(small) as created:
        answer = await batch(created, *[bytes(900_000)] * 4)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (413, "files")
    assert "2097152 bytes (2.0 MiB)" in error["message"]
    assert "fewer at a time" in error["message"]


class Ends:
    """How the requests of an application ended, by its own metrics."""

    def __init__(self, app: FastAPI) -> None:
        self._registry = app.state.service.telemetry.metrics.registry

    def outcome(self, outcome: str, route: str = "/transcribe/batch") -> float:
        labels = {"route": route, "model": "tiny", "outcome": outcome}
        return self._registry.get_sample_value("asr_requests_total", labels) or 0.0

    def rejections(self, reason: str) -> float:
        return self._registry.get_sample_value("asr_rejections_total", {"reason": reason}) or 0.0


async def test_a_batch_that_a_broken_engine_fails_is_an_error_although_it_is_answered(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(app.state.service.transcriber("").model.engine, "run", broken)
    answer = await batch(app, *[wav(recite("abc"))] * 3)
    assert (answer.status_code, answer.json()["failed"]) == (200, 3)
    assert {item["error"]["code"] for item in answer.json()["results"]} == {"inference_failed"}
    ends = Ends(app)
    assert (ends.outcome("error"), ends.outcome("ok")) == (1, 0)


async def test_files_that_are_no_audio_leave_a_batch_ok(app: FastAPI) -> None:
    answer = await batch(app, wav(recite("abc")), b"no audio", b"")
    assert (answer.status_code, answer.json()["failed"]) == (200, 2)
    ends = Ends(app)
    assert (ends.outcome("ok"), ends.outcome("error")) == (1, 0)


async def test_what_breaks_on_one_file_of_a_batch_stays_there(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = transcriber.decode
    answers = iter([None, MemoryError(), RuntimeError("secret"), None])

    def breaking(*given: Any, **more: Any) -> Any:
        if error := next(answers):
            raise error
        return decode(*given, **more)

    monkeypatch.setattr(transcriber, "decode", breaking)
    answer = await batch(app, *[wav(recite("abc"))] * 4)
    assert answer.status_code == 200
    results = answer.json()["results"]
    codes = sorted(item["error"]["code"] for item in results if "error" in item)
    assert codes == ["internal_error", "out_of_resources"]
    assert answer.json()["succeeded"] == 2
    assert "secret" not in answer.text
    ends = Ends(app)
    assert (ends.outcome("error"), ends.outcome("ok"), ends.outcome("rejected")) == (1, 0, 0)
    assert ends.rejections("out_of_resources") == 1


async def test_the_files_of_a_batch_share_the_deadline_of_the_request(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time; from the second on the worker hangs until the answer is there."""
    decode, answered, calls = transcriber.decode, threading.Event(), []

    def hanging(*given: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            answered.wait(60)
        return decode(*given, **more)

    monkeypatch.setattr(transcriber, "decode", hanging)
    hasty = settings.model_copy(update={"request_timeout_s": 3.0, "max_segments_in_flight": 1})
    async with started(hasty) as created:
        start_s = time.monotonic()
        answer = await batch(created, *[wav(sing("abc"))] * 4)
        took_s = time.monotonic() - start_s
        answered.set()
        ends = Ends(created)
        assert (ends.outcome("timeout"), ends.outcome("ok")) == (1, 0)
        assert ends.rejections("deadline_exceeded") == 3  # once for each file, and not again for the request
    codes = [item.get("error", {}).get("code") for item in answer.json()["results"]]
    assert codes == [None, *["deadline_exceeded"] * 3]
    assert took_s < 6


async def test_a_queue_that_fills_during_the_upload_costs_no_file_of_a_batch(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "KEEP_ROOM_S", 0.0)  # as if the upload took longer
    narrow = settings.model_copy(update={"queue_limit_audio_s": 3.0})
    async with started(narrow) as created, client(created) as http:
        service = created.state.service
        engine, may_run = service.transcriber("").model.engine, threading.Event()
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda *given, **more: may_run.wait(60) and run(*given, **more))
        long = wav(sing("abcdefgh abcdefgh abc"))
        boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=a.wav\r\n\r\n"
        others: list[asyncio.Task[httpx.Response]] = []

        async def fill(place: str) -> None:
            others.append(asyncio.create_task(http.post("/transcribe", files={"file": long})))
            async with asyncio.timeout(30):
                while not service.summary()["queue"][place]:  # noqa: ASYNC110  it has no event to wait for
                    await asyncio.sleep(0.01)

        async def body() -> AsyncIterator[bytes]:
            yield boundary + wav(sing("bad"))
            await fill("busy_workers")
            await fill("waiting")  # which leaves no room for a third
            for text in ("cafe", "head"):
                yield b"\r\n" + boundary + wav(sing(text))
            yield b"\r\n--x--\r\n"
            asyncio.get_running_loop().call_later(0.5, may_run.set)

        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await http.post("/transcribe/batch", content=body(), headers=headers)
        assert [task.status_code for task in await asyncio.gather(*others)] == [200, 200]
    results = answer.json()["results"]
    assert [item.get("transcription", {}).get("text") for item in results] == ["bad", "cafe", "head"]


async def test_a_caller_that_does_not_wait_lengthens_its_own_line_only(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tuple(ApiKey.parse(f"{name}:{KEY}-{name}") for name in ("hasty", "patient"))
    narrow = settings.model_copy(update={"queue_limit_audio_s": 3.0, "api_keys": keys})
    async with started(narrow) as created, client(created) as http:
        service = created.state.service
        engine, may_run = service.transcriber("").model.engine, threading.Event()
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda *given, **more: may_run.wait(60) and run(*given, **more))
        files = {"file": wav(sing("abcdefgh abcdefgh abc"))}

        async def post(name: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {KEY}-{name}"}
            return await http.post("/transcribe", files=files, headers=headers)

        accepted: list[asyncio.Task[httpx.Response]] = []
        for place in ("busy_workers", "waiting"):
            accepted.append(asyncio.create_task(post("patient")))
            async with asyncio.timeout(30):
                while not service.summary()["queue"][place]:  # noqa: ASYNC110  it has no event to wait for
                    await asyncio.sleep(0.01)
        hasty = [await post("hasty") for _ in range(50)]
        patient = await post("patient")
        may_run.set()
        await asyncio.gather(*accepted)
    told_ms = [float(answer.headers["retry-after-ms"]) for answer in (hasty[-1], patient)]
    assert {answer.status_code for answer in [*hasty, patient]} == {429}
    assert told_ms[1] < told_ms[0] / 5


class FullDisk(io.RawIOBase):
    """A file on a disk with room for the first megabyte of each."""

    opened: ClassVar[list[FullDisk]] = []

    def __init__(self, **_: object) -> None:
        self.opened.append(self)
        self._at = 0

    def readable(self) -> bool:
        return True

    writable = seekable = readable

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset
        return offset

    def write(self, data: Any) -> int:
        if self._at + len(data) > 2**20 + 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._at += len(data)
        return len(data)


async def test_a_disk_that_is_full_in_the_middle_of_an_upload_is_503(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece too small to be written at once is tried again when the file is closed."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **named: io.BufferedRandom(FullDisk(**named)))

    async def body() -> AsyncIterator[bytes]:
        yield b"--x\r\nContent-Disposition: form-data; name=file; filename=a.wav\r\n\r\n"
        for _ in range(1200):
            yield bytes(1000)

    async with client(app) as http:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = await http.post("/transcribe", content=body(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_resources")
    assert int(answer.headers["retry-after"]) >= 1
    assert [file.closed for file in FullDisk.opened] == [True]
