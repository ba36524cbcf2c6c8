"""The door to the engine: a queue bounded in audio-seconds, with deadlines, for one model.

``submit`` runs on the event loop and costs microseconds; ``workers.py`` runs the batches, ``batching.py``
plans them. Everything of one request shares an owner and takes turns with other requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from api.backpressure import RetrySchedule
from api.errors import DeadlineExceededError, DrainingError, QueueFullError
from api.frames import Frames
from api.telemetry import Telemetry, current_record
from api.telemetry.record import request_id_in_logs
from api.workers import BatchEngine, Entry, SegmentResult, WorkerPool

T = TypeVar("T")

KEEP_ROOM_S = 5.0  # from the head of a request to its first audio in the queue

__all__ = ["Admission", "Batcher", "SegmentResult", "request_owner"]


class Admission:
    """Who may join the queue; one for all batchers of a process, because they share the workers.

    ``limit_s``: audio-seconds that may wait. Used from one event loop.
    """

    def __init__(
        self, limit_s: float, pool: WorkerPool, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit_s = limit_s
        self.pool = pool
        self.draining = False
        self._usual_audio_s = 5.0
        self._clock = clock
        self._retry = RetrySchedule()
        self._kept: dict[Hashable, tuple[float, float]] = {}  # audio-seconds, until when; oldest first
        self._kept_s = 0.0
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None], float]] = deque()
        pool.on_space = self._wake

    def enter(self, owner: Hashable) -> None:
        """Let a request in before its audio is read, and keep room for as much as others brought.

        The room is kept until ``owner`` queues its first utterance, or leaves, for ``KEEP_ROOM_S`` at most.
        Raises DrainingError or QueueFullError.
        """
        self.leave(owner)
        self.check_room()
        self._kept[owner] = (self._usual_audio_s, self._clock() + KEEP_ROOM_S)
        self._kept_s += self._usual_audio_s

    def check_room(self) -> None:
        """Raise what ``enter`` would. While a worker is idle nobody is kept out by uploads on their way."""
        self._refuse_while_draining()
        pool, audio_s, claimed_s = self.pool, self._usual_audio_s, self.claimed_audio_s
        idle = pool.waiting_audio_s == 0.0 and pool.busy < pool.workers
        if not (idle or self._fits(audio_s, claimed_s)):
            self._refuse(audio_s, claimed_s, self.limit_s, self._clock())

    @property
    def claimed_audio_s(self) -> float:
        """Audio-seconds that wait for a worker, and those for which room is kept."""
        self._forget_old(self._clock())
        return self.pool.waiting_audio_s + self._kept_s

    def leave(self, owner: Hashable) -> None:
        """Free what is kept for ``owner``, if anything."""
        self._kept_s -= self._kept.pop(owner, (0.0, 0.0))[0]
        if not self._kept:
            self._kept_s = 0.0  # no remainder of rounding

    def check(self, audio_s: float, deadline_s: float, owner: Hashable = None) -> None:
        """Raise DrainingError, or QueueFullError with the seconds after which a retry will find room.

        Full means: no room, somebody accepted is waiting for room, or the wait would outlast the deadline.
        For an ``owner`` whose room is kept it may be longer than expected: the queue may pass its limit by
        one utterance.
        """
        self._refuse_while_draining()
        now_s = self._clock()
        self._forget_old(now_s)
        room_is_kept = owner in self._kept
        self.leave(owner)
        waiting_s = self.pool.waiting_audio_s
        in_time_s = max(0.0, deadline_s - now_s) * self._rate() * 0.8
        in_time = waiting_s == 0.0 or waiting_s + audio_s <= in_time_s
        fits = (room_is_kept and waiting_s <= self.limit_s) or self._fits(audio_s, waiting_s)
        if not (in_time and fits):
            self._refuse(audio_s, waiting_s, min(self.limit_s, in_time_s), now_s)
        if self.claimed_audio_s < 0.5 * self.limit_s:
            self._retry.queue_ran_low(now_s)
        self._usual_audio_s += 0.05 * (audio_s - self._usual_audio_s)

    def _rate(self) -> float:
        return max(self.pool.drain_rate.per_s, 1e-3)

    def _forget_old(self, now_s: float) -> None:
        while self._kept:
            owner, (_, until_s) = next(iter(self._kept.items()))
            if until_s > now_s:
                return
            self.leave(owner)

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise DrainingError("The service is shutting down and takes no new work.")

    def _refuse(self, audio_s: float, waiting_s: float, room_s: float, now_s: float) -> NoReturn:
        rate = self._rate()
        record = current_record()
        caller = record.caller if record is not None else None
        retry_s = self._retry.retry_after_s(audio_s, waiting_s + audio_s - room_s, rate, now_s, caller)
        raise QueueFullError(
            f"The queue is full: {waiting_s:.0f} audio-seconds are waiting or on their way, and {rate:.0f} "
            f"get done per second. Try again in {retry_s:.1f} seconds.",
            retry_after_s=retry_s,
        )

    async def wait_for_space(self, audio_s: float, deadline_s: float) -> None:
        """Until there is room for more of a request that was already let in; they queue in order.

        Raises DeadlineExceededError.
        """
        pool = self.pool
        if self._fits(audio_s, pool.waiting_audio_s):
            return
        loop = asyncio.get_running_loop()
        waiter = (loop, loop.create_future(), audio_s)
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(max(0.0, deadline_s - self._clock())):
                await waiter[1]
        except TimeoutError:
            raise DeadlineExceededError("The audio could not be queued before the deadline.") from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            self._wake()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and finish what was accepted; False if that took longer than ``timeout_s``."""
        self.draining = True
        until_s = self._clock() + timeout_s
        while self._waiters or self.pool.waiting or self.pool.busy:
            if self._clock() >= until_s:
                return False
            await asyncio.sleep(0.01)
        return True

    def _fits(self, audio_s: float, waiting_s: float) -> bool:
        return not self._waiters and self._has_room(audio_s, waiting_s)

    def _has_room(self, audio_s: float, waiting_s: float) -> bool:
        """An empty queue takes anything."""
        return waiting_s == 0.0 or waiting_s + audio_s <= self.limit_s

    def _wake(self) -> None:
        """Called by a worker when an entry leaves the queue."""
        try:
            loop = self._waiters[0][0]
        except IndexError:  # the usual case; the last waiter may also leave just now
            return
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._wake_first)

    def _wake_first(self) -> None:
        if self._waiters:
            _, future, audio_s = self._waiters[0]
            if not future.done() and self._has_room(audio_s, self.pool.waiting_audio_s):
                future.set_result(None)


