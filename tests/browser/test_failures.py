"""What people see when something is wrong, and that it goes away by itself where it can."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, expect

from loadtest.processes import free_port
from tests.browser.page_server import (
    ENGLISH,
    Visit,
    drop,
    new_context,
    page_server,
    visit,
)
from tests.e2e.live import start
from tests.tiny_bundle import recite, sing, wav

SONG = wav(sing("head bad cafe"))


def says(page: Page, key: str) -> None:
    expect(page.get_by_test_id("stAlert").filter(has_text=ENGLISH[key]).first).to_be_visible()


def test_a_file_that_is_no_recording(desk: Visit) -> None:
    drop(desk.page, ("letter.wav", b"Dear Sir, this is text.\n" * 50))
    says(desk.page, "problem.undecodable")
    expect(desk.page.get_by_role("button", name=ENGLISH["problem.retry"])).to_have_count(0)
    desk.shot("undecodable")


def test_an_empty_file(desk: Visit) -> None:
    drop(desk.page, ("empty.wav", b""))
    says(desk.page, "problem.empty")


def test_silence(desk: Visit) -> None:
    drop(desk.page, ("quiet.wav", wav(np.zeros(32_000, np.float32))))
    says(desk.page, "result.silence")
    desk.page.locator(".player[data-ready]").wait_for()  # it can still be listened to
    desk.shot("silence")


def test_a_file_above_the_limit_is_refused_before_it_is_sent(desk: Visit, tmp_path: Path) -> None:
    huge = tmp_path / "huge.wav"
    huge.write_bytes(bytes(26 * 2**20))
    desk.page.locator('[data-testid="stFileUploader"] input[type=file]').set_input_files(huge)
    expect(desk.page.get_by_text("25.0MB or smaller")).to_be_visible()
    desk.shot("too_large_for_the_page")


def test_a_service_through_its_life(browser: Browser, tones: Path, folder: Path) -> None:
    """Down, up, too large, down again: one service through its life, one page that follows it."""
    port = free_port()
    with (
        page_server(f"http://127.0.0.1:{port}", folder / "life_page.log") as address,
        visit(new_context(browser), address) as seen,
    ):
        says(seen.page, "problem.down")
        expect(seen.page.get_by_role("button", name=ENGLISH["input.sample"])).to_be_disabled()
        seen.shot("down")
        live = start(tones, folder / "life.log", port=port, models="tiny", max_upload_bytes=100_000)
        try:
            expect(seen.page.get_by_role("button", name=ENGLISH["input.sample"])).to_be_enabled()
            expect(seen.page.get_by_test_id("stAlert")).to_have_count(0)
            drop(seen.page, ("large.wav", wav(recite(["head bad cafe"] * 10))))
            says(seen.page, "problem.too_large")
            seen.shot("too_large")
        finally:
            live.kill()
        says(seen.page, "problem.down")  # though nobody touches the page
        expect(seen.page.get_by_role("button", name=ENGLISH["input.sample"])).to_be_disabled()
        drop(seen.page, ("song.wav", SONG))
        failed = seen.page.get_by_test_id("stAlert").filter(has_text="song.wav")
        expect(failed.filter(has_text=ENGLISH["problem.down"])).to_be_visible()


def test_a_busy_service_is_asked_again_when_it_says(browser: Browser, tones: Path, folder: Path) -> None:
    """Twelve requests a minute: the second file is told to wait some seconds, waits, and is served."""
    live = start(tones, folder / "busy.log", models="tiny", rate_limit_per_minute=12)
    try:
        with (
            page_server(live.url, folder / "busy_page.log", ASR_UI_PARALLEL_FILES="1") as address,
            visit(new_context(browser), address) as seen,
        ):
            drop(seen.page, ("first.wav", SONG), ("second.wav", SONG))
            expect(seen.page.get_by_text(re.compile(r"second\.wav.*asking again in \d+ s"))).to_be_visible()
            seen.shot("busy")
            expect(
                seen.page.get_by_role("button", name=ENGLISH["result.download_zip"].format(count=2))
            ).to_be_visible()
    finally:
        live.kill()


def test_an_overloaded_service_says_how_long_to_wait(browser: Browser, tones: Path, folder: Path) -> None:
    """One request a minute: too long to wait in silence, so the person is told the seconds."""
    live = start(tones, folder / "full.log", models="tiny", rate_limit_per_minute=1)
    try:
        with (
            page_server(live.url, folder / "full_page.log", ASR_UI_PARALLEL_FILES="1") as address,
            visit(new_context(browser), address) as seen,
        ):
            with live.client() as client:  # from the page's address: its request of the minute
                client.post("/transcribe", files={"file": SONG}).raise_for_status()
            drop(seen.page, ("second.wav", SONG))
            says(seen.page, "problem.busy")
            expect(seen.page.get_by_text(re.compile(r"asks to wait [3456]\d seconds"))).to_be_visible()
            expect(seen.page.get_by_role("button", name=ENGLISH["problem.retry"])).to_be_enabled()
            seen.shot("overloaded")
    finally:
        live.kill()


def test_a_service_that_shuts_down_is_waited_for(browser: Browser, tones: Path, folder: Path) -> None:
    live = start(tones, folder / "drain.log", models="tiny", drain_grace_s=60)
    try:
        with page_server(live.url, folder / "drain_page.log") as address:
            live.process.terminate()
            with visit(new_context(browser), address) as seen:
                says(seen.page, "problem.draining")
                seen.shot("draining")
    finally:
        live.kill()
