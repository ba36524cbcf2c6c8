"""Vosk's protocol: every message of audio gets one answer, a partial text or the text of an utterance.

``{"config": ...}`` first (no answer), then 16-bit little-endian mono; a null in it is as if it was not there.
``{"eof": 1}`` gives the rest and ends the session, ``{"reset": 1}`` gives the rest and goes on; either may
stand beside a config. A second config adds to the first; after the first audio only its ``words`` counts.
"""

from __future__ import annotations

import math
import time
from typing import Any

from api.errors import AsrError, DrainingError, InvalidRequestError, InvalidValueError, StreamTimeoutError
from api.forms import MAX_HOTWORD_CHARACTERS, check_options
from api.live.connection import Connection, json_object
from api.live.listener import AudioForm, Listener
from api.live.pcm import check_rate
from api.live.recogniser import LOOK_EVERY_S, Recogniser
from api.live.utterances import Began, Happening, Piece
from api.service import Service
from api.transcriber import Options
from api.transcript import Transcript
from api.vad import VadOptions

_DEFAULT_RATE_HZ = 8000  # as Vosk's own server
_AHEAD_S = 1.0  # more than piles up in a network on the way from somebody who speaks


class Pace:
    """Whether a look is worth its time. Times are those of one clock, in seconds.

    Every message is answered before the next is read, so a look is time in which nothing is heard. Who speaks
    wants to see each; who sends a recording as fast as it is taken wants its end.
    """

    def __init__(self) -> None:
        self._ahead_s = 0.0  # by so much is the sound before the last piece longer than the time it took
        self._piece_s = 0.0
        self._heard_at_s = 0.0
        self._due_at_s = -math.inf

    def heard(self, audio_s: float, now_s: float) -> None:
        """So much sound has come. Time in which none came is no credit for later."""
        self._ahead_s = max(0.0, self._ahead_s + self._piece_s - (now_s - self._heard_at_s))
        self._piece_s, self._heard_at_s = audio_s, now_s

    def may_look(self, now_s: float) -> bool:
        """Always at the speed of speech; of somebody who is ahead, as much later as the last look took."""
        return self._ahead_s <= _AHEAD_S or now_s >= self._due_at_s

    def looked(self, began_s: float, ended_s: float) -> None:
        """A look took from then to then."""
        self._due_at_s = ended_s + max(LOOK_EVERY_S, ended_s - began_s)


