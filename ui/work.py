"""What a session has sent: tasks that run on the background loop and that the page looks at.

A task is written by the loop's thread and read by the page's scripts. Each attribute is replaced as a whole,
so a reader may be a moment late and never sees half a value.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum

from ui.background import Background
from ui.client import AudioFile, Options
from ui.errors import ApiError, PageFaultError
from ui.sound import SoundPicture, UnreadableSoundError, duration_of, picture_of
from ui.transcript import Delta, Transcript

AUDIO_KEPT_BYTES = 150 * 1024 * 1024
TASKS_KEPT = 100
ABANDONED_AFTER_S = 30.0
_WATCH_S = 2.0

_log = logging.getLogger(__name__)


class State(StrEnum):
    """Where a task stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Task:
    """One file on its way. ``heard_s`` of ``duration_s`` seconds have become ``text`` so far.

    ``retry_at`` (``time.monotonic``) is set while the service has asked for patience. ``audio`` is None once
    the session has taken in too much to keep it.
    """

    name: str
    audio: AudioFile | None
    options: Options
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    state: State = State.WAITING
    attempt: int = 0
    created_at: float = field(default_factory=time.time)
    text: str = ""
    heard_s: float | None = None
    duration_s: float | None = None
    elapsed_s: float = 0.0
    retry_at: float | None = None
    transcript: Transcript | None = None
    picture: SoundPicture | None = None
    error: ApiError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state not in (State.WAITING, State.RUNNING)

    @property
    def empty(self) -> bool:
        """Whether the file holds nothing at all."""
        return self.audio is not None and not self.audio.data


class Work:
    """The tasks of one session, newest last. ``alive`` tells whether anybody still looks at the page."""

    def __init__(
        self, background: Background, parallel: int, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self._background = background
        self._parallel = parallel
        self._alive = alive
        self._futures: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._slots: asyncio.Semaphore | None = None
        self._watcher: Future[None] | None = None
        self.tasks: list[Task] = []

    def add(self, files: Sequence[AudioFile], options: Options) -> list[Task]:
        """Send files, a few at a time; oldest results make room."""
        new = [Task(file.name, file, options) for file in files]
        with self._lock:
            self.tasks = [*self.tasks, *new]
        for task in new:
            self._begin(task)
        self._make_room()
        return new

    def again(self, task: Task, options: Options) -> Task:
        """Send a task's file once more, where its sound is still there; the task that does it.

        A transcript stays, beside the new one: it may have been corrected, and the new attempt may fail.
        """
        if task.transcript is not None and task.audio is not None:
            return self.add([task.audio], options)[0]
        with self._lock:
            if task.audio is None or not task.over:
                return task
            task.options = options
            task.attempt += 1
            task.state, task.error = State.WAITING, None
            task.text, task.heard_s, task.retry_at = "", None, None
        self._begin(task)
        return task

    def cancel(self, *tasks: Task) -> None:
        """Stop them: their connections are closed, and the service drops what it was doing."""
        with self._lock:  # all of them first, so that none takes the place that another one leaves
            for task in tasks:
                if not task.over:
                    task.state = State.CANCELLED
        for task in tasks:
            future = self._futures.pop(task.id, None)
            if future is not None:
                future.cancel()
        self._make_room()

    def cancel_all(self) -> None:
        """Stop everything that runs or waits."""
        self.cancel(*self.running)

    def remove(self, task: Task) -> None:
        """Forget a task and its sound."""
        self.cancel(task)
        with self._lock:
            self.tasks = [other for other in self.tasks if other is not task]

    @property
    def running(self) -> Iterator[Task]:
        """Tasks that are not over."""
        return (task for task in self.tasks if not task.over)

    def find(self, task_id: str | None) -> Task | None:
        """The task of that id, or None."""
        return next((task for task in self.tasks if task.id == task_id), None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until nothing runs, at most ``timeout_s`` seconds; whether that is so."""
        futures = [future for future in self._futures.values() if not future.cancelled()]
        return not concurrent.futures.wait(futures, timeout_s).not_done

    def _begin(self, task: Task) -> None:
        self._futures[task.id] = self._background.start(self._run(task))
        if self._watcher is None or self._watcher.done():
            self._watcher = self._background.start(self._watch())

    async def _run(self, task: Task) -> None:
        if self._slots is None:
            self._slots = asyncio.Semaphore(self._parallel)
        async with self._slots:
            with self._lock:
                if task.audio is None or task.over:
                    return
                task.state = State.RUNNING
            started, attempt, audio = time.monotonic(), task.attempt, task.audio
            drawing = asyncio.create_task(asyncio.to_thread(_draw, task, audio.data))
            problem: ApiError | None = None
            try:
                await self._listen(task, audio, started)
                await drawing
            except ApiError as error:
                problem = error
            except Exception:  # whatever it is, nobody may wait for ever
                _log.exception("A file's task failed inside the page.")
                problem = PageFaultError("This page failed. The reason is in its log.")
            finally:
                drawing.cancel()
            self._end(task, attempt, started, problem)

    def _end(self, task: Task, attempt: int, started: float, problem: ApiError | None) -> None:
        """Close this attempt, unless it was cancelled, or a new one has begun since."""
        with self._lock:
            if task.attempt == attempt and not task.over:
                if problem is not None:
                    task.error, task.elapsed_s = problem, time.monotonic() - started
                task.retry_at = None
                task.state = State.DONE if problem is None else State.FAILED
        self._make_room()

    async def _listen(self, task: Task, audio: AudioFile, started: float) -> None:
        attempt = task.attempt

        def patience(wait_s: float, reason: ApiError) -> None:
            task.retry_at = time.monotonic() + wait_s

        stream = self._background.client.stream(audio, task.options, on_wait=patience)
        async with aclosing(stream) as items:
            async for item in items:
                if task.attempt != attempt:
                    return
                task.retry_at = None
                if isinstance(item, Delta):
                    task.text += item.text
                    task.heard_s = item.end_s if item.end_s is not None else task.heard_s
                else:
                    task.transcript = item
                    task.duration_s = item.duration_s
                    task.elapsed_s = time.monotonic() - started

    async def _watch(self) -> None:
        """Cancel everything when the page has been closed; a short loss of the network is forgiven."""
        last_seen = time.monotonic()
        while any(self.running):
            if self._alive():
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > ABANDONED_AFTER_S:
                self.cancel_all()
            await asyncio.sleep(_WATCH_S)

    def _make_room(self) -> None:
        """Forget the oldest results, and the sound of more; whatever has yet to be sent stays."""
        with self._lock:
            over = [task for task in self.tasks if task.over]
            surplus = {task.id for task in over[: max(0, len(self.tasks) - TASKS_KEPT)]}
            self.tasks = [task for task in self.tasks if task.id not in surplus]
            kept_bytes = 0
            for task in reversed(self.tasks):
                kept_bytes += len(task.audio.data) if task.audio else 0
                if kept_bytes > AUDIO_KEPT_BYTES and task.over:
                    task.audio, task.picture = None, None


def _draw(task: Task, data: bytes) -> None:
    """Without a picture the transcript is worth as much, so nothing that goes wrong here ends the task."""
    picture = None
    try:
        task.duration_s = task.duration_s or duration_of(data)
        picture = picture_of(data)
    except UnreadableSoundError:
        pass
    except Exception:
        _log.exception("The picture of a sound could not be drawn.")
    task.picture = picture
