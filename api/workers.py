"""The inference threads: one pool for all models, so that many models do not oversubscribe the cores.

A worker that becomes free plans the next batch from what is waiting at that moment, so batches form while the
engine is busy and nothing waits for a batch to fill. With more workers than the device runs at once (a GPU),
one of them always has the next batch ready. The worker that ran a batch decodes it, too: what the engine gave
is in that core's caches, and another thread would have to be woken and to share the cores.

A worker thread that dies fails its batch and is replaced. ``stalled`` tells whether batches still make
progress: that, and not an answering event loop, is what liveness means.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from api.backpressure import DrainRate
from api.batching import BatchLimits, TurnQueue, plan_batch
from api.errors import AsrError, DrainingError, InferenceError, OutOfResourcesError
from api.frames import Frames
from api.telemetry import Origin, Telemetry
from api.telemetry.spans import kept

log = structlog.get_logger(__name__)

STALL_AFTER_S = 60.0


class BatchEngine(Protocol):
    """What a worker needs of an engine; see ``engine.py``."""

    @property
    def name(self) -> str: ...
    @property
    def sample_rate_hz(self) -> int: ...
    @property
    def limits(self) -> BatchLimits: ...
    def run(self, waveforms: Sequence[NDArray[np.float32]], *, alone: bool) -> list[Frames]: ...


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SegmentResult(Generic[T]):
    """``value`` is what decoding gave, ``decoding_s`` how long that took, ``ended_ago_s`` how long ago the
    inference ended then (others of the batch may have been decoded before). ``inference_s`` counts from the
    first batch it was in; ``batches`` leads to the spans of all, more than one where the first failed."""

    value: T
    queue_s: float
    inference_s: float
    decoding_s: float
    ended_ago_s: float
    batch_size: int
    batches: tuple[Origin, ...] = ()


@dataclass(slots=True, eq=False)
class Entry:
    """One utterance on its way through the queue. ``decode`` gets its log-probabilities, in the worker:
    float32 ``(frames, vocabulary)``, only valid frames.

    ``begun_s``, ``inferred_s`` and ``decoding_s``: when its first batch began, its inference ended and its
    decoding began, on the pool's clock; None while that has not happened. A worker writes them, and they tell
    where the time went of what comes to no result."""

    waveform: NDArray[np.float32]
    decode: Callable[[Frames], Any]
    audio_s: float
    owner: Hashable
    deadline_s: float
    queued_s: float
    future: asyncio.Future[SegmentResult[Any]]
    origin: Origin | None = None
    request_id: str | None = None
    begun_s: float | None = None
    inferred_s: float | None = None
    decoding_s: float | None = None
    batches: tuple[Origin, ...] = ()
    queue: ModelQueue | None = None  # None from the moment a worker or nobody wants it any more


@dataclass(slots=True, eq=False)
class ModelQueue:
    """What waits for one model."""

    engine: BatchEngine
    waiting: TurnQueue[Entry] = field(default_factory=TurnQueue)


@dataclass(slots=True, eq=False)
class _Running:
    entries: list[Entry]
    since_s: float


class WorkerPool:
    """``workers`` threads that run batches of every registered model. All methods may be called anywhere."""

    def __init__(
        self,
        workers: int,
        telemetry: Telemetry,
        *,
        rate: float = 50.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``rate``: audio-seconds per second to expect before anything was measured.

        ``waiting`` and ``waiting_audio_s`` tell how much waits for a worker.
        """
        self.workers = workers
        self.drain_rate = DrainRate(rate)
        # Counted, not summed over the queues: the event loop reads these while threads turn the queues.
        self.waiting = 0
        self.waiting_audio_s = 0.0
        self.abandoned = 0
        self.expired = 0
        self.replaced = 0
        self.on_space: Callable[[], None] = lambda: None
        self._telemetry = telemetry
        self._clock = clock
        self._changed = threading.Condition()
        self._queues: deque[ModelQueue] = deque()
        self._threads: set[threading.Thread] = set()
        self._running: dict[threading.Thread, _Running] = {}
        self._last_progress_s = clock()
        self._oldest_wait_s: float | None = None
        self._closing = False

    # -- from the event loop

    def register(self, engine: BatchEngine) -> ModelQueue:
        """A queue for one more model."""
        queue = ModelQueue(engine)
        with self._changed:
            self._queues.append(queue)
        return queue

    def start(self) -> None:
        """Start the threads."""
        for _ in range(self.workers):
            self._spawn()

    def put(self, queue: ModelQueue, entry: Entry) -> None:
        """Append an entry. Raises DrainingError when the pool is closed."""
        with self._changed:
            if self._closing:
                raise DrainingError("The service is shutting down.")
            if not self.waiting and not self._running:
                self._last_progress_s = self._clock()  # nothing was to be done until now
            entry.queue = queue
            queue.waiting.push(entry.owner, entry)
            self.waiting += 1
            self.waiting_audio_s += entry.audio_s
            self._changed.notify()

    def withdraw(self, entry: Entry, *, expired: bool) -> bool:
        """Take an entry out that nobody waits for any more; False when a worker has it already."""
        with self._changed:
            if entry.queue is None:
                return False
            entry.queue.waiting.remove(entry.owner, entry)
            self._forget(entry)
            if expired:
                self.expired += 1
            else:
                self.abandoned += 1
        self._telemetry.segments_dropped("expired" if expired else "abandoned")
        return True

    @property
    def busy(self) -> int:
        """Workers inside a batch."""
        return len(self._running)

    @property
    def last_progress_s(self) -> float:
        """When (``clock``) a batch last finished, or work arrived at an idle pool."""
        return self._last_progress_s

    def stalled(self, after_s: float = STALL_AFTER_S) -> bool:
        """Whether there is work but no batch has finished for ``after_s`` seconds."""
        with self._changed:
            pending = bool(self._running) or self.waiting > 0
            return pending and self._clock() - self._last_progress_s > after_s

    def close(self, timeout_s: float = 5.0) -> None:
        """End the threads after the batches they are in; whatever still waits fails with DrainingError."""
        with self._changed:
            self._closing = True
            left = [entry for queue in self._queues for _, entry in queue.waiting.in_turn(len(queue.waiting))]
            for entry in left:
                assert entry.queue is not None  # noqa: S101  it was in a queue
                entry.queue.waiting.remove(entry.owner, entry)
                self._forget(entry)
            self._changed.notify_all()
            threads = list(self._threads)
        self._fail(left, DrainingError("The service is shutting down."))
        until_s = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    # -- in the threads

    def _spawn(self) -> None:
        thread = threading.Thread(target=self._work, name="asr-worker", daemon=True)
        with self._changed:
            self._threads.add(thread)
        thread.start()

    def _work(self) -> None:
        thread = threading.current_thread()
        try:
            while True:
                with self._changed:
                    while not self._closing and not self.waiting:
                        self._changed.wait()
                    if self._closing:
                        break
                    queue, entries = self._take()
                    if not entries:
                        continue
                    self._running[thread] = _Running(entries, self._clock())
                    alone = len(self._running) == 1 and not self.waiting
                self._telemetry.busy.begin()
                try:
                    self._run(queue.engine, entries, alone=alone)
                finally:
                    self._telemetry.busy.end()
                audio_s = sum(entry.audio_s for entry in entries)
                with self._changed:
                    del self._running[thread]
                    now_s = self._last_progress_s = self._clock()
                    self.drain_rate.finished(audio_s, now_s, saturated=self.waiting > 0)
        except BaseException as error:
            died_in = self._running.get(thread)
            ids = _ids(died_in.entries) if died_in is not None else {}
            log.critical("worker died", error=type(error).__name__, **ids, exc_info=True)
        finally:
            with self._changed:
                lost = self._running.pop(thread, None)
                self._threads.discard(thread)
                closing = self._closing
            if not closing:
                self.replaced += 1
                self._spawn()
            if lost is not None:
                self._fail(lost.entries, InferenceError("The engine failed on this audio."))

    def _take(self) -> tuple[ModelQueue, list[Entry]]:
        """The next batch: models take turns, then ``plan_batch`` decides. Overdue entries are dropped."""
        while not self._queues[0].waiting:
            self._queues.rotate(-1)
        queue = self._queues[0]
        self._queues.rotate(-1)
        limits = queue.engine.limits
        candidates = queue.waiting.in_turn(1 if limits.max_batch == 1 else 4 * limits.max_batch)
        chosen = plan_batch([len(entry.waveform) for _, entry in candidates], limits)
        now_s = self._clock()
        entries = []
        for owner, entry in (candidates[index] for index in chosen):
            queue.waiting.take(owner, entry)
            self._forget(entry)
            if entry.deadline_s <= now_s:
                self.expired += 1  # the submitter's timer tells its caller
                self._telemetry.segments_dropped("expired")
            else:
                entries.append(entry)
        return queue, entries

    def _forget(self, entry: Entry) -> None:
        entry.queue = None
        self.waiting -= 1
        self.waiting_audio_s = max(0.0, self.waiting_audio_s - entry.audio_s) if self.waiting else 0.0
        self.on_space()

    def _run(self, engine: BatchEngine, entries: list[Entry], *, alone: bool) -> None:
        """One batch; if it fails, each of its entries by itself, so that only the bad ones fail."""
        start_s = self._clock()
        lengths_s = [entry.audio_s for entry in entries]
        origins = [entry.origin for entry in entries]
        try:
            with self._telemetry.batch(model=engine.name, lengths_s=lengths_s, requests=origins) as batch:
                for entry in entries:
                    entry.batches += (batch,)
                    if entry.begun_s is None:
                        entry.begun_s = start_s
                outputs = engine.run([entry.waveform for entry in entries], alone=alone)
        except Exception as error:
            told = repr(error)
            log.error("batch failed", model=engine.name, size=len(entries), error=told, **_ids(entries))
            if len(entries) == 1:
                self._fail(entries, _public(error))
            else:
                for entry in entries:
                    self._run(engine, [entry], alone=False)
            return
        end_s = self._clock()
        for entry in entries:
            entry.inferred_s = end_s
        for entry, output in zip(entries, outputs, strict=True):
            if entry.future.done():  # its caller has left
                self._telemetry.segments_dropped("unclaimed")
                continue
            begin_s = entry.decoding_s = self._clock()
            first_s = start_s if entry.begun_s is None else entry.begun_s
            try:
                value = entry.decode(output)
            except Exception as error:
                self._deliver(entry, error)
                continue
            now_s = self._clock()
            result = SegmentResult(
                value=value,
                queue_s=first_s - entry.queued_s,
                inference_s=end_s - first_s,
                decoding_s=now_s - begin_s,
                ended_ago_s=now_s - end_s,
                batch_size=len(entries),
                batches=entry.batches,
            )
            self._deliver(entry, result)

    def _fail(self, entries: Sequence[Entry], error: AsrError) -> None:
        for entry in entries:
            self._deliver(entry, error)

    def _deliver(self, entry: Entry, result: SegmentResult[Any] | Exception) -> None:
        """Settle the entry's future on its own loop; its caller may have left meanwhile."""
        try:
            entry.future.get_loop().call_soon_threadsafe(self._settle, entry.future, result)
        except RuntimeError:
            self._telemetry.segments_dropped("unclaimed")
            log.warning("a result for a closed event loop")

    def _settle(
        self, future: asyncio.Future[SegmentResult[Any]], result: SegmentResult[Any] | Exception
    ) -> None:
        if future.done():
            self._telemetry.segments_dropped("unclaimed")
        elif isinstance(result, Exception):
            future.set_exception(result)
            self._telemetry.segments_dropped("failed")
        else:
            future.set_result(result)


def _ids(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Whose work it was, for a log line: by the requests' ids, and by those of their traces that are kept."""
    contexts = [kept(entry.origin) for entry in entries]
    return {
        "request_ids": list(dict.fromkeys(entry.request_id for entry in entries if entry.request_id)),
        "trace_ids": list(dict.fromkeys(f"{context.trace_id:032x}" for context in contexts if context)),
    }


def _public(error: Exception) -> AsrError:
    """What the caller may know of an engine's exception."""
    if isinstance(error, AsrError):
        return error
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return OutOfResourcesError("The machine has no memory left for this audio.")
    return InferenceError("The engine failed on this audio.")
