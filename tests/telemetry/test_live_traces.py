"""Traces and logs of a real API process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loadtest.local_stack import LocalStack
from loadtest.processes import LiveServer, free_port
from tests.telemetry.live import MODEL, clip, metric_sum, settings, stack, tracing, transcribe
from tests.telemetry.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.tiny_bundle import sing, wav
from ui.client import AsrClient, AudioFile
from ui.settings import UiSettings
from ui.tracing import Tracing
from ui.transcript import Transcript

__all__ = ["stack"]

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE_ID, PARENT_ID = PARENT.split("-")[1:3]
STAGES = {"read", "decode", "segment", "queue", "inference", "ctc", "render"}
SHARED = Path(os.environ.get("ASR_SHARED_DIR", Path(__file__).resolve().parents[3] / "shared"))
SINK = SHARED / "tools" / "otlp_sink.py"


def server_ended(spans: list[ReceivedSpan]) -> bool:
    return any(span.name.startswith("POST") for span in spans) and any(span.name == "batch" for span in spans)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_request_is_one_trace_through_every_stage(stack: LocalStack, protocol: str) -> None:
    with OtlpReceiver() as receiver:
        api = stack.api(settings(stack.folder / "models", **tracing(receiver, protocol)))
        answer = httpx.post(
            f"{api.url}/transcribe", files={"file": clip("bad cafe")}, headers={"traceparent": PARENT}
        )
        assert answer.json()["text"] == "bad cafe"
        spans = receiver.wait_for(server_ended)

    mine = [span for span in spans if span.trace_id == TRACE_ID]
    by_name = {span.name: span for span in mine}
    server = by_name["POST /transcribe"]
    assert server.parent_id == PARENT_ID
    assert set(by_name) == STAGES | {"POST /transcribe"}
    assert {by_name[stage].parent_id for stage in STAGES} == {server.span_id}
    for stage in STAGES:
        assert server.start_ns <= by_name[stage].end_ns <= server.end_ns + 1_000_000, stage
    (batch,) = [span for span in spans if span.name == "batch"]
    assert batch.trace_id != TRACE_ID
    assert batch.links == [(TRACE_ID, server.span_id)]
    assert by_name["inference"].links == [(batch.trace_id, batch.span_id)]
    attributes = server.attributes
    assert attributes["asr.model"] == MODEL
    assert attributes["asr.audio_s"] == pytest.approx(answer.json()["duration"])
    assert attributes["asr.batch_size"] == 1
    assert attributes["asr.queue_s"] >= 0
    assert attributes["asr.real_time_factor"] > 0
    assert attributes["http.response.status_code"] == 200
    assert answer.headers["x-request-id"] == TRACE_ID == attributes["asr.request_id"]


ODD = {b"user-agent": b"\\xff\\ud800\xff", b"traceparent": b"\xff\\x", b"baggage": b"\xff\\u1"}


@pytest.mark.parametrize("name", ODD)
def test_headers_that_are_not_utf8_cost_no_answer_no_count_and_no_span(
    stack: LocalStack, name: bytes
) -> None:
    """OpenTelemetry takes them for escapes, and fails at that, or makes what cannot be sent."""
    with OtlpReceiver() as receiver:
        api = stack.api(settings(stack.folder / "models", **tracing(receiver, "grpc")))
        odd = {name: ODD[name]}
        posted = httpx.post(f"{api.url}/transcribe", files={"file": clip("bad cafe")}, headers=odd)
        assert (posted.status_code, posted.json()["text"]) == (200, "bad cafe")
        assert httpx.get(f"{api.url}/models", headers=odd).status_code == 200
        spans = receiver.wait_for(server_ended)
        assert metric_sum(api, "asr_trace_spans_total", result="failed") == 0
        assert metric_sum(api, "http_server_request_duration_seconds_count", http_route="/models") == 1
    server = next(span for span in spans if span.name == "POST /transcribe")
    assert {span.parent_id for span in spans if span.name in STAGES} == {server.span_id}
    assert [line for line in api.log_lines() if line["level"] == "error"] == []


def test_the_page_and_the_service_share_one_trace(stack: LocalStack, monkeypatch: pytest.MonkeyPatch) -> None:
    with OtlpReceiver() as receiver:
        variables = tracing(receiver, "http/protobuf")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        api = stack.api(settings(stack.folder / "models", **variables))
        of_the_page = Tracing()

        async def use_the_page() -> Transcript:
            environ = {"ASR_API_URL": api.url}
            async with AsrClient(UiSettings.from_env(environ), tracing=of_the_page) as client:
                return await client.transcribe(AudioFile("song.wav", clip("bad cafe")))

        transcript = asyncio.run(use_the_page())
        of_the_page.close()
        spans = receiver.wait_for(lambda found: sum(s.name == "POST /transcribe" for s in found) == 2)
    assert transcript.text == "bad cafe"
    (page,) = [span for span in spans if span.resource["service.name"] == "asr-ui"]
    (server,) = [span for span in spans if span.name == "POST /transcribe" and span is not page]
    assert page.parent_id == ""
    assert (server.trace_id, server.parent_id) == (page.trace_id, page.span_id)
    assert page.start_ns <= server.start_ns <= page.end_ns
    assert transcript.trace_id == page.trace_id


def test_the_segments_of_a_long_file_are_in_its_trace(stack: LocalStack) -> None:
    with OtlpReceiver() as receiver:
        api = stack.api(settings(stack.folder / "models", **tracing(receiver)))
        answer = transcribe(api, wav(np.tile(sing("bad cafe "), 10)))
        assert answer.status_code == 200
        spans = receiver.wait_for(server_ended)
    names = [span.name for span in spans]
    batches = names.count("batch")
    assert batches > 1
    assert names.count("inference") == names.count("queue") == batches
    assert len({span.trace_id for span in spans if span.name == "inference"}) == 1


def test_spans_of_the_last_request_survive_a_stop(stack: LocalStack) -> None:
    with OtlpReceiver() as receiver:
        slow_export = {**tracing(receiver), "OTEL_BSP_SCHEDULE_DELAY": "60000"}
        api = stack.api(settings(stack.folder / "models", **slow_export))
        assert transcribe(api, clip()).status_code == 200
        assert receiver.spans() == []
        assert api.terminate() == 0
        assert server_ended(receiver.spans())


def test_a_dead_collector_costs_one_log_line(stack: LocalStack) -> None:
    dead = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    }
    api = stack.api(settings(stack.folder / "models", **dead))
    for _ in range(6):
        assert transcribe(api, clip()).json()["text"] == "bad cafe"
        time.sleep(0.5)
    wait_until(lambda: metric_sum(api, "asr_trace_spans_total", result="failed") > 0)
    start_s = time.monotonic()
    assert api.terminate() == 0
    assert time.monotonic() - start_s < 15
    troubles = [line for line in api.log_lines() if line["level"] in ("warning", "error")]
    assert [line["event"] for line in troubles] == ["traces_lost"]


def test_nothing_said_and_no_key_is_logged(stack: LocalStack) -> None:
    key, wrong = "the-right-key-0123456789", "a-wrong-key-9876543210"
    said = "deaf cab fed ace"
    api = stack.api(settings(stack.folder / "models", ASR_API_KEYS=f"me:{key}", ASR_LOG_LEVEL="debug"))
    for token, expected in ((key, 200), (wrong, 401)):
        answer = httpx.post(
            f"{api.url}/transcribe",
            files={"file": (f"{said}.wav", clip(said))},
            data={"hotwords[]": said, "beam": "4"},
            headers={"authorization": f"Bearer {token}"},
        )
        assert answer.status_code == expected
        if expected == 200:
            assert answer.json()["text"] == said
    httpx.post(f"{api.url}/transcribe?api_key={key}", files={"file": b"not audio"})
    api.terminate()
    for secret in (said, key, wrong):
        assert secret not in api.log
    outcomes = [line["outcome"] for line in api.log_lines() if line.get("route") == "/transcribe"]
    assert outcomes == ["ok", "unauthorized", "unauthorized"]


def test_the_text_is_logged_when_asked_for(stack: LocalStack) -> None:
    api = stack.api(settings(stack.folder / "models", ASR_LOG_TEXT="true"))
    assert transcribe(api, clip("bad cafe")).status_code == 200
    api.terminate()
    assert [line["text"] for line in api.log_lines() if "text" in line] == ["bad cafe"]


@pytest.fixture
def sink(stack: LocalStack) -> LiveServer:
    if not SINK.is_file():
        pytest.skip("the trace receiver of the shared folder is not here")
    grpc_port, http_port = free_port(), free_port()
    command = [sys.executable, str(SINK), str(grpc_port), str(http_port)]
    return stack.start("sink", command, "/healthz", http_port)


def jaeger(sink: LiveServer, path: str) -> Any:
    return httpx.get(f"{sink.url}{path}").json()["data"]


def test_traces_are_found_with_jaegers_queries(stack: LocalStack, sink: LiveServer) -> None:
    more = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_SERVICE_NAME": "asr-under-test",
    }
    api = stack.api(settings(stack.folder / "models", **more))
    httpx.post(f"{sink.url}/_fail?n=2")  # two refused exports are tried again
    identifier = transcribe(api, clip()).headers["x-request-id"]
    query = "/api/traces?service=asr-under-test&operation=POST%20/transcribe"
    wait_until(lambda: bool(jaeger(sink, query)))
    assert "asr-under-test" in jaeger(sink, "/api/services")
    (trace,) = jaeger(sink, f"/api/traces/{identifier}")
    spans = {span["operationName"]: span for span in trace["spans"]}
    server = spans["POST /transcribe"]
    assert server["references"] == []
    for stage in STAGES:
        (reference,) = spans[stage]["references"]
        assert (reference["refType"], reference["spanID"]) == ("CHILD_OF", server["spanID"])
    assert server["tags"]["asr.outcome"] == "ok"
    assert server["resource"]["service.version"]


def wait_until(done: Any, timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_the_receiver_alone_starts_and_stops() -> None:
    code = (
        "from tests.telemetry.otlp_receiver import OtlpReceiver\nwith OtlpReceiver() as r: print(r.spans())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n")
