"""The server spans that we make late are those that OpenTelemetry's instrumentation makes."""

from __future__ import annotations

import contextvars
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from api.errors import AsrError, QueueFullError, to_response
from api.telemetry import Telemetry, current_record, instrument
from api.telemetry.core import MOST_NOTES_OF_A_REQUEST
from api.telemetry.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OURS = ("asr.outcome", "asr.request_id")


def make_app(fail_with: Exception | None = None) -> FastAPI:
    app = FastAPI()

    @app.post("/transcribe")
    async def transcribe(status: int = 200) -> JSONResponse:
        if fail_with is not None:
            raise fail_with
        return JSONResponse({"text": "hello"}, status_code=status)

    async def known(_: object, error: Exception) -> JSONResponse:
        return to_response(error)

    app.add_exception_handler(AsrError, known)
    return app


async def ask(
    app: FastAPI, method: str, path: str, headers: dict[str, str], caller: str = "198.51.100.7"
) -> None:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(caller, 1234))
    async with httpx.AsyncClient(transport=transport, base_url="http://asr.test:8000") as client:
        await client.request(method, path, headers=headers)


async def ours(app: FastAPI, method: str, path: str, headers: dict[str, str]) -> ReadableSpan:
    kept = InMemorySpanExporter()
    telemetry = Telemetry(tracing=Tracing(kept, "memory", lambda *_: None, "1", "test"))
    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    await ask(app, method, path, headers)
    telemetry.flush()
    (span,) = kept.get_finished_spans()
    return span


async def theirs(app: FastAPI, method: str, path: str, headers: dict[str, str]) -> ReadableSpan:
    kept = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        meter_provider=NoOpMeterProvider(),
        exclude_spans=["receive", "send"],
    )
    await ask(app, method, path, headers)
    (span,) = kept.get_finished_spans()
    return span


def seen(span: ReadableSpan) -> dict[str, Any]:
    """What must be the same."""
    attributes = {name: value for name, value in (span.attributes or {}).items() if name not in OURS}
    parent = span.parent
    return {
        "name": span.name,
        "kind": span.kind,
        "attributes": attributes,
        "status": (span.status.status_code, span.status.description),
        "parent": parent and (parent.trace_id, parent.span_id, parent.is_remote, parent.trace_state),
        "flags": span.context and span.context.trace_flags,
        "trace_state": span.context and span.context.trace_state,
    }


@pytest.mark.parametrize(
    ("method", "path", "headers", "fail_with"),
    [
        ("POST", "/transcribe", {}, None),
        ("POST", "/transcribe", {"traceparent": PARENT, "tracestate": "vendor=7"}, None),
        ("POST", "/transcribe", {"traceparent": "rubbish", "user-agent": "curl/8"}, None),
        ("POST", "/transcribe", {}, QueueFullError("full")),
        ("POST", "/transcribe?status=503", {}, None),
        ("POST", "/transcribe?status=rubbish", {}, None),
        ("GET", "/transcribe", {}, None),
        ("BREW", "/transcribe", {}, None),
    ],
)
async def test_a_span_of_ours_tells_what_the_instrumentation_would_tell(
    method: str, path: str, headers: dict[str, str], fail_with: Exception | None
) -> None:
    span = seen(await ours(make_app(fail_with), method, path, headers))
    wanted = seen(await theirs(make_app(fail_with), method, path, headers))
    if "?" in path:  # a caller's query stays out of traces
        assert wanted["attributes"]["url.query"] == path.partition("?")[2]
        wanted["attributes"]["url.query"] = "[removed]"
    assert span["kind"] is SpanKind.SERVER
    assert span == wanted


@pytest.mark.parametrize(
    ("status", "seen"),
    [(500, StatusCode.ERROR), (504, StatusCode.ERROR), (503, StatusCode.UNSET), (422, StatusCode.UNSET)],
)
async def test_the_span_of_what_failed_after_its_status_was_sent_is_red(
    status: int, seen: StatusCode
) -> None:
    """A batch whose files failed, a stream: the answer is 200, the outcome is not ok."""
    app = FastAPI()

    @app.post("/transcribe")
    async def transcribe() -> dict[str, str]:
        record = current_record()
        assert record is not None
        record.failed("some_code", status)
        return {}

    assert (await ours(app, "POST", "/transcribe", {})).status.status_code is seen


async def test_addresses_may_be_lists() -> None:
    app = make_app()

    async def listed(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "server": list(scope["server"]), "client": list(scope["client"])}, receive, send)

    kept = InMemorySpanExporter()
    telemetry = Telemetry(tracing=Tracing(kept, "memory", lambda *_: None, "1", "test"))
    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    transport = httpx.ASGITransport(listed)
    async with httpx.AsyncClient(transport=transport, base_url="http://asr.test:8000") as client:
        await client.post("/transcribe")
    telemetry.flush()
    assert len(kept.get_finished_spans()) == 1


