"""The loaded models: bundle, engine and batcher of each, on one pool of workers and behind one admission."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog

from api import beam, compiled, ctc
from api.batcher import Admission, Batcher
from api.bundle import Bundle, load_bundle
from api.calibration import Calibration, calibrate
from api.cgroup import cpu_limit_cores, usable_cores
from api.decoding import in_words, usual_beam
from api.engine import Engine
from api.errors import ModelNotFoundError
from api.settings import Settings
from api.telemetry import Telemetry
from api.workers import WorkerPool

log = structlog.get_logger("api.registry")

ALIAS_OF_DEFAULT = "whisper-1"
GPU_WORKERS = 2  # one runs while the other pads the next batch


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is warm and takes work."""

    bundle: Bundle
    engine: Engine
    batcher: Batcher
    calibration: Calibration
    load_s: float
    usual_beam: int = 0
    """Width of the beam search where a request asks for none; 0 is greedy."""

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self.bundle.name

    @property
    def graph(self) -> str:
        """``int8``, ``int4`` or ``float32``."""
        return self.engine.graph

    @property
    def provider(self) -> str:
        """Where it runs: ``cpu``, ``cuda`` or ``openvino``."""
        return self.engine.provider

    def describe(self) -> dict[str, Any]:
        """What was chosen and measured, for ``/models``."""
        return {
            **self.engine.describe(),
            "decoding": in_words(self.bundle, self.usual_beam),
            "workers": self.calibration.workers,
            "audio_s_per_s": round(self.calibration.audio_s_per_s, 1),
            "measured": self.calibration.measured,
            "load_s": round(self.load_s, 2),
        }


class Registry:
    """Models by name."""

    def __init__(
        self, loaded: Sequence[LoadedModel], default: str, pool: WorkerPool, admission: Admission
    ) -> None:
        self._models = {model.name: model for model in loaded}
        self._default = default
        self.pool = pool
        self.admission = admission

    def models(self) -> list[LoadedModel]:
        """In the order of the settings."""
        return list(self._models.values())

    def get(self, name: str = "") -> LoadedModel:
        """By name; empty and ``whisper-1`` are the default model. Raises ModelNotFoundError."""
        if name in ("", ALIAS_OF_DEFAULT):
            name = self._default
        if name not in self._models:
            raise ModelNotFoundError(name[:100], list(self._models))
        return self._models[name]

    def queue_summary(self) -> dict[str, Any]:
        """For ``/health``."""
        pool = self.pool
        return {
            "waiting": pool.waiting,
            "waiting_audio_s": round(pool.waiting_audio_s, 2),
            "claimed_audio_s": round(self.admission.claimed_audio_s, 2),
            "limit_audio_s": self.admission.limit_s,
            "drain_audio_s_per_s": round(pool.drain_rate.per_s, 1),
            "workers": pool.workers,
            "busy_workers": pool.busy,
            "abandoned": pool.abandoned,
            "expired": pool.expired,
            "replaced_workers": pool.replaced,
        }

    def stalled(self) -> str | None:
        """Why the process should be restarted: work is there, but no batch has finished for a long time."""
        if not self.pool.stalled():
            return None
        idle_s = time.monotonic() - self.pool.last_progress_s
        return f"no batch has finished for {idle_s:.0f} s while work is waiting"

    async def close(self, timeout_s: float) -> None:
        """Refuse new requests, finish what was accepted, end the workers."""
        if not await self.admission.drain(timeout_s):
            log.warning("drain_timed_out", waiting=self.pool.waiting, busy=self.pool.busy)
        await asyncio.to_thread(self.pool.close)


async def open_registry(
    settings: Settings, telemetry: Telemetry, go_on: Callable[[], None] = lambda: None
) -> Registry:
    """Load, calibrate and warm up every model of the settings, then start the workers.

    Runs in a thread, so that probes are answered meanwhile. ``go_on`` is called between the steps and may end
    them by raising: nothing else can end a thread. Raises BundleError or SettingsError; whatever else fails
    in a warm-up fails the start, too.
    """
    return await asyncio.to_thread(_load_all, settings, telemetry, go_on)


