"""What every transcription route does first and last: admission, reading the form, watching the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute

from api.batcher import request_owner
from api.errors import ClientDisconnected, DrainingError, InvalidRequestError
from api.multipart import Form, Limits, Upload, read_form
from api.service import Service
from api.telemetry import current_record

R = TypeVar("R")


class PlainRoute(APIRoute):
    """A route whose function takes the request and gives the response: FastAPI documents it, no more.

    Looking for parameters and dependencies that such a function does not have costs a tenth of a millisecond.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself."""
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


class Intake:
    """Admit a request, read its form, and remove its files at the end, or when the answer's stream ends.

    Entering raises NotReadyError, DrainingError or QueueFullError before a byte of the body is read; what
    ``read_form`` raises after.
    """

    def __init__(self, request: Request, service: Service, *, many: bool = False) -> None:
        self._request = request
        self._service = service
        self._many = many
        self._owner = request_owner()
        self._form: Form | None = None
        self._handed_over = False

    async def __aenter__(self) -> Form:
        settings, many = self._service.settings, self._many
        limits = Limits(
            file_bytes=settings.max_upload_bytes,
            files=settings.max_batch_files if many else 1,
            body_bytes=settings.max_body_bytes if many else settings.max_upload_bytes,
            idle_s=settings.upload_idle_timeout_s,
            total_s=settings.upload_timeout_s,
            spool_dir=settings.spool_dir,
        )
        self._service.admit(self._owner)
        try:
            with self._service.telemetry.stage("read"), _answered_if_cut_short():
                self._form = await read_form(self._request, limits)
        except BaseException:
            self.release()
            raise
        return self._form

    async def __aexit__(self, *_: object) -> None:
        if not self._handed_over:
            self.release()

    def hand_over(self) -> None:
        """From here on the answer's stream calls ``release``."""
        self._handed_over = True

    def release(self) -> None:
        """Remove the files and free the request's place."""
        if self._form is not None:
            self._form.close()
        self._service.leave(self._owner)


def only_file(form: Form) -> Upload:
    """The one file, in the part named ``file``. Raises InvalidRequestError saying what came instead."""
    if not form.files:
        raise InvalidRequestError("The form has no part named 'file' with the audio.", param="file")
    upload = form.files[0]
    if upload.field != "file":
        raise InvalidRequestError(
            f"The audio came in part {upload.field!r}; send it in the part named 'file'.", param="file"
        )
    return upload


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """Await ``work``; cancel it when the caller leaves, or when the service has no more time.

    Raises ClientDisconnected or DrainingError then.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  a coroutine runs in one
    working, left = True, False

    def leave(watch: asyncio.Task[None]) -> None:
        nonlocal left
        if working and not watch.cancelled():
            left = True
            task.cancel()

    watch = asyncio.create_task(_disconnected(request))
    watch.add_done_callback(leave)
    with _answered_if_cut_short():
        try:
            return await work
        except asyncio.CancelledError:
            if not left:
                raise
            task.uncancel()
            raise ClientDisconnected from None
        finally:
            working = False
            watch.cancel()


@contextmanager
def _answered_if_cut_short() -> Iterator[None]:
    """The server cancels what is not finished at the end of the drain; without this that is a bare 500."""
    try:
        yield
    except asyncio.CancelledError:
        message = "The service is shutting down and could not finish this request."
        raise DrainingError(message) from None


async def _disconnected(request: Request) -> None:
    """Return when the caller has left. The body is read by now, so nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def request_id() -> str:
    """The id of the current request; also in its x-request-id header."""
    record = current_record()
    return record.request_id if record is not None else ""
