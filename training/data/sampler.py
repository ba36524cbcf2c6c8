"""Batches of utterances of similar length, limited by their padded seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from training.errors import DataError


class DurationBatchSampler(Sampler[list[int]]):
    """Yields lists of indices whose longest member times their number stays within `max_batch_s`.

    Durations are jittered by a few per cent before sorting, so that an utterance meets other neighbours in
    each epoch, and the batches come in random order. Both depend on the seed and the epoch only: a resumed
    run sees the batches that it would have seen.
    """

    def __init__(
        self,
        durations_s: Sequence[float],
        max_batch_s: float,
        *,
        max_items: int = 1_000,
        shuffle: bool = True,
        jitter: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not durations_s:
            raise DataError("no utterances to make batches of")
        if max(durations_s) > max_batch_s:
            raise DataError(
                f"an utterance of {max(durations_s):.1f} s does not fit a batch of {max_batch_s:.1f} s; "
                "raise max_batch_s or lower max_duration_s"
            )
        self.durations_s = np.asarray(durations_s, np.float64)
        self.max_batch_s = max_batch_s
        self.max_items = max_items
        self.shuffle = shuffle
        self.jitter = jitter
        self.seed = seed
        self.epoch = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        """All batches of the current epoch."""
        random = np.random.default_rng((self.seed, self.epoch))
        keys = self.durations_s
        if self.shuffle:
            keys = keys * random.uniform(1 - self.jitter, 1 + self.jitter, len(keys))
        batches: list[list[int]] = []
        current: list[int] = []
        longest_s = 0.0
        for index in np.argsort(keys, kind="stable").tolist():
            grown_s = max(longest_s, float(self.durations_s[index]))
            if current and (
                grown_s * (len(current) + 1) > self.max_batch_s or len(current) >= self.max_items
            ):
                batches.append(current)
                current, grown_s = [], float(self.durations_s[index])
            current.append(index)
            longest_s = grown_s
        batches.append(current)
        if self.shuffle:
            random.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())

    def __len__(self) -> int:
        return len(self.batches())
