"""The queue and its workers under load, deadlines, cancellation and failing engines."""

from __future__ import annotations

import asyncio
import math
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from api.batcher import KEEP_ROOM_S, Admission, Batcher, SegmentResult
from api.batching import BatchLimits
from api.errors import (
    DeadlineExceededError,
    DrainingError,
    InferenceError,
    OutOfResourcesError,
    QueueFullError,
)
from api.frames import Frames
from api.telemetry import Telemetry
from api.workers import WorkerPool

RATE_HZ = 100  # so that a waveform of 100 samples is a second
Run = Callable[[Sequence[NDArray[np.float32]]], None]
Heard = SegmentResult[float]


def first_value(frames: Frames) -> float:
    """What the tests decode with: the value that ``House.submit`` was given."""
    return float(frames.rows[0, 0])


@dataclass
class EchoEngine:
    """Returns each waveform as its own result. ``gate`` holds batches back, ``before`` may raise."""

    name: str = "echo"
    sample_rate_hz: int = RATE_HZ
    limits: BatchLimits = field(default_factory=lambda: BatchLimits(1, 10**6))
    before: Run = lambda waveforms: None
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[float]] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def run(self, waveforms: Sequence[NDArray[np.float32]], *, alone: bool) -> list[Frames]:
        self.batches.append([float(waveform[0]) for waveform in waveforms])
        self.entered.release()
        assert self.gate.wait(20)
        self.before(waveforms)
        return [Frames(waveform[:, None]) for waveform in waveforms]

    async def wait_entered(self) -> None:
        """Until a worker is inside a batch."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=20)


@dataclass
class House:
    pool: WorkerPool
    admission: Admission
    batcher: Batcher
    engine: EchoEngine
    telemetry: Telemetry

    def submit(
        self,
        value: float,
        seconds: float = 1.0,
        *,
        timeout_s: float = 20.0,
        wait: bool = False,
        owner: str = "",
        decode: Callable[[Frames], float] = first_value,
    ) -> asyncio.Task[Heard]:
        waveform = np.full(int(seconds * RATE_HZ), value, np.float32)
        deadline_s = time.monotonic() + timeout_s
        return asyncio.create_task(
            self.batcher.submit(waveform, decode, deadline_s=deadline_s, wait=wait, owner=owner or None)
        )

    async def blocked(self) -> asyncio.Task[Heard]:
        """Occupy the only worker with value -1."""
        task = self.submit(-1)
        await self.engine.wait_entered()
        return task


@asynccontextmanager
async def house(
    engine: EchoEngine | None = None,
    *,
    workers: int = 1,
    limit_s: float = 100.0,
    rate: float = 10.0,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[House]:
    engine = engine or EchoEngine()
    telemetry = telemetry or Telemetry()
    pool = WorkerPool(workers, telemetry, rate=rate)
    admission = Admission(limit_s, pool)
    batcher = Batcher(engine, admission, telemetry)
    pool.start()
    try:
        yield House(pool, admission, batcher, engine, telemetry)
    finally:
        engine.gate.set()
        await asyncio.to_thread(pool.close)


def sample(telemetry: Telemetry, name: str) -> float:
    value = telemetry.metrics.registry.get_sample_value(name)
    assert value is not None
    return value


async def settle(*tasks: asyncio.Task[Heard]) -> list[Heard | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_everyone_gets_their_own_result() -> None:
    async with house(EchoEngine(limits=BatchLimits(4, 10**6)), workers=2, limit_s=1e6, rate=1e6) as h:
        h.engine.gate.set()
        tasks = [h.submit(float(value), 0.5 + value % 7) for value in range(300)]
        results = await asyncio.gather(*tasks)
        assert [result.value for result in results] == list(range(300))
        assert all(result.queue_s >= 0 and result.inference_s >= 0 for result in results)
        assert sum(len(batch) for batch in h.engine.batches) == 300
        assert (h.pool.waiting, h.pool.waiting_audio_s) == (0, 0.0)
        assert sample(h.telemetry, "asr_batch_size_sum") == 300


async def test_batches_form_while_the_engine_is_busy_and_only_of_similar_lengths() -> None:
    async with house(EchoEngine(limits=BatchLimits(3, 10**6))) as h:
        first = await h.blocked()
        others = [h.submit(value, seconds) for value, seconds in enumerate([1.0, 1.0, 9.0, 1.0, 1.0])]
        await asyncio.sleep(0)
        h.engine.gate.set()
        results = await asyncio.gather(first, *others)
        assert h.engine.batches == [[-1.0], [0.0, 1.0, 3.0], [2.0], [4.0]]
        assert [result.batch_size for result in results] == [1, 3, 3, 1, 3, 1]


async def test_a_full_queue_refuses_with_the_time_it_takes_to_drain() -> None:
    async with house(limit_s=10.0, rate=2.0) as h:
        running = await h.blocked()
        waiting = [h.submit(value, 3.0) for value in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as refused:
            await h.submit(9, 3.0)
        # 9 of 10 audio-seconds wait, 2 drain per second: one second until there is room for 3 more.
        assert refused.value.retry_after_s == pytest.approx(1.0 * 1.1 + 0.2)
        with pytest.raises(QueueFullError) as refused_later:
            await h.submit(9, 3.0)
        assert (refused_later.value.retry_after_s or 0) > (refused.value.retry_after_s or 0)
        h.engine.gate.set()
        await asyncio.gather(running, *waiting)
        assert (await h.submit(9, 3.0)).value == 9.0


async def test_refusing_before_the_upload_is_read() -> None:
    async with house(limit_s=10.0) as h:
        h.admission.enter("first")
        h.admission.leave("first")
        running = await h.blocked()
        waiting = h.submit(1, 10.0)
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            h.admission.enter("second")
        h.engine.gate.set()
        await asyncio.gather(running, waiting)


async def test_who_was_let_in_is_not_refused_after_the_upload() -> None:
    """Room is kept from the door to the queue: others that come meanwhile are refused at the door."""
    async with house(limit_s=12.0) as h:
        running = await h.blocked()
        h.admission.enter("first")  # five audio-seconds are kept for each: nobody has read them yet
        h.admission.enter("second")
        with pytest.raises(QueueFullError, match="10 audio-seconds are waiting"):
            h.admission.enter("third")
        first = h.submit(1, 7.0, owner="first")
        second = h.submit(2, 7.0, owner="second")
        await asyncio.sleep(0)
        assert h.pool.waiting_audio_s == h.admission.claimed_audio_s == 14.0
        h.engine.gate.set()
        await asyncio.gather(running, first, second)
        for name in ("third", "fourth"):
            h.admission.enter(name)


async def test_uploads_that_are_longer_than_expected_pass_the_limit_by_one() -> None:
    async with house(limit_s=30.0) as h:
        running = await h.blocked()
        names = [f"caller {number}" for number in range(6)]
        for name in names:
            h.admission.enter(name)
        tasks = [h.submit(index, 20.0, owner=name) for index, name in enumerate(names)]
        await asyncio.sleep(0)
        assert h.pool.waiting_audio_s == 40.0
        h.engine.gate.set()
        results = await settle(running, *tasks)
        assert sum(isinstance(result, QueueFullError) for result in results) == 4


async def test_uploads_on_their_way_keep_nobody_out_while_a_worker_is_idle() -> None:
    async with house(limit_s=12.0) as h:
        for name in ("first", "second", "third", "fourth"):
            h.admission.enter(name)
        h.admission.enter("first")  # again: its room counts once
        assert h.admission.claimed_audio_s == 20.0
        running = await h.blocked()
        with pytest.raises(QueueFullError):
            h.admission.enter("fifth")
        h.engine.gate.set()
        await running


async def test_room_that_is_kept_comes_back() -> None:
    """When its request leaves, and from a slow upload after a few seconds."""
    async with house(limit_s=12.0) as h:
        clock = 0.0
        h.admission._clock = lambda: clock
        running = await h.blocked()
        for name in ("slow", "leaves"):
            h.admission.enter(name)
        h.admission.leave("leaves")
        h.admission.enter("takes its room")
        with pytest.raises(QueueFullError):
            h.admission.enter("early")
        clock = KEEP_ROOM_S + 0.1
        h.admission.enter("late")
        h.admission.enter("later")
        with pytest.raises(QueueFullError):
            h.admission.enter("too late")
        h.engine.gate.set()
        await running


async def test_as_much_room_is_kept_as_others_brought() -> None:
    async with house(limit_s=100.0) as h:
        for _ in range(100):
            h.admission.check(30.0, deadline_s=math.inf)
        h.admission.enter("next")
        assert h.admission.claimed_audio_s == pytest.approx(30.0, abs=0.5)


async def test_who_is_slower_than_its_room_is_kept_is_a_newcomer_again() -> None:
    async with house(limit_s=12.0) as h:
        clock = 0.0
        h.admission._clock = lambda: clock
        running = await h.blocked()
        h.admission.enter("slow")
        waiting = h.submit(1, 10.0)
        await asyncio.sleep(0)
        clock = KEEP_ROOM_S + 0.1
        with pytest.raises(QueueFullError):
            await h.submit(2, 5.0, owner="slow")
        h.engine.gate.set()
        await asyncio.gather(running, waiting)


async def test_the_line_of_the_refused_is_forgotten_when_the_queue_runs_low() -> None:
    async with house(limit_s=10.0, rate=2.0) as h:
        for _ in range(2):
            running = await h.blocked()
            waiting = [h.submit(value, 3.0) for value in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError) as first:
                await h.submit(9, 3.0)
            assert first.value.retry_after_s is not None
            assert first.value.retry_after_s < 2.0
            for _ in range(20):
                with pytest.raises(QueueFullError):
                    await h.submit(9, 3.0)
            waiting.append(h.submit(3, 1.0))  # there is room for it, but the queue is far from low
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError) as last:
                await h.submit(9, 3.0)
            assert last.value.retry_after_s is not None
            assert last.value.retry_after_s > 5.0
            h.engine.gate.set()
            await asyncio.gather(running, *waiting)
            h.engine.gate, h.engine.entered = threading.Event(), threading.Semaphore(0)


async def test_an_empty_queue_takes_even_what_is_longer_than_its_limit() -> None:
    async with house(limit_s=5.0) as h:
        h.engine.gate.set()
        assert (await h.submit(1, 60.0)).batch_size == 1


async def test_what_cannot_be_done_in_time_is_refused_at_once() -> None:
    async with house(limit_s=1000.0, rate=1.0) as h:
        running = await h.blocked()
        waiting = h.submit(1, 20.0)
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await h.submit(2, 5.0, timeout_s=30.0)  # 25 seconds of work, and a fifth to be sure
        patient = h.submit(3, 5.0, timeout_s=60.0)
        await asyncio.sleep(0)
        h.engine.gate.set()
        await asyncio.gather(running, waiting, patient)


async def test_a_deadline_that_has_passed_is_not_queued() -> None:
    async with house() as h:
        h.engine.gate.set()
        with pytest.raises(DeadlineExceededError):
            await h.submit(1, timeout_s=-0.1)
        assert h.engine.batches == []


async def test_a_deadline_that_passes_in_the_queue_is_answered_then_and_never_computed() -> None:
    async with house(rate=1e6) as h:
        running = await h.blocked()
        with pytest.raises(DeadlineExceededError):
            await h.submit(1, timeout_s=0.05)
        assert (h.pool.waiting, h.pool.waiting_audio_s, h.pool.expired) == (0, 0.0, 1)
        h.engine.gate.set()
        await running
        assert h.engine.batches == [[-1.0]]


async def test_a_deadline_that_passes_during_inference_is_answered_then() -> None:
    async with house(rate=1e6) as h:
        task = h.submit(1, timeout_s=0.1)
        await h.engine.wait_entered()
        with pytest.raises(DeadlineExceededError):
            await task
        h.engine.gate.set()
        assert (await h.submit(2)).value == 2.0


async def test_a_caller_that_left_is_dropped_before_the_batch_forms() -> None:
    async with house(EchoEngine(limits=BatchLimits(8, 10**6))) as h:
        running = await h.blocked()
        stays, leaves = h.submit(1), h.submit(2)
        await asyncio.sleep(0)
        leaves.cancel()
        await settle(leaves)
        assert (h.pool.waiting, h.pool.waiting_audio_s, h.pool.abandoned) == (1, 1.0, 1)
        h.engine.gate.set()
        await asyncio.gather(running, stays)
        assert h.engine.batches == [[-1.0], [1.0]]


async def test_a_caller_that_leaves_during_inference_harms_nobody() -> None:
    async with house(EchoEngine(limits=BatchLimits(8, 10**6))) as h:
        running = await h.blocked()
        leaves, stays = h.submit(1), h.submit(2)
        await asyncio.sleep(0)
        h.engine.gate.set()
        h.engine.gate = threading.Event()
        await running
        await h.engine.wait_entered()
        leaves.cancel()
        await settle(leaves)
        h.engine.gate.set()
        assert (await stays).value == 2.0
        assert h.pool.abandoned == 0


async def test_what_a_caller_left_behind_is_not_decoded() -> None:
    decoded: list[float] = []

    def decode(frames: Frames) -> float:
        decoded.append(first_value(frames))
        return decoded[-1]

    async with house(EchoEngine(limits=BatchLimits(8, 10**6))) as h:
        running = await h.blocked()
        leaves, stays = h.submit(1, decode=decode), h.submit(2, decode=decode)
        await asyncio.sleep(0)
        gate, h.engine.gate = h.engine.gate, threading.Event()
        gate.set()
        await running
        await h.engine.wait_entered()
        leaves.cancel()
        await settle(leaves)
        h.engine.gate.set()
        await stays
        assert decoded == [2.0]
        dropped = h.telemetry.metrics.registry.get_sample_value(
            "asr_segments_dropped_total", {"reason": "unclaimed"}
        )
        assert dropped == 1


def poisoned_by_two() -> EchoEngine:
    """An engine that takes batches and fails on every batch with the value 2 in it."""

    def refuse(waveforms: Sequence[NDArray[np.float32]]) -> None:
        if any(waveform[0] == 2.0 for waveform in waveforms):
            raise RuntimeError("no kernel for this shape: /secret/path")

    return EchoEngine(limits=BatchLimits(8, 10**6), before=refuse)


async def one_batch_of_three(h: House) -> list[Heard | BaseException]:
    """What became of 1, 2 and 3, which waited together."""
    running = await h.blocked()
    tasks = [h.submit(value) for value in (1, 2, 3)]
    await asyncio.sleep(0)
    h.engine.gate.set()
    await running
    return await settle(*tasks)


async def test_a_poisoned_item_fails_alone() -> None:
    async with house(poisoned_by_two()) as h:
        first, second, third = await one_batch_of_three(h)
        assert isinstance(first, SegmentResult)
        assert isinstance(third, SegmentResult)
        assert isinstance(second, InferenceError)
        assert "secret" not in second.message
        assert h.pool.replaced == 0


async def test_what_cannot_be_decoded_fails_alone() -> None:
    def refuse(frames: Frames) -> float:
        raise ValueError(f"value {first_value(frames):g}")

    async with house(EchoEngine(limits=BatchLimits(8, 10**6))) as h:
        running = await h.blocked()
        tasks = [h.submit(1), h.submit(2, decode=refuse), h.submit(3)]
        await asyncio.sleep(0)
        h.engine.gate.set()
        await running
        first, second, third = await settle(*tasks)
        assert h.engine.batches == [[-1.0], [1.0, 2.0, 3.0]]
        assert isinstance(first, SegmentResult)
        assert isinstance(third, SegmentResult)
        assert (first.value, third.value) == (1.0, 3.0)
        assert isinstance(second, ValueError)
        assert str(second) == "value 2"
        assert h.pool.replaced == 0


async def test_decoding_is_timed_apart_from_inference() -> None:
    def slow(frames: Frames) -> float:
        time.sleep(0.05)
        return first_value(frames)

    async with house(EchoEngine(limits=BatchLimits(8, 10**6))) as h:
        running = await h.blocked()
        tasks = [h.submit(1, decode=slow), h.submit(2, decode=slow)]
        await asyncio.sleep(0)
        h.engine.gate.set()
        await running
        first, second = [await task for task in tasks]
        assert first.decoding_s >= 0.05
        assert second.decoding_s >= 0.05
        assert second.ended_ago_s >= 0.1  # the first was decoded before it
        assert second.inference_s == first.inference_s < 0.05


async def test_no_memory_for_one_is_its_own_failure() -> None:
    def exhaust(waveforms: Sequence[NDArray[np.float32]]) -> None:
        if waveforms[0][0] == 1.0:
            raise MemoryError

    async with house(EchoEngine(before=exhaust)) as h:
        h.engine.gate.set()
        with pytest.raises(OutOfResourcesError):
            await h.submit(1)
        assert (await h.submit(2)).batch_size == 1


@pytest.mark.parametrize("workers", [1, 3])
async def test_a_worker_that_dies_is_replaced_and_only_its_batch_fails(workers: int) -> None:
    def die(waveforms: Sequence[NDArray[np.float32]]) -> None:
        if waveforms[0][0] == 1.0:
            raise SystemExit

    async with house(EchoEngine(before=die), workers=workers) as h:
        h.engine.gate.set()
        for _ in range(5):
            with pytest.raises(InferenceError):
                await h.submit(1)
            assert (await h.submit(2)).value == 2.0
        assert h.pool.replaced == 5
        alive = [thread for thread in threading.enumerate() if thread in h.pool._threads]
        assert len(alive) == workers
        assert not h.pool.stalled()


async def test_stalled_means_work_without_progress() -> None:
    now = 1000.0
    engine, telemetry = EchoEngine(), Telemetry()
    pool = WorkerPool(1, telemetry, clock=lambda: now)
    batcher = Batcher(engine, Admission(100.0, pool, clock=lambda: now), telemetry, clock=lambda: now)
    pool.start()
    try:
        now += 10_000  # long idle
        assert not pool.stalled(after_s=60)
        task = asyncio.create_task(
            batcher.submit(np.ones(100, np.float32), first_value, deadline_s=now + 1000)
        )
        await engine.wait_entered()
        assert not pool.stalled(after_s=60)
        now += 61
        assert pool.stalled(after_s=60)
        engine.gate.set()
        await task
        while pool.busy:  # noqa: ASYNC110  a thread books its batch after it has delivered it
            await asyncio.sleep(0.001)
        assert not pool.stalled(after_s=60)
    finally:
        engine.gate.set()
        await asyncio.to_thread(pool.close)


async def test_a_quiet_hour_is_no_slow_hour() -> None:
    now = 1000.0
    engine, telemetry = EchoEngine(), Telemetry()
    pool = WorkerPool(1, telemetry, rate=50.0, clock=lambda: now)
    batcher = Batcher(engine, Admission(100.0, pool, clock=lambda: now), telemetry, clock=lambda: now)
    engine.gate.set()
    pool.start()
    try:
        for _ in range(2):
            await batcher.submit(np.ones(500, np.float32), first_value, deadline_s=now + 1000)
            while pool.busy:  # noqa: ASYNC110  a thread books its batch after it has delivered it
                await asyncio.sleep(0.001)
            now += 3600
        assert pool.drain_rate.per_s == 50.0
    finally:
        await asyncio.to_thread(pool.close)


async def test_draining_refuses_newcomers_and_finishes_what_was_accepted() -> None:
    async with house(limit_s=2.0) as h:
        running = await h.blocked()
        accepted = [h.submit(1, 2.0), h.submit(2, 2.0, wait=True)]
        await asyncio.sleep(0)
        drained = asyncio.create_task(h.admission.drain(20.0))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await h.submit(3)
        late = h.submit(4, wait=True)  # the next segment of a file that was let in
        await asyncio.sleep(0)
        assert not drained.done()
        h.engine.gate.set()
        results = await asyncio.gather(running, *accepted, late)
        assert [result.value for result in results] == [-1.0, 1.0, 2.0, 4.0]
        assert await drained


async def test_draining_gives_up_after_its_time_and_closing_answers_the_rest() -> None:
    async with house() as h:
        running = await h.blocked()
        waiting = h.submit(1)
        await asyncio.sleep(0)
        assert not await h.admission.drain(0.05)
        closing = asyncio.create_task(asyncio.to_thread(h.pool.close))
        with pytest.raises(DrainingError):
            await waiting
        h.engine.gate.set()
        assert (await running).value == -1.0
        await closing
        assert not h.pool._threads
        with pytest.raises(DrainingError):
            h.pool.put(h.batcher._queue, None)  # type: ignore[arg-type]  # refused before it is looked at


async def test_accepted_files_wait_for_room_in_order_and_ahead_of_newcomers() -> None:
    async with house(limit_s=4.0) as h:
        running = await h.blocked()
        queued = h.submit(0, 4.0)
        await asyncio.sleep(0)
        more = [h.submit(value, 2.0, wait=True) for value in (1, 2, 3)]
        await asyncio.sleep(0)
        assert h.pool.waiting == 1
        with pytest.raises(QueueFullError):
            await h.submit(9, 0.1)
        h.engine.gate.set()
        await asyncio.gather(running, queued, *more)
        assert h.engine.batches == [[-1.0], [0.0], [1.0], [2.0], [3.0]]


async def test_waiting_for_room_ends_with_the_deadline_or_the_caller() -> None:
    async with house(limit_s=4.0) as h:
        running = await h.blocked()
        queued = h.submit(0, 4.0)
        await asyncio.sleep(0)
        leaves = h.submit(1, 2.0, wait=True)
        overdue = h.submit(2, 2.0, wait=True, timeout_s=0.05)
        stays = h.submit(3, 2.0, wait=True)
        await asyncio.sleep(0)
        leaves.cancel()
        outcome = await settle(leaves, overdue)
        assert isinstance(outcome[0], asyncio.CancelledError)
        assert isinstance(outcome[1], DeadlineExceededError)
        h.engine.gate.set()
        await asyncio.gather(running, queued, stays)
        assert h.engine.batches == [[-1.0], [0.0], [3.0]]


async def test_who_stops_waiting_for_room_makes_way_for_the_next() -> None:
    async with house(limit_s=10.0) as h:
        running = await h.blocked()
        queued = h.submit(0, 5.0)
        await asyncio.sleep(0)
        long, short = h.submit(1, 9.0, wait=True), h.submit(2, 5.0, wait=True)
        await asyncio.sleep(0)
        assert h.pool.waiting == 1
        long.cancel()
        await settle(long)
        for _ in range(5):  # turns of the loop; nothing leaves the queue meanwhile
            await asyncio.sleep(0)
        assert h.pool.waiting == 2
        h.engine.gate.set()
        await asyncio.gather(running, queued, short)


async def test_a_short_clip_does_not_wait_behind_a_long_file() -> None:
    async with house() as h:
        running = await h.blocked()
        long_file = [h.submit(value, owner="file") for value in range(10, 20)]
        await asyncio.sleep(0)
        clip = h.submit(1, owner="clip")
        await asyncio.sleep(0)
        h.engine.gate.set()
        await asyncio.gather(running, clip, *long_file)
        order = [batch[0] for batch in h.engine.batches]
        assert order.index(1.0) <= 2
        assert [value for value in order if value >= 10] == list(range(10, 20))


async def test_models_share_the_workers_and_take_turns() -> None:
    other = EchoEngine(name="other")
    async with house() as h:
        second = Batcher(other, h.admission, h.telemetry)
        running = await h.blocked()
        deadline_s = time.monotonic() + 20
        others = [
            asyncio.create_task(
                second.submit(np.full(10, value, np.float32), first_value, deadline_s=deadline_s)
            )
            for value in range(3)
        ]
        mine = [h.submit(value) for value in range(4)]
        await asyncio.sleep(0)
        assert h.pool.waiting == 7
        h.engine.gate.set()
        assert await asyncio.to_thread(other.entered.acquire, timeout=20)
        assert len(h.engine.batches) <= 2  # one worker: it is held in the other model's first batch
        other.gate.set()
        await asyncio.gather(running, *mine, *others)
        assert sum(map(len, other.batches)) == 3


async def test_what_waits_can_be_read_while_workers_turn_from_model_to_model() -> None:
    other = EchoEngine(name="other")
    other.gate.set()
    async with house(workers=2, limit_s=1e6, rate=1e6) as h:
        h.engine.gate.set()
        second = Batcher(other, h.admission, h.telemetry)
        often = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

        async def keep_busy(batcher: Batcher) -> None:
            for _ in range(500):
                await batcher.submit(np.ones(10, np.float32), first_value, deadline_s=time.monotonic() + 20)

        def read() -> None:
            for _ in range(200_000):
                assert 0 <= h.pool.waiting <= 8

        try:
            work = [keep_busy(batcher) for batcher in (h.batcher, second) for _ in range(4)]
            await asyncio.gather(asyncio.to_thread(read), *work)
        finally:
            sys.setswitchinterval(often)
        assert h.pool.waiting == 0


async def test_only_a_lone_clip_gets_all_cores() -> None:
    alone: list[bool] = []

    class Watching(EchoEngine):
        def run(self, waveforms: Sequence[NDArray[np.float32]], *, alone: bool) -> list[Frames]:
            lone.append(alone)
            return super().run(waveforms, alone=alone)

    lone = alone
    async with house(Watching(), workers=2) as h:
        first = h.submit(1)
        await h.engine.wait_entered()
        second = h.submit(2)
        await h.engine.wait_entered()
        h.engine.gate.set()
        await asyncio.gather(first, second)
        assert alone == [True, False]


async def test_nothing_is_lost_or_doubled_when_callers_come_and_go() -> None:
    rng = random.Random(7)

    def sometimes(waveforms: Sequence[NDArray[np.float32]]) -> None:
        time.sleep(0.0005)
        if any(int(waveform[0]) % 13 == 0 for waveform in waveforms):
            raise RuntimeError("bad luck")

    engine = EchoEngine(limits=BatchLimits(4, 10**6), before=sometimes)
    async with house(engine, workers=3, limit_s=60.0, rate=1e4) as h:
        engine.gate.set()
        tasks = []
        for value in range(600):
            tasks.append(h.submit(value, rng.uniform(0.1, 3.0), wait=rng.random() < 0.5))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.uniform(0, 0.002))
            if rng.random() < 0.2:
                rng.choice(tasks).cancel()
        outcomes = await settle(*tasks)
        for value, outcome in enumerate(outcomes):
            if isinstance(outcome, SegmentResult):
                assert outcome.value == value
                assert value % 13 != 0
            else:
                assert isinstance(outcome, asyncio.CancelledError | QueueFullError | InferenceError)
        assert any(isinstance(outcome, SegmentResult) for outcome in outcomes)
        assert await h.admission.drain(20.0)
        assert (h.pool.waiting, h.pool.waiting_audio_s, h.pool.busy) == (0, 0.0, 0)
