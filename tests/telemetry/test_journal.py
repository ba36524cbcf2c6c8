"""Notes are worked off in order, once, by whoever comes first; none is lost and none blocks the others."""

from __future__ import annotations

import io
import json
import threading
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.errors import to_response
from api.telemetry import Telemetry, configure_logging, instrument, journal
from api.telemetry.journal import Journal
from tests.telemetry.test_tracing import wait_until


def test_notes_are_done_in_their_order_and_once() -> None:
    done: list[int] = []
    notes = Journal(every_s=60.0)
    for number in range(5):
        notes.note(done.append, number)
    assert done == []  # made in passing
    notes.work_off()
    notes.work_off()
    assert done == [0, 1, 2, 3, 4]


def test_a_thread_does_them_when_nobody_asks() -> None:
    done: list[int] = []
    notes = Journal(every_s=0.01)
    notes.note(done.append, 1)
    wait_until(lambda: done == [1])


def test_whoever_reads_the_metrics_sees_what_was_noted() -> None:
    telemetry = Telemetry()
    telemetry.record_stage("decode", 0.25)
    value = telemetry.metrics.registry.get_sample_value
    assert value("asr_stage_duration_seconds_sum", {"stage": "decode"}) == 0.25


def test_a_note_that_fails_does_not_take_others_along() -> None:
    log = io.StringIO()
    configure_logging(log_format="json", stream=log)
    done: list[int] = []

    def fail() -> None:
        raise ValueError("no")

    notes = Journal(every_s=60.0)
    notes.note(fail)
    notes.note(done.append, 1)
    notes.work_off()
    assert done == [1]
    assert [json.loads(line)["event"] for line in log.getvalue().splitlines()] == ["telemetry_failed"]


async def test_a_note_of_a_request_that_fails_does_not_take_the_request_along() -> None:
    log = io.StringIO()
    configure_logging(log_format="json", stream=log)
    telemetry = Telemetry()
    app = FastAPI()

    @app.post("/transcribe")
    async def transcribe() -> None:
        telemetry.record_stage("decode", 0.25)
        bad: Any = ["not a language"]
        telemetry.transcribed(model="m", language=bad, audio_s=1.0, processing_s=1.0, confidence=None)
        telemetry.record_stage("ctc", 0.5)

    instrument(app, telemetry, lambda error, request_id: to_response(error, request_id=request_id))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.post("/transcribe")
    value = telemetry.metrics.registry.get_sample_value
    assert value("asr_stage_duration_seconds_sum", {"stage": "ctc"}) == 0.5
    ended = {"route": "/transcribe", "model": "unknown", "outcome": "ok"}
    assert value("asr_requests_total", ended) == 1
    assert "telemetry_failed" in log.getvalue()


def test_more_notes_than_may_wait_are_worked_off_by_their_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_NOTES", 10)
    done: list[int] = []
    notes = Journal(every_s=60.0)
    for number in range(11):
        notes.note(done.append, number)
    assert done == list(range(11))


def test_a_reader_waits_for_the_note_that_another_thread_is_at() -> None:
    done: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(20)
        done.append("slow")

    notes = Journal(every_s=60.0)
    notes.note(slow)
    other = threading.Thread(target=notes.work_off)
    other.start()
    assert begun.wait(20)
    reader = threading.Thread(target=lambda: (notes.work_off(), done.append("read")))
    reader.start()
    time.sleep(0.05)
    assert done == []
    go_on.set()
    reader.join(20)
    other.join(20)
    assert done == ["slow", "read"]


def test_the_thread_ends_when_idle_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "IDLE_TURNS", 2)
    done: list[int] = []
    notes = Journal(every_s=0.005)
    notes.note(done.append, 1)
    first = notes._thread
    assert first is not None
    first.join(20)
    assert not first.is_alive()
    notes.note(done.append, 2)
    wait_until(lambda: done == [1, 2])
    assert notes._thread is not first


def test_without_a_thread_notes_wait_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near a container's limit of processes none can be started."""

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    done: list[int] = []
    notes = Journal(every_s=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(journal.threading, "Thread", NoThread)
        notes.note(done.append, 1)
    assert done == []
    notes.note(done.append, 2)
    wait_until(lambda: done == [1, 2])


def test_no_note_is_lost_while_threads_end_and_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "IDLE_TURNS", 1)
    done: list[int] = []
    notes = Journal(every_s=0.0)

    def work(first: int) -> None:
        for number in range(first, first + 300):
            notes.note(done.append, number)
            if number % 7 == 0:
                time.sleep(0.0005)  # long enough for the thread to find nothing and end

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    wait_until(lambda: len(done) == 1200)
    assert len(set(done)) == 1200