async def test_an_exception_that_nobody_handled_is_in_the_span() -> None:
    span = await ours(make_app(RuntimeError("no")), "POST", "/transcribe", {"traceparent": PARENT})
    wanted = await theirs(make_app(RuntimeError("no")), "POST", "/transcribe", {"traceparent": PARENT})
    assert seen(span)["parent"] == seen(wanted)["parent"]
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 500
    assert span.attributes["error.type"] == "500"
    assert span.status.status_code.name == "ERROR"
    (event,) = span.events
    assert event.attributes is not None
    assert event.attributes["exception.type"] == "RuntimeError"
    assert event.attributes["exception.message"] == "no"


async def test_its_ids_are_those_that_the_request_had() -> None:
    kept = InMemorySpanExporter()
    telemetry = Telemetry(tracing=Tracing(kept, "memory", lambda *_: None, "1", "test"))
    app = FastAPI()

    @app.post("/transcribe")
    async def transcribe(fail: bool = False) -> None:
        with telemetry.stage("read"):
            pass
        if fail:
            raise RuntimeError("no")

    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    await ask(app, "POST", "/transcribe", {})
    await ask(app, "POST", "/transcribe?fail=true", {})
    telemetry.flush()
    by_name: dict[str, list[ReadableSpan]] = {}
    for span in kept.get_finished_spans():
        by_name.setdefault(span.name, []).append(span)
    for server, stage in zip(by_name["POST /transcribe"], by_name["read"], strict=True):
        assert server.context is not None
        assert stage.parent is not None
        assert stage.parent.span_id == server.context.span_id
        assert stage.parent.trace_id == server.context.trace_id
        assert (server.start_time or 0) < (stage.end_time or 0) <= (server.end_time or 0)


async def test_requests_that_look_alike_are_told_apart() -> None:
    """What they have in common is put together once."""
    kept = InMemorySpanExporter()
    telemetry = Telemetry(tracing=Tracing(kept, "memory", lambda *_: None, "1", "test"))
    app = make_app()
    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    requests = [
        ({}, "198.51.100.7"),
        ({}, "198.51.100.7"),
        ({}, "198.51.100.8"),
        ({"user-agent": "curl/8"}, "198.51.100.7"),
        ({"host": "other.test"}, "198.51.100.7"),
        ({"user-agent": "x" * 5000}, "198.51.100.7"),
    ]
    for headers, caller in requests * 2:
        await ask(app, "POST", "/transcribe", headers, caller)
    telemetry.flush()
    spans = sorted(kept.get_finished_spans(), key=lambda span: span.start_time or 0)
    assert len(spans) == 2 * len(requests)
    for span, (headers, caller) in zip(spans, requests * 2, strict=True):
        attributes = span.attributes or {}
        assert attributes["client.address"] == caller
        if "user-agent" in headers:
            assert attributes["user_agent.original"] == headers["user-agent"]
    ids = {(span.attributes or {})["asr.request_id"] for span in spans}
    assert len(ids) == len(spans)


async def test_what_comes_after_the_answer_is_counted_and_in_the_trace() -> None:
    kept = InMemorySpanExporter()
    telemetry = Telemetry(tracing=Tracing(kept, "memory", lambda *_: None, "1", "test"))
    app = FastAPI()
    late = []

    @app.post("/transcribe")
    async def transcribe() -> None:
        late.append(contextvars.copy_context())

    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    await ask(app, "POST", "/transcribe", {})
    telemetry.flush()
    late[0].run(telemetry.record_stage, "decode", 0.5)
    value = telemetry.metrics.registry.get_sample_value
    assert value("asr_stage_duration_seconds_sum", {"stage": "decode"}) == 0.5
    telemetry.flush()
    server, stage = kept.get_finished_spans()
    assert server.context is not None
    assert stage.parent is not None
    assert (stage.name, stage.parent.span_id) == ("decode", server.context.span_id)


async def test_a_long_request_shows_while_it_is_at_work() -> None:
    telemetry = Telemetry()
    app = FastAPI()
    value = telemetry.metrics.registry.get_sample_value
    seen = []

    @app.post("/transcribe")
    async def transcribe() -> None:
        for number in range(1000):
            telemetry.record_stage("decode", 0.001)
            if number % 100 == 99:
                seen.append(value("asr_stage_duration_seconds_count", {"stage": "decode"}))

    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    await ask(app, "POST", "/transcribe", {})
    for number, count in enumerate(seen, 1):
        assert count is not None
        assert 100 * number - MOST_NOTES_OF_A_REQUEST < count <= 100 * number
    assert value("asr_stage_duration_seconds_count", {"stage": "decode"}) == 1000
