"""What a stop waits for."""

from __future__ import annotations

from api.telemetry.scrape import LONGEST_WAIT_S, ScrapeWatch


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_nobody_waits_where_nobody_scrapes() -> None:
    watch = ScrapeWatch(Clock())
    watch.changed()
    assert not watch.pending()


def test_a_stop_waits_for_the_scrape_that_sees_the_last_request() -> None:
    clock = Clock()
    watch = ScrapeWatch(clock)
    for clock.now_s in (0.0, 15.0):
        watch.scraped()
    assert not watch.pending()
    clock.now_s = 16.0
    watch.changed()
    assert watch.pending()
    clock.now_s = 30.0
    watch.scraped()
    assert not watch.pending()


def test_a_scrape_that_came_late_and_the_next_one_soon_after_it_shorten_no_wait() -> None:
    clock = Clock()
    watch = ScrapeWatch(clock)
    for clock.now_s in (0.0, 15.0, 44.9, 45.0):
        watch.scraped()
    watch.changed()
    clock.now_s = 60.0
    assert watch.pending()


def test_a_scraper_that_comes_more_often_now_is_waited_for_less() -> None:
    clock = Clock()
    watch = ScrapeWatch(clock)
    for clock.now_s in (0.0, 60.0, 62.0, 64.0, 66.0, 68.0):
        watch.scraped()
    watch.changed()
    clock.now_s = 72.1
    assert not watch.pending()


def test_a_scraper_that_went_away_is_not_waited_for_long() -> None:
    clock = Clock()
    watch = ScrapeWatch(clock)
    for clock.now_s in (0.0, 15.0):
        watch.scraped()
    watch.changed()
    clock.now_s = 15.0 + 23.4
    assert watch.pending()
    clock.now_s = 15.0 + 23.6
    assert not watch.pending()


def test_a_long_interval_is_not_waited_out() -> None:
    clock = Clock()
    watch = ScrapeWatch(clock)
    for clock.now_s in (0.0, 3600.0):
        watch.scraped()
    watch.changed()
    clock.now_s = 3600.0 + 1.5 * LONGEST_WAIT_S + 1.0
    assert not watch.pending()