class Vosk:
    """One session."""

    def __init__(self, connection: Connection, service: Service) -> None:
        self._connection = connection
        self._service = service
        self._shows_words = True
        self._model = ""
        self._form = AudioForm("audio/pcm", _DEFAULT_RATE_HZ)
        self._options = Options()
        self._listener: Listener | None = None
        self._recogniser: Recogniser | None = None
        self._partial = ""
        self._pace = Pace()

    @staticmethod
    def error_message(error: AsrError) -> dict[str, Any]:
        """The last message of a session that ends with `error`; Vosk has none, so this is ours."""
        return error.to_body()

    async def run(self) -> None:
        """Until ``eof``, or the caller leaves. Raises what ``Connection.messages`` does, and AsrError."""
        try:
            async for message in self._connection.messages():
                if isinstance(message, bytes):
                    await self._connection.send(await self._hear(message))
                elif await self._command(message):
                    return
        except (DrainingError, StreamTimeoutError):
            await self._connection.send(await self._rest())
            raise

    async def _command(self, message: str) -> bool:
        """Obey; True when that was the last."""
        command = json_object(message, "The message is neither audio nor valid JSON.")
        if "config" in command:
            self._configure(command["config"])
        if command.get("eof"):
            await self._connection.send(await self._rest())
            return True
        if command.get("reset"):
            await self._connection.send(await self._rest())
        elif "config" not in command:
            raise InvalidRequestError("A text message is {'config': {...}}, {'eof': 1} or {'reset': 1}.")
        return False

    def _configure(self, config: object) -> None:
        """Take over what `config` names; it is checked at once, and used when the audio begins."""
        if not isinstance(config, dict):
            raise InvalidRequestError("config is not an object.", param="config")
        config = {name: value for name, value in config.items() if value is not None}
        if "words" in config:
            if config["words"] not in (True, False):  # 1 and 0 are equal to them
                raise InvalidRequestError("words is neither true nor false.", param="words")
            self._shows_words = bool(config["words"])
        if self._listener is not None:
            return
        if "sample_rate" in config:
            self._form = AudioForm("audio/pcm", check_rate(config["sample_rate"], "sample_rate"))
        if "phrase_list" in config:
            phrases = _phrases(config["phrase_list"])
            self._options = check_options(
                self._service.settings, None, None, phrases, None, hotwords_field="phrase_list"
            )
        if "model" in config:
            self._model = config["model"]
            if not isinstance(self._model, str):
                raise InvalidRequestError("model is not text.", param="model")
            self._service.transcriber(self._model)

    async def _hear(self, data: bytes) -> dict[str, Any]:
        """The answer to a message of audio."""
        if self._listener is None:
            self._listener = await Listener.open(
                self._service, self._model, self._options, self._form, VadOptions()
            )
            self._connection.model = self._listener.model_name
        happenings = await self._listener.feed(data)
        self._pace.heard(self._listener.heard_s - self._connection.audio_s, time.perf_counter())
        self._connection.audio_s = self._listener.heard_s
        if ended := await self._follow(self._listener, happenings):
            return self._result(ended)
        if self._recogniser is not None:
            await self._look(self._listener, self._recogniser)
        return {"partial": self._partial}

    async def _look(self, listener: Listener, recogniser: Recogniser) -> None:
        """Decode the open utterance as far as it goes, where that is worth it."""
        began_s = time.perf_counter()
        if not self._pace.may_look(began_s) or (window := listener.look(recogniser)) is None:
            return
        self._partial = await recogniser.look(window)
        self._pace.looked(began_s, time.perf_counter())
        if self._partial:
            recogniser.told()

    async def _rest(self) -> dict[str, Any]:
        """What is left, as an utterance."""
        if self._listener is None:
            return self._result([])
        return self._result(await self._follow(self._listener, self._listener.commit()))

    async def _follow(self, listener: Listener, happenings: list[Happening]) -> list[Transcript]:
        """The utterances that end in `happenings`."""
        ended = []
        heard_s = time.perf_counter()
        for happening in happenings:
            if isinstance(happening, Began):
                self._recogniser = listener.new_recogniser()
                self._connection.utterance_began(self._recogniser)
            elif self._recogniser is None:
                raise RuntimeError("an utterance went on that never began")
            elif isinstance(happening, Piece):
                try:
                    await self._recogniser.add(happening.window)
                except AsrError as error:
                    self._connection.utterance_ended(self._recogniser, heard_s, error)
                    raise
            else:
                audio_s = listener.seconds(happening.samples)
                transcript = self._recogniser.finish(audio_s)
                if transcript.text:
                    self._recogniser.told()
                ended.append(transcript)
                self._connection.utterance_ended(self._recogniser, heard_s)
                self._recogniser, self._partial = None, ""
        return ended

    def _result(self, transcripts: list[Transcript]) -> dict[str, Any]:
        words = [word for transcript in transcripts for word in transcript.words]
        body: dict[str, Any] = {"text": " ".join(each.text for each in transcripts if each.text)}
        if self._shows_words and words:
            body["result"] = [
                {
                    "conf": round(word.confidence, 6),
                    "end": round(word.end_s, 3),
                    "start": round(word.start_s, 3),
                    "word": word.text,
                }
                for word in words
            ]
        return body


def _phrases(value: object) -> tuple[str, ...]:
    """Vosk's ``phrase_list`` as hotwords, without what stands for any other word.

    Raises InvalidRequestError (no list of texts) or InvalidValueError (a phrase that is too long or no text).
    """
    if not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
        raise InvalidRequestError("phrase_list is not a list of texts.", param="phrase_list")
    for index, phrase in enumerate(value):
        is_text = not any("\ud800" <= character <= "\udfff" for character in phrase[:MAX_HOTWORD_CHARACTERS])
        if len(phrase) > MAX_HOTWORD_CHARACTERS or not is_text:
            problem = "are too many" if is_text else "with half a surrogate pair are no text"
            raise InvalidValueError(
                f"phrase_list[{index}]: {len(phrase)} characters {problem}; a phrase is text of at most "
                f"{MAX_HOTWORD_CHARACTERS}.",
                param="phrase_list",
            )
    return tuple(each for each in value if each.strip() and each != "[unk]")
