"""Decoding and cutting as one pull: each call, in a pool thread, does just enough for the next windows."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from api.audio import AudioReader
from api.errors import ClientDisconnected
from api.segmenter import Segmenter, Window
from api.telemetry import Telemetry

_TURN_S = 0.25  # of a thread for a file in which there is nothing to hear, however long: others wait for it


@dataclass(slots=True)
class Progress:
    """Filled while a file is read: complete once its last window was taken.

    ``unspellable``: hotwords that the model's vocabulary cannot spell.
    """

    duration_s: float = 0.0
    warnings: tuple[str, ...] = ()
    unspellable: tuple[str, ...] = ()


class WindowReader:
    """Windows of one file, which is closed at its end.

    ``next`` and ``close`` may run in different threads, never at once.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        sample_rate_hz: int,
        max_audio_s: float,
        segmenter: Segmenter,
        progress: Progress,
        telemetry: Telemetry,
    ) -> None:
        self.exhausted = False
        self._file = file
        self._sample_rate_hz = sample_rate_hz
        self._max_audio_s = max_audio_s
        self._segmenter = segmenter
        self._progress = progress
        self._telemetry = telemetry
        self._reader: AudioReader | None = None
        self._blocks: Iterator[NDArray[np.float32]] = iter(())
        self._lock = threading.Lock()
        self._stopped = False
        self._decode_s = 0.0
        self._segment_s = 0.0

    def next(self) -> list[Window]:
        """The next windows; none where the file has ended (``exhausted``) or its turn has.

        Raises UndecodableAudioError, AudioTooLongError.
        """
        with self._lock:
            self._decode_s = self._segment_s = 0.0
            try:
                return self._pull()
            finally:
                self._telemetry.record_stage("decode", self._decode_s, ended_ago_s=self._segment_s)
                self._telemetry.record_stage("segment", self._segment_s)

    def _pull(self) -> list[Window]:
        turn_ends_s = time.perf_counter() + _TURN_S
        while not self._stopped:
            block = self._decode()
            start_s = time.perf_counter()
            windows = list(self._segmenter.finish() if block is None else self._segmenter.push(block))
            self._segment_s += time.perf_counter() - start_s
            if block is None:
                self.exhausted = True
                self._release()  # a file that waits in the queue is not held twice, as bytes and as samples
            if windows or self.exhausted or time.perf_counter() > turn_ends_s:
                return windows
        raise ClientDisconnected

    def _decode(self) -> NDArray[np.float32] | None:
        """One block of waveform, None at the end."""
        start_s = time.perf_counter()
        try:
            if self._reader is None:
                self._reader = AudioReader(
                    self._file, sample_rate_hz=self._sample_rate_hz, max_audio_s=self._max_audio_s
                )
                self._blocks = iter(self._reader)
            return next(self._blocks, None)
        finally:
            self._decode_s += time.perf_counter() - start_s
            if self._reader is not None:
                self._progress.duration_s = self._reader.duration_s
                self._progress.warnings = self._reader.warnings

    def stop(self) -> None:
        """Ask a running ``next`` to end after the block it is at."""
        self._stopped = True

    def close(self) -> None:
        """Release the decoder, after a running ``next`` has ended."""
        self._stopped = True
        with self._lock:
            self._release()

    def _release(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader, self._blocks = None, iter(())
            self._file.close()
