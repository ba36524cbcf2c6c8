"""How batches are formed: pure functions and data, no threads and no clocks."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may cost.

    ``max_batch``: utterances. ``max_padded_samples``: rows times padded length. ``max_padding``: largest
    share of padding, 0 to 1. ``buckets``: the lengths in samples that batches are padded to, ascending.
    """

    max_batch: int
    max_padded_samples: int
    max_padding: float = 0.25
    buckets: tuple[int, ...] = ()


def bucket_of(samples: int, buckets: Sequence[int]) -> int:
    """The least bucket that holds ``samples``; ``samples`` itself above the largest."""
    place = bisect_left(buckets, samples)
    return buckets[place] if place < len(buckets) else samples


def plan_batch(samples: Sequence[int], limits: BatchLimits) -> list[int]:
    """Which of the waiting utterances run together.

    ``samples``: lengths of the candidates in the order of their turns, at least one. Returns ascending
    indices. The first candidate is always in, whatever it costs: nobody is overtaken for ever. Others join in
    order while the batch stays within every limit.
    """
    chosen = [0]
    longest = total = samples[0]
    for index in range(1, len(samples)):
        if len(chosen) >= limits.max_batch:
            break
        new_longest = max(longest, samples[index])
        padded = bucket_of(new_longest, limits.buckets) * (len(chosen) + 1)
        new_total = total + samples[index]
        if padded <= limits.max_padded_samples and new_total >= (1.0 - limits.max_padding) * padded:
            chosen.append(index)
            longest, total = new_longest, new_total
    return chosen


class TurnQueue(Generic[Item]):
    """Items by whose they are. Owners take turns, an item each; each owner's items keep their order.

    So a clip of one segment waits for at most one segment of every file that is ahead of it. Not thread-safe.
    """

    def __init__(self) -> None:
        self._turns: OrderedDict[Hashable, deque[Item]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, owner: Hashable, item: Item) -> None:
        """Append to the owner's items; an owner without any goes to the end of the round."""
        self._turns.setdefault(owner, deque()).append(item)
        self._length += 1

    def in_turn(self, limit: int) -> list[tuple[Hashable, Item]]:
        """Up to ``limit`` items in the order of turns: everybody's first, then everybody's second, ..."""
        found: list[tuple[Hashable, Item]] = []
        depth = 0
        while len(found) < limit:
            before = len(found)
            for owner, items in self._turns.items():
                if depth < len(items):
                    found.append((owner, items[depth]))
                    if len(found) == limit:
                        return found
            if len(found) == before:
                break
            depth += 1
        return found

    def take(self, owner: Hashable, item: Item) -> None:
        """Remove an item that had its turn; its owner goes to the end of the round."""
        self.remove(owner, item)
        if owner in self._turns:
            self._turns.move_to_end(owner)

    def remove(self, owner: Hashable, item: Item) -> None:
        """Remove an item that gave up. Raises KeyError or ValueError when it is not here."""
        items = self._turns[owner]
        items.remove(item)
        self._length -= 1
        if not items:
            del self._turns[owner]
