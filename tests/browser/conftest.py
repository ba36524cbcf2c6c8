"""Skips without chromium; services and pages shared by the browser tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from playwright.sync_api import Browser, BrowserContext

from loadtest.clips import shared_dir
from loadtest.processes import ROOT, LiveServer
from tests.browser.page_server import CHROMIUM, Visit, chromium, new_context, page_server, visit
from tests.e2e.live import start
from tests.tiny_bundle import make_bundle

SPEECH_MODELS = (
    "en-moonshine-tiny",
    "en-whisper-tiny",
    "en-whisper-tiny-ctc",
    "en-quartznet-small",
    "en-quartznet15x5",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if not CHROMIUM.exists():
                item.add_marker(pytest.mark.skip(reason=f"{CHROMIUM} is not installed"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="session")
def tones(folder: Path) -> Path:
    """A models folder with the tone models."""
    models = folder / "tones"
    make_bundle(models, "tiny")
    make_bundle(models, "other", languages=("vi",))
    return models


@pytest.fixture(scope="session")
def tone_service(tones: Path, folder: Path) -> Iterator[LiveServer]:
    """A real service whose text is known to the letter."""
    live = start(tones, folder / "tone_service.log", models="tiny,other")
    yield live
    live.kill()


@pytest.fixture(scope="session")
def tone_page(tone_service: LiveServer, folder: Path) -> Iterator[str]:
    links = {"ASR_UI_JAEGER_URL": "http://jaeger.test", "ASR_UI_GRAFANA_URL": "http://grafana.test/d/asr"}
    with page_server(tone_service.url, folder / "tone_page.log", **links) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def context(browser: Browser) -> BrowserContext:
    """Shared, so that Streamlit's scripts are read from the cache; each test has its own page and session."""
    return new_context(browser)


@pytest.fixture
def desk(context: BrowserContext, tone_page: str) -> Iterator[Visit]:
    with visit(context, tone_page) as seen:
        yield seen


@pytest.fixture(scope="session")
def speech_service(folder: Path) -> Iterator[LiveServer]:
    """A real service with a real English model, the shipped one if it is there."""
    names = [name for name in SPEECH_MODELS if (ROOT / "models" / name / "manifest.json").exists()]
    if not names:
        pytest.skip("no English bundle under models/")
    live = start(ROOT / "models", folder / "speech_service.log", models=names[0], workers=1)
    yield live
    live.kill()


@pytest.fixture(scope="session")
def speech_page(speech_service: LiveServer, folder: Path) -> Iterator[str]:
    with page_server(speech_service.url, folder / "speech_page.log") as address:
        yield address


@pytest.fixture(scope="session")
def spoken(folder: Path) -> tuple[Path, str]:
    """A WAV file of speech and its text: real speech where the shared folder is, else the page's sample."""
    shared = shared_dir() / "speech" / "test"
    source = ROOT / "ui" / "samples" / "en.flac"
    text = "he has been in the band for a long time"
    if (shared / "manifest.jsonl").exists():
        lines = (shared / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        known = {entry["id"]: entry for entry in map(json.loads, lines)}
        chosen = known.get("cvdelta-common_voice_en_40191876")
        if chosen is not None:
            source, text = shared / chosen["audio_filepath"], chosen["text"]
    samples, rate_hz = soundfile.read(source, dtype="int16")
    wav = folder / "spoken.wav"
    soundfile.write(wav, samples, rate_hz, subtype="PCM_16")
    return wav, text
