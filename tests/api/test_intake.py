"""A caller that leaves: its work is cancelled, and nothing else."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from api.errors import ClientDisconnected, DrainingError
from api.routes.intake import unless_disconnected


class Caller:
    """A connection that stays until ``leave``."""

    def __init__(self) -> None:
        self._gone = asyncio.Event()
        self.request = Request({"type": "http", "headers": []}, receive=self._receive)

    def leave(self) -> None:
        self._gone.set()

    async def _receive(self) -> Message:
        await self._gone.wait()
        return {"type": "http.disconnect"}


async def test_leaving_cancels_the_work_and_is_told() -> None:
    caller, ended = Caller(), []

    async def work() -> None:
        try:
            caller.leave()
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(ClientDisconnected):
        await unless_disconnected(caller.request, work())
    assert ended
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_leaving_when_the_work_is_done_cancels_nothing_else() -> None:
    caller = Caller()

    async def work() -> str:
        await asyncio.sleep(0)  # so that the connection is watched
        caller.leave()
        await asyncio.sleep(0)  # so that the watching has ended, but its end was not told yet
        return "done"

    assert await unless_disconnected(caller.request, work()) == "done"
    await asyncio.sleep(0.01)


async def test_the_end_of_the_drain_is_no_leaving() -> None:
    caller, begun = Caller(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(unless_disconnected(caller.request, work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(DrainingError):
        await task


async def test_what_the_work_raises_passes_through() -> None:
    async def work() -> None:
        raise DrainingError("by itself")

    with pytest.raises(DrainingError, match="by itself"):
        await unless_disconnected(Caller().request, work())
