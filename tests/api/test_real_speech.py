"""Real models on real speech and real noise; skipped, with the reason, where either is absent."""

from __future__ import annotations

import io
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from api.audio import decode
from api.commands.runtime import open_service
from api.openai_format import delta_event, done_event
from api.segmenter import may_be_speech
from api.service import Service
from api.settings import Settings
from api.transcriber import Options
from tests.tiny_bundle import wav

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ASR_SHARED_DIR", ROOT.parent / "shared"))
TEST_SETS = SHARED / "speech" / "test"
RATE_HZ = 16_000

needs_speech = pytest.mark.skipif(not TEST_SETS.is_dir(), reason=f"no recordings in {TEST_SETS}")


def model_dir(name: str) -> Path:
    folder = Path(os.environ.get("ASR_MODELS_DIR", ROOT / "models"))
    if not (folder / name / "manifest.json").is_file():
        pytest.skip(f"no bundle {name} in {folder}")
    return folder


def recordings(source: str, count: int) -> list[tuple[NDArray[np.float32], str]]:
    """The first ``count`` recordings of a test set with their texts."""
    lines = (TEST_SETS / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["source"] == source][:count]
    return [
        (
            decode((TEST_SETS / row["audio_filepath"]).read_bytes(), sample_rate_hz=RATE_HZ).samples,
            row["text"],
        )
        for row in rows
    ]


def edits(found: Sequence[str], expected: Sequence[str]) -> int:
    """Levenshtein distance in words, or in letters of a text."""
    row = list(range(len(expected) + 1))
    for i, word in enumerate(found, start=1):
        above, row = row, [i]
        for j, other in enumerate(expected, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (word != other)))
    return row[-1]


@pytest_asyncio.fixture(
    params=[
        "en-moonshine-tiny",
        "en-whisper-tiny",
        "en-whisper-tiny-ctc",
        "en-quartznet-small",
        "en-quartznet15x5",
    ]
)
async def service(request: pytest.FixtureRequest) -> AsyncIterator[Service]:
    folder = model_dir(request.param)
    settings = Settings(models_dir=folder, models=(request.param,), calibrate=False, workers=2)
    async with open_service(settings) as opened:
        yield opened


async def text_of(service: Service, samples: NDArray[np.float32], *hotwords: str) -> str:
    file = io.BytesIO(wav(samples))
    return (await service.transcriber("").transcribe(file, Options(hotwords=hotwords))).text


@needs_speech
async def test_cut_and_whole_agree_on_joined_recordings(service: Service) -> None:
    """Minutes of joined recordings give the text that the recordings give alone.

    Compared by letters: the front end normalises over a window, so that a neighbour changes doubtful letters,
    and a model in training has many of those. A cut that lost or doubled words would change the length.
    """
    window_s = service.models()[0].bundle.manifest.max_window_s
    spoken = recordings("libriother", 12 if window_s <= 20 else 18)
    pause = np.zeros(RATE_HZ // 2, np.float32)
    joined = np.concatenate([part for samples, _ in spoken for part in (samples, pause)])
    assert len(joined) / RATE_HZ > 3 * window_s
    alone = " ".join([await text_of(service, samples) for samples, _ in spoken])
    together = await text_of(service, joined)
    assert len(alone) > 400
    assert len(together) == pytest.approx(len(alone), rel=0.05)
    assert edits(together, alone) / len(alone) < 0.2


@needs_speech
async def test_logprobs_of_joined_recordings_join_to_the_text(service: Service) -> None:
    """Byte for byte, in the whole answer and in the events of a stream."""
    window_s = service.models()[0].bundle.manifest.max_window_s
    joined = np.concatenate([samples for samples, _ in recordings("libriother", 8)])
    assert len(joined) / RATE_HZ > 1.2 * window_s
    file = io.BytesIO(wav(joined))
    transcript = await service.transcriber("").transcribe(file, Options())
    assert len(transcript.segments) >= 2
    events = [
        delta_event(segment, first=index == 0, logprobs=True)
        for index, segment in enumerate(transcript.segments)
    ]
    assert "".join(event["delta"] for event in events) == transcript.text
    last = done_event(transcript, logprobs=True)
    for text, entries in [(event["delta"], event["logprobs"]) for event in events] + [
        (transcript.text, last["logprobs"])
    ]:
        assert b"".join(bytes(entry["bytes"]) for entry in entries) == text.encode()


async def test_a_word_before_a_pause_ends_before_it(service: Service) -> None:
    """A decoder writes the full stop where it hears the pause; the word is over then."""
    sample = decode((ROOT / "samples" / "hello.flac").read_bytes(), sample_rate_hz=RATE_HZ).samples
    pause = np.zeros(3 * RATE_HZ, np.float32)
    file = io.BytesIO(wav(np.concatenate([sample, pause, sample, pause])))
    transcript = await service.transcriber("").transcribe(file, Options())
    length_s = len(sample) / RATE_HZ
    before = [word for word in transcript.words if word.start_s < length_s][-1]
    assert before.text.lower().removesuffix(".") == "time"
    assert before.end_s < length_s
    assert before in [segment.words[-1] for segment in transcript.segments]


@needs_speech
@pytest.mark.parametrize("source", ["libriother", "cvdelta", "an4", "ocean", "vivos", "voxforge"])
def test_no_recording_of_speech_is_taken_for_silence_or_noise(source: str) -> None:
    spoken = recordings(source, 25)
    assert spoken
    for samples, text in spoken:
        assert may_be_speech(samples, RATE_HZ), text


@needs_speech
async def test_word_error_rate_of_the_strong_model() -> None:
    """A tenth of the set, so with a margin over the 15 % that the whole set must meet."""
    folder = model_dir("en-quartznet15x5")
    settings = Settings(models_dir=folder, models=("en-quartznet15x5",), calibrate=False, workers=2)
    async with open_service(settings) as service:
        spoken = recordings("libriother", 15)
        texts = [(await text_of(service, samples)).split() for samples, _ in spoken]
    wrong = sum(edits(found, text.split()) for found, (_, text) in zip(texts, spoken, strict=True))
    assert wrong / sum(len(text.split()) for _, text in spoken) < 0.18


def silence() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0, 1e-4, 10 * RATE_HZ).astype(np.float32)


