"""Several models at once: names, sharing of the workers, what is announced, and refusing to start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from api.ctc import greedy_of
from api.errors import BundleError, DrainingError, ModelNotFoundError, QueueFullError
from api.frames import Frames
from api.registry import LoadedModel, Registry, open_registry
from api.settings import Settings, load_settings
from api.telemetry import Telemetry
from tests.tiny_bundle import make_bundle, sing


def settings_for(folder: Path, *names: str, **more: object) -> Settings:
    for name in names:
        make_bundle(folder, name)
    return load_settings(None, models_dir=folder, models=names, calibrate=False, **more)


@asynccontextmanager
async def opened(settings: Settings, telemetry: Telemetry | None = None) -> AsyncIterator[Registry]:
    registry = await open_registry(settings, telemetry or Telemetry())
    try:
        yield registry
    finally:
        await registry.close(10.0)


async def hear(model: LoadedModel, text: str) -> str:
    vocabulary = model.bundle.vocabulary

    def decode(frames: Frames) -> str:
        return vocabulary.decode(greedy_of(frames, vocabulary.blank_id).token_ids.tolist())

    result = await model.batcher.submit(sing(text), decode, deadline_s=time.monotonic() + 20)
    return result.value


async def test_models_are_found_by_name_and_the_alias_is_the_default(tmp_path: Path) -> None:
    async with opened(settings_for(tmp_path, "one", "two", default_model="two")) as registry:
        assert [model.name for model in registry.models()] == ["one", "two"]
        assert registry.get("one").name == "one"
        assert registry.get("").name == registry.get("whisper-1").name == "two"
        with pytest.raises(ModelNotFoundError, match="one, two"):
            registry.get("../one")


async def test_all_models_answer_at_once_on_one_pool_of_workers(tmp_path: Path) -> None:
    async with opened(settings_for(tmp_path, "one", "two", "three", workers=2)) as registry:
        texts = ["abc", "dd ee", "hgh", "a b c d"]
        heard = await asyncio.gather(
            *(hear(model, text) for text in texts for model in registry.models() for _ in range(5))
        )
        assert heard == [text for text in texts for _ in range(15)]
        assert registry.pool.workers == 2
        assert len({id(model.batcher._pool) for model in registry.models()}) == 1


async def test_what_was_chosen_is_exported(tmp_path: Path) -> None:
    telemetry = Telemetry()
    settings = settings_for(tmp_path, "one", workers=1, queue_limit_audio_s=77.0)
    async with opened(settings, telemetry) as registry:
        value = telemetry.metrics.registry.get_sample_value
        assert value("asr_model_loaded", {"model": "one"}) == 1
        assert value("asr_workers") == 1
        assert value("asr_queue_limit_audio_seconds") == 77.0
        assert value("asr_queue_depth") == value("asr_queue_audio_seconds") == 0
        await hear(registry.get(), "abc")
        assert (value("asr_compute_seconds_total", {"model": "one"}) or 0) > 0
        described = registry.get().describe()
        assert described["workers"] == 1
        assert described["provider"] == "cpu"
        assert registry.queue_summary()["limit_audio_s"] == 77.0
        assert registry.stalled() is None


async def test_calibration_at_start_is_shown(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    async with opened(load_settings(None, models_dir=tmp_path, models=("tiny",))) as registry:
        described = registry.get().describe()
        assert described["measured"]["batch_1"] > 0
        assert described["audio_s_per_s"] > 0


async def test_a_bundle_that_was_tampered_with_fails_the_start(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "one", "two")
    with (tmp_path / "two" / "vocab.txt").open("a") as file:
        file.write("x\n")
    telemetry = Telemetry()
    with pytest.raises(BundleError, match="two"):
        await open_registry(settings, telemetry)
    value = telemetry.metrics.registry.get_sample_value
    assert value("asr_model_loaded", {"model": "two"}) == 0


async def test_admission_before_the_upload(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "one", queue_limit_audio_s=8.0, workers=1)
    async with opened(settings) as registry:
        registry.admission.enter("first")
        registry.pool.waiting_audio_s = 8.0  # as if it were full
        with pytest.raises(QueueFullError):
            registry.admission.enter("first")
        registry.pool.waiting_audio_s = 0.0


async def test_closing_finishes_what_was_accepted(tmp_path: Path) -> None:
    registry = await open_registry(settings_for(tmp_path, "one", workers=1), Telemetry())
    model = registry.get()
    accepted = [asyncio.create_task(hear(model, "abc")) for _ in range(20)]
    await asyncio.sleep(0)
    await registry.close(20.0)
    assert await asyncio.gather(*accepted) == ["abc"] * 20
    assert not registry.pool._threads
    with pytest.raises(DrainingError):
        registry.admission.enter("next")
