"""A live recording, cut into utterances while it goes on.

With server_vad an utterance is a stretch of speech with its padding; without, it begins with the first sample
and lasts until ``commit``. Samples are counted from the start of the recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from api.segmenter import Stretch, Window
from api.vad import VadOptions, VoiceActivity


@dataclass(frozen=True, slots=True)
class Began:
    """An utterance begins here, padding included."""

    at_sample: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Audio of the utterance that will not change: all of it, or as much as the model takes at once."""

    window: Window


@dataclass(frozen=True, slots=True)
class Ended:
    """The utterance ends here, after so many ``samples``; its last piece came before."""

    at_sample: int
    samples: int


Happening = Began | Piece | Ended


class Utterances:
    """Push samples in, take out what happens; holds at most one window of the model.

    `after` has heard the same recording until now: how long it was, and how loud its room is, is known.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        max_window_s: float,
        vad: VadOptions | None,
        after: Utterances | None = None,
    ) -> None:
        self.sample_rate_hz = sample_rate_hz
        self.samples_heard = 0
        self._vad = vad
        self._began_at = 0
        self._stretch = Stretch(sample_rate_hz=sample_rate_hz, max_window_s=max_window_s)
        self._activity: VoiceActivity | None = None
        self._last_activity: VoiceActivity | None = None  # of whoever listened for speech last
        if after is not None:
            self.samples_heard = round(after.samples_heard / after.sample_rate_hz * sample_rate_hz)
            self._last_activity = after._last_activity
        self._begin_anew()

    @property
    def is_open(self) -> bool:
        """Whether an utterance has begun and not ended."""
        return len(self._stretch) > 0

    @property
    def open_samples(self) -> int:
        """How many of the open utterance are not in a piece yet."""
        return len(self._stretch)

    def push(self, samples: NDArray[np.float32]) -> Iterator[Happening]:
        """What float32 (n,) ``samples`` bring, in order."""
        start_sample = self.samples_heard
        self.samples_heard += len(samples)
        if self._activity is None:
            if len(samples):
                yield from self._append(start_sample, samples)
            return
        for at_sample, spoken, is_last in self._activity.push(samples):
            yield from self._append(self._origin + at_sample, spoken)
            if is_last:
                yield from self._end()

    def commit(self) -> Iterator[Happening]:
        """End the open utterance here, if there is one, whoever still speaks."""
        if self._activity is not None:
            for at_sample, spoken, _ in self._activity.finish():
                yield from self._append(self._origin + at_sample, spoken)
        if self.is_open:
            yield from self._end()
        self._begin_anew()

    def clear(self, unheard: int = 0) -> None:
        """Forget the open utterance, and so many samples that were to come: times go on behind them."""
        self.samples_heard += unheard
        self._stretch.take()
        self._begin_anew()

    def so_far(self) -> Window | None:
        """What is heard of the open utterance since its last piece."""
        return self._stretch.window()

    def _begin_anew(self) -> None:
        self._origin = self.samples_heard
        if self._vad is not None:
            self._activity = VoiceActivity(self.sample_rate_hz, self._vad, self._last_activity)
            self._last_activity = self._activity

    def _append(self, start_sample: int, samples: NDArray[np.float32]) -> Iterator[Happening]:
        if not self.is_open:
            self._began_at = start_sample
            yield Began(start_sample)
        for window in self._stretch.append(start_sample, samples):
            yield Piece(window)

    def _end(self) -> Iterator[Happening]:
        window = self._stretch.take()
        if window is None:
            return
        yield Piece(window)
        at_sample = window.start_sample + len(window.samples)
        yield Ended(at_sample, at_sample - self._began_at)
