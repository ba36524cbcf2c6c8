"""A stream of waveform blocks -> windows that fit the model, cut where nobody speaks.

Two ways to cut, both causal and independent of how the stream was split into blocks:

- **whole** (``vad=None``): the audio stays in one piece up to the model's window; longer audio is cut at the
  quietest place in the window's second half, so no sample is lost and none is given twice. For models that
  scale a window as a whole, it is also cut in pauses between voices of different loudness.
- **server_vad**: only stretches of speech are kept, each with its padding; a pause of
  ``silence_duration_ms`` ends one.

Windows without anything that could be speech (silence, steady noise, a tone) are dropped: no text is made
from them. Music passes this gate; the model's own blank decides there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from api.vad import BEGIN, VadOptions, VoiceActivity

FloatArray = NDArray[np.float32]

FRAME_S = 0.02
_SMOOTHING_FRAMES = 10  # a cut needs 0.2 s of quiet; the gaps inside words are shorter
_QUIET_MARGIN_DB = 3.0  # frames this close to the quietest count as equally quiet
SILENCE_DBFS = -65.0  # loudest frame of a silent window
STEADY_RANGE_DB = 3.0  # loudest frame minus the 10th percentile; white noise has 1.6, noisy speech 5 and more
_SHORTEST_JUDGED_S = 0.5  # below this a window has too few frames to be called steady
_FLOOR = 1e-10  # -100 dBFS, keeps the logarithm finite
# Voices of different loudness; what was measured is in docs/experiments.md, 30 November 2026.
_UNLIKE_DB = 10.0
_PAUSE_FRAMES = 15  # 0.3 s between them
_VOICE_FRAMES = 15  # a shorter sound says little about a voice's loudness
_SPEECH_FRAMES = 3  # power is averaged over 60 ms to tell speech from pauses


@dataclass(frozen=True, slots=True)
class Window:
    """``samples`` float32 (n,) that begin ``start_sample`` samples after the start of the file."""

    start_sample: int
    samples: FloatArray


class Stretch:
    """Contiguous samples that grow; what exceeds the model's window is cut off at the quietest place."""

    def __init__(self, *, sample_rate_hz: int, max_window_s: float) -> None:
        self.sample_rate_hz = sample_rate_hz
        self.start_sample = 0
        self._max_window = int(max_window_s * sample_rate_hz)
        self._parts: list[FloatArray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, start_sample: int, samples: FloatArray) -> Iterator[Window]:
        """Windows that float32 (n,) ``samples`` fill; an empty stretch begins at ``start_sample``."""
        if not self._length:
            self.start_sample = start_sample
        self._parts.append(samples)
        self._length += len(samples)
        if self._length <= self._max_window:
            return
        buffered = np.concatenate(self._parts)
        while len(buffered) > self._max_window:
            cut = quietest_cut(buffered[: self._max_window], self.sample_rate_hz)
            yield Window(self.start_sample, buffered[:cut])
            buffered = buffered[cut:]
            self.start_sample += cut
        self._parts, self._length = [buffered.copy()], len(buffered)

    def window(self) -> Window | None:
        """What has been gathered since the last cut; None where that is nothing."""
        if not self._length:
            return None
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return Window(self.start_sample, self._parts[0])

    def take(self) -> Window | None:
        """The same, and the stretch is empty afterwards."""
        window = self.window()
        self._parts, self._length = [], 0
        return window


class Segmenter:
    """Push blocks in, take windows out; holds at most one window and one block."""

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        max_window_s: float,
        vad: VadOptions | None = None,
        scales_windows: bool = False,
    ) -> None:
        """``scales_windows``: the model does, and misses a quiet voice beside a loud one."""
        self.sample_rate_hz = sample_rate_hz
        self._scales_windows = scales_windows and vad is None
        self._activity = VoiceActivity(sample_rate_hz, vad) if vad is not None else None
        self._stretch = Stretch(sample_rate_hz=sample_rate_hz, max_window_s=max_window_s)

    def push(self, block: FloatArray) -> Iterator[Window]:
        """Windows that ``block`` (float32 (n,)) completes, in order."""
        if self._activity is not None:
            yield from self._append(self._activity.push(block))
        else:
            after = self._stretch.start_sample + len(self._stretch)
            yield from self._append([(after, block, False)])

    def finish(self) -> Iterator[Window]:
        """The rest, when the file has ended."""
        if self._activity is not None:
            yield from self._append(self._activity.finish())
        yield from self._rest()

    def _append(self, pieces: Iterable[tuple[int, FloatArray, bool]]) -> Iterator[Window]:
        for start_sample, samples, is_last in pieces:
            for window in self._stretch.append(start_sample, samples):
                yield from self._heard(window)
            if is_last:
                yield from self._rest()

    def _rest(self) -> Iterator[Window]:
        window = self._stretch.take()
        if window is not None:
            yield from self._heard(window)

    def _heard(self, window: Window) -> Iterator[Window]:
        """The window, or its parts, without those that cannot be speech."""
        samples, rate_hz = window.samples, self.sample_rate_hz
        power = frame_power(samples, rate_hz)
        cuts = cuts_between_voices(power) if self._scales_windows else []
        if not cuts:
            if _may_be_speech(power, len(samples), rate_hz):
                yield window
            return
        frame = int(FRAME_S * rate_hz)
        for start, end in pairwise([0, *(cut * frame for cut in cuts), len(samples)]):
            if may_be_speech(samples[start:end], rate_hz):
                yield Window(window.start_sample + start, samples[start:end])


