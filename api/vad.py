"""Voice activity by level: which stretches of a stream are speech.

The decision is causal and made per 10 ms frame, so it does not depend on how the stream was split into
blocks, and a live stream can use it as well as a file.

Speech begins a certain way up from the noise to the loudest sound of late, and ends further down: there is
little room between them in a noisy room, and much where the noise, voices perhaps, rises and falls. Both are
tracked. What was measured, and how often it errs: docs/experiments.md, 30 November 2026.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

FRAME_S = 0.01
_LEVEL_FRAMES = 3  # power is averaged over 30 ms: single frames of noise vary by decibels
# The noise is the quietest 0.3 s of the last 5 s. Shorter stretches are gaps between syllables, or packets
# that a telephone line has lost.
_NOISE_FRAMES = 30
_NOISE_MEMORY_FRAMES = 500
_LOUDER_DB = 0.03  # the noise grows by so much at most with every frame: speech may go on for long
_FIRST_NOISE_DBFS = -45.0  # at most, so that speech from the first frame is heard
_FIRST_RANGE_DB = 25.0  # from noise to speech, before there was any
_FORGET_DB = 0.005  # the loudest sound counts for so much less with every frame
_SILENCE_DBFS = -70.0  # nothing below this is speech, whatever the noise
_LEAST_OVER_NOISE_DB = 1.0  # however low the threshold: the noise itself is no speech
_SLOPE_DB = 2.0  # the probability of speech rises from 1/2 to 3/4 in 2.2 dB
_ONSET_FRAMES = 2 + _LEVEL_FRAMES  # speech must last 30 ms to count, a click does not
_TAIL_S = 0.2  # kept after the last speech frame: final consonants are quiet


@dataclass(frozen=True, slots=True)
class Gate:
    """How far over the noise is speech: a share of the range up to the loudest sound, within bounds (dB)."""

    share: float
    least_db: float
    most_db: float

    def over_noise_db(self, range_db: float) -> float:
        """Where ``range_db`` is from the noise to the loudest sound."""
        return min(max(self.share * range_db, self.least_db), self.most_db)


BEGIN = Gate(0.35, 7.0, 12.0)
_GO_ON = Gate(0.2, 3.5, 8.0)


@dataclass(frozen=True, slots=True)
class VadOptions:
    """OpenAI's ``server_vad`` parameters: ``threshold`` in (0, 1), the others in milliseconds."""

    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500


class VoiceActivity:
    """Push blocks in, take stretches of speech out as (start_sample, samples, is_last) pieces.

    `after` has heard the same stream until now: how loud its noise and its speech are is known.
    """

    def __init__(self, sample_rate_hz: int, options: VadOptions, after: VoiceActivity | None = None) -> None:
        self._frame = int(FRAME_S * sample_rate_hz)
        self._stricter_db = _SLOPE_DB * math.log(options.threshold / (1 - options.threshold))
        self._levels: _Levels = after._levels if after is not None else _Levels()
        self._padding_frames = round(options.prefix_padding_ms / 1000 / FRAME_S)
        self._silence_frames = max(1, round(options.silence_duration_ms / 1000 / FRAME_S))
        self._tail_frames = min(self._silence_frames, round(_TAIL_S / FRAME_S))
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
        for frame, power in zip(framed, framed.var(axis=1).tolist(), strict=True):
            yield from self._step(frame, power)

    def finish(self) -> Iterator[tuple[int, FloatArray, bool]]:
        """End of the stream: an open stretch is closed, with what came after its last speech frame."""
        if self._in_speech:
            tail = [*self._pause, self._rest][: self._tail_frames]
            start_frame = self._frames_seen - len(self._pause)
            yield start_frame * self._frame, np.concatenate(tail), True
        self._in_speech = False
        self._pause.clear()

    def _step(self, frame: FloatArray, power: float) -> Iterator[tuple[int, FloatArray, bool]]:
        speech = self._is_speech(power)
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

    def _is_speech(self, power: float) -> bool:
        level_dbfs, noise_dbfs, loudest_dbfs = self._levels.push(power)
        gate = _GO_ON if self._in_speech else BEGIN
        over_noise_db = gate.over_noise_db(loudest_dbfs - noise_dbfs) + self._stricter_db
        return level_dbfs > max(_SILENCE_DBFS, noise_dbfs + max(_LEAST_OVER_NOISE_DB, over_noise_db))


class _Levels:
    """Level of the sound, of the noise before it, and of the loudest sound of late, frame by frame, dBFS."""

    def __init__(self) -> None:
        self._frames = 0
        self._powers: deque[float] = deque(maxlen=_NOISE_FRAMES)
        # (frame, level) of each smoothed level that is lower than all after it: the first is the lowest.
        self._quiet: deque[tuple[int, float]] = deque()
        self._noise_dbfs = _FIRST_NOISE_DBFS
        self._loudest_dbfs = _FIRST_NOISE_DBFS + _FIRST_RANGE_DB

    def push(self, power: float) -> tuple[float, float, float]:
        """The three levels at the next frame, whose mean square is ``power``."""
        noise_dbfs = self._noise_dbfs
        self._powers.append(power)
        powers = list(self._powers)
        level_dbfs = _dbfs(powers[-_LEVEL_FRAMES:])
        self._remember(_dbfs(powers))
        self._noise_dbfs = min(self._quiet[0][1], self._noise_dbfs + _LOUDER_DB)
        self._loudest_dbfs = max(level_dbfs, self._loudest_dbfs - _FORGET_DB)
        self._frames += 1
        return level_dbfs, noise_dbfs, self._loudest_dbfs

    def _remember(self, smoothed_dbfs: float) -> None:
        while self._quiet and self._quiet[-1][1] >= smoothed_dbfs:
            self._quiet.pop()
        self._quiet.append((self._frames, smoothed_dbfs))
        if self._quiet[0][0] <= self._frames - _NOISE_MEMORY_FRAMES:
            self._quiet.popleft()


def _dbfs(powers: list[float]) -> float:
    return 10 * math.log10(sum(powers) / len(powers) + 1e-10)