def _load_all(settings: Settings, telemetry: Telemetry, go_on: Callable[[], None]) -> Registry:
    limit_cores = cpu_limit_cores()
    cores = usable_cores(limit_cores)
    for name in settings.models:
        telemetry.model_not_loaded(name)
    if problem := compiled.unusable():
        log.warning("compiled_decoders_unusable", file=str(compiled.LIBRARY), problem=problem)
    engines = []
    workers = 0
    # The default model first: what it calibrates to is the number of workers of all.
    names = sorted(settings.models, key=lambda name: name != settings.default_model_name)
    for name in names:
        engine, calibration, load_s = _load(settings, name, cores, workers, go_on)
        workers = workers or calibration.workers
        engines.append((engine, calibration, load_s))
    go_on()
    slowest = min(calibration.audio_s_per_s for _, calibration, _ in engines)
    pool = WorkerPool(workers, telemetry, rate=slowest)
    admission = Admission(settings.queue_limit_audio_s, pool)
    loaded = []
    for engine, calibration, load_s in engines:
        batcher = Batcher(engine, admission, telemetry)
        beam = usual_beam(engine.bundle, settings.max_beam)
        model = LoadedModel(engine.bundle, engine, batcher, calibration, load_s, beam)
        loaded.append(model)
        _announce(model, telemetry)
    loaded.sort(key=lambda model: settings.models.index(model.name))
    _export(telemetry, loaded, pool, admission, limit_cores)
    pool.start()
    _return_memory()
    return Registry(loaded, settings.default_model_name, pool, admission)


def _load(
    settings: Settings, name: str, cores: int, workers: int, go_on: Callable[[], None]
) -> tuple[Engine, Calibration, float]:
    """One model, warm. ``workers``: of the pool, 0 while it is not decided."""
    start_s = time.perf_counter()
    go_on()
    bundle = load_bundle(settings.models_dir, name)
    go_on()
    with ThreadPoolExecutor(1, thread_name_prefix="warm-up") as beside:
        decoder = beside.submit(_warm_decoder, bundle)
        engine, calibration = _warm_engine(settings, bundle, cores, workers, go_on)
        decoder.result()
    return engine, calibration, time.perf_counter() - start_s


def _warm_engine(
    settings: Settings, bundle: Bundle, cores: int, workers: int, go_on: Callable[[], None]
) -> tuple[Engine, Calibration]:
    threads = settings.threads_per_worker or 1
    wanted_workers = workers or settings.workers or max(1, cores // threads)
    wide = min(cores, settings.workers or cores)
    engine = Engine(
        bundle,
        graph=settings.graph,
        provider=settings.provider,
        kernels=settings.kernels == "auto",
        threads=threads,
        wide_threads=wide if settings.calibrate and not settings.threads_per_worker else 0,
        max_batch=settings.max_batch or 1,
        # On a CPU batches that are not asked for stay within one window: larger ones win nothing there.
        max_batch_audio_s=settings.max_batch_audio_s if settings.max_batch else 0.0,
    )
    if engine.provider == "cuda":
        engine.allow_padded(settings.max_batch_audio_s)
        if not workers and not settings.workers:
            wanted_workers = GPU_WORKERS
    go_on()
    engine.warm_up(wanted_workers)
    go_on()
    if settings.calibrate:
        calibration = calibrate(engine, wanted_workers, max_batch=settings.max_batch)
        if calibration.max_batch > 1:
            engine.warm_up(wanted_workers)
    else:
        batch = settings.max_batch or (16 if engine.provider == "cuda" else 1)
        engine.configure(max_batch=batch, wide=False)
        calibration = Calibration(wanted_workers, batch, wide=False, wide_only=False, audio_s_per_s=50.0)
    return engine, calibration


def _return_memory() -> None:
    """Give what loading and compiling freed back to the system; 20 to 30 MB with the small model."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def _warm_decoder(bundle: Bundle) -> None:
    vocabulary = bundle.vocabulary
    ctc.warm_up(len(vocabulary), vocabulary.blank_id)
    beam.warm_up(vocabulary)


def _announce(model: LoadedModel, telemetry: Telemetry) -> None:
    manifest = model.bundle.manifest
    telemetry.model_loaded(
        model.name,
        languages=manifest.languages,
        revision=manifest.version,
        quantization=model.graph,
        provider=model.provider,
        kernels=model.engine.kernels,
        load_s=model.load_s,
    )
    log.info("model_loaded", model=model.name, **model.describe())


def _export(
    telemetry: Telemetry,
    loaded: Sequence[LoadedModel],
    pool: WorkerPool,
    admission: Admission,
    limit_cores: float,
) -> None:
    threads = max(model.engine.threads for model in loaded)
    max_batch = max(model.calibration.max_batch for model in loaded)
    telemetry.engine_configured(
        workers=pool.workers, threads_per_worker=threads, max_batch=max_batch, cpu_limit_cores=limit_cores
    )
    metrics = telemetry.metrics
    metrics.queue_depth.set_function(lambda: float(pool.waiting))
    metrics.queue_audio.set_function(lambda: admission.claimed_audio_s)
    metrics.queue_limit.set(admission.limit_s)
    log.info(
        "engine_configured",
        cpu_limit_cores=round(limit_cores, 2),
        workers=pool.workers,
        threads_per_worker=threads,
        max_batch=max_batch,
        queue_limit_audio_s=admission.limit_s,
    )
