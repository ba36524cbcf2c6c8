"""The soak test finds what it looks for, and its requests get the answers they say they may get."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from loadtest.clips import wav_clip
from loadtest.mixed_live import Microphone, changed
from loadtest.mixed_load import Callers, Kind, Tally
from loadtest.processes import LiveServer, api_server
from loadtest.soak import POOL_THREADS, Growth, Reader, Sample, findings, growth
from tests.tiny_bundle import make_bundle

FLAT = Growth(level_mb=300.0, added_mb=1.0, steady_mb=0.5, measured_s=1500.0)
IDLE = Sample(0.0, 300.0, 14, 8, 0)
CALM = {"requests_in_progress": 0}


def readings(slope_mb_per_h: float, swing_mb: float = 2.0, level_mb: float = 300.0) -> list[Sample]:
    """Half an hour at one reading in five seconds, with the swings of requests in progress."""
    rng = random.Random(3)
    return [
        Sample(at_s, level_mb + slope_mb_per_h * at_s / 3600 + rng.uniform(-swing_mb, swing_mb), 14, 8, 0)
        for at_s in (5.0 * step for step in range(360))
    ]


def test_swings_are_no_growth() -> None:
    measured = growth(readings(0.0))
    assert abs(measured.steady_mb) < 3
    assert not measured.counts


def test_a_leak_of_a_percent_in_five_minutes_counts() -> None:
    measured = growth(readings(36.0))
    assert measured.added_mb == pytest.approx(0.9 * 18.0, abs=2)
    assert measured.steady_mb == pytest.approx(0.9 * 18.0, abs=3)
    assert measured.counts


def test_one_high_water_mark_does_not_count() -> None:
    """A larger file than any before it takes memory that the allocator keeps; the next one takes no more."""
    samples = [replace(sample, rss_mb=sample.rss_mb + 12 * (sample.at_s > 900)) for sample in readings(0.0)]
    measured = growth(samples)
    assert measured.added_mb == pytest.approx(12, abs=3)
    assert not measured.counts


def test_few_readings_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples; at least 20"):
        growth(readings(0.0)[:3])


def test_findings_name_what_stayed_and_what_was_answered_wrongly() -> None:
    kind = Kind("clip", Callers.clip, frozenset({"200"}), 1)  # type: ignore[arg-type]
    tally = Tally()
    tally.note(kind, "200")
    assert findings(tally, FLAT, IDLE, IDLE, CALM) == []
    tally.note(kind, "500 internal_error")
    a_pool_that_filled = Sample(1.0, 300.0, 14, 8 + POOL_THREADS, 0)
    assert findings(Tally(), FLAT, IDLE, a_pool_that_filled, CALM) == []
    after = Sample(1.0, 300.0, 15, 8 + POOL_THREADS + 1, 1)
    leak = Growth(level_mb=300.0, added_mb=20.0, steady_mb=15.0, measured_s=1800.0)
    assert findings(tally, leak, IDLE, after, {"requests_in_progress": 2}) == [
        "1 times clip: 500 internal_error",
        "memory grows: memory 300 MB, +20.0 MB in 30 minutes, of which +15.0 steadily",
        "idle, 15 descriptors after the load, 14 before",
        f"idle, {9 + POOL_THREADS} threads after the load, 8 before",
        "idle, 1 spooled after the load, 0 before",
        "2 requests still in progress",
    ]


def test_an_unlinked_spool_file_is_seen(tmp_path: Path) -> None:
    this = LiveServer("this test", psutil.Process(), tmp_path / "log", "/")  # type: ignore[arg-type]
    reader = Reader(this, tmp_path, 1.0, None)
    before = reader.read()
    with tempfile.TemporaryFile(dir=tmp_path), tempfile.NamedTemporaryFile(dir=tmp_path):
        during = reader.read()
    assert (before.spooled, reader.read().spooled) == (0, 0)
    assert during.spooled == 3  # the named one counts twice: as a file and as an open descriptor
    assert during.descriptors == before.descriptors + 2


def test_speech_that_is_understood_in_another_way_is_a_finding() -> None:
    same = ["one", "two"]
    assert changed([["o"], same, same, same, ["one"]]) == ""
    assert changed([["o"], same, same, ["two"], []]) == (
        "round 4 was understood as ['two'], the second one as ['one', 'two']"
    )
    assert changed([same]) == ""


def test_every_kind_of_request_gets_an_answer_that_it_allows(tmp_path: Path) -> None:
    make_bundle(tmp_path / "models", "tiny")
    (tmp_path / "spool").mkdir()
    callers = Callers(seed=1)
    got: Counter[tuple[str, str]] = Counter()
    wrong = []

    async def ask_all(base_url: str) -> None:
        async with httpx.AsyncClient(base_url=base_url, timeout=60.0, trust_env=False) as http:
            for kind in callers.kinds:
                for turn in range(3):
                    answer = await kind.ask(http, random.Random(turn))
                    got[kind.name, answer] += 1
                    if answer not in kind.allowed:
                        wrong.append((kind.name, answer))

    with api_server("tiny", tmp_path / "models", spool_dir=tmp_path / "spool") as running:
        asyncio.run(ask_all(running.url))
        assert not wrong
        assert len({name for name, _ in got}) == len(callers.kinds)
        spoken = Microphone([wav_clip("short", np.zeros(4800, np.float32))]).session(running.address, 5.0)
        assert asyncio.run(spoken) == "200"
        reader = Reader(running, tmp_path / "spool", 1.0, None)
        assert reader.read().threads > 1