def white_noise() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(0, 0.1, 10 * RATE_HZ).astype(np.float32)


def pink_noise() -> NDArray[np.float32]:
    spectrum = np.fft.rfft(np.random.default_rng(2).normal(size=10 * RATE_HZ))
    spectrum /= np.sqrt(np.arange(1, len(spectrum) + 1))
    samples = np.fft.irfft(spectrum)
    return (0.3 * samples / np.abs(samples).max()).astype(np.float32)


def music() -> NDArray[np.float32]:
    """Plucked chords: decaying notes with three harmonics."""
    rng = np.random.default_rng(3)
    time_s = np.arange(RATE_HZ) / RATE_HZ
    samples = np.zeros(10 * RATE_HZ)
    for _ in range(60):
        start = int(rng.integers(0, len(samples) - RATE_HZ))
        pitch_hz = 220 * 2 ** (rng.integers(0, 24) / 12)
        note = sum(np.sin(2 * np.pi * pitch_hz * k * time_s) / k for k in (1, 2, 3)) * np.exp(-4 * time_s)
        samples[start : start + RATE_HZ] += note
    return (0.5 * samples / np.abs(samples).max()).astype(np.float32)


@pytest.mark.parametrize("sound", [silence, white_noise, pink_noise, music])
async def test_no_text_is_made_of_silence_noise_or_music(service: Service, sound: object) -> None:
    assert callable(sound)
    assert await text_of(service, sound()) == ""


async def test_the_sample_is_heard(service: Service) -> None:
    """`samples/hello.flac` is what `make run` shows: every word of it is recognised by each model."""
    sample = decode((ROOT / "samples" / "hello.flac").read_bytes(), sample_rate_hz=RATE_HZ)
    text = await text_of(service, sample.samples)
    assert text.lower().removesuffix(".") == "he has been in the band for a long time"


async def test_a_hotword_that_is_not_said_changes_nothing(service: Service) -> None:
    """However long what is said agrees with it."""
    sample = decode((ROOT / "samples" / "hello.flac").read_bytes(), sample_rate_hz=RATE_HZ)
    said = await text_of(service, sample.samples)
    begun = [
        "he has been in the bakery",
        "in the band for a long career",
        "he has been in the band for years",
    ]
    for hotwords in [*([phrase] for phrase in begun), begun, [phrase.capitalize() for phrase in begun]]:
        assert await text_of(service, sample.samples, *hotwords) == said


def test_the_page_offers_the_same_sample() -> None:
    """A first click on "Try a sample" shows what `make run` shows. (The page's image holds `ui/` only.)"""
    shown = (ROOT / "ui" / "samples" / "en.flac").read_bytes()
    assert shown == (ROOT / "samples" / "hello.flac").read_bytes()
