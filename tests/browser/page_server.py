"""The page as a real process, and a browser that notes whatever it asks for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from loadtest.processes import ROOT, free_port, start
from ui.strings import TABLES

CHROMIUM = Path("/usr/bin/chromium")
ENGLISH = TABLES["en"]
DESKTOP = (1280, 1700)
PHONE = (390, 844)


def screenshot_folder() -> Path:
    """Where pictures go: ``ASR_SCREENSHOTS``, else ``build/screenshots``."""
    folder = Path(os.environ.get("ASR_SCREENSHOTS") or ROOT / "build" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


expect.set_options(timeout=60_000)  # shared machines pause


@contextmanager
def page_server(api_url: str, log: Path, **environ: str) -> Iterator[str]:
    """``streamlit run ui/app.py`` on a free port; yields its address once it answers."""
    command = (
        *(sys.executable, "-m", "streamlit", "run", str(ROOT / "ui" / "app.py")),
        *(f"--server.port={free_port()}", "--server.address=127.0.0.1"),
    )
    variables = {"ASR_API_URL": api_url, **environ}
    # The folder is any: the configuration must be found from anywhere.
    page = start("the page", command, log, "/_stcore/health", variables, cwd=log.parent)
    try:
        yield page.url
    finally:
        page.stop()


@contextmanager
def chromium(microphone: Path | None = None) -> Iterator[Browser]:
    """Debian's chromium without a window; ``microphone`` is a WAV file that it hears, over and over."""
    flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags.append("--disable-gpu")  # an emulated one costs more than it draws
    if microphone is not None:
        flags.append(f"--use-file-for-fake-audio-capture={microphone}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield browser
        browser.close()


@dataclass
class Visit:
    """One open page. ``finish`` asserts what holds on every visit."""

    page: Page
    address: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def shot(self, name: str) -> None:
        """A picture of the page into the screenshot folder."""
        self.page.screenshot(path=screenshot_folder() / f"{name}.png")

    def finish(self) -> None:
        """Nothing came from another host, and no script of the page failed."""
        hosts = {urlsplit(url).netloc for url in self.requests if url.startswith(("http", "ws"))}
        assert hosts == {urlsplit(self.address).netloc}
        assert not self.errors


def new_context(browser: Browser, size: tuple[int, int] = DESKTOP, locale: str = "en-US") -> BrowserContext:
    """A fresh browser: no cache, no cookies."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        locale=locale,
        permissions=["clipboard-read"],
        reduced_motion="reduce",
    )
    context.set_default_timeout(60_000)
    return context


@contextmanager
def visit(context: BrowserContext, address: str) -> Iterator[Visit]:
    """Open the page in a new tab, which is a new session."""
    page = context.new_page()
    seen = Visit(page, address)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("websocket", lambda socket_: seen.requests.append(socket_.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.goto(address)
    page.locator('[data-testid="stFileUploader"]').wait_for()
    yield seen
    seen.finish()
    page.close()


def drop(page: Page, *files: tuple[str, bytes]) -> None:
    payload = [{"name": name, "mimeType": "audio/wav", "buffer": data} for name, data in files]
    page.locator('[data-testid="stFileUploader"] input[type=file]').set_input_files(payload)


def words(page: Page) -> Locator:
    return page.locator(".player .text .word")


def heard(page: Page) -> str:
    """The transcript, once it is there and its sound can be played."""
    page.locator(".player[data-ready]").wait_for()
    return " ".join(words(page).all_inner_texts())


def download(page: Page, name: str) -> bytes:
    with page.expect_download() as started:
        page.get_by_role("button", name=name, exact=True).click()
    return Path(started.value.path()).read_bytes()


def expand(page: Page, key: str) -> None:
    page.locator("summary", has_text=ENGLISH[key]).click()


def choose(page: Page, key: str, option: str, offered: list[str]) -> None:
    """Choose from exactly ``offered`` with the keyboard, again where a redraw of the page closes the list.

    Whoever opens a list within the moment that Streamlit redraws the page sees it close and opens it again.
    """
    box = page.get_by_role("combobox", name=ENGLISH[key], exact=True)
    expect(box).to_be_visible()
    for _ in range(5):
        box.press("ArrowDown")
        with contextlib.suppress(AssertionError):
            expect(page.get_by_role("option")).to_have_text(offered, timeout=5_000)
            box.fill(option)
            expect(page.get_by_role("option")).to_have_text([option], timeout=5_000)
            box.press("Enter")
            expect(page.get_by_role("option")).to_have_count(0, timeout=5_000)
            box.blur()  # what was only typed, and not chosen, is forgotten then
            expect(box).to_have_value(option, timeout=5_000)
            return
        box.press("Escape")
    raise AssertionError(f"{option!r} could not be chosen from {offered}")
