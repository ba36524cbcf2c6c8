"""Work that comes to no result leaves its time, its error and its batch where operators look for them."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from api.errors import AsrError, to_response
from api.frames import Frames
from api.telemetry import Telemetry, configure_logging, current_record, instrument
from api.telemetry.otlp import encode
from api.telemetry.tracing import Tracing
from tests.api.test_batcher import EchoEngine, House, first_value, house, poisoned_by_two


@dataclass
class Service:
    """A batcher behind POST /transcribe?value=, every request traced."""

    app: FastAPI
    house: House
    kept: InMemorySpanExporter
    log: io.StringIO
    timeout_s: float = 20.0
    decode: Callable[[Frames], float] = first_value
    asked: list[asyncio.Task[httpx.Response]] = field(default_factory=list)

    async def post(self, value: float = 1, name: str = "only-one") -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(f"/transcribe?value={value}", headers={"x-request-id": name})

    def begin(self, value: float = 1, name: str = "only-one") -> asyncio.Task[httpx.Response]:
        self.asked.append(asyncio.create_task(self.post(value, name)))
        return self.asked[-1]

    def spans(self) -> dict[str, ReadableSpan]:
        """By name; of several with one name the last."""
        self.house.telemetry.flush()
        return {span.name: span for span in self.kept.get_finished_spans()}

    def lines(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]

    def stages_ms(self) -> dict[str, float]:
        (line,) = self.lines("request")
        stages: dict[str, float] = line["stages_ms"]
        return stages


@asynccontextmanager
async def serving(engine: EchoEngine, **more: Any) -> AsyncIterator[Service]:
    kept, log, app = InMemorySpanExporter(), io.StringIO(), FastAPI()
    configure_logging(log_format="json", stream=log)
    telemetry = Telemetry(tracing=Tracing(kept, "memory", lambda *_: None, "1", "test"))
    async with house(engine, telemetry=telemetry, rate=1e6, **more) as inside:
        service = Service(app, inside, kept, log)

        @app.post("/transcribe")
        async def transcribe(value: float) -> dict[str, float]:
            task = inside.submit(value, timeout_s=service.timeout_s, decode=service.decode, wait=True)
            result = await task
            telemetry.record_stage("inference", result.inference_s, links=result.batches)
            return {"value": result.value}

        async def known(_: object, error: Exception) -> Any:
            record = current_record()
            assert record is not None
            assert isinstance(error, AsrError)
            record.failed(error.code, error.status)
            return to_response(error)

        app.add_exception_handler(AsrError, known)
        instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
        yield service


def is_red(span: ReadableSpan) -> bool:
    return span.status.status_code is StatusCode.ERROR


def leads_to(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def broken() -> EchoEngine:
    def fail(_: Sequence[NDArray[np.float32]]) -> None:
        raise RuntimeError("the node reshape_7 has no room")

    engine = EchoEngine(before=fail)
    engine.gate.set()
    return engine


async def test_what_the_engine_fails_on_leads_to_the_batch_and_its_exception() -> None:
    async with serving(broken()) as service:
        assert (await service.post()).status_code == 500
        spans = service.spans()
    assert is_red(spans["inference"])
    assert (spans["inference"].attributes or {})["error.type"] == "InferenceError"
    assert not is_red(spans["queue"])
    batch = spans["batch"]
    assert is_red(batch)
    assert leads_to(spans["inference"]) == [id_of(batch)]
    (event,) = batch.events
    attributes = event.attributes or {}
    assert attributes["exception.type"] == "RuntimeError"
    assert attributes["exception.message"] == "the node reshape_7 has no room"
    assert "reshape_7" in str(attributes["exception.stacktrace"])
    assert {"queue", "inference"} <= set(service.stages_ms())


async def test_the_exception_of_a_batch_reaches_the_collector() -> None:
    async with serving(broken()) as service:
        await service.post()
        service.spans()
    sent = encode(service.kept.get_finished_spans())
    spans = [span for group in sent.resource_spans[0].scope_spans for span in group.spans]
    (batch,) = [span for span in spans if span.name == "batch"]
    assert [event.name for event in batch.events] == ["exception"]
    assert batch.status.code == 2


async def test_the_line_of_a_failed_batch_names_its_requests() -> None:
    async with serving(broken()) as service:
        await service.post(name="the-request")
        server = service.spans()["POST /transcribe"]
    (line,) = service.lines("batch failed")
    assert server.context is not None
    assert line["request_ids"] == ["the-request"]
    assert line["trace_ids"] == [f"{server.context.trace_id:032x}"]


async def test_a_deadline_that_passes_in_the_engine_leaves_the_time_spent_there() -> None:
    """The engine hangs: its batch is still at work when the request's spans are written."""
    async with serving(EchoEngine()) as service:
        service.timeout_s = 0.3
        assert (await service.post()).status_code == 504
        early = service.spans()
        assert "batch" not in early
        service.house.engine.gate.set()
        while "batch" not in service.spans():  # noqa: ASYNC110  it has no event to wait for
            await asyncio.sleep(0.01)
        batch = service.spans()["batch"]
    inference, server = early["inference"], early["POST /transcribe"]
    assert is_red(inference)
    assert not is_red(early["queue"])
    assert leads_to(inference) == [id_of(batch)]
    assert inference.end_time is not None
    assert inference.start_time is not None
    assert inference.parent is not None
    assert inference.parent.span_id == id_of(server)
    assert 100 < service.stages_ms()["inference"] <= sum(service.stages_ms().values())


