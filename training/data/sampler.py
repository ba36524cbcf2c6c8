"""Batches of utterances of similar length, limited by their padded seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from training.errors import DataError


class DurationBatchSampler(Sampler[list[int]]):
    """Yields lists of indices whose longest member times their number stays within `max_batch_s`.

    Utterances of similar length form a bucket that holds a whole number of batches; an epoch shuffles within
    the buckets and then the batches. Which batches there are depends on the seed and the epoch only, and how
    many on neither: the trainer validates after as many batches as the first epoch had.
    """

    def __init__(
        self,
        durations_s: Sequence[float],
        max_batch_s: float,
        *,
        max_items: int = 1_000,
        shuffle: bool = True,
        spread: float = 0.15,
        seed: int = 0,
    ) -> None:
        if not durations_s:
            raise DataError("no utterances to make batches of")
        if max(durations_s) > max_batch_s:
            raise DataError(
                f"an utterance of {max(durations_s):.1f} s does not fit a batch of {max_batch_s:.1f} s; "
                "raise max_batch_s or lower max_duration_s"
            )
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.sampler = self  # where Lightning looks for set_epoch
        self._done = 0
        self._buckets = _buckets(np.asarray(durations_s, np.float64), max_batch_s, max_items, spread)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def go_on_from(self, epoch: int, done: int) -> None:
        """Let the next iteration yield `epoch` without its first `done` batches; all done: the next epoch."""
        self.epoch, self._done = (epoch, done) if done < len(self) else (epoch + 1, 0)

    def batches(self) -> list[list[int]]:
        """All batches of the current epoch, the longest utterances first where nothing is shuffled."""
        random = np.random.default_rng((self.seed, self.epoch))
        batches: list[list[int]] = []
        for members, items in self._buckets:
            drawn = random.permutation(members) if self.shuffle else members
            batches += [drawn[start : start + items].tolist() for start in range(0, len(drawn), items)]
        if self.shuffle:
            random.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        done, self._done = self._done, 0
        return iter(self.batches()[done:])

    def __len__(self) -> int:
        return sum(-(-len(members) // items) for members, items in self._buckets)


def _buckets(
    durations_s: npt.NDArray[np.float64], max_batch_s: float, max_items: int, spread: float
) -> list[tuple[npt.NDArray[np.int64], int]]:
    """Indices of a bucket, and how many of them fit a batch; the longest utterances come first.

    A bucket reaches down to its longest duration less `spread` and holds two batches at least, so that an
    utterance meets other neighbours in every epoch.
    """
    order = np.argsort(-durations_s, kind="stable")
    falling = -durations_s[order]
    buckets = []
    start = 0
    while start < len(order):
        longest_s = -falling[start]
        items = max_items
        if longest_s * max_items > max_batch_s:
            items = max(1, int(max_batch_s / longest_s))
        near = int(np.searchsorted(falling, -longest_s * (1.0 - spread), side="right")) - start
        count = items * max(2, near // items)
        buckets.append((order[start : start + count], items))
        start += count
    return buckets
