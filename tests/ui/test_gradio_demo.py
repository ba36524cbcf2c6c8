"""The Gradio demonstration over its own HTTP interface, the service through MockTransport."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ui.service import TRANSCRIPT, envelope, sse
from ui.background import Background
from ui.settings import UiSettings
from ui.strings import TABLES

gradio = pytest.importorskip("gradio", reason="gradio belongs to the dev group")
pytestmark = pytest.mark.filterwarnings("ignore")  # gradio's own
SAMPLE = Path(__file__).parents[2] / "ui" / "samples" / "en.flac"


@pytest.fixture
def answers() -> list[httpx.Response]:
    done = {"type": "transcript.text.done", **TRANSCRIPT}
    return [httpx.Response(200, content=sse({"type": "transcript.text.delta", "delta": "the"}, done))]


@pytest.fixture
def transcribe(answers: list[httpx.Response]) -> Iterator[Any]:
    """The function behind the demonstration's form."""
    from ui.gradio_demo import build

    def handler(request: httpx.Request) -> httpx.Response:
        return answers[0]

    settings = UiSettings(api_url="http://service.test")
    background = Background(settings, httpx.MockTransport(handler))
    blocks = build(settings, background)
    found = [block.fn for block in blocks.fns.values() if block.api_name == "transcribe"]
    yield found[0]
    background.close()
    del blocks, found
    # gradio leaves event loops open, the last one as the thread's own; their warnings belong to this module
    asyncio.set_event_loop(None)
    gc.collect()


def test_sound_becomes_text_and_subtitles(transcribe: Any) -> None:
    *_, (text, subtitles) = transcribe(str(SAMPLE), None, "")
    assert text == TRANSCRIPT["text"]
    assert subtitles.startswith("1\n00:00:00,100 --> ")


def test_a_failure_is_said_in_plain_words(transcribe: Any, answers: list[httpx.Response]) -> None:
    answers[0] = envelope(400, "undecodable_audio")
    with pytest.raises(gradio.Error, match=TABLES["en"]["problem.undecodable"]):
        list(transcribe(str(SAMPLE), None, ""))


def test_nothing_chosen_is_nothing_done(transcribe: Any) -> None:
    assert list(transcribe(None, None, "")) == []
