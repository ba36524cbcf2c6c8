"""For everybody: phones, keyboards, screen readers, weak eyes, five languages."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, expect

from loadtest.processes import LiveServer
from tests.browser.page_server import (
    ENGLISH,
    PHONE,
    Visit,
    drop,
    expand,
    heard,
    new_context,
    visit,
    words,
)
from tests.tiny_bundle import sing, wav
from ui.strings import TABLES

TEXT = "head bad cafe"


def test_the_keyboard_reaches_words_and_position(desk: Visit) -> None:
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    words(desk.page).first.focus()
    desk.page.keyboard.press("ArrowRight")
    expect(words(desk.page).nth(1)).to_be_focused()
    desk.page.keyboard.press("End")
    expect(words(desk.page).nth(2)).to_be_focused()
    desk.page.keyboard.press("Enter")
    assert desk.page.locator(".player").get_attribute("data-part")
    position = desk.page.get_by_role("slider", name=ENGLISH["player.position"])
    position.focus()
    desk.page.keyboard.press("Home")
    desk.page.keyboard.press("ArrowRight")
    # Half a second from the beginning, and what has been played until the browser is asked.
    expect(position).to_have_attribute("aria-valuenow", re.compile(r"^0\.[5-9]$"))


def test_it_fits_a_phone(browser: Browser, tone_page: str) -> None:
    with visit(new_context(browser, PHONE), tone_page) as phone:
        drop(phone.page, ("song.wav", wav(sing(TEXT))))
        assert heard(phone.page) == TEXT
        too_wide = phone.page.evaluate(
            """() => [...document.querySelectorAll("*")].filter((node) => {
                const box = node.getBoundingClientRect();
                return box.width > 0 && box.right > innerWidth + 1 && getComputedStyle(node).position
                    !== "fixed" && !node.closest(".scroll, .asr-scroll");
            }).map((node) => node.className || node.tagName).slice(0, 5)"""
        )
        assert too_wide == []
        small = phone.page.evaluate(
            """() => [...document.querySelectorAll('[data-testid="stMainBlockContainer"] button')]
                .filter((node) => node.offsetParent && node.textContent.trim() && node.offsetHeight < 40)
                .map((node) => node.textContent.trim())"""
        )
        assert small == []
        phone.page.locator(".player").scroll_into_view_if_needed()
        phone.shot("phone")


def test_the_segments_fit_a_narrow_phone_in_long_words(browser: Browser, tone_page: str) -> None:
    """WCAG 2.2, success criterion 1.4.10: nothing is reached by scrolling sideways only at 320 pixels."""
    with visit(new_context(browser, (320, 700), locale="ru"), tone_page) as phone:
        drop(phone.page, ("song.wav", wav(sing(TEXT))))
        heard(phone.page)
        table = phone.page.locator(".player .scroll")
        table.scroll_into_view_if_needed()
        phone.shot("narrow")
        assert table.evaluate("node => node.scrollWidth - node.clientWidth") <= 0


def test_every_control_has_a_name(desk: Visit) -> None:
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    for key in ("options.title", "result.correct", "compare.title", "details.title"):
        expand(desk.page, key)
    session = desk.page.context.new_cdp_session(desk.page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "combobox", "slider", "tab", "link", "spinbutton"}
    nameless = [
        node
        for node in nodes
        if not node.get("ignored")
        and node["role"]["value"] in controls
        and not str(node.get("name", {}).get("value", "")).strip()
    ]
    assert len([node for node in nodes if node["role"]["value"] in controls]) > 20
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(desk: Visit, scheme: Literal["light", "dark"]) -> None:
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1, by day and by night."""
    desk.page.emulate_media(color_scheme=scheme)
    desk.page.reload()
    desk.page.get_by_role("heading", level=1).wait_for()
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    for key in ("options.title", "compare.title", "details.title"):
        expand(desk.page, key)
    desk.page.mouse.move(0, 0)
    desk.page.wait_for_timeout(500)
    script = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
    found = desk.page.evaluate(script)
    assert found["looked"] > 60
    desk.shot(f"contrast_{scheme}")
    assert found["bad"] == []


