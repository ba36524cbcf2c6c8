"""A real model: speech from a file, from the sample, and from a microphone."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, BrowserContext, expect

from loadtest.processes import ROOT, LiveServer
from tests.browser.page_server import ENGLISH, Visit, chromium, heard, visit
from ui.alignment import align, comparable, error_rate

SAMPLE = ROOT / "ui" / "samples" / "en.flac"


@pytest.fixture(scope="module")
def browser(spoken: tuple[Path, str]) -> Iterator[Browser]:
    with chromium(microphone=spoken[0]) as running:
        yield running


@pytest.fixture
def desk(context: BrowserContext, speech_page: str) -> Iterator[Visit]:
    with visit(context, speech_page) as seen:
        yield seen


def straight(service: LiveServer, path: Path) -> str:
    """What the service itself answers for the file; how good a model is, is measured elsewhere."""
    with service.client() as client:
        answer = client.post("/transcribe", files={"file": path.read_bytes()}).raise_for_status()
    text = str(answer.json()["text"])
    assert text, "the model hears nothing"
    return text


def test_the_sample_is_one_click_away(desk: Visit, speech_service: LiveServer) -> None:
    desk.page.get_by_role("button", name=ENGLISH["input.sample"]).click()
    assert heard(desk.page) == straight(speech_service, SAMPLE)
    desk.page.mouse.move(0, 0)
    desk.page.wait_for_timeout(500)
    desk.shot("sample")


def test_speech_from_a_file(desk: Visit, spoken: tuple[Path, str], speech_service: LiveServer) -> None:
    path, _ = spoken
    desk.page.locator('[data-testid="stFileUploader"] input[type=file]').set_input_files(path)
    assert heard(desk.page) == straight(speech_service, path)


def test_speech_from_the_microphone(
    desk: Visit, spoken: tuple[Path, str], speech_service: LiveServer
) -> None:
    path, _ = spoken
    length_s = soundfile.info(path).duration
    desk.page.get_by_role("button", name="Record", exact=True).click()
    stop = desk.page.get_by_role("button", name="Stop recording")
    expect(stop).to_be_visible()
    desk.page.wait_for_timeout(1000 * (2 * length_s + 1))  # it comes over and over: one whole is inside
    stop.click()
    # letter by letter: the recording went through the browser's resampler, and a weak model spells at random
    recorded = list(" ".join(comparable(heard(desk.page))))
    played = list(" ".join(comparable(straight(speech_service, path))))
    rate = error_rate(align(played, recorded))
    kept = 1 - (rate.changed + rate.missing) / rate.reference_words
    assert kept >= 0.6, ("".join(played), "".join(recorded))
    desk.shot("microphone")


def test_a_long_file_shows_its_text_on_the_way_and_can_be_cancelled(
    desk: Visit, spoken: tuple[Path, str], speech_service: LiveServer, tmp_path: Path
) -> None:
    speech, rate_hz = soundfile.read(spoken[0], dtype="int16")
    long = tmp_path / "long.flac"
    soundfile.write(long, np.tile(speech, 1200 * rate_hz // len(speech)), rate_hz)
    cancel = desk.page.get_by_role("button", name=ENGLISH["progress.cancel"])
    process = speech_service.process  # held back, or a fast machine is done before anybody can look
    process.send_signal(signal.SIGSTOP)
    try:
        desk.page.locator('[data-testid="stFileUploader"] input[type=file]').set_input_files(long)
        expect(cancel).to_be_visible()
        partial = desk.page.locator(".asr-partial")
        for _ in range(60):  # a few windows at a time, until the page has shown some of their text
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)
            process.send_signal(signal.SIGSTOP)
            desk.page.wait_for_timeout(400)
            if partial.count() and re.search(r"\w", partial.first.inner_text()):
                break
        else:
            pytest.fail("no text appeared on the way")
        # Two hours of text do not push the button away, and what was heard last is what is seen.
        height, hidden_below = partial.first.evaluate(
            "it => { it.textContent = 'word '.repeat(18000); const all = document.createRange();"
            "all.selectNodeContents(it); const box = it.getBoundingClientRect();"
            "return [box.height, all.getBoundingClientRect().bottom - box.bottom]; }"
        )
        assert height < 250
        assert hidden_below < 5
        cancel.click()
    finally:
        process.send_signal(signal.SIGCONT)
    expect(desk.page.get_by_text(ENGLISH["result.cancelled"])).to_be_visible()
    with speech_service.client() as client:
        while client.get("/health").json()["requests_in_progress"]:  # pytest-timeout ends what never ends
            time.sleep(0.1)
