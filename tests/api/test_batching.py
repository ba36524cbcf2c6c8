"""Planning of batches and turns: pure functions, so properties."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from api.batching import BatchLimits, TurnQueue, bucket_of, plan_batch
from api.engine import BUCKET_RATIOS, choose_ratio, make_buckets

LENGTHS = st.lists(st.integers(1, 2000), min_size=1, max_size=40)
LIMITS = st.builds(
    BatchLimits,
    max_batch=st.integers(1, 16),
    max_padded_samples=st.integers(1, 8000),
    max_padding=st.floats(0, 1),
    buckets=st.sampled_from([(), (100, 300, 900, 2000), make_buckets(50, 2000, 1.1)]),
)


@given(LENGTHS, LIMITS)
def test_a_batch_stays_within_every_limit_and_never_skips_the_first(
    samples: list[int], limits: BatchLimits
) -> None:
    chosen = plan_batch(samples, limits)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= limits.max_batch
    if len(chosen) > 1:
        padded = bucket_of(max(samples[index] for index in chosen), limits.buckets) * len(chosen)
        assert padded <= limits.max_padded_samples
        assert sum(samples[index] for index in chosen) >= (1 - limits.max_padding) * padded


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 16))
def test_equal_lengths_fill_the_batch(length: int, count: int, max_batch: int) -> None:
    limits = BatchLimits(max_batch, max_padded_samples=10**9)
    assert plan_batch([length] * count, limits) == list(range(min(count, max_batch)))


def test_a_long_one_does_not_join_short_ones() -> None:
    limits = BatchLimits(max_batch=4, max_padded_samples=10**9)
    assert plan_batch([100, 1000, 100, 90], limits) == [0, 2, 3]


@given(st.integers(1, 3000), LIMITS)
def test_a_bucket_holds_what_is_in_it(samples: int, limits: BatchLimits) -> None:
    bucket = bucket_of(samples, limits.buckets)
    assert bucket >= samples
    assert all(other < samples for other in limits.buckets if other < bucket)


@given(st.integers(100, 8000), st.integers(8000, 400_000), st.sampled_from(BUCKET_RATIOS))
def test_buckets_reach_from_least_to_most_in_steps_of_the_ratio(least: int, most: int, ratio: float) -> None:
    buckets = make_buckets(least, most, ratio)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == most
    assert buckets[0] <= max(least * ratio, most)
    for small, large in pairwise(buckets):
        assert large <= (small + 1) * ratio


def test_slow_models_get_coarse_buckets() -> None:
    most = 16_000 * 20
    fast = choose_ratio(8000, most, samples_per_s=16_000 * 1000, budget_s=2.0)
    slow = choose_ratio(8000, most, samples_per_s=16_000 * 5, budget_s=2.0)
    assert (fast, slow) == (BUCKET_RATIOS[0], BUCKET_RATIOS[-1])
    assert sum(make_buckets(8000, most, fast)) / (16_000 * 1000) <= 2.0


@given(st.lists(st.integers(0, 4), max_size=60))
def test_every_item_is_taken_once_and_owners_keep_their_order(owners: list[int]) -> None:
    queue: TurnQueue[tuple[int, int]] = TurnQueue()
    for number, owner in enumerate(owners):
        queue.push(owner, (owner, number))
    taken = []
    while queue:
        owner, item = queue.in_turn(1)[0]
        queue.take(owner, item)
        taken.append(item)
    assert Counter(taken) == Counter((owner, number) for number, owner in enumerate(owners))
    for owner in set(owners):
        own = [number for whose, number in taken if whose == owner]
        assert own == sorted(own)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 30))
def test_a_newcomer_waits_for_one_item_of_each_owner_at_most(backlogs: list[int], served: int) -> None:
    queue: TurnQueue[tuple[int, int]] = TurnQueue()
    for owner, backlog in enumerate(backlogs):
        for number in range(backlog):
            queue.push(owner, (owner, number))
    for _ in range(min(served, len(queue))):
        owner, item = queue.in_turn(1)[0]
        queue.take(owner, item)
    queue.push("new", (-1, 0))
    waited = 0
    while (turn := queue.in_turn(1)[0])[0] != "new":
        queue.take(*turn)
        waited += 1
    assert waited <= len(backlogs)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 50))
def test_turns_are_listed_in_the_order_in_which_they_are_taken(owners: list[int], limit: int) -> None:
    queue: TurnQueue[tuple[int, int]] = TurnQueue()
    for number, owner in enumerate(owners):
        queue.push(owner, (owner, number))
    listed = queue.in_turn(limit)
    assert len(listed) == min(limit, len(owners))
    one_by_one = []
    for _ in listed:
        turn = queue.in_turn(1)[0]
        queue.take(*turn)
        one_by_one.append(turn)
    assert [item for _, item in listed] == [item for _, item in one_by_one]


def test_items_that_give_up_are_gone() -> None:
    queue: TurnQueue[str] = TurnQueue()
    for item in "abc":
        queue.push("x", item)
    queue.remove("x", "b")
    assert [item for _, item in queue.in_turn(9)] == ["a", "c"]
    queue.remove("x", "a")
    queue.remove("x", "c")
    assert len(queue) == 0
    assert queue.in_turn(9) == []
