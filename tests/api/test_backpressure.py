"""The drain rate and the times at which refused callers are told to come back."""

from __future__ import annotations

import heapq
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.backpressure import MAX_RETRY_S, DrainRate, RetrySchedule


def test_the_rate_begins_with_what_calibration_expects_and_learns_from_work() -> None:
    rate = DrainRate(prior=50.0)
    assert rate.per_s == 50.0
    for second in range(120):
        rate.finished(200.0, float(second), saturated=True)
    assert rate.per_s == pytest.approx(200.0, rel=0.01)


def test_idle_time_is_not_slowness() -> None:
    rate = DrainRate(prior=100.0)
    for second in range(60):
        rate.finished(100.0, float(second), saturated=True)
    rate.finished(100.0, 60.0, saturated=False)
    rate.finished(5.0, 4000.0, saturated=True)
    rate.finished(100.0, 4001.0, saturated=True)
    assert rate.per_s == pytest.approx(100.0, rel=0.02)


@given(st.lists(st.floats(0.1, 60), min_size=1, max_size=50), st.floats(1, 500))
def test_refused_callers_are_told_times_of_their_own(audio_s: list[float], rate: float) -> None:
    schedule = RetrySchedule()
    times = [schedule.retry_after_s(audio, 10.0, rate, now_s=100.0) for audio in audio_s]
    assert times == sorted(times)
    assert all(10.0 / rate < time <= MAX_RETRY_S for time in times)
    for (before, audio), after in zip(zip(times, audio_s, strict=True), times[1:], strict=False):
        assert after == MAX_RETRY_S or after - before >= audio / rate * 0.99


def test_the_line_is_forgotten_when_those_who_were_told_to_come_have_not() -> None:
    schedule = RetrySchedule()
    for _ in range(100):
        schedule.retry_after_s(5.0, 5.0, 10.0, now_s=0.0)
    assert schedule.retry_after_s(5.0, 5.0, 10.0, now_s=0.0) > 50
    schedule.queue_ran_low(now_s=1.0)
    assert schedule.retry_after_s(5.0, 5.0, 10.0, now_s=1.0) < 2


def test_one_who_asks_on_and_on_sends_nobody_else_away_for_long() -> None:
    """Seven requests a second from one caller, which waits for nothing; another one every three seconds."""
    schedule = RetrySchedule()
    told: dict[str, list[float]] = {"hasty": [], "patient": []}
    for tick in range(7 * 120):
        now_s = tick / 7
        told["hasty"].append(schedule.retry_after_s(5.0, 5.0, 9.5, now_s, "hasty"))
        if tick % 21 == 20:
            told["patient"].append(schedule.retry_after_s(5.0, 5.0, 9.5, now_s, "patient"))
    assert max(told["hasty"]) == MAX_RETRY_S
    # At 9.5 audio-seconds per second 12 seconds empty the queue that this was measured with, of 115.
    assert max(told["patient"]) < 12


def test_callers_take_turns_in_line() -> None:
    schedule = RetrySchedule()
    for _ in range(20):
        schedule.retry_after_s(5.0, 0.0, 10.0, 0.0, "many")
    first, second = (schedule.retry_after_s(5.0, 0.0, 10.0, 0.0, "few") for _ in range(2))
    assert first < second < schedule.retry_after_s(5.0, 0.0, 10.0, 0.0, "many")
    assert schedule.retry_after_s(5.0, 0.0, 10.0, 0.0, "new") < second


def test_those_who_were_told_a_time_that_has_come_stand_in_line_no_more() -> None:
    schedule = RetrySchedule()
    for _ in range(4):
        schedule.retry_after_s(5.0, 0.0, 10.0, 0.0, "soon")
    assert schedule._places
    schedule.retry_after_s(5.0, 0.0, 10.0, 100.0, "later")
    assert set(schedule._places_of) == {"later"}
    schedule.queue_ran_low(100.0)
    assert not schedule._places
    assert not schedule._places_of


@pytest.mark.parametrize("addresses", [1, 20, 10**9], ids=["one", "twenty", "their own"])
def test_the_median_client_that_obeys_succeeds_on_its_next_try(addresses: int) -> None:
    """A queue that drains 100 audio-seconds per second; three times that is offered for two minutes.

    By clients behind so many addresses.
    """
    rng = random.Random(1)
    rate, limit = 100.0, 300.0
    schedule = RetrySchedule()
    waiting, now = 0.0, 0.0
    arrivals: list[tuple[float, int, float, int]] = []
    time = 0.0
    while time < 120.0:
        time += rng.expovariate(3 * rate / 5.0)
        heapq.heappush(arrivals, (time, 0, rng.uniform(2, 8), rng.randrange(addresses)))
    later_tries: list[bool] = []
    accepted_in_overload = 0.0
    while arrivals:
        at, tries, audio, caller = heapq.heappop(arrivals)
        waiting = max(0.0, waiting - (at - now) * rate)
        now = at
        fits = waiting + audio <= limit
        if tries == 1:
            later_tries.append(fits)
        if fits:
            if waiting < 0.5 * limit:
                schedule.queue_ran_low(now)
            waiting += audio
            accepted_in_overload += audio if now <= 120.0 else 0.0
        elif tries < 5:
            wait = schedule.retry_after_s(audio, waiting + audio - limit, rate, now, caller)
            heapq.heappush(arrivals, (now + wait, tries + 1, audio, caller))
    assert len(later_tries) > 1000
    assert statistics.median(later_tries) == 1
    assert accepted_in_overload >= 0.9 * 120.0 * rate
