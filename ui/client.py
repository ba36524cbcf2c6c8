"""The only way from the page to the service: its REST API over httpx, typed, asynchronous.

Every call is retried when the service says "later" (429, 503, a lost connection) and waits for as long as
it is told to. A call that is cancelled (``task.cancel()``) closes its connection, and the service then drops
the work.
Nothing is retried once a stream has begun to speak.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from ui import answers
from ui.errors import ApiError, ApiProtocolError
from ui.load import Load, load_from_metrics
from ui.retry import RetryPolicy
from ui.settings import UiSettings
from ui.tracing import SpanHandle, Tracing
from ui.transcript import Delta, Health, Language, Model, Transcript

LOOK_UP_TIMEOUT_S = 5.0
_RETRIED_FAILURES = (httpx.ConnectError, httpx.ConnectTimeout, httpx.RemoteProtocolError)


@dataclass(frozen=True)
class AudioFile:
    """A file as the person gave it: its name, its bytes, the type the browser claims."""

    name: str
    data: bytes
    content_type: str = "application/octet-stream"


@dataclass(frozen=True)
class Options:
    """What to ask for. ``model`` None is the service's default, ``beam`` None the model's own way."""

    model: str | None = None
    language: str | None = None
    hotwords: tuple[str, ...] = ()
    beam: int | None = None


OnWait = Callable[[float, ApiError], None]
"""Called before each wait with its seconds and the reason."""


class AsrClient:
    """Asynchronous client; use it inside ``async with`` or call ``aclose``. It belongs to one event loop.

    ``transport`` and ``sleep`` are seams for tests.
    """

    def __init__(
        self,
        settings: UiSettings,
        *,
        tracing: Tracing | None = None,
        retry: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        headers = {"User-Agent": "asr-ui"}
        if settings.api_key:
            headers["Authorization"] = f"Bearer {settings.api_key}"
        self._tracing = tracing or Tracing()
        self._retry = retry or RetryPolicy()
        self._sleep = sleep
        self._http = httpx.AsyncClient(
            base_url=settings.api_url,
            headers=headers,
            timeout=httpx.Timeout(settings.timeout_s, connect=LOOK_UP_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=8),
            transport=transport,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def information(self) -> dict[str, Any]:
        """``GET /``: name, version, links and limits, as the service says them."""
        body = await self._look_up("/")
        return body if isinstance(body, dict) else {}

    async def models(self) -> tuple[Model, ...]:
        """``GET /models``: what is loaded, the default first."""
        entries = answers.entries(await self._look_up("/models"), "models")
        models = [Model.from_json(entry) for entry in entries]
        return tuple(sorted(models, key=lambda model: not model.is_default))

    async def languages(self) -> tuple[Language, ...]:
        """``GET /languages``: what the loaded models speak."""
        entries = answers.entries(await self._look_up("/languages"), "languages")
        return tuple(Language.from_json(entry) for entry in entries)

    async def health(self) -> Health:
        """``GET /health``: its state in one word. Does not raise on 503, which is an answer here."""
        response = await self._get("/health")
        body = answers.decode(response)
        details = body if isinstance(body, dict) else {}
        known = response.status_code in (httpx.codes.OK, httpx.codes.SERVICE_UNAVAILABLE)
        if not known or not isinstance(details.get("status"), str):
            if response.is_error:
                raise answers.failure(response)
            raise ApiProtocolError("The address answers, but not as the speech service does.")
        return Health(details["status"], ready=not response.is_error, details=details)

    async def load(self) -> Load:
        """``GET /metrics``, reduced to queue and load."""
        response = await self._get("/metrics")
        if response.is_error:
            raise answers.failure(response)
        return load_from_metrics(response.text)

    async def transcribe(
        self, file: AudioFile, options: Options | None = None, *, on_wait: OnWait | None = None
    ) -> Transcript:
        """``POST /transcribe``: one file, with word times and confidence.

        Raises:
            ApiError: see ``ui/errors.py``.
        """
        form = _form(options or Options())
        async with self._send("/transcribe", form, [("file", file)], on_wait) as (response, span):
            await response.aread()
            return answers.finish(Transcript.from_json(answers.json_body(response)), response, span)

    async def transcribe_batch(
        self, files: Sequence[AudioFile], options: Options | None = None, *, on_wait: OnWait | None = None
    ) -> list[Transcript | ApiError]:
        """``POST /transcribe/batch``: many files in one request, answers in the same order.

        A file that failed has its error in its place; only a failure of the whole request raises.
        """
        form = _form(options or Options())
        parts = [("files", file) for file in files]
        async with self._send("/transcribe/batch", form, parts, on_wait) as (response, span):
            await response.aread()
            entries = answers.entries(answers.json_body(response), "results")
            if len(entries) != len(files):
                raise ApiProtocolError(f"The service answered for {len(entries)} of {len(files)} files.")
            return [answers.batch_entry(entry, response, span) for entry in entries]

    async def stream(
        self, file: AudioFile, options: Options | None = None, *, on_wait: OnWait | None = None
    ) -> AsyncGenerator[Delta | Transcript]:
        """``POST /transcribe`` with ``stream=true``: text as it is found, the whole transcript last.

        The events are OpenAI's; the service's own route adds times, words, segments and stage times to them.
        """
        options = options or Options()
        form = {**_form(options), "stream": "true"}
        async with self._send("/transcribe", form, [("file", file)], on_wait) as (response, span):
            async for event in answers.stream_events(response):
                if event.get("type") == "transcript.text.delta":
                    yield Delta(str(event.get("delta", "")), answers.seconds(event.get("end")))
                elif event.get("type") == "transcript.text.done":
                    transcript = answers.from_done(
                        event, language=options.language or "", model=options.model or ""
                    )
                    yield answers.finish(transcript, response, span)
                    return
        raise ApiProtocolError("The service's stream ended before the transcript was complete.")

    async def _look_up(self, path: str) -> object:
        response = await self._get(path)
        if response.is_error:
            raise answers.failure(response)
        return answers.json_body(response)

    async def _get(self, path: str) -> httpx.Response:
        """One quick question, asked once: the page asks again by itself."""
        try:
            return await self._http.get(path, timeout=LOOK_UP_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise answers.transport_failure(error, str(self._http.base_url)) from error

    @asynccontextmanager
    async def _send(
        self,
        path: str,
        form: Mapping[str, str | list[str]],
        files: Sequence[tuple[str, AudioFile]],
        on_wait: OnWait | None,
    ) -> AsyncIterator[tuple[httpx.Response, SpanHandle]]:
        """A successful answer with its body still unread; retries inside, one span around all attempts."""
        attributes: dict[str, str | int | float] = {"url.path": path, "asr.files": len(files)}
        with self._tracing.span(f"POST {path}", attributes) as span:
            response = await self._open(path, form, files, on_wait, span.headers)
            try:
                yield response, span
            except httpx.HTTPError as error:
                raise answers.transport_failure(error, str(self._http.base_url)) from error
            finally:
                await response.aclose()

    async def _open(
        self,
        path: str,
        form: Mapping[str, str | list[str]],
        files: Sequence[tuple[str, AudioFile]],
        on_wait: OnWait | None,
        headers: Mapping[str, str],
    ) -> httpx.Response:
        attempt = 0
        while True:
            parts = [(field, (file.name, file.data, file.content_type)) for field, file in files]
            request = self._http.build_request(
                "POST", path, data=dict(form), files=parts, headers=dict(headers)
            )
            answer: httpx.Response | None = None
            failure: ApiError
            try:
                answer = await self._http.send(request, stream=True)
                if not answer.is_error:
                    return answer
                try:
                    await answer.aread()
                finally:
                    await answer.aclose()
                failure = answers.failure(answer)
                wait_s = self._retry.wait_s(attempt, answer.headers, answer.status_code)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                failure = answers.transport_failure(error, str(self._http.base_url))
                retried = isinstance(error, _RETRIED_FAILURES)
                wait_s = self._retry.wait_s(attempt, None, None) if retried else None
            if wait_s is None:
                raise failure
            if on_wait is not None:
                on_wait(wait_s, failure)
            await self._sleep(wait_s)
            attempt += 1


def _form(options: Options) -> dict[str, str | list[str]]:
    """The fields of a request; times are always asked for, because the page shows them."""
    form: dict[str, str | list[str]] = {}
    if options.model:
        form["model"] = options.model
    if options.language:
        form["language"] = options.language
    if options.hotwords:
        form["hotwords[]"] = list(options.hotwords)
    if options.beam is not None:
        form["beam"] = str(options.beam)
    return {**form, "timestamps": "true"}
