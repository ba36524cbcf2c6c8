"""From bytes to transcript in process, with the tone model: cutting, order, limits, cancelling, hotwords."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from api.commands.runtime import open_service
from api.errors import AudioTooLongError, DeadlineExceededError, InvalidValueError, ModelNotFoundError
from api.service import Service
from api.settings import Settings
from api.transcriber import Options, Transcriber
from api.transcript import Transcript
from api.vad import VadOptions
from api.windows import Progress
from tests.tiny_bundle import add_language_model, make_bundle, recite, sing, wav
from training.ngram import character_ngrams

Transcribe = Callable[[NDArray[np.float32], Options], Transcript]
SENTENCE = st.text("abcdefgh", min_size=1, max_size=5)


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_bundle(folder)
    return folder


def make_settings(models_dir: Path, **changes: object) -> Settings:
    given = {"models_dir": models_dir, "models": ("tiny",), "calibrate": False, "workers": 2, **changes}
    return Settings(**given)  # type: ignore[arg-type]


@pytest_asyncio.fixture
async def service(models_dir: Path) -> AsyncIterator[Service]:
    async with open_service(make_settings(models_dir)) as opened:
        yield opened


@pytest.fixture(scope="module")
def transcribe(models_dir: Path) -> Iterator[Transcribe]:
    """A service on a loop in a thread of its own, as a plain function."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait_for(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    context = open_service(make_settings(models_dir))
    transcriber = wait_for(context.__aenter__()).transcriber("")
    yield lambda audio, options: wait_for(transcriber.transcribe(io.BytesIO(wav(audio)), options))
    wait_for(context.__aexit__(None, None, None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class TestCutting:
    """One service for all examples: hypothesis runs many."""

    @settings(max_examples=25)
    @given(sentences=st.lists(SENTENCE, min_size=1, max_size=14), pause_s=st.floats(0.3, 1.2))
    def test_cut_and_whole_agree(self, transcribe: Transcribe, sentences: list[str], pause_s: float) -> None:
        """Up to a minute against windows of four seconds: no word lost, doubled, moved or changed."""
        audio = recite(sentences, pause_s)
        result = transcribe(audio, Options())
        assert result.text == " ".join(sentences)
        assert [word.text for word in result.words] == sentences
        start_s = 0.0
        for word, sentence in zip(result.words, sentences, strict=True):
            assert word.start_s == pytest.approx(start_s + 0.1, abs=0.03)
            start_s += len(sing(sentence + " ")) / 16_000 + pause_s
        assert result.duration_s == pytest.approx(len(audio) / 16_000)

    @settings(max_examples=15)
    @given(sentences=st.lists(SENTENCE, min_size=1, max_size=8), silence_ms=st.integers(150, 250))
    def test_server_vad_and_whole_agree(
        self, transcribe: Transcribe, sentences: list[str], silence_ms: int
    ) -> None:
        audio = np.concatenate([np.zeros(16_000, np.float32), recite(sentences, 0.5)])
        options = Options(vad=VadOptions(prefix_padding_ms=100, silence_duration_ms=silence_ms))
        result = transcribe(audio, options)
        assert result.text == " ".join(sentences)


async def test_the_language_model_of_a_bundle_decides_what_is_unclear(tmp_path: Path) -> None:
    """Two tones at once, the wrong one a little louder; by default the language model is heard, too."""
    add_language_model(make_bundle(tmp_path), character_ngrams(["bad bad bad had"], 3, 1))
    audio = sing("bac", amplitude=0.3) + sing("bad", amplitude=0.29)
    async with open_service(make_settings(tmp_path)) as opened:
        transcriber = opened.transcriber("")

        async def text(options: Options) -> str:
            return (await transcriber.transcribe(io.BytesIO(wav(audio)), options)).text

        assert await text(Options()) == "bad"
        assert await text(Options(beam=0)) == "bac"
        assert await text(Options(beam=4)) == "bad"
        assert transcriber.model.describe()["decoding"] == "beam 8 with language model"
        # Too narrow for a language model: it searches without. A "d" may follow: all frames of both tones are
        # alike, so that "c" in the first and "d" in the last of them is as probable as the reverse.
        assert (await text(Options(beam=2))).startswith("bac")


@pytest.mark.parametrize(
    ("max_beam", "decoding", "text"),
    [(4, "beam 4 with language model", "bad"), (2, "greedy", "bac"), (1, "greedy", "bac")],
)
async def test_the_settings_bound_the_usual_beam(
    tmp_path: Path, max_beam: int, decoding: str, text: str
) -> None:
    add_language_model(make_bundle(tmp_path), character_ngrams(["bad bad bad had"], 3, 1))
    audio = sing("bac", amplitude=0.3) + sing("bad", amplitude=0.29)
    async with open_service(make_settings(tmp_path, max_beam=max_beam)) as opened:
        transcriber = opened.transcriber("")
        assert transcriber.model.describe()["decoding"] == decoding
        assert (await transcriber.transcribe(io.BytesIO(wav(audio)), Options())).text == text


async def test_segments_come_in_order_and_before_the_end(service: Service) -> None:
    sentences = ["abc", "de", "fgh", "ab"] * 10
    parts: list[str] = []
    progress = Progress()
    transcriber = service.transcriber("tiny")
    async with aclosing(
        transcriber.stream(io.BytesIO(wav(recite(sentences, 1.0))), Options(), progress)
    ) as stream:
        async for segments in stream:
            parts.extend(segment.text for segment in segments)
            if len(parts) == 1:
                assert progress.duration_s > 0
    assert parts == sentences


async def test_few_windows_of_one_file_wait_at_once(models_dir: Path) -> None:
    async with open_service(make_settings(models_dir, max_segments_in_flight=2)) as service:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                summary = service.summary()["queue"]
                # A worker counts as busy for a moment after it has delivered, so at most one more each.
                most = max(most, summary["waiting"] + summary["busy_workers"])
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        await service.transcriber("").transcribe(io.BytesIO(wav(recite(["abc"] * 40, 0.5))), Options())
        watching.cancel()
        assert 1 <= most <= 2 + service.summary()["queue"]["workers"]


def held_engine(service: Service, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Make inferences wait: set when the first has begun, to be set when they may end."""
    engine = service.transcriber("").model.engine
    begun, may_end, run = threading.Event(), threading.Event(), engine.run

    def wait_and_run(*given: Any, **named: Any) -> Any:
        begun.set()
        may_end.wait(60)
        return run(*given, **named)

    monkeypatch.setattr(engine, "run", wait_and_run)
    return begun, may_end


async def test_leaving_early_drops_the_work(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = io.BytesIO(wav(recite(["abc"] * 200, 0.5)))
    begun, may_end = held_engine(service, monkeypatch)
    task = asyncio.create_task(service.transcriber("").transcribe(recording, Options(beam=64)))
    try:
        assert await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(5):  # far less than the engine is held
                await task
    finally:
        may_end.set()
    assert service.summary()["queue"]["waiting"] == 0
    assert recording.closed, "a thread may still read it"


async def test_a_second_cancellation_closes_the_file_too(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = io.BytesIO(wav(recite(["abc"] * 200, 0.5)))
    begun, may_end = held_engine(service, monkeypatch)
    task = asyncio.create_task(service.transcriber("").transcribe(recording, Options(beam=64)))
    try:
        assert await asyncio.to_thread(begun.wait, 60)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    finally:
        may_end.set()
    assert task.cancelled()
    assert recording.closed


async def test_a_short_plain_wav_wakes_no_thread(service: Service) -> None:
    class Refusing(ThreadPoolExecutor):
        def submit(self, *given: Any, **named: Any) -> NoReturn:
            raise AssertionError("a thread was asked")

    usual = service.transcriber("")
    with Refusing() as pool:
        transcriber = Transcriber(usual.model, service.settings, service.telemetry, pool)
        recording = wav(sing("bad cafe"))
        assert (await transcriber.transcribe(io.BytesIO(recording), Options())).text == "bad cafe"
        for file, options in (
            (io.BytesIO(recording + b"LIST\0\0\0\0"), Options()),
            (io.BytesIO(recording), Options(vad=VadOptions())),
        ):
            with pytest.raises(AssertionError, match="asked"):
                await transcriber.transcribe(file, options)


async def test_a_file_that_waits_for_its_turn_is_held_as_samples_only(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = held_engine(service, monkeypatch)
    recording = io.BytesIO(wav(sing("abc")))
    task = asyncio.create_task(service.transcriber("").transcribe(recording, Options()))
    assert await asyncio.to_thread(begun.wait, 60)
    try:
        assert recording.closed
    finally:
        may_end.set()
    assert (await task).text == "abc"


async def test_deadline_ends_a_request(models_dir: Path) -> None:
    async with open_service(make_settings(models_dir, request_timeout_s=0.05)) as service:
        with pytest.raises(DeadlineExceededError):
            await service.transcriber("").transcribe(
                io.BytesIO(wav(recite(["abc"] * 2000, 0.5))), Options(beam=64)
            )


class SlowDisk(io.BytesIO):
    """Silence of half an hour, which takes ten seconds to read."""

    def __init__(self) -> None:
        super().__init__(wav(np.zeros(16_000 * 1800, np.float32)))

    def read(self, size: int | None = -1) -> bytes:
        time.sleep(0.1)
        return super().read(size)


async def test_deadline_ends_the_reading_of_a_file_in_which_nothing_is_heard(models_dir: Path) -> None:
    async with open_service(make_settings(models_dir, request_timeout_s=0.5)) as service:
        recording, start_s = SlowDisk(), time.monotonic()
        with pytest.raises(DeadlineExceededError):
            await service.transcriber("").transcribe(recording, Options())
        assert time.monotonic() - start_s < 8
        assert recording.closed, "a thread may still read it"


async def test_a_file_in_which_nothing_is_heard_lets_others_be_decoded(service: Service) -> None:
    usual = service.transcriber("")
    with ThreadPoolExecutor(1) as pool:
        transcriber = Transcriber(usual.model, service.settings, service.telemetry, pool)
        silent = asyncio.create_task(transcriber.transcribe(SlowDisk(), Options()))
        await asyncio.sleep(0.2)
        other = io.BytesIO(wav(sing("bad cafe", sample_rate_hz=8_000), 8_000))
        assert (await transcriber.transcribe(other, Options())).text == "bad cafe"
        assert not silent.done()
        silent.cancel()
        await asyncio.gather(silent, return_exceptions=True)


@pytest.mark.parametrize("options", [Options(vad=VadOptions()), Options(hotwords=("bad",))])
@pytest.mark.parametrize("by_deadline", [True, False])
async def test_who_waits_for_a_thread_leaves_at_once(
    service: Service, options: Options, by_deadline: bool
) -> None:
    usual, may_end = service.transcriber(""), threading.Event()
    timeout_s = 0.2 if by_deadline else 600.0
    settings = service.settings.model_copy(update={"request_timeout_s": timeout_s})
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(may_end.wait, 60)
        transcriber = Transcriber(usual.model, settings, service.telemetry, pool)
        recording = io.BytesIO(wav(sing("bad cafe")))
        task = asyncio.create_task(transcriber.transcribe(recording, options))
        try:
            await asyncio.sleep(0.1)
            if not by_deadline:
                task.cancel()
            await asyncio.wait([task], timeout=20)
            assert task.done()
            assert not held.done()
        finally:
            may_end.set()
        with pytest.raises(DeadlineExceededError if by_deadline else asyncio.CancelledError):
            await task


async def test_length_cap_is_kept(models_dir: Path) -> None:
    async with open_service(make_settings(models_dir, max_audio_s=5)) as service:
        with pytest.raises(AudioTooLongError, match="5 seconds"):
            await service.transcriber("").transcribe(io.BytesIO(wav(recite(["abc"] * 20))), Options())


@pytest.mark.parametrize("options", [Options(), Options(beam=8), Options(hotwords=("CAFE", "Bad"))])
async def test_decodings_agree_on_clear_audio(service: Service, options: Options) -> None:
    result = await service.transcriber("").transcribe(io.BytesIO(wav(sing("head bad cafe"))), options)
    assert result.text == "head bad cafe"
    assert result.confidence is not None
    assert result.confidence > 0.99


async def test_unknown_names(service: Service) -> None:
    with pytest.raises(ModelNotFoundError):
        service.transcriber("../tiny")
    assert service.transcriber("whisper-1").model.name == "tiny"
    with pytest.raises(InvalidValueError, match="'ru'"):
        await service.transcriber("").transcribe(io.BytesIO(wav(sing("a"))), Options(language="ru"))


async def test_silence_has_no_text_and_no_confidence(service: Service) -> None:
    silence = np.zeros(16_000 * 30, np.float32)
    result = await service.transcriber("").transcribe(io.BytesIO(wav(silence)), Options())
    assert (result.text, result.segments, result.confidence) == ("", (), None)
    assert result.duration_s == pytest.approx(30.0)


async def test_many_files_at_once_do_not_mix(service: Service) -> None:
    texts = [f"{first}{second} {first}" for first in "abcdefgh" for second in "abcdefgh"]
    transcriber = service.transcriber("")
    results = await asyncio.gather(
        *(transcriber.transcribe(io.BytesIO(wav(sing(text))), Options()) for text in texts)
    )
    assert [result.text for result in results] == texts


async def test_hotwords_that_cannot_be_spelled_are_named(service: Service) -> None:
    result = await service.transcriber("").transcribe(
        io.BytesIO(wav(sing("bad"))), Options(hotwords=("bad", "xyz"))
    )
    assert result.text == "bad"
    assert result.warnings == ("The model cannot spell the hotword 'xyz'.",)


async def test_hotwords_for_a_decoder_are_warned_of(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"decoder": True}))
    async with open_service(make_settings(tmp_path)) as service:
        transcriber = service.transcriber("")
        file = io.BytesIO(wav(sing("bad")))
        result = await transcriber.transcribe(file, Options(hotwords=("bad",)))
        assert result.warnings == ("Model 'tiny' writes with a decoder, which hotwords change little.",)
        file = io.BytesIO(wav(sing("bad")))
        assert (await transcriber.transcribe(file, Options())).warnings == ()


async def test_the_event_loop_does_not_wait_for_long_lists_of_hotwords(service: Service) -> None:
    threads = []

    class Watched(str):
        def lower(self) -> str:
            threads.append(threading.current_thread())
            return super().lower()

    options = Options(hotwords=(Watched("bad"),))
    assert (await service.transcriber("").transcribe(io.BytesIO(wav(sing("bad"))), options)).text == "bad"
    assert threads
    assert threading.current_thread() not in threads
