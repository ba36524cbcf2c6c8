"""A stream of waveform blocks -> windows that fit the model, cut where nobody speaks.

Two ways to cut, both causal and independent of how the stream was split into blocks:

- **whole** (``vad=None``): the audio stays in one piece up to the model's window; longer audio is cut at the
  quietest place in the window's second half, so no sample is lost and none is given twice.
- **server_vad**: only stretches of speech are kept, each with its padding; a pause of
  ``silence_duration_ms`` ends one.

Windows without anything that could be speech (silence, steady noise, a tone) are dropped: no text is made
from them. Music passes this gate; the model's own blank decides there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from api.vad import VadOptions, VoiceActivity

FloatArray = NDArray[np.float32]

FRAME_S = 0.02
_SMOOTHING_S = 0.2  # a cut needs this much quiet; the gaps inside words are shorter
_QUIET_MARGIN_DB = 3.0  # frames this close to the quietest count as equally quiet
SILENCE_DBFS = -65.0  # loudest frame of a silent window
STEADY_RANGE_DB = 3.0  # loudest frame minus the 10th percentile; white noise has 1.6, noisy speech 5 and more
_SHORTEST_JUDGED_S = 0.5  # below this a window has too few frames to be called steady
_FLOOR = 1e-10  # -100 dBFS, keeps the logarithm finite


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

    def __init__(self, *, sample_rate_hz: int, max_window_s: float, vad: VadOptions | None = None) -> None:
        self.sample_rate_hz = sample_rate_hz
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
                if may_be_speech(window.samples, self.sample_rate_hz):
                    yield window
            if is_last:
                yield from self._rest()

    def _rest(self) -> Iterator[Window]:
        window = self._stretch.take()
        if window is not None and may_be_speech(window.samples, self.sample_rate_hz):
            yield window


def quietest_cut(samples: FloatArray, sample_rate_hz: int) -> int:
    """Sample index in the second half of float32 (n,) ``samples`` where a cut does least harm.

    The level is smoothed over 200 ms; of all places that are as quiet as the quietest, the middle of the
    longest run is taken, and of equally long runs the last.
    """
    levels = frame_levels_dbfs(samples, sample_rate_hz, smoothing_s=_SMOOTHING_S)
    first = len(levels) // 2
    quiet = levels[first:] <= levels[first:].min() + _QUIET_MARGIN_DB
    edges = np.flatnonzero(np.diff(np.concatenate(([0], quiet.view(np.int8), [0]))))
    starts, ends = edges[0::2], edges[1::2]
    longest = len(starts) - 1 - int(np.argmax((ends - starts)[::-1]))
    middle_frame = first + (starts[longest] + ends[longest]) / 2
    return int(min(max(middle_frame * FRAME_S * sample_rate_hz, 1), len(samples)))


def may_be_speech(samples: FloatArray, sample_rate_hz: int) -> bool:
    """False for float32 (n,) ``samples`` that are silent or steady from end to end."""
    levels = frame_levels_dbfs(samples, sample_rate_hz)
    if levels.max() < SILENCE_DBFS:
        return False
    if len(samples) < _SHORTEST_JUDGED_S * sample_rate_hz:
        return True
    tenth = (len(levels) - 1) // 10
    return bool(levels.max() - np.partition(levels, tenth)[tenth] >= STEADY_RANGE_DB)


def frame_levels_dbfs(samples: FloatArray, sample_rate_hz: int, smoothing_s: float = 0.0) -> FloatArray:
    """Level of each 20 ms frame of float32 (n,) ``samples`` in dB under full scale, float32 (frames,).

    An incomplete last frame counts as a frame. With ``smoothing_s`` the power is averaged around each frame.
    The mean of ``samples`` does not count: the constant offset of a cheap converter would cover quiet speech.
    """
    samples = samples - samples.mean()
    frame = max(1, int(FRAME_S * sample_rate_hz))
    whole = len(samples) // frame
    framed = samples[: whole * frame].reshape(whole, frame)
    power = np.einsum("ij,ij->i", framed, framed) / frame
    rest = samples[whole * frame :]
    if len(rest):
        power = np.append(power, np.dot(rest, rest) / len(rest))
    if smoothing_s:
        width = max(1, round(smoothing_s / FRAME_S))
        padded = np.pad(power, (width // 2, width - 1 - width // 2), mode="edge")
        power = np.convolve(padded, np.full(width, 1 / width, dtype=np.float32), mode="valid")
    return np.asarray(10 * np.log10(power + _FLOOR), dtype=np.float32)
