"""Tracing against a real OTLP receiver: both protocols, parents, links, attributes, a dead backend."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from api.errors import to_response
from api.telemetry import Telemetry, configure_logging, instrument, metrics_response
from api.telemetry.http import _without_query
from api.telemetry.tracing import Tracing, build_exporter, tracing_enabled
from tests.telemetry.otlp_receiver import OtlpReceiver, ReceivedSpan

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE_ID, PARENT_ID = PARENT.split("-")[1:3]
OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0"}
CLOSED_PORT = "http://127.0.0.1:9"  # the discard port: nothing listens there


def make_app(telemetry: Telemetry) -> FastAPI:
    app = FastAPI()
    telemetry.model_loaded(
        "m", languages=["en"], revision="1", quantization="int8", provider="cpu", kernels="vnni", load_s=0.1
    )

    @app.post("/transcribe")
    async def transcribe() -> dict[str, str]:
        with telemetry.stage("decode", codec="wav"):
            pass
        linked = telemetry.origin()

        def work() -> Any:
            with telemetry.batch(model="m", lengths_s=[1.0, 2.0], requests=[linked, None]) as batch:
                time.sleep(0.002)
            return batch

        with ThreadPoolExecutor(1) as pool:
            batch_span = await asyncio.get_running_loop().run_in_executor(pool, work)

            def ctc() -> None:
                with telemetry.stage("ctc"):
                    pass

            telemetry.record_stage("queue", 0.01, ended_ago_s=0.002)
            telemetry.record_stage("inference", 0.002, links=[batch_span])
            context = contextvars.copy_context()
            await asyncio.get_running_loop().run_in_executor(pool, context.run, ctc)
        telemetry.transcribed(model="m", language="en", audio_s=2.0, processing_s=0.5, confidence=0.9)
        return {"text": "hello"}

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return metrics_response(telemetry, request)

    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    return app


async def exchange(app: FastAPI, *, traced: bool = True) -> tuple[httpx.Response, str]:
    """One transcription between probes; its answer and the OpenMetrics exposition after it."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/health/live")
        answer = await client.post("/transcribe", headers={"traceparent": PARENT} if traced else {})
        metrics = await client.get(
            "/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"}
        )
    return answer, metrics.text


