"""Raw audio in, what happens in it out; and who recognises it. What both protocols share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import structlog

from api.live.pcm import Encoding, PcmInput
from api.live.recogniser import Recogniser
from api.live.utterances import Happening, Utterances
from api.segmenter import Window
from api.service import Service
from api.transcriber import Options, Transcriber
from api.vad import VadOptions

_log = structlog.get_logger("api.live")

_LONG_BYTES = 32_000  # resampling and finding speech in more than this is left to a thread


@dataclass(frozen=True, slots=True)
class AudioForm:
    """What a caller sends: mono, 16-bit little-endian or G.711, samples per second."""

    encoding: Encoding
    rate_hz: int


class Listener:
    """One recording through one model; made by ``open``."""

    def __init__(
        self,
        service: Service,
        transcriber: Transcriber,
        pcm: PcmInput,
        utterances: Utterances,
        new_recogniser: Callable[[], Recogniser],
        ended_before: list[Happening],
    ) -> None:
        self._service = service
        self._transcriber = transcriber
        self._pcm = pcm
        self._utterances = utterances
        self.new_recogniser = new_recogniser  # for one more utterance
        self.ended_before = ended_before  # with the listener before this one, whose times they have

    @classmethod
    async def open(
        cls,
        service: Service,
        model: str,
        options: Options,
        form: AudioForm,
        vad: VadOptions | None,
        *,
        after: Listener | None = None,
    ) -> Self:
        """`after` listened to the same recording until now, and ends where nothing is raised.

        What that brought is in ``ended_before``. Raises ModelNotFoundError, InvalidValueError (language).
        """
        transcriber = service.transcriber(model)
        new_recogniser = await _recognisers(service, transcriber, options)
        manifest = transcriber.model.bundle.manifest
        ended_before = after._end() if after is not None else []  # before anybody asks how much it heard
        utterances = Utterances(
            sample_rate_hz=manifest.sample_rate_hz,
            max_window_s=manifest.max_window_s,
            vad=vad,
            after=after._utterances if after is not None else None,
        )
        pcm = PcmInput(
            form.encoding,
            form.rate_hz,
            manifest.sample_rate_hz,
            after._pcm if after is not None else None,
        )
        return cls(service, transcriber, pcm, utterances, new_recogniser, ended_before)

    async def change(self, options: Options) -> None:
        """Use `options` for what begins from here on. Raises InvalidValueError (language)."""
        self.new_recogniser = await _recognisers(self._service, self._transcriber, options)

    async def feed(self, data: bytes) -> list[Happening]:
        """What `data` brings, in order."""
        if len(data) <= _LONG_BYTES:
            return self._hear(data)
        return await asyncio.get_running_loop().run_in_executor(self._service.pool, self._hear, data)

    def _hear(self, data: bytes) -> list[Happening]:
        return list(self._utterances.push(self._pcm.feed(data)))

    def commit(self) -> list[Happening]:
        """The open utterance ends here."""
        if not self._utterances.is_open:
            return []
        return [*self._utterances.push(self._pcm.flush()), *self._utterances.commit()]

    def _end(self) -> list[Happening]:
        """The open utterance ends here, and with or without one all that came is heard."""
        happenings = self.commit()
        self._utterances.clear(len(self._pcm.flush()))
        return happenings

    def clear(self) -> None:
        """Forget the open utterance."""
        self._utterances.clear(len(self._pcm.clear()))

    def look(self, recogniser: Recogniser) -> Window | None:
        """What `recogniser` should look at now, if anything."""
        heard_s = self._utterances.open_samples / self._utterances.sample_rate_hz
        return self._utterances.so_far() if recogniser.wants_look(heard_s) else None

    @property
    def model_name(self) -> str:
        """Of the model that hears."""
        return self._transcriber.model.name

    @property
    def is_open(self) -> bool:
        """Whether an utterance has begun and not ended."""
        return self._utterances.is_open

    @property
    def heard_s(self) -> float:
        """Seconds heard, with those before."""
        return self.seconds(self._utterances.samples_heard)

    def seconds(self, samples: int) -> float:
        """At the model's sample rate."""
        return samples / self._utterances.sample_rate_hz


async def _recognisers(
    service: Service, transcriber: Transcriber, options: Options
) -> Callable[[], Recogniser]:
    """What makes one for each utterance. Raises InvalidValueError (language)."""
    transcriber.language_of(options.language)
    hotwords = await transcriber.hotwords(options)
    unspellable = len(hotwords.unknown) if hotwords is not None else 0
    has_decoder = transcriber.model.bundle.manifest.decoder
    if options.hotwords and (unspellable or has_decoder):
        # No event of either protocol takes a warning. The words themselves are the caller's.
        _log.info(
            "hotwords_without_effect",
            model=transcriber.model.name,
            given=len(options.hotwords),
            unspellable=unspellable,
            decoder=has_decoder,
        )
    return partial(
        Recogniser,
        transcriber,
        options,
        hotwords,
        service.telemetry,
        service.settings.request_timeout_s,
    )
