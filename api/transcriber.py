"""READ FIRST: audio bytes -> Transcript. One line per stage:

    decode    api/audio.py       bytes -> float32 mono blocks at the model's sample rate
    segment   api/segmenter.py   blocks -> windows the model can take; what cannot be speech is dropped
    infer     api/batcher.py     window -> log-probabilities, through the bounded queue and the engine
    ctc       api/ctc.py         log-probabilities -> tokens with times and confidence
    collect   api/transcript.py  tokens -> words, segments, text

Decoding and cutting run in a small thread pool, a block at a time, only as fast as windows are taken:
memory stays flat whatever the file's length. A short wav that needs no decoding is read at once, because
another thread would take longer to wake up. At most ``max_segments_in_flight`` windows of one file wait in
the queue, so a short clip does not stand behind an hour-long one.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, ParamSpec, TypeVar

import structlog

from api.audio import is_quick
from api.decoding import decode
from api.errors import DeadlineExceededError, InvalidValueError
from api.frames import Frames
from api.hotwords import HotwordAutomaton, build_hotwords
from api.normalise import normalise
from api.registry import LoadedModel
from api.segmenter import Segmenter, Window
from api.settings import Settings
from api.telemetry import Telemetry, current_record
from api.transcript import Segment, Transcript, join_text, segments_of
from api.vad import VadOptions
from api.windows import Progress, WindowReader

_log = structlog.get_logger("api.transcriber")

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_HOTWORD_BEAM = 16  # hotwords need a beam; this one is used where none was asked for


@dataclass(frozen=True, slots=True)
class Options:
    """What a request may choose.

    ``beam``: 0 is greedy, None the model's own way. ``vad`` None cuts only where the window ends.
    """

    language: str | None = None
    beam: int | None = None
    hotwords: tuple[str, ...] = ()
    vad: VadOptions | None = None


class Transcriber:
    """Files in, transcripts out, through one model; safe for many files at once on one event loop."""

    def __init__(self, model: LoadedModel, settings: Settings, telemetry: Telemetry, pool: Executor) -> None:
        self.model = model
        self._settings = settings
        self._telemetry = telemetry
        self._pool = pool

    def deadline_s(self) -> float:
        """When a request that begins now has to be done, on ``time.monotonic``'s scale."""
        return time.monotonic() + self._settings.request_timeout_s

    async def transcribe(
        self, file: BinaryIO, options: Options, *, wait: bool = False, deadline_s: float | None = None
    ) -> Transcript:
        """The whole transcript of ``file`` (seekable, any format; closed as soon as it has been read).

        ``wait``: this file belongs to a request that was let in before, so it waits for room in the queue.
        ``deadline_s``: of that request, as ``deadline_s`` gave it; this file's own where None.

        Raises UndecodableAudioError, AudioTooLongError, InvalidValueError, QueueFullError, DrainingError,
        DeadlineExceededError, InferenceError.
        """
        start_s = time.perf_counter()
        progress = Progress()
        parts = self.stream(file, options, progress, wait=wait, deadline_s=deadline_s)
        async with aclosing(parts):
            segments = tuple([segment async for part in parts for segment in part])
        return self.finish(segments, options, progress, time.perf_counter() - start_s)

    def finish(
        self, segments: tuple[Segment, ...], options: Options, progress: Progress, processing_s: float
    ) -> Transcript:
        """The transcript of all segments that ``stream`` gave, reported to telemetry."""
        transcript = Transcript(
            text=join_text(segments),
            segments=segments,
            duration_s=progress.duration_s,
            processing_s=processing_s,
            model=self.model.name,
            language=self.language_of(options.language),
            warnings=progress.warnings
            + tuple(f"The model cannot spell the hotword {word!r}." for word in progress.unspellable)
            + self._warnings_of(options),
        )
        self._telemetry.transcribed(
            model=transcript.model,
            language=transcript.language,
            audio_s=transcript.duration_s,
            processing_s=processing_s,
            confidence=transcript.confidence,
        )
        if self._settings.log_text:
            _log.info("transcript", text=transcript.text)
        return transcript

    def _warnings_of(self, options: Options) -> tuple[str, ...]:
        if options.hotwords and self.model.bundle.manifest.decoder:
            return (f"Model {self.model.name!r} writes with a decoder, which hotwords change little.",)
        return ()

    async def stream(
        self,
        file: BinaryIO,
        options: Options,
        progress: Progress,
        *,
        wait: bool = False,
        deadline_s: float | None = None,
    ) -> AsyncGenerator[list[Segment], None]:
        """Segments of each window in order, as soon as they and all before them are done.

        Close the generator (``aclosing``) when leaving early: windows in the queue are dropped then.
        """
        if (record := current_record()) is not None:
            record.model = self.model.name
        self.language_of(options.language)
        deadline_s = self.deadline_s() if deadline_s is None else deadline_s
        async with _until(deadline_s):
            hotwords = await self.hotwords(options)
        progress.unspellable = hotwords.unknown if hotwords is not None else ()
        quick = options.vad is None and is_quick(file, self.model.bundle.manifest.sample_rate_hz)
        reader = self._open(file, options, progress)
        in_flight: deque[asyncio.Task[list[Segment]]] = deque()
        try:
            while not reader.exhausted:
                for window in reader.next() if quick else await self._pull(reader, deadline_s):
                    if len(in_flight) >= self._settings.max_segments_in_flight:
                        yield await in_flight.popleft()
                    work = self.hear(window, options, hotwords, deadline_s, wait=wait)
                    in_flight.append(asyncio.create_task(work))
                    wait = True  # the first window was let in, the others only wait for room
                while in_flight and in_flight[0].done():
                    yield await in_flight.popleft()
            while in_flight:
                yield await in_flight.popleft()
        finally:
            try:
                if in_flight:
                    for task in in_flight:
                        task.cancel()
                    await asyncio.gather(*in_flight, return_exceptions=True)
            finally:  # a second cancellation ends the wait
                reader.close()

    def _open(self, file: BinaryIO, options: Options, progress: Progress) -> WindowReader:
        manifest = self.model.bundle.manifest
        rate_hz = manifest.sample_rate_hz
        segmenter = Segmenter(
            sample_rate_hz=rate_hz,
            max_window_s=manifest.max_window_s,
            vad=options.vad,
            scales_windows=not manifest.decoder,
        )
        return WindowReader(
            file,
            sample_rate_hz=rate_hz,
            max_audio_s=self._settings.max_audio_s,
            segmenter=segmenter,
            progress=progress,
            telemetry=self._telemetry,
        )

    async def _pull(self, reader: WindowReader, deadline_s: float) -> list[Window]:
        """The next windows; when cancelled or too late, waits for a thread that has begun to leave the file.

        Raises DeadlineExceededError and what ``WindowReader.next`` does.
        """
        job = self._in_pool(reader.next)
        pulling = asyncio.wrap_future(job)
        async with _until(deadline_s):
            try:
                return await asyncio.shield(pulling)
            except asyncio.CancelledError:
                reader.stop()
                if not job.cancel():
                    await asyncio.gather(pulling, return_exceptions=True)
                raise

    async def hear(
        self,
        window: Window,
        options: Options,
        hotwords: HotwordAutomaton | None,
        deadline_s: float,
        *,
        wait: bool,
    ) -> list[Segment]:
        """Segments of one window: queue, inference, decoding. ``hotwords`` as ``hotwords`` gave them.

        Raises what ``Batcher.submit`` does, which then has told where the time went.
        """
        decoding = partial(self._decode, window, options, hotwords)
        result = await self.model.batcher.submit(window.samples, decoding, deadline_s=deadline_s, wait=wait)
        record_stage, ended_ago_s = self._telemetry.record_stage, result.ended_ago_s
        record_stage("queue", result.queue_s, ended_ago_s=ended_ago_s + result.inference_s)
        record_stage("inference", result.inference_s, ended_ago_s=ended_ago_s, links=result.batches)
        record_stage("ctc", result.decoding_s)
        return result.value

    def _decode(
        self,
        window: Window,
        options: Options,
        hotwords: HotwordAutomaton | None,
        frames: Frames,
    ) -> list[Segment]:
        """log-probabilities -> segments of one window."""
        bundle = self.model.bundle
        decoded = decode(frames, bundle, self._beam(options, hotwords), hotwords)
        rate_hz = bundle.manifest.sample_rate_hz
        segments = segments_of(
            decoded,
            frames,
            bundle.vocabulary,
            frame_stride_s=bundle.manifest.frame_stride_s,
            window_start_s=window.start_sample / rate_hz,
            window_s=len(window.samples) / rate_hz,
        )
        kept = [seg for seg in segments if not seg.is_like_noise(self._settings.noise_confidence)]
        self._telemetry.segments_dropped("noise", len(segments) - len(kept))
        return kept

    def _beam(self, options: Options, hotwords: HotwordAutomaton | None) -> int:
        """Width of the beam search, 0 for greedy decoding."""
        beam = self.model.usual_beam if options.beam is None else options.beam
        return beam or (min(DEFAULT_HOTWORD_BEAM, self._settings.max_beam) if hotwords is not None else 0)

    def language_of(self, language: str | None) -> str:
        """The language asked for, or the model's first. Raises InvalidValueError for an unknown one."""
        languages = self.model.bundle.manifest.languages
        if language is None:
            return languages[0]
        if language not in languages:
            known = ", ".join(languages)
            raise InvalidValueError(
                f"Model {self.model.name!r} does not transcribe language {language!r}; it knows {known}.",
                param="language",
                code="unsupported_language",
            )
        return language

    async def hotwords(self, options: Options) -> HotwordAutomaton | None:
        """Those of ``options``, ready for the search. Raises InvalidValueError for an unknown language."""
        # A long list takes a fifth of a second, in which the event loop would answer nobody.
        if not options.hotwords:
            return None
        return await asyncio.wrap_future(self._in_pool(self._build_hotwords, options))

    def _build_hotwords(self, options: Options) -> HotwordAutomaton | None:
        bundle, language = self.model.bundle, self.language_of(options.language)
        steps = bundle.manifest.text_normalisation
        words = [normalise(word, steps, language) for word in options.hotwords]
        return build_hotwords(words, bundle.vocabulary)

    def _in_pool(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Run in the pool, in the caller's context: spans find their parents there."""
        return self._pool.submit(partial(contextvars.copy_context().run, function, *args, **kwargs))


@asynccontextmanager
async def _until(deadline_s: float) -> AsyncIterator[None]:
    """Cancel what is inside when ``deadline_s`` passes, and raise DeadlineExceededError."""
    try:
        async with asyncio.timeout(deadline_s - time.monotonic()):
            yield
    except TimeoutError:
        raise DeadlineExceededError("The audio could not be decoded before the deadline.") from None
