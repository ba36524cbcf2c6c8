"""What an engine gives for one utterance: log-probabilities of its frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Frames:
    """Log-probabilities of one utterance, every different frame once where the graph says which are equal.

    A model with a decoder shows each token in a few equal frames and nothing in most others; with its tens of
    thousands of tokens, the frames take ten times as much memory as what is different of them.
    """

    rows: NDArray[np.float32]
    """(rows, vocabulary)."""
    of_frame: NDArray[np.int64] | None = None
    """(frames,), the row of each frame; None: row i is frame i, and there are no others."""

    def __len__(self) -> int:
        """How many frames."""
        return len(self.rows if self.of_frame is None else self.of_frame)

    def of_token(self, token_id: int) -> NDArray[np.float32]:
        """(frames,), the log-probabilities of one token."""
        values = self.rows[:, token_id]
        return values if self.of_frame is None else values[self.of_frame]

    def whole(self) -> NDArray[np.float32]:
        """(frames, vocabulary), a row for every frame."""
        return self.rows if self.of_frame is None else self.rows[self.of_frame]

    def at(self, frames: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(frames), vocabulary), the rows of these frames, a copy."""
        return self.rows[frames if self.of_frame is None else self.of_frame[frames]]

    def firsts(self) -> NDArray[np.int64]:
        """The first one of every run of equal frames."""
        if self.of_frame is None:
            changes = (self.rows[1:] != self.rows[:-1]).any(axis=1)
        else:
            changes = self.of_frame[1:] != self.of_frame[:-1]
        return np.flatnonzero(np.append(len(self) > 0, changes))

    def different(self) -> Frames:
        """The same frames, without rows that belong to none of them, such as those of other utterances."""
        if self.of_frame is None:
            return self
        used, of_frame = np.unique(self.of_frame, return_inverse=True)
        return Frames(self.rows[used], of_frame)
