"""Tasks on the background loop: order, progress, patience, cancelling, what a session keeps."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import soundfile

from tests.ui.service import TRANSCRIPT, Script, envelope, sse
from ui import errors, work
from ui.background import Background
from ui.client import AudioFile, Options
from ui.settings import UiSettings
from ui.work import State, Task, Work

DELTA = {"type": "transcript.text.delta", "delta": "the quick", "start": 0.1, "end": 0.8}
DONE = {"type": "transcript.text.done", **TRANSCRIPT}


def wav(seconds: float = 0.5) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(round(16_000 * seconds), np.float32), 16_000, format="WAV")
    return out.getvalue()


FILE = AudioFile("a.wav", wav(), "audio/wav")


def finished() -> httpx.Response:
    return httpx.Response(200, content=sse(DELTA, DONE), headers={"x-request-id": "req-1"})


@contextmanager
def working(
    handler: Callable[[httpx.Request], httpx.Response],
    parallel: int = 2,
    alive: Callable[[], bool] = lambda: True,
) -> Iterator[Work]:
    background = Background(UiSettings(api_url="http://service.test"), httpx.MockTransport(handler))
    made = Work(background, parallel, alive)
    try:
        yield made
    finally:
        made.cancel_all()
        background.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for another thread; the limit only bounds a failing test."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Stuck(httpx.AsyncByteStream):
    """Says one event, then nothing until it is closed."""

    def __init__(self) -> None:
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield sse(DELTA).removesuffix(b"data: [DONE]\n\n")
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.closed = True


def test_a_file_becomes_a_transcript_and_a_picture() -> None:
    with working(Script(finished())) as made:
        (task,) = made.add([FILE], Options(hotwords=("fox",)))
        made.wait()
    assert task.state is State.DONE
    assert task.transcript is not None
    assert task.transcript.request_id == "req-1"
    assert (task.text, task.heard_s) == ("the quick", 0.8)
    assert task.picture is not None
    assert task.elapsed_s > 0
    assert list(made.running) == []


def test_each_failure_stays_with_its_file() -> None:
    script = Script(envelope(400, "undecodable_audio"), finished())
    with working(script, parallel=1) as made:
        bad, good = made.add([AudioFile("b.txt", b"text"), FILE], Options())
        made.wait()
    assert isinstance(bad.error, errors.UndecodableAudioError)
    assert (bad.state, good.state) == (State.FAILED, State.DONE)


def test_a_file_cut_short_is_over_with_its_text() -> None:
    """The picture failed outside of what was caught, and the page waited for it for ever."""
    whole = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 30 * 16_000)
    soundfile.write(whole, noise, 16_000, format="FLAC")
    cut = AudioFile("cut.flac", whole.getvalue()[: len(whole.getvalue()) // 2], "audio/flac")
    with working(Script(finished())) as made:
        (task,) = made.add([cut], Options())
        made.wait()
    assert task.state is State.DONE
    assert task.transcript is not None
    assert task.picture is not None
    assert task.picture.duration_s == pytest.approx(15, abs=1.5)


def test_whatever_happens_to_the_picture_the_text_is_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(work, "picture_of", fail)
    with working(Script(finished())) as made:
        (task,) = made.add([FILE], Options())
        made.wait()
    assert task.state is State.DONE
    assert task.transcript is not None
    assert task.picture is None
    assert "MemoryError" in caplog.text


def test_a_fault_of_the_page_ends_the_task(caplog: pytest.LogCaptureFixture) -> None:
    with working(Script(RuntimeError("a fault"))) as made:
        (task,) = made.add([FILE], Options())
        made.wait()
    assert task.state is State.FAILED
    assert isinstance(task.error, errors.PageFaultError)
    assert "a fault" in caplog.text
    assert "a fault" not in task.error.message


def test_no_more_files_at_once_than_allowed() -> None:
    bodies: list[Stuck] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(Stuck())
        return httpx.Response(200, stream=bodies[-1])

    with working(handler, parallel=2) as made:
        tasks = made.add([FILE] * 4, Options())
        until(lambda: sum(task.text != "" for task in tasks) == 2)
        assert [task.state for task in tasks] == [State.RUNNING] * 2 + [State.WAITING] * 2
        made.cancel(tasks[0])
        until(lambda: tasks[2].text != "")
        assert len(bodies) == 3
        assert bodies[0].closed


def test_cancelling_closes_the_connections_and_a_waiting_file_is_never_sent() -> None:
    body = Stuck()
    script = Script(httpx.Response(200, stream=body))
    with working(script, parallel=1) as made:
        first, second = made.add([FILE, FILE], Options())
        until(lambda: first.text != "")
        made.cancel_all()
        until(lambda: body.closed)
        assert [first.state, second.state] == [State.CANCELLED] * 2
    assert len(script.requests) == 1


def test_a_cancelled_file_can_be_sent_again_with_other_options() -> None:
    body = Stuck()
    script = Script(httpx.Response(200, stream=body), finished())
    with working(script) as made:
        (task,) = made.add([FILE], Options())
        until(lambda: task.text != "")
        made.cancel(task)
        made.again(task, Options(model="other"))
        made.wait()
    assert task.state is State.DONE
    assert b"other" in script.requests[1].content


def test_a_text_that_is_sent_again_stays_beside_the_new_one() -> None:
    script = Script(finished(), envelope(500, "internal_error"))
    with working(script) as made:
        (task,) = made.add([FILE], Options())
        made.wait()
        new = made.again(task, Options(model="other"))
        made.wait()
        assert made.tasks == [task, new]
        assert new.audio is task.audio
    assert task.transcript is not None
    assert (task.state, new.state) == (State.DONE, State.FAILED)


def test_patience_is_shown_while_the_service_is_busy() -> None:
    script = Script(envelope(429, "queue_full", **{"retry-after-ms": "600"}), finished())
    with working(script) as made:
        (task,) = made.add([FILE], Options())
        until(lambda: task.retry_at is not None or task.over)
        assert task.retry_at is not None
        made.wait()
        assert task.state is State.DONE
        assert task.retry_at is None


def test_a_closed_page_stops_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ABANDONED_AFTER_S", 0.05)
    monkeypatch.setattr(work, "_WATCH_S", 0.01)
    body = Stuck()
    seen = [True]
    with working(Script(httpx.Response(200, stream=body)), alive=lambda: seen[0]) as made:
        (task,) = made.add([FILE], Options())
        until(lambda: task.text != "")
        assert not body.closed
        seen[0] = False
        until(lambda: body.closed)
        assert task.state is State.CANCELLED


def test_old_sound_makes_room_and_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "AUDIO_KEPT_BYTES", 2 * len(FILE.data))
    monkeypatch.setattr(work, "TASKS_KEPT", 4)
    with working(Script(finished())) as made:
        for _ in range(6):
            made.add([FILE], Options())
            made.wait()
        made.add([], Options())
        assert len(made.tasks) == 4
        assert [task.audio is not None for task in made.tasks] == [False, False, True, True]
        assert all(task.transcript is not None for task in made.tasks)
        made.again(made.tasks[0], Options())  # its sound is gone: nothing to send
        assert made.tasks[0].state is State.DONE


def test_many_files_of_one_drop_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "AUDIO_KEPT_BYTES", 3 * len(FILE.data))
    with working(Script(finished())) as made:
        tasks = made.add([FILE] * 12, Options())
        made.wait()
        assert {task.state for task in tasks} == {State.DONE}
        assert [task.audio is not None for task in tasks] == [False] * 9 + [True] * 3


def test_cancelled_files_stay_within_the_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "AUDIO_KEPT_BYTES", 3 * len(FILE.data))
    # an answer of its own for each request: a stream that two requests share fails for the second
    with working(lambda request: httpx.Response(200, stream=Stuck())) as made:
        tasks = made.add([FILE] * 12, Options())
        assert all(task.audio is not None for task in tasks), "what has yet to be sent is kept"
        made.cancel_all()
        assert sum(task.audio is not None for task in tasks) == 3


def test_removing_forgets() -> None:
    with working(Script(finished())) as made:
        (task,) = made.add([FILE], Options())
        made.wait()
        made.remove(task)
        assert made.tasks == []
        assert made.find(task.id) is None


def test_a_new_task_waits() -> None:
    assert not Task("a", FILE, Options()).over