def quietest_cut(samples: FloatArray, sample_rate_hz: int) -> int:
    """Sample index in the second half of float32 (n,) ``samples`` where a cut does least harm.

    The level is smoothed over 0.2 s; of all places that are as quiet as the quietest, the middle of the
    longest run is taken, and of equally long runs the last.
    """
    levels = _dbfs(_smoothed(frame_power(samples, sample_rate_hz), _SMOOTHING_FRAMES))
    first = len(levels) // 2
    quiet = levels[first:] <= levels[first:].min() + _QUIET_MARGIN_DB
    starts, ends = _runs(quiet)
    longest = len(starts) - 1 - int(np.argmax((ends - starts)[::-1]))
    middle_frame = first + (starts[longest] + ends[longest]) / 2
    return int(min(max(middle_frame * FRAME_S * sample_rate_hz, 1), len(samples)))


def cuts_between_voices(power: FloatArray) -> list[int]:
    """Frames between stretches of speech that differ much in loudness; ``power`` as `frame_power` gives it.

    Each is in the middle of a pause. A stretch is compared with the loudest one since the last cut.
    """
    levels = _dbfs(_smoothed(power, _SPEECH_FRAMES))
    twentieth = (len(levels) - 1) // 20
    noise_dbfs = float(np.partition(levels, twentieth)[twentieth])
    speech = levels > noise_dbfs + BEGIN.over_noise_db(float(levels.max()) - noise_dbfs)
    starts, ends = _runs(speech)
    if not len(starts):
        return []
    paused = starts[1:] - ends[:-1] >= _PAUSE_FRAMES
    cuts = []
    loudest_dbfs: float | None = None
    after = 0  # end of the stretch before
    for start, end in zip(starts[np.append(True, paused)], ends[np.append(paused, True)], strict=True):
        if end - start >= _VOICE_FRAMES:
            ninth = (end - start) * 9 // 10
            loudness_dbfs = float(np.partition(levels[start:end], ninth)[ninth])
            if loudest_dbfs is None:
                loudest_dbfs = loudness_dbfs
            elif abs(loudness_dbfs - loudest_dbfs) > _UNLIKE_DB:
                cuts.append(int(after + start) // 2)
                loudest_dbfs = loudness_dbfs
            loudest_dbfs = max(loudness_dbfs, loudest_dbfs)
        after = end
    return cuts


def _runs(flags: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where stretches of True begin, and where each is over, int64 (runs,)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.view(np.int8), [0]))))
    return edges[0::2], edges[1::2]


def may_be_speech(samples: FloatArray, sample_rate_hz: int) -> bool:
    """False for float32 (n,) ``samples`` that are silent or steady from end to end."""
    return _may_be_speech(frame_power(samples, sample_rate_hz), len(samples), sample_rate_hz)


def _may_be_speech(power: FloatArray, length: int, sample_rate_hz: int) -> bool:
    levels = _dbfs(power)
    if levels.max() < SILENCE_DBFS:
        return False
    if length < _SHORTEST_JUDGED_S * sample_rate_hz:
        return True
    tenth = (len(levels) - 1) // 10
    return bool(levels.max() - np.partition(levels, tenth)[tenth] >= STEADY_RANGE_DB)


def frame_power(samples: FloatArray, sample_rate_hz: int) -> FloatArray:
    """Mean square of each 20 ms frame of float32 (n,) ``samples``, float32 (frames,).

    An incomplete last frame counts as a frame. The mean of ``samples`` does not count: the constant offset of
    a cheap converter would cover quiet speech.
    """
    samples = samples - samples.mean()
    frame = max(1, int(FRAME_S * sample_rate_hz))
    whole = len(samples) // frame
    framed = samples[: whole * frame].reshape(whole, frame)
    power = np.einsum("ij,ij->i", framed, framed) / frame
    rest = samples[whole * frame :]
    if len(rest):
        power = np.append(power, np.dot(rest, rest) / len(rest))
    return np.asarray(power, dtype=np.float32)


def _smoothed(power: FloatArray, frames: int) -> FloatArray:
    """Averaged over so many frames around each."""
    padded = np.pad(power, (frames // 2, frames - 1 - frames // 2), mode="edge")
    return np.convolve(padded, np.full(frames, 1 / frames, dtype=np.float32), mode="valid")


def _dbfs(power: FloatArray) -> FloatArray:
    return np.asarray(10 * np.log10(power + _FLOOR), dtype=np.float32)
