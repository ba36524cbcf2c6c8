"""One event loop beside the page's scripts: requests go on while a script reruns, and can be cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from ui.client import AsrClient
from ui.settings import UiSettings
from ui.tracing import Tracing

T = TypeVar("T")


class Background:
    """A thread with an event loop and the client that belongs to it; one for all sessions of the process."""

    def __init__(self, settings: UiSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="asr-ui-requests", daemon=True)
        self._thread.start()
        self._tracing = Tracing()
        self.client = self.call(self._open(settings, transport))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _open(self, settings: UiSettings, transport: httpx.AsyncBaseTransport | None) -> AsrClient:
        return AsrClient(settings, tracing=self._tracing, transport=transport)

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.aclose()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin ``work``; ``cancel()`` on the future cancels the task and closes its connection."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Do ``work`` and wait for it; raises what it raises."""
        return self.start(work).result()

    def close(self) -> None:
        """Cancel what runs, then stop the loop and its thread."""
        self.call(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._tracing.close()