def wait_until(done: Callable[[], bool], timeout_s: float = 15.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not done() and time.monotonic() < until_s:
        time.sleep(0.05)
    assert done()


def environment(endpoint: str, monkeypatch: pytest.MonkeyPatch, **more: str) -> dict[str, str]:
    values = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50", **more}
    for name, value in values.items():
        monkeypatch.setenv(name, value)  # the SDK reads its own variables from the process
    return values


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_spans_reach_the_collector_with_parents_links_and_attributes(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OtlpReceiver() as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        environ = environment(endpoint, monkeypatch, OTEL_EXPORTER_OTLP_PROTOCOL=protocol)
        telemetry = Telemetry(version="9.9", environment="production", environ=environ)
        answer, metrics = await exchange(make_app(telemetry))
        await asyncio.to_thread(telemetry.shutdown)
        spans = receiver.spans()

    assert answer.headers["x-request-id"] == TRACE_ID
    by_name = {span.name: span for span in spans}
    assert sorted(by_name) == ["POST /transcribe", "batch", "ctc", "decode", "inference", "queue"]
    assert len(spans) == 6  # no probe, no scrape, no receive or send spans
    server = by_name["POST /transcribe"]
    assert (server.trace_id, server.parent_id) == (TRACE_ID, PARENT_ID)
    for stage in ("decode", "queue", "inference", "ctc"):
        assert (by_name[stage].trace_id, by_name[stage].parent_id) == (TRACE_ID, server.span_id)

    batch = by_name["batch"]
    assert batch.parent_id == ""
    assert batch.trace_id != TRACE_ID
    assert batch.links == [(TRACE_ID, server.span_id)]
    assert by_name["inference"].links == [(batch.trace_id, batch.span_id)]
    assert batch.attributes["asr.batch_size"] == 2
    assert batch.attributes["asr.audio_s"] == 3.0
    assert batch.attributes["asr.padding_ratio"] == 0.25

    expected = {
        "http.request.method": "POST",
        "http.route": "/transcribe",
        "http.response.status_code": 200,
        "asr.model": "m",
        "asr.language": "en",
        "asr.audio_s": 2.0,
        "asr.queue_s": 0.01,
        "asr.real_time_factor": 0.25,
        "asr.outcome": "ok",
        "asr.request_id": TRACE_ID,
    }
    assert {name: server.attributes.get(name) for name in expected} == expected
    assert by_name["decode"].attributes["asr.codec"] == "wav"
    assert by_name["queue"].end_ns <= by_name["inference"].end_ns
    assert by_name["queue"].end_ns - by_name["queue"].start_ns == pytest.approx(0.01e9, rel=1e-3)
    assert server.resource["service.name"] == "asr-api"
    assert server.resource["service.version"] == "9.9"
    assert server.resource["deployment.environment"] == "production"
    check_exemplars(metrics, server)


def check_exemplars(exposition: str, server: ReceivedSpan) -> None:
    """Buckets lead to the trace: Grafana opens it by the label `trace_id`."""
    found = {
        sample.name: sample.exemplar.labels
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.exemplar
    }
    wanted = {"trace_id": server.trace_id, "span_id": server.span_id}
    for name in (
        "asr_request_duration_seconds",
        "asr_real_time_factor",
        "http_server_request_duration_seconds",
    ):
        assert found[f"{name}_bucket"] == wanted
    assert found["asr_stage_duration_seconds_bucket"]["trace_id"] == TRACE_ID


async def test_what_stands_in_the_query_is_in_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with OtlpReceiver() as receiver:
        telemetry = Telemetry(environ=environment(receiver.grpc_endpoint, monkeypatch))
        transport = httpx.ASGITransport(make_app(telemetry))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post("/transcribe?api_key=sk-query-0123456789")
        await asyncio.to_thread(telemetry.shutdown)
        spans = receiver.spans()
    (server,) = (span for span in spans if span.name == "POST /transcribe")
    assert server.attributes["url.query"] == "[removed]"
    assert "sk-query" not in str([span.attributes for span in spans])


def test_what_stands_in_the_query_is_in_no_older_attribute_either() -> None:
    """OTEL_SEMCONV_STABILITY_OPT_IN=http/dup: the address as a whole is an attribute, too."""
    told = {"http.url": "http://test/transcribe?api_key=sk-query", "url.query": "api_key=sk-query"}
    span = TracerProvider().get_tracer("test").start_span("POST /transcribe", attributes=told)
    assert isinstance(span, ReadableSpan)
    _without_query(span, {"query_string": b"api_key=sk-query"})
    assert span.attributes == {"http.url": "http://test/transcribe", "url.query": "[removed]"}


async def test_a_trace_that_is_not_sampled_costs_no_span_and_leaves_no_exemplar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with OtlpReceiver() as receiver:
        environ = environment(
            receiver.grpc_endpoint,
            monkeypatch,
            OTEL_TRACES_SAMPLER="parentbased_traceidratio",
            OTEL_TRACES_SAMPLER_ARG="0",
        )
        telemetry = Telemetry(environ=environ)
        answer, metrics = await exchange(make_app(telemetry), traced=False)
        await asyncio.to_thread(telemetry.shutdown)
        assert receiver.spans() == []
    assert len(answer.headers["x-request-id"]) == 32
    assert "# {" not in metrics


async def test_a_backend_that_is_down_costs_one_log_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    configure_logging(log_format="json", stream=log)
    environ = environment(CLOSED_PORT, monkeypatch, OTEL_EXPORTER_OTLP_TIMEOUT="1")
    telemetry = Telemetry(environ=environ)
    app = make_app(telemetry)
    for _ in range(3):
        answer, _metrics = await exchange(app)
        assert answer.status_code == 200
        await asyncio.sleep(1.2)  # one export and its timeout
    start_s = time.monotonic()
    await asyncio.to_thread(telemetry.shutdown, 2.0)
    assert time.monotonic() - start_s < 10
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line["event"] for line in lines if line["event"] != "request"] == ["traces_lost"]
    lost = telemetry.metrics.registry.get_sample_value("asr_trace_spans_total", {"result": "failed"})
    assert lost is not None
    assert lost >= 6


def test_spans_that_a_full_queue_pushes_out_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow collector: while it has the first batch, more spans end than the queue holds."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    counts: Counter[str] = Counter()
    taken, go_on = threading.Event(), threading.Event()

    class Slow(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            taken.set()
            go_on.wait(20)
            return SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            pass

    def count(result: str, spans: int) -> None:
        counts[result] += spans

    tracing = Tracing(Slow(), "slow", count, "1", "test")
    tracer = tracing.provider.get_tracer("test")
    for _ in range(10):
        tracer.start_span("first").end()
    assert taken.wait(20)
    for _ in range(27):
        tracer.start_span("more").end()
    assert counts == {"dropped": 7}
    go_on.set()
    tracing.shutdown()
    assert counts == {"dropped": 7, "exported": 30}


async def test_spans_flow_again_when_the_backend_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    configure_logging(log_format="json", stream=log)
    receiver = OtlpReceiver()  # has a port, but does not answer yet
    environ = environment(
        receiver.http_endpoint,
        monkeypatch,
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
    )
    telemetry = Telemetry(environ=environ)
    app = make_app(telemetry)
    await exchange(app)
    await asyncio.to_thread(wait_until, lambda: "traces_lost" in log.getvalue())
    with receiver:
        await exchange(app)
        await asyncio.to_thread(receiver.wait_for, lambda spans: len(spans) >= 6)
        await asyncio.to_thread(telemetry.shutdown)
    events = [json.loads(line)["event"] for line in log.getvalue().splitlines()]
    assert [event for event in events if event.startswith("traces_")] == ["traces_lost", "traces_recovered"]


async def test_without_an_endpoint_there_is_no_tracing() -> None:
    telemetry = Telemetry(environ={})
    assert telemetry.tracing is None
    answer, metrics = await exchange(make_app(telemetry))
    assert answer.headers["x-request-id"] == TRACE_ID  # the caller's trace still names the request
    assert "# {" not in metrics


@pytest.mark.parametrize(
    ("environ", "enabled"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4317"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_standard_variables_switch_it(environ: dict[str, str], enabled: bool) -> None:
    assert tracing_enabled(environ) is enabled


def test_an_unknown_protocol_refuses_to_start() -> None:
    with pytest.raises(ValueError, match="http/protobuf"):
        build_exporter({"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier-pigeon"})


async def test_logs_carry_the_ids_of_the_span(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    configure_logging(log_format="json", stream=log)
    with OtlpReceiver() as receiver:
        telemetry = Telemetry(environ=environment(receiver.grpc_endpoint, monkeypatch))
        await exchange(make_app(telemetry))
        await asyncio.to_thread(telemetry.shutdown)
        (server,) = receiver.spans("POST /transcribe")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    (line,) = [line for line in lines if line["event"] == "request" and line["route"] == "/transcribe"]
    assert (line["trace_id"], line["span_id"]) == (server.trace_id, server.span_id)
    assert line["request_id"] == TRACE_ID
