"""The queue's simulation against results that are known exactly, and the sizing that follows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest.capacity import (
    erlang_c,
    highest_utilisation,
    mean_wait,
    p95_wait,
    replicas_needed,
    simulate,
)

EXPONENTIAL = np.random.default_rng(1).exponential(1.0, 200_000)
CONSTANT = np.ones(1)
# A mean over 20 runs is within four of its standard errors of the truth, but for one draw in some thousands
# (Student's t with 19 degrees of freedom); the seeds are fixed.
ERRORS = 4.0


def test_erlang_c_is_the_sum_it_abbreviates() -> None:
    for workers in (1, 2, 5, 12):
        for load in (0.1, 0.5, 0.9):
            offered = workers * load
            last = offered**workers / math.factorial(workers) / (1 - load)
            others = sum(offered**count / math.factorial(count) for count in range(workers))
            assert erlang_c(workers, load) == pytest.approx(last / (others + last), rel=1e-12)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_simulation_agrees_with_erlang_c(workers: int, load: float) -> None:
    """M/M/c: mean and 95th percentile of the wait are known in closed form."""
    seen = simulate(workers, load, EXPONENTIAL, arrivals=40_000, seed=2)
    assert abs(seen.mean - mean_wait(workers, load, 1.0)) < ERRORS * seen.mean_error
    exact = p95_wait(workers, load, 1.0)
    assert abs(seen.p95 - exact) <= ERRORS * seen.p95_error + 1e-12
    assert seen.mean_error < 0.05 * seen.mean + 1e-3


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_simulation_agrees_with_pollaczek_and_khinchine(load: float) -> None:
    """M/D/1: half the wait of M/M/1."""
    seen = simulate(1, load, CONSTANT, arrivals=40_000, seed=3)
    exact = load / (2 * (1 - load))
    assert mean_wait(1, load, 0.0) == pytest.approx(exact)
    assert abs(seen.mean - exact) < ERRORS * seen.mean_error


def test_the_same_seed_gives_the_same_waits() -> None:
    once, again = (simulate(2, 0.7, EXPONENTIAL, arrivals=1_000, runs=3, seed=9) for _ in range(2))
    assert once == again
    assert once != simulate(2, 0.7, EXPONENTIAL, arrivals=1_000, runs=3, seed=10)


def test_highest_utilisation_meets_its_target_and_not_more() -> None:
    for workers in (1, 4):
        for target in (0.5, 3.0, 30.0):
            load = highest_utilisation(workers, target, 0.2)
            assert p95_wait(workers, load, 0.2) <= target
            assert p95_wait(workers, load + 0.001, 0.2) > target


def test_one_queue_for_many_workers_is_better_than_a_queue_each() -> None:
    loads = [highest_utilisation(workers, 3.0, 0.2) for workers in (1, 2, 4, 8)]
    assert loads == sorted(loads)
    assert loads[0] < 0.75 < 0.9 < loads[-1]


def test_replicas() -> None:
    """114 audio-seconds per second and clips of 5.2 s: 46 ms each, so 250 ms are 5.5 service times."""
    one = {"replica_audio_s_per_s": 114.0, "clip_s": 5.2, "target_s": 0.25, "variation": 0.2}
    load = highest_utilisation(1, 0.25 * 114 / 5.2, 0.2)
    assert replicas_needed(114.0 * load, **one) == 1
    assert replicas_needed(114.0 * load + 1, **one) == 2
    assert replicas_needed(1000.0, **one) == math.ceil(1000 / 114 / load)
    assert replicas_needed(1000.0, **{**one, "target_s": 2.5}) < replicas_needed(1000.0, **one)
