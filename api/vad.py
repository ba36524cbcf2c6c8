"""Voice activity by energy over a tracked noise floor: which stretches of a stream are speech.

The decision is causal and made per 10 ms frame, so it does not depend on how the stream was split into
blocks, and a live stream can use it as well as a file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

FRAME_S = 0.01
_FLOOR_MEMORY_S = 3.0  # the noise floor is the quietest frame of this past
_FIRST_FLOOR_DBFS = (
    -45.0
)  # and at most this in the first second, so that speech from the first frame is heard
_FIRST_S = 1.0
_SILENCE_DBFS = -60.0  # nothing below this is speech, whatever the floor
_HALFWAY_DB = 10.0  # level over the floor at which the probability of speech is one half
_SLOPE_DB = 2.0
_ONSET_FRAMES = 3  # speech must last 30 ms to count, a click does not
_TAIL_S = 0.2  # kept after the last speech frame: final consonants are quiet


@dataclass(frozen=True, slots=True)
class VadOptions:
    """OpenAI's ``server_vad`` parameters: ``threshold`` in (0, 1), the others in milliseconds."""

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500


class VoiceActivity:
    """Push blocks in, take stretches of speech out as (start_sample, samples, is_last) pieces."""

    def __init__(self, sample_rate_hz: int, options: VadOptions) -> None:
        self._frame = int(FRAME_S * sample_rate_hz)
        self._threshold_db = _HALFWAY_DB + _SLOPE_DB * float(
            np.log(options.threshold / (1 - options.threshold))
        )
        self._padding_frames = round(options.prefix_padding_ms / 1000 / FRAME_S)
        self._silence_frames = max(1, round(options.silence_duration_ms / 1000 / FRAME_S))
        self._tail_frames = min(self._silence_frames, round(_TAIL_S / FRAME_S))
        self._past_dbfs: deque[float] = deque(maxlen=round(_FLOOR_MEMORY_S / FRAME_S))
        self._before: deque[FloatArray] = deque(maxlen=self._padding_frames + _ONSET_FRAMES)
        self._pause: list[FloatArray] = []
        self._rest = np.zeros(0, dtype=np.float32)
        self._frames_seen = 0
        self._onset = 0
        self._in_speech = False

    def push(self, block: FloatArray) -> Iterator[tuple[int, FloatArray, bool]]:
        """Pieces of speech in float32 (n,) ``block``; pieces of one stretch are contiguous."""
        samples = np.concatenate((self._rest, block)) if len(self._rest) else block
        frames = len(samples) // self._frame
        self._rest = samples[frames * self._frame :].copy()
        framed = samples[: frames * self._frame].reshape(frames, self._frame)
        # The variance, not the power: the constant offset of a cheap converter would cover quiet speech.
        levels = 10 * np.log10(framed.var(axis=1) + 1e-10)
        for frame, level_dbfs in zip(framed, levels.tolist(), strict=True):
            yield from self._step(frame, level_dbfs)

    def finish(self) -> Iterator[tuple[int, FloatArray, bool]]:
        """End of the stream: an open stretch is closed, with what came after its last speech frame."""
        if self._in_speech:
            tail = [*self._pause, self._rest][: self._tail_frames]
            start_frame = self._frames_seen - len(self._pause)
            yield start_frame * self._frame, np.concatenate(tail), True
        self._in_speech = False
        self._pause.clear()

    def _step(self, frame: FloatArray, level_dbfs: float) -> Iterator[tuple[int, FloatArray, bool]]:
        speech = self._is_speech(level_dbfs)
        self._frames_seen += 1
        if not self._in_speech:
            self._before.append(frame)
            self._onset = self._onset + 1 if speech else 0
            if self._onset >= _ONSET_FRAMES:
                self._in_speech = True
                start_frame = self._frames_seen - len(self._before)
                yield start_frame * self._frame, np.concatenate(self._before), False
                self._before.clear()
            return
        if not speech:
            self._pause.append(frame)
            if len(self._pause) >= self._silence_frames:
                yield from self._close()
            return
        start_frame = self._frames_seen - 1 - len(self._pause)
        yield start_frame * self._frame, np.concatenate([*self._pause, frame]), False
        self._pause.clear()

    def _close(self) -> Iterator[tuple[int, FloatArray, bool]]:
        """The pause is long enough: keep its first part as the tail, its end may pad the next stretch."""
        start_frame = self._frames_seen - len(self._pause)
        yield start_frame * self._frame, np.concatenate(self._pause[: self._tail_frames]), True
        self._before.extend(self._pause[self._tail_frames :])
        self._pause.clear()
        self._in_speech, self._onset = False, 0

    def _is_speech(self, level_dbfs: float) -> bool:
        floor_dbfs = min(self._past_dbfs, default=_FIRST_FLOOR_DBFS)
        if self._frames_seen < _FIRST_S / FRAME_S:
            floor_dbfs = min(floor_dbfs, _FIRST_FLOOR_DBFS)
        self._past_dbfs.append(level_dbfs)
        return level_dbfs > max(_SILENCE_DBFS, floor_dbfs + self._threshold_db)
