"""OpenAI's realtime transcription: client events in, server events out.

Audio goes through ``utterances.py`` as it comes. What it brings (looks, pieces, ends) waits in a short line
for one task that recognises and tells, in order; while that line is full nothing more is read, so a caller
that sends faster than we transcribe is slowed down by its own connection.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from api.errors import (
    AsrError,
    ClientDisconnected,
    DrainingError,
    InvalidRequestError,
    InvalidValueError,
    StreamTimeoutError,
    public,
)
from api.live.connection import Connection, json_object
from api.live.listener import Listener
from api.live.realtime_session import Session, updated
from api.live.recogniser import Recogniser, StableWords
from api.live.utterances import Began, Ended, Happening, Piece
from api.openai_format import logprob_list, usage
from api.segmenter import Window
from api.service import Service
from api.transcriber import Transcriber

_log = structlog.get_logger("api.live")

_WAITING = 8  # looks, pieces and ends that may wait to be recognised
_TRANSCRIPTION = "conversation.item.input_audio_transcription"


@dataclass(slots=True)
class Item:
    """One utterance on its way."""

    recogniser: Recogniser
    told: StableWords = field(default_factory=StableWords)
    id: str = field(default_factory=lambda: f"item_{uuid.uuid4().hex[:24]}")
    dropped: bool = False
    failure: AsrError | None = None
    ended_s: float = 0.0  # of time.perf_counter


@dataclass(frozen=True, slots=True)
class _Work:
    """For the task that recognises: a look, a piece, or (without a window) the end of an item."""

    item: Item
    window: Window | None = None
    is_look: bool = False
    audio_s: float = 0.0


class Realtime:
    """One session."""

    def __init__(self, connection: Connection, service: Service, model: str) -> None:
        self._connection = connection
        self._service = service
        self._session = Session.of_model(model)
        self._item: Item | None = None
        self._last_item_id: str | None = None
        self._work: asyncio.Queue[_Work | None] = asyncio.Queue(_WAITING)
        self._looking = False
        self._failure: Exception | None = None
        self._handlers: dict[
            str, Callable[[Listener, dict[str, Any]], Coroutine[Any, Any, Listener | None]]
        ] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
        }

    @staticmethod
    def check(service: Service, model: str, intent: str) -> None:
        """What the address says. Raises ModelNotFoundError, NotReadyError, InvalidValueError."""
        service.models()
        service.transcriber(model)
        if intent != "transcription":
            raise InvalidValueError("intent: only transcription is offered.", param="intent")

    @staticmethod
    def error_event(error: AsrError, event_id: str | None = None) -> dict[str, Any]:
        """``error``; `event_id` is the client's, of the event that is at fault."""
        return _event("error", error={**error.to_body()["error"], "event_id": event_id})

    async def run(self) -> None:
        """Until the caller leaves. Raises what ``Connection.messages`` does, after what was heard is told."""
        listener = await self._listen(self._session)
        await self._send("session.created", session=self._described())
        telling = asyncio.create_task(self._tell())
        try:
            async for message in self._connection.messages():
                listener = await self._handle(listener, message) or listener
                if self._failure is not None:
                    raise self._failure
        except (DrainingError, StreamTimeoutError):
            await self._happened(listener, listener.commit())
            await self._work.put(None)
            await telling
            raise
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    # -- client events

    async def _handle(self, listener: Listener, message: str | bytes) -> Listener | None:
        """Obey; the listener from here on where that is another."""
        event_id = None
        try:
            if isinstance(message, bytes):
                raise InvalidRequestError(
                    "Events are JSON in text messages; audio goes into input_audio_buffer.append."
                )
            event = json_object(message, "The event is not valid JSON.")
            event_id = event.get("event_id") if isinstance(event.get("event_id"), str) else None
            kind = event.get("type")
            handler = self._handlers.get(kind) if isinstance(kind, str) else None
            if handler is None:
                known = ", ".join(self._handlers)
                raise InvalidRequestError(
                    f"There is no event of type {str(kind)[:64]!r}; there are {known}.", param="type"
                )
            return await handler(listener, event)
        except ClientDisconnected:
            raise
        except AsrError as error:
            await self._connection.send(self.error_event(error, event_id))
            return None

    async def _update(self, listener: Listener, event: dict[str, Any]) -> Listener:
        session = updated(self._session, event.get("session"))
        if self._is_heard_alike(session):
            await listener.change(session.options(self._service.settings))
        else:
            old, listener = listener, await self._listen(session, after=listener)
            await self._happened(old, listener.ended_before)
        self._session = session
        await self._send("session.updated", session=self._described())
        return listener

    async def _append(self, listener: Listener, event: dict[str, Any]) -> None:
        encoded = event.get("audio")
        if not isinstance(encoded, str):
            raise InvalidRequestError("input_audio_buffer.append needs audio, in base64.", param="audio")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequestError("audio is not base64.", param="audio") from None
        happenings = await listener.feed(data)
        self._connection.audio_s = listener.heard_s
        await self._happened(listener, happenings)
        await self._look(listener)

    async def _commit(self, listener: Listener, _: dict[str, Any]) -> None:
        if not listener.is_open:
            raise InvalidRequestError(
                "There is nothing to commit: no speech came since the last utterance.",
                code="input_audio_buffer_commit_empty",
            )
        await self._happened(listener, listener.commit())

    async def _clear(self, listener: Listener, _: dict[str, Any]) -> None:
        listener.clear()
        if self._item is not None:
            self._connection.utterance_dropped(self._item.recogniser)
            self._item.dropped, self._item = True, None  # what waits for it is left undone
        await self._send("input_audio_buffer.cleared")

    # -- audio

    async def _listen(self, session: Session, after: Listener | None = None) -> Listener:
        """Raises what a wrong model, language or hotword does."""
        listener = await Listener.open(
            self._service,
            session.transcription.model,
            session.options(self._service.settings),
            session.audio_form,
            session.vad,
            after=after,
        )
        self._connection.model = listener.model_name
        return listener

    def _is_heard_alike(self, session: Session) -> bool:
        """Whether the open utterance can go on in `session`. Raises ModelNotFoundError."""
        return (
            session.audio_form == self._session.audio_form
            and session.vad == self._session.vad
            and self._transcriber_of(session) is self._transcriber_of(self._session)
        )

    def _transcriber_of(self, session: Session) -> Transcriber:
        return self._service.transcriber(session.transcription.model)

    async def _happened(self, listener: Listener, happenings: Iterable[Happening]) -> None:
        for happening in happenings:
            if isinstance(happening, Began):
                self._item = Item(listener.new_recogniser())
                self._connection.utterance_began(self._item.recogniser)
                await self._send_speech("started", "audio_start_ms", listener, happening.at_sample)
            elif self._item is None:
                raise RuntimeError("an utterance went on that never began")
            elif isinstance(happening, Piece):
                await self._work.put(_Work(self._item, happening.window))
            else:
                await self._ended(listener, self._item, happening)

    async def _ended(self, listener: Listener, item: Item, ended: Ended) -> None:
        await self._send_speech("stopped", "audio_end_ms", listener, ended.at_sample)
        await self._send("input_audio_buffer.committed", item_id=item.id, previous_item_id=self._last_item_id)
        self._last_item_id, self._item = item.id, None
        item.ended_s = time.perf_counter()
        await self._work.put(_Work(item, audio_s=listener.seconds(ended.samples)))

    async def _send_speech(self, what: str, when: str, listener: Listener, at_sample: int) -> None:
        if self._session.vad is not None and self._item is not None:
            fields = {when: round(listener.seconds(at_sample) * 1000), "item_id": self._item.id}
            await self._send(f"input_audio_buffer.speech_{what}", **fields)

    async def _look(self, listener: Listener) -> None:
        """Have the open utterance decoded as far as it goes, unless something waits that comes first."""
        if self._item is None or self._looking or not self._work.empty():
            return
        if window := listener.look(self._item.recogniser):
            self._looking = True
            await self._work.put(_Work(self._item, window, is_look=True))

    # -- recognising and telling

    async def _tell(self) -> None:
        """Do what waits, in order. After a failure only take it, so that nobody waits for room."""
        while (work := await self._work.get()) is not None:
            try:
                if not (work.item.dropped or self._failure):
                    await self._do(work)
            except Exception as error:  # nobody listens any more, or worse
                self._failure = error
            finally:
                if work.is_look:
                    self._looking = False

    async def _do(self, work: _Work) -> None:
        item, window = work.item, work.window
        if window is None:
            await self._complete(item, work.audio_s)
        elif item.failure is None:
            try:
                if work.is_look:
                    text = await item.recogniser.look(window)
                    await self._send_delta(item, item.told.look(text, item.recogniser.looked_at_s))
                else:
                    await item.recogniser.add(window)
            except ClientDisconnected:
                raise
            except Exception as error:
                if not isinstance(error, AsrError):
                    _log.error("unhandled_exception", exc_info=error)
                item.failure = public(error, self._connection.id)  # told when the utterance has ended

    async def _complete(self, item: Item, audio_s: float) -> None:
        self._connection.utterance_ended(item.recogniser, item.ended_s, item.failure)
        if item.failure is not None:
            error = item.failure.to_body()["error"]
            await self._send(f"{_TRANSCRIPTION}.failed", item_id=item.id, content_index=0, error=error)
            return
        transcript = item.recogniser.finish(audio_s)
        await self._send_delta(item, item.told.finish(transcript.text))
        fields: dict[str, Any] = {"transcript": transcript.text, "usage": usage(audio_s)}
        if self._session.include:
            fields["logprobs"] = logprob_list(transcript.segments)
        await self._send(f"{_TRANSCRIPTION}.completed", item_id=item.id, content_index=0, **fields)

    async def _send_delta(self, item: Item, delta: str) -> None:
        if delta and not item.dropped:
            item.recogniser.told()
            await self._send(f"{_TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=delta)

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._connection.send(_event(kind, **fields))

    def _described(self) -> dict[str, Any]:
        model = self._transcriber_of(self._session).model.name
        return {
            "id": self._connection.id,
            "object": "realtime.transcription_session",
            **self._session.described(model),
        }


def _event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "event_id": f"event_{uuid.uuid4().hex[:24]}", **fields}