async def test_a_deadline_that_passes_in_the_queue_leaves_the_time_spent_there() -> None:
    async with serving(EchoEngine()) as service:
        running = await service.house.blocked()
        service.timeout_s = 0.2
        assert (await service.post()).status_code == 504
        service.house.engine.gate.set()
        await running
        spans = service.spans()
    assert is_red(spans["queue"])
    assert "inference" not in spans
    assert service.stages_ms()["queue"] > 100


async def test_a_deadline_that_passes_before_there_is_room_leaves_the_time_spent_there() -> None:
    async with serving(EchoEngine(), limit_s=1.0) as service:
        running = await service.house.blocked()
        waiting = service.house.submit(1)
        await asyncio.sleep(0)
        service.timeout_s = 0.2
        assert (await service.post()).status_code == 504
        service.house.engine.gate.set()
        await asyncio.gather(running, waiting)
        spans = service.spans()
    assert is_red(spans["queue"])
    assert service.stages_ms()["queue"] > 100


async def test_what_was_cancelled_is_told_but_not_as_a_failure() -> None:
    async with serving(EchoEngine()) as service:
        running = await service.house.blocked()
        leaves = service.begin()
        while not service.house.pool.waiting:  # noqa: ASYNC110  it has no event to wait for
            await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        service.house.engine.gate.set()
        await running
        queue = service.spans()["queue"]
    assert not is_red(queue)
    assert (queue.attributes or {})["error.type"] == "CancelledError"


async def test_what_decoding_fails_on_is_not_the_engines_failure() -> None:
    def fail(_: Frames) -> float:
        raise ValueError("no such token")

    engine = EchoEngine()
    engine.gate.set()
    async with serving(engine) as service:
        service.decode = fail
        assert (await service.post()).status_code == 500
        spans = service.spans()
    assert [is_red(spans[stage]) for stage in ("queue", "inference", "ctc")] == [False, False, True]


async def test_what_is_tried_again_alone_leads_to_both_batches() -> None:
    async with serving(poisoned_by_two()) as service:
        running = await service.house.blocked()
        asked = [service.begin(value, f"request-{value}") for value in (1, 2, 3)]
        while service.house.pool.waiting < 3:  # noqa: ASYNC110  it has no event to wait for
            await asyncio.sleep(0)
        service.house.engine.gate.set()
        await running
        assert [(await answer).status_code for answer in asked] == [200, 500, 200]
        service.spans()
    spans = service.kept.get_finished_spans()
    failed, *alone = [span for span in spans if span.name == "batch"]
    (first,) = [line for line in service.lines("batch failed") if line["size"] == 3]
    assert sorted(first["request_ids"]) == ["request-1", "request-2", "request-3"]
    inferences = [span for span in spans if span.name == "inference"]
    assert len(inferences) == 3
    assert len(alone) == 3
    for span in inferences:
        assert leads_to(span)[0] == id_of(failed)
        assert leads_to(span)[1] in {id_of(batch) for batch in alone}