@pytest.mark.parametrize("language", ["vi", "ru"])  # all five: tests/ui/test_page.py
def test_the_page_speaks_the_browsers_language(browser: Browser, tone_page: str, language: str) -> None:
    with visit(new_context(browser, locale=language), tone_page) as seen:
        expect(seen.page.get_by_role("heading", level=1)).to_have_text(TABLES[language]["page.title"])
        expect(seen.page.locator("html")).to_have_attribute("lang", language)
        if language == "vi":
            drop(seen.page, ("song.wav", wav(sing(TEXT))))
            heard(seen.page)
            expect(seen.page.locator(".player .clock")).to_have_text(re.compile(r"^0:00,0 / 0:0\d,\d$"))
            assert "0,5×" in seen.page.locator(".player .speed select").inner_text()
            seen.shot("vietnamese")


# Notes what live regions come to hold; an alert is also told where it comes with its text.
LISTEN = """() => {
    window.spoken = [];
    const note = (node) => {
        const region = (node.closest ? node : node.parentElement)?.closest("[aria-live], [role=alert]");
        if (region && region.textContent.trim()) window.spoken.push(region.textContent.trim());
    };
    new MutationObserver((changes) => changes.forEach((change) => {
        note(change.target);
        change.addedNodes.forEach((node) => node.querySelectorAll?.("[role=alert]").forEach(note));
    })).observe(document.body, { subtree: true, childList: true, characterData: true });
}"""


def test_the_focus_outlives_the_button_that_held_it(desk: Visit, tone_service: LiveServer) -> None:
    """WCAG 2.2, success criterion 2.4.3: who works without a mouse does not begin anew at the top."""
    heading = desk.page.get_by_role("heading", level=1)
    tone_service.process.send_signal(signal.SIGSTOP)
    try:
        drop(desk.page, ("song.wav", wav(sing(TEXT))))
        desk.page.get_by_role("button", name=ENGLISH["progress.cancel"], exact=True).press("Enter")
        expect(desk.page.get_by_text(ENGLISH["result.cancelled"])).to_be_visible()
        expect(heading).to_be_focused()
    finally:
        tone_service.process.send_signal(signal.SIGCONT)
    remove = desk.page.get_by_role("button", name=ENGLISH["result.remove"])
    remove.press("Enter")
    expect(remove).to_have_count(0)
    expect(heading).to_be_focused()


def test_each_file_on_its_way_is_heard_by_its_name(desk: Visit, tone_service: LiveServer) -> None:
    song = wav(sing(TEXT))
    tone_service.process.send_signal(signal.SIGSTOP)  # held back, or it is done before anybody can look
    try:
        drop(desk.page, ("a.wav", song), ("b & <b>.wav", song))
        for name in ("a.wav", "b & <b>.wav"):
            expect(desk.page.get_by_role("progressbar", name=name)).to_have_count(1)
            cancel = desk.page.get_by_role("button", name=ENGLISH["progress.cancel_one"].format(name=name))
            expect(cancel).to_have_count(1)
        expect(desk.page.get_by_role("progressbar")).to_have_count(3)  # and one for both together
        desk.shot("two_on_their_way")
        cancel.click()
        expect(desk.page.get_by_role("button", name=ENGLISH["progress.cancel"], exact=True)).to_be_visible()
    finally:
        tone_service.process.send_signal(signal.SIGCONT)
    assert heard(desk.page) == TEXT


def test_what_appears_by_itself_is_announced(desk: Visit) -> None:
    """WCAG 2.2, success criterion 4.1.3."""
    desk.page.evaluate(LISTEN)
    one, several = (ENGLISH[key] for key in ("result.ready", "result.ready_of"))
    for count in (1, 2):  # the same words once more are said once more
        drop(desk.page, ("song.wav", wav(sing(TEXT))))
        desk.page.wait_for_function(
            "([text, count]) => window.spoken.filter((said) => said === text).length === count",
            arg=[one.format(name="song.wav"), count],
        )
    drop(desk.page, *[(f"{text}.wav", wav(sing(text))) for text in ("head", "bad", "cafe")])
    desk.page.wait_for_function(
        "(text) => window.spoken.includes(text)", arg=several.format(ready=3, total=3)
    )
    drop(desk.page, ("letter.wav", b"Dear Sir, this is text.\n" * 50))
    desk.page.wait_for_function("() => window.spoken.some((said) => said.includes('letter.wav'))")
    expect(desk.page.locator(".asr-spoken")).to_have_count(1)
