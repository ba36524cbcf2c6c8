"""One utterance through the model: what it seems to say while it is spoken, and its transcript.

A look decodes all that was heard since the last piece, so looks come at longer and longer distances: their
audio together is at most about ten times the utterance. None is taken while other work waits for a worker.
How often, and when words are told: ADR 8 has the measurements.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import takewhile

from api.errors import AsrError
from api.hotwords import HotwordAutomaton
from api.segmenter import Window, may_be_speech
from api.telemetry import Telemetry
from api.transcriber import Options, Transcriber
from api.transcript import Segment, Transcript, join_text
from api.windows import Progress

LOOK_EVERY_S = 0.2
LOOK_SHARE = 1 / 8
"""Of what is heard already, that must be new before the next look."""
AGREE_S = 0.4
AGREE_SHARE = 1 / 5
"""Of what is heard already, over which looks must agree on a word before it is told."""


class Recogniser:
    """Holds one utterance's text; used by one task at a time."""

    def __init__(
        self,
        transcriber: Transcriber,
        options: Options,
        hotwords: HotwordAutomaton | None,
        telemetry: Telemetry,
        timeout_s: float,
    ) -> None:
        self._transcriber = transcriber
        self._options = options
        self._hotwords = hotwords
        self._telemetry = telemetry
        self._timeout_s = timeout_s
        self._begun_s = time.perf_counter()
        self._segments: list[Segment] = []
        self._processing_s = 0.0
        self._looked_at_s = 0.0
        self._has_told = False

    @property
    def looked_at_s(self) -> float:
        """Seconds of sound, since the last piece, that the last look saw."""
        return self._looked_at_s

    @property
    def model_name(self) -> str:
        """Of the model that hears."""
        return self._transcriber.model.name

    def wants_look(self, heard_s: float) -> bool:
        """Whether ``heard_s`` seconds since the last piece make another look worth it, and nobody waits."""
        due_s = self._looked_at_s + max(LOOK_EVERY_S, LOOK_SHARE * self._looked_at_s)
        return heard_s >= due_s and self._transcriber.model.batcher.is_quiet

    async def look(self, window: Window) -> str:
        """The text so far, as it seems: the last words may still change. Where that fails, the pieces'."""
        self._looked_at_s = len(window.samples) / self._sample_rate_hz
        try:
            segments = await self._hear(window)
        except AsrError:  # the transcript does not need it
            segments = []
        return join_text([*self._segments, *segments])

    async def add(self, window: Window) -> None:
        """Audio that will not change. Raises what ``Transcriber.hear`` does."""
        self._looked_at_s = 0.0
        self._segments += await self._hear(window)

    def finish(self, audio_s: float) -> Transcript:
        """The transcript of all pieces; ``audio_s`` is the utterance's length in seconds."""
        progress = Progress(duration_s=audio_s)
        segments = tuple(self._segments)
        return self._transcriber.finish(segments, self._options, progress, self._processing_s)

    def told(self) -> None:
        """Some of the text is about to reach the caller; later calls change nothing."""
        if not self._has_told:
            self._has_told = True
            elapsed_s = time.perf_counter() - self._begun_s
            self._telemetry.metrics.time_to_first_result.labels("websocket").record(elapsed_s, None)

    @property
    def _sample_rate_hz(self) -> int:
        return self._transcriber.model.bundle.manifest.sample_rate_hz

    async def _hear(self, window: Window) -> list[Segment]:
        if not may_be_speech(window.samples, self._sample_rate_hz):
            return []
        start_s = time.perf_counter()
        deadline_s = time.monotonic() + self._timeout_s
        try:
            return await self._transcriber.hear(window, self._options, self._hotwords, deadline_s, wait=True)
        finally:
            self._processing_s += time.perf_counter() - start_s


class StableWords:
    """Which words may be told before the end: those that looks agreed on for long enough.

    What was told is not taken back, so the caller sees a text that only grows; the transcript may differ from
    it. (Local agreement, Liu et al. 2020, "Low-latency sequence-to-sequence speech recognition", over a time
    instead of a number of looks.)
    """

    def __init__(self) -> None:
        self._looks: deque[tuple[float, list[str]]] = deque()
        self._told: list[str] = []

    def look(self, text: str, heard_s: float) -> str:
        """What ``text``, the whole text so far, adds to what was told; may be empty.

        ``heard_s``: seconds of sound behind it, counted from where the last piece was cut off.
        """
        words = text.split()
        if self._looks and heard_s <= self._looks[-1][0]:
            self._looks.clear()  # a piece was cut off, and time counts from there
        since_s = heard_s - max(AGREE_S, AGREE_SHARE * heard_s) + 1e-3  # sound comes in whole milliseconds
        while len(self._looks) > 1 and self._looks[1][0] <= since_s:
            self._looks.popleft()
        agreed: list[str] = []
        if self._looks and self._looks[0][0] <= since_s:
            columns = zip(words, *(before for _, before in self._looks), strict=False)
            agreed = [column[0] for column in takewhile(_are_equal, columns)]
        self._looks.append((heard_s, words))
        return self._tell(agreed)

    def finish(self, text: str) -> str:
        """The rest of the transcript; empty where it does not begin with what was told."""
        return self._tell(text.split())

    def _tell(self, words: list[str]) -> str:
        told = len(self._told)
        if len(words) <= told or words[:told] != self._told:
            return ""
        self._told = words
        return (" " if told else "") + " ".join(words[told:])


def _are_equal(column: tuple[str, ...]) -> bool:
    return len(set(column)) == 1
