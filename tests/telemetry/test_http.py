"""The middleware on small applications: every way a request can end, seen from /metrics and the log."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from starlette.responses import StreamingResponse

from api.errors import AsrError, DeadlineExceededError, QueueFullError, RateLimitedError, to_response
from api.telemetry import Telemetry, configure_logging, current_record, instrument, metrics_response
from api.telemetry.metrics import LIVE_ROUTES

OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0"}


class App:
    """One application whose `POST /transcribe` does what the test says."""

    def __init__(self, answer: Callable[[Request], Awaitable[Any]]) -> None:
        self.telemetry = Telemetry()
        self.telemetry.model_loaded(
            "m",
            languages=["en"],
            revision="1",
            quantization="int8",
            provider="cpu",
            kernels="vnni",
            load_s=0.1,
        )
        self.app = FastAPI()
        self.log = io.StringIO()
        configure_logging(log_format="json", level="DEBUG", stream=self.log)

        @self.app.post("/transcribe")
        async def transcribe(request: Request) -> Any:
            return await answer(request)

        @self.app.get("/health/live")
        async def live() -> dict[str, str]:
            return {"status": "ok"}

        @self.app.get("/metrics")
        async def metrics(request: Request) -> Response:
            return metrics_response(self.telemetry, request)

        async def known(_: Request, error: Exception) -> Response:
            assert isinstance(error, AsrError)
            record = current_record()
            assert record is not None
            record.failed(error.code, error.status)
            return to_response(error)

        self.app.add_exception_handler(AsrError, known)
        instrument(
            self.app, self.telemetry, lambda error, request_id: to_response(error, request_id=request_id)
        )

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def value(self, name: str, **labels: str) -> float:
        return self.telemetry.metrics.registry.get_sample_value(name, labels) or 0.0

    def outcome(self, outcome: str, model: str = "unknown") -> float:
        return self.value("asr_requests_total", route="/transcribe", model=model, outcome=outcome)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


async def succeed(_: Request) -> dict[str, str]:
    record = current_record()
    assert record is not None
    record.model = "m"
    return {"text": "hello"}


async def test_a_success_is_counted_timed_and_logged_once() -> None:
    app = App(succeed)
    async with app.client() as client:
        answer = await client.post("/transcribe")
    assert answer.status_code == 200
    assert app.outcome("ok", model="m") == 1
    assert app.value("asr_request_duration_seconds_count", route="/transcribe", model="m") == 1
    assert app.value("asr_time_to_first_result_seconds_count", transport="http") == 1
    assert app.value("asr_inflight_requests") == 0
    (line,) = [line for line in app.log_lines() if line["event"] == "request"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["status"], line["outcome"], line["model"]) == (200, "ok", "m")


@pytest.mark.parametrize(
    ("protocol", "error", "outcome", "timed"),
    [
        ("vosk", DeadlineExceededError("late"), "timeout", 1),
        ("realtime", QueueFullError("full"), "rejected", 0),
    ],
)
def test_an_utterance_that_fails_is_counted_like_a_request(
    protocol: str, error: AsrError, outcome: str, timed: int
) -> None:
    telemetry = Telemetry()
    telemetry.utterance_ended(protocol, "none", elapsed_s=1.0, status=error.status, code=error.code)
    labels = {"route": LIVE_ROUTES[protocol], "model": "unknown"}
    value = telemetry.metrics.registry.get_sample_value
    assert value("asr_requests_total", {**labels, "outcome": outcome}) == 1
    assert value("asr_request_duration_seconds_count", labels) == timed
    assert value("asr_rejections_total", {"reason": error.code}) == 1


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (QueueFullError("full"), "rejected", "queue_full"),
        (RateLimitedError("slow down"), "limited", "rate_limit_exceeded"),
        (DeadlineExceededError("late"), "timeout", "deadline_exceeded"),
    ],
)
async def test_a_refusal_is_counted_by_outcome_and_reason(error: AsrError, outcome: str, reason: str) -> None:
    async def refuse(_: Request) -> None:
        raise error

    app = App(refuse)
    async with app.client() as client:
        answer = await client.post("/transcribe")
    assert answer.status_code == error.status
    assert app.outcome(outcome) == 1
    assert app.value("asr_rejections_total", reason=reason) == 1
    timed = 1 if outcome == "timeout" else 0
    assert app.value("asr_request_duration_seconds_count", route="/transcribe", model="unknown") == timed


async def test_an_unhandled_exception_is_an_error_with_an_id_and_nothing_else() -> None:
    async def fail(_: Request) -> None:
        raise RuntimeError("the secret of the house")

    app = App(fail)
    async with app.client() as client:
        answer = await client.post("/transcribe")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.text
    assert app.outcome("error") == 1
    assert any(line["event"] == "unhandled_exception" for line in app.log_lines())


async def test_a_caller_that_leaves_is_cancelled_not_ok() -> None:
    async def wait_for_disconnect(request: Request) -> Response:
        await request.body()
        assert await request.is_disconnected()
        return Response(status_code=200)

    app = App(wait_for_disconnect)
    messages: list[Any] = [
        {"type": "http.request", "body": b"", "more_body": False},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/transcribe",
        "raw_path": b"/transcribe",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app.app(scope, receive, send)
    assert app.outcome("cancelled") == 1
    assert app.outcome("ok") == 0
    assert app.value("asr_inflight_requests") == 0


async def test_a_cancelled_task_is_counted_and_leaves_nothing_in_flight() -> None:
    started = asyncio.Event()

    async def hang(_: Request) -> None:
        started.set()
        await asyncio.Event().wait()

    app = App(hang)
    async with app.client() as client:
        task = asyncio.create_task(client.post("/transcribe"))
        await started.wait()
        assert app.value("asr_inflight_requests") == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert app.outcome("cancelled") == 1
    assert app.value("asr_inflight_requests") == 0


async def test_a_stream_that_fails_after_its_first_byte_is_an_error() -> None:
    async def stream(_: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"data: {}\n\n"
            record = current_record()
            assert record is not None
            record.failed("inference_failed", 500)
            yield b'data: {"error": {}}\n\n'

        return StreamingResponse(parts(), media_type="text/event-stream")

    app = App(stream)
    async with app.client() as client:
        answer = await client.post("/transcribe")
    assert answer.status_code == 200
    assert app.outcome("error") == 1
    assert app.outcome("ok") == 0


async def test_a_stream_that_breaks_is_an_error() -> None:
    async def stream(_: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"data: {}\n\n"
            raise RuntimeError("broken")

        return StreamingResponse(parts(), media_type="text/event-stream")

    app = App(stream)
    async with app.client() as client:
        with pytest.raises(RuntimeError, match="broken"):
            await client.post("/transcribe")
    assert app.outcome("error") == 1
    assert app.value("asr_inflight_requests") == 0


async def test_the_answer_is_counted_before_its_caller_has_it() -> None:
    app = App(succeed)
    async with app.client() as client:
        for sent in range(1, 20):
            await client.post("/transcribe")
            assert app.outcome("ok", model="m") == sent


async def test_http_durations_have_route_and_status_and_no_foreign_paths() -> None:
    app = App(succeed)
    async with app.client() as client:
        await client.get("/health/live")
        for number in range(30):
            await client.get(f"/scan/{number}")
        await client.request("BREW", "/transcribe")
        text = (await client.get("/metrics")).text
    assert 'http_request_method="GET",http_response_status_code="200",http_route="/health/live"' in text
    assert 'http_response_status_code="404",http_route="unmatched"' in text
    assert 'http_request_method="_OTHER"' in text
    assert "scan" not in text
    assert "BREW" not in text


async def test_probes_and_scrapes_are_logged_at_debug_only() -> None:
    app = App(succeed)
    async with app.client() as client:
        await client.get("/health/live")
        await client.get("/metrics")
        await client.get("/nowhere")
    levels = {line["route"]: line["level"] for line in app.log_lines() if line["event"] == "request"}
    assert levels == {"/health/live": "debug", "/metrics": "debug", "unmatched": "info"}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-request-id": "proxy-chose-this.1"}, "proxy-chose-this.1"),
        (
            {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
            "0af7651916cd43dd8448eb211c80319c",
        ),
    ],
)
async def test_request_id_comes_from_the_caller_or_its_trace(headers: dict[str, str], expected: str) -> None:
    async with App(succeed).client() as client:
        assert (await client.post("/transcribe", headers=headers)).headers["x-request-id"] == expected


@pytest.mark.parametrize("bad", ["short", "x" * 65, "with space in it", "new\tline-in-it", 'quote"quote'])
async def test_a_malformed_request_id_is_replaced(bad: str) -> None:
    async with App(succeed).client() as client:
        answer = await client.post("/transcribe", headers={"x-request-id": bad})
    assert answer.headers["x-request-id"] != bad
    assert len(answer.headers["x-request-id"]) == 32


async def test_the_stages_reach_the_caller_as_server_timing() -> None:
    async def staged(_: Request) -> dict[str, str]:
        with app.telemetry.stage("decode"):
            await asyncio.sleep(0.01)
        app.telemetry.record_stage("queue", 0.25)
        app.telemetry.record_stage("queue", 0.25)
        return {}

    app = App(staged)
    async with app.client() as client:
        timing = (await client.post("/transcribe")).headers["server-timing"]
    stages = dict(part.split(";dur=") for part in timing.split(", "))
    assert float(stages["queue"]) == 500.0
    assert float(stages["decode"]) >= 10.0


async def test_metrics_speak_the_format_that_is_asked_for() -> None:
    app = App(succeed)
    async with app.client() as client:
        await client.post("/transcribe")
        plain = await client.get("/metrics")
        openmetrics = await client.get("/metrics", headers=OPENMETRICS)
    assert plain.headers["content-type"].startswith("text/plain")
    assert "# EOF" not in plain.text
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in text_string_to_metric_families(openmetrics.text)}
    assert {"asr_requests", "asr_request_duration_seconds"} <= names
