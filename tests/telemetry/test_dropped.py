"""Every way in which a segment ends in no transcript is counted, once."""

from __future__ import annotations

import asyncio

import pytest

from api.errors import DeadlineExceededError, DrainingError, InferenceError
from api.telemetry.metrics import DROP_REASONS
from loadtest.local_stack import LocalStack
from tests.api.test_batcher import House, house, one_batch_of_three, poisoned_by_two, settle
from tests.telemetry.live import clip, metric_sum, settings, stack, transcribe

__all__ = ["stack"]


async def dropped(h: House, **expected: float) -> None:
    """The counts are as expected, once the loop has run what the worker handed over."""
    await asyncio.sleep(0.05)
    value = h.telemetry.metrics.registry.get_sample_value
    counts = {reason: value("asr_segments_dropped_total", {"reason": reason}) for reason in DROP_REASONS}
    assert counts == dict.fromkeys(DROP_REASONS, 0.0) | expected


async def test_what_is_delivered_is_not_dropped() -> None:
    async with house() as h:
        h.engine.gate.set()
        await asyncio.gather(*(h.submit(value) for value in range(20)))
        await dropped(h)


async def test_a_caller_that_leaves_the_queue() -> None:
    async with house() as h:
        running = await h.blocked()
        leaves = h.submit(1)
        await asyncio.sleep(0)
        leaves.cancel()
        await settle(leaves)
        h.engine.gate.set()
        await running
        await dropped(h, abandoned=1)


async def test_a_deadline_that_passes_in_the_queue() -> None:
    async with house(rate=1e6) as h:
        running = await h.blocked()
        with pytest.raises(DeadlineExceededError):
            await h.submit(1, timeout_s=0.05)
        h.engine.gate.set()
        await running
        await dropped(h, expired=1)


async def test_results_that_come_too_late() -> None:
    async with house(rate=1e6) as h:
        late = h.submit(1, timeout_s=0.1)
        await h.engine.wait_entered()
        with pytest.raises(DeadlineExceededError):
            await late
        h.engine.gate.set()
        await h.submit(2)
        await h.engine.wait_entered()
        h.engine.gate.clear()
        leaves = h.submit(3)
        await h.engine.wait_entered()
        leaves.cancel()
        await settle(leaves)
        h.engine.gate.set()
        await h.submit(4)
        await dropped(h, unclaimed=2)


async def test_what_the_engine_fails_on() -> None:
    async with house(poisoned_by_two()) as h:
        results = await one_batch_of_three(h)
        assert [isinstance(result, InferenceError) for result in results] == [False, True, False]
        await dropped(h, failed=1)


async def test_what_still_waits_when_the_pool_closes() -> None:
    async with house() as h:
        running = await h.blocked()
        waits = h.submit(1)
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(h.pool.close))
        (result,) = await settle(waits)
        assert isinstance(result, DrainingError)
        h.engine.gate.set()
        await asyncio.gather(running, closing)
        await dropped(h, failed=1)


def test_what_is_taken_for_noise(stack: LocalStack) -> None:
    api = stack.api(settings(stack.folder / "models", ASR_NOISE_CONFIDENCE="1"))
    assert transcribe(api, clip("bad cafe")).json()["text"] == "bad cafe"
    assert metric_sum(api, "asr_segments_dropped_total") == 0
    assert transcribe(api, clip("a b")).json()["text"] == ""
    assert metric_sum(api, "asr_segments_dropped_total", reason="noise") == 1
    assert metric_sum(api, "asr_segments_dropped_total") == 1