class Batcher:
    """One model's queue."""

    def __init__(
        self,
        engine: BatchEngine,
        admission: Admission,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self._admission = admission
        self._pool = admission.pool
        self._queue = self._pool.register(engine)
        self._telemetry = telemetry
        self._clock = clock

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits for a worker, of any model."""
        return not self._pool.waiting

    async def submit(
        self,
        waveform: NDArray[np.float32],
        decode: Callable[[Frames], T],
        *,
        deadline_s: float,
        wait: bool = False,
        owner: Hashable | None = None,
    ) -> SegmentResult[T]:
        """What ``decode`` makes of one utterance, float32 ``(samples,)``, from whichever batch it ends up in.

        ``decode`` runs in the worker's thread, with the log-probabilities: float32 ``(frames, vocabulary)``.
        What it raises is raised here.

        ``deadline_s``: on ``time.monotonic``'s scale. ``wait``: this is more of a request that was let in
        before, so it waits for room instead of being refused. ``owner``: whose turn it is; the current
        request where none is given. Cancelling drops the work if no worker has begun it.

        Raises QueueFullError, DrainingError, DeadlineExceededError, InferenceError, OutOfResourcesError.
        """
        audio_s = len(waveform) / self.engine.sample_rate_hz
        owner = owner if owner is not None else request_owner()
        if wait:
            self._admission.leave(owner)  # what is kept for it is for this
            asked_s = self._clock()
            try:
                await self._admission.wait_for_space(audio_s, deadline_s)
            except BaseException as error:
                self._telemetry.record_stage("queue", self._clock() - asked_s, error=type(error).__name__)
                raise
        else:
            self._admission.check(audio_s, deadline_s, owner)
        now_s = self._clock()
        if deadline_s <= now_s:
            raise DeadlineExceededError("The deadline passed before the audio could be queued.")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[SegmentResult[T]] = loop.create_future()
        entry = Entry(
            waveform=waveform,
            decode=decode,
            audio_s=audio_s,
            owner=owner if owner is not None else id(future),
            deadline_s=deadline_s,
            queued_s=now_s,
            future=future,
            origin=self._telemetry.origin(),
            request_id=request_id_in_logs.get(),
        )
        self._pool.put(self._queue, entry)
        timer = loop.call_later(deadline_s - now_s, self._expire, entry)
        try:
            result = await future
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                self._pool.withdraw(entry, expired=False)
            self._record_failure(entry, type(error).__name__)
            raise
        finally:
            timer.cancel()
        record = current_record()
        if record is not None:
            record.batch_size = max(record.batch_size, result.batch_size)
        return result

    def _record_failure(self, entry: Entry, error: str) -> None:
        """Where the time went of an entry without a result: the stage it was in ended with ``error``."""
        record_stage, now_s = self._telemetry.record_stage, self._clock()
        if entry.begun_s is None:
            record_stage("queue", now_s - entry.queued_s, error=error)
            return
        record_stage("queue", entry.begun_s - entry.queued_s, ended_ago_s=now_s - entry.begun_s)
        if entry.inferred_s is None:
            record_stage("inference", now_s - entry.begun_s, links=entry.batches, error=error)
            return
        inference_s, ended_ago_s = entry.inferred_s - entry.begun_s, now_s - entry.inferred_s
        record_stage("inference", inference_s, ended_ago_s=ended_ago_s, links=entry.batches)
        decoding_s = entry.inferred_s if entry.decoding_s is None else entry.decoding_s
        record_stage("ctc", now_s - decoding_s, error=error)

    def _expire(self, entry: Entry) -> None:
        self._pool.withdraw(entry, expired=True)
        if not entry.future.done():
            entry.future.set_exception(DeadlineExceededError("The audio was not done before its deadline."))


def request_owner() -> Hashable:
    """The request this runs for; None outside of one."""
    record = current_record()
    return id(record) if record is not None else None
