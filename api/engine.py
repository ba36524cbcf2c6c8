"""ONNX Runtime: padded waveforms -> log-probabilities.

One session with one thread serves all workers: ``Run`` is thread-safe, a one-thread session has no pool of
its own, so every worker computes on its own core and the weights are in memory once. (Measured: no slower
than a session per worker.) A second, ``wide`` session spreads one clip over all cores for the moments when
nothing else is to be done; calibration keeps it only where it is faster.

On a CPU a clip runs at its own length, and nothing is kept for a shape: ONNX Runtime's memory patterns, one
for each length ever seen, are off. Other providers compile or plan for each shape; for them lengths are
padded up to buckets, every one of which is warm before the first request. Thread pools do not spin: spinning
threads take the core that another worker, or another container, is about to use.

On CPUs the convolutions of INT8 graphs run on our own kernels where those work (``api.kernels``); both
sessions then read the same copy of their weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import structlog
from numpy.typing import NDArray

from api.batching import BatchLimits, bucket_of
from api.bundle import Bundle, check_outputs, check_session
from api.errors import BundleError, InferenceError, SettingsError
from api.exact_products import make_products_exact
from api.frames import Frames
from api.kernels import PLACES, ROWS, Kernels, instructions, open_sessions, outputs_of
from api.manifest import GraphChoice

log = structlog.get_logger("api.engine")

ProviderName = Literal["auto", "cpu", "cuda", "openvino"]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "cuda": {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"},
    "openvino": {"device_type": "CPU"},
}

WIDE_MAX_BYTES = 128 * 2**20  # the wide session holds the weights once more
BUCKET_RATIOS = (1.05, 1.1, 1.2, 1.5)  # fine buckets waste least, coarse ones warm fastest
WARM_UP_BUDGET_S = 2.0
WARM_UP_CLIP_S = 2.0


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """log_probs float32 ``(batch, frames, vocabulary)``; frame_lengths int64 ``(batch,)``.

    With ``places``, int64 ``(batch, frames)``, ``log_probs`` is ``(rows, vocabulary)`` and a place one of
    its rows.
    """

    log_probs: NDArray[np.float32]
    frame_lengths: NDArray[np.int64]
    places: NDArray[np.int64] | None = None

    def frames(self) -> list[Frames]:
        """Those of each utterance, without the padding's."""
        lengths = self.frame_lengths.tolist()
        if self.places is None:
            return [Frames(item[:count]) for item, count in zip(self.log_probs, lengths, strict=True)]
        return [
            Frames(self.log_probs, item[:count]) for item, count in zip(self.places, lengths, strict=True)
        ]


def make_buckets(least: int, most: int, ratio: float) -> tuple[int, ...]:
    """Lengths in samples from ``least`` to ``most``, each at most ``ratio`` times the one before."""
    buckets = [most]
    while buckets[-1] / ratio > least:
        buckets.append(int(buckets[-1] / ratio))
    return tuple(reversed(buckets))


def choose_ratio(least: int, most: int, samples_per_s: float, budget_s: float) -> float:
    """The finest ratio whose buckets warm up within the budget; the coarsest if none does."""
    for ratio in BUCKET_RATIOS:
        if sum(make_buckets(least, most, ratio)) / samples_per_s <= budget_s:
            return ratio
    return BUCKET_RATIOS[-1]


class Engine:
    """One model in ONNX Runtime. ``infer`` and ``run`` may be called from many threads at once."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        graph: GraphChoice = "auto",
        provider: ProviderName = "auto",
        threads: int = 1,
        wide_threads: int = 0,
        max_batch: int = 1,
        max_batch_audio_s: float = 60.0,
        kernels: bool = True,
    ) -> None:
        """Open the sessions and check the graph against the manifest.

        ``kernels``: our own where they work; else ONNX Runtime's for everything.
        ``max_batch_audio_s``: padded audio-seconds of a batch, but never less than the model's window.
        ``threads``: inside one inference. ``wide_threads``: of the second session, 0 for none. Raises
        BundleError for a graph that is not what the manifest says, SettingsError for a provider that is
        asked for but does not work here.
        """
        self.bundle = bundle
        on_cpu = provider == "cpu" or (provider == "auto" and "cuda" not in available_providers())
        self.graph = bundle.choose_graph(graph, instructions() if kernels and on_cpu else "onnxruntime")
        self.threads = threads
        path = bundle.graph_path(self.graph)
        kernels = kernels and self.graph != "float32"
        wide = wide_threads if wide_threads > 1 and path.stat().st_size <= WIDE_MAX_BYTES else 0
        opened = _open(bundle, str(path), provider, threads, wide, kernels=kernels)
        self.provider, self.kernels, self._session = opened.provider, opened.kernels, opened.session
        self._wide, self._wide_threads = opened.wide, wide
        check_session(bundle, self.graph, self._session)
        manifest = bundle.manifest
        self._least = manifest.input.min_samples
        self._most = int(manifest.max_window_s * manifest.sample_rate_hz)
        self.allow_padded(max_batch_audio_s)
        self._max_batch = max_batch
        self._shapes_cost = self.provider != "cpu"
        self._buckets = self._make_buckets(BUCKET_RATIOS[-1])

    # -- what others ask

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self.bundle.name

    @property
    def sample_rate_hz(self) -> int:
        """Of the waveforms."""
        return self.bundle.manifest.sample_rate_hz

    @property
    def longest_samples(self) -> int:
        """Of one window."""
        return self._most

    @property
    def limits(self) -> BatchLimits:
        """What one batch may hold."""
        return BatchLimits(self._max_batch, self._max_padded, buckets=self._buckets)

    @property
    def has_wide(self) -> bool:
        """Whether a lone clip is spread over all cores."""
        return self._wide is not None

    @property
    def _least_bucket(self) -> int:
        return max(self._least, min(self._most, self.sample_rate_hz // 2))

    def _make_buckets(self, ratio: float) -> tuple[int, ...]:
        return make_buckets(self._least_bucket, self._most, ratio) if self._shapes_cost else ()

    # -- what calibration decides

    def configure(self, *, max_batch: int, wide: bool) -> None:
        """Set the batch cap; give the wide session up where it does not help."""
        self._max_batch = max_batch
        if not wide:
            self._wide = None

    def allow_padded(self, audio_s: float) -> None:
        """Set the padded audio-seconds of a batch; one window always fits."""
        self._max_padded = max(self._most, int(audio_s * self.sample_rate_hz))

    def use_wide_only(self) -> None:
        """Every batch on all cores, for one worker."""
        if self._wide is not None:
            self._session, self._wide = self._wide, None
            self.threads = self._wide_threads

    def warm_up(self, workers: int) -> float:
        """Run the shortest and the longest window, or every bucket, on ``workers`` threads, then the largest
        batch; seconds it took.

        The first run also checks frames and vocabulary against the manifest, and its speed decides how fine
        the buckets are. Raises BundleError; any other exception of ONNX Runtime passes through.
        """
        start_s = time.perf_counter()
        samples = min(self._most, max(self._least, int(WARM_UP_CLIP_S * self.sample_rate_hz)))
        clip = np.zeros((1, samples), np.float32)
        self._checked_first_run(clip)
        if self._shapes_cost:
            speed = workers * samples / self._timed(clip)
            ratio = choose_ratio(self._least_bucket, self._most, speed, WARM_UP_BUDGET_S)
            self._buckets = self._make_buckets(ratio)
        ends = (self._least_bucket, self._most)
        with ThreadPoolExecutor(workers, thread_name_prefix="warm-up") as pool:
            # Largest first, so that the threads end together.
            list(pool.map(self._warm_length, reversed(self._buckets or sorted(ends * workers))))
        if self._wide is not None:
            for samples in ends:
                self._infer_zeros(1, samples, wide=True)
        if self._max_batch > 1:
            self._infer_zeros(self._max_batch, min(self._most, self._max_padded // self._max_batch))
        return time.perf_counter() - start_s

    def _checked_first_run(self, clip: NDArray[np.float32]) -> None:
        lengths = np.array([clip.shape[1]], np.int64)
        found = _encoded(self._session, clip, lengths)
        log_probs = found.log_probs if found.places is None else found.log_probs[found.places]
        check_outputs(self.bundle, clip.shape[1], log_probs, found.frame_lengths)
        if not np.isfinite(log_probs).all():
            raise BundleError(self.name, "graphs", self.graph, "gives values that are not finite on silence")

    def _timed(self, clip: NDArray[np.float32]) -> float:
        start_s = time.perf_counter()
        self.infer(clip, np.array([clip.shape[1]], np.int64))
        return max(1e-6, time.perf_counter() - start_s)

    def _warm_length(self, samples: int) -> None:
        self._infer_zeros(1, samples)

    def _infer_zeros(self, batch: int, samples: int, *, wide: bool = False) -> None:
        lengths = np.full(batch, samples, np.int64)
        self.infer(np.zeros((batch, samples), np.float32), lengths, wide=wide)

    # -- inference

    def infer(
        self, waveform: NDArray[np.float32], lengths: NDArray[np.int64], *, wide: bool = False
    ) -> EncodedBatch:
        """Log-probabilities of a padded batch.

        ``waveform`` float32 ``(batch, samples)``, zeros after each item's length; ``lengths`` int64
        ``(batch,)``. ``wide``: on all cores, where there is a session for it.
        Raises InferenceError for outputs that are not finite or not of the right length.
        """
        session = self._wide if wide and self._wide is not None else self._session
        found = _encoded(session, waveform, lengths)
        # One output per frame is enough: softmax spreads whatever is not finite over all of them.
        if not np.isfinite(found.log_probs[..., 0]).all():
            raise InferenceError("The model gave no valid probabilities for this audio.")
        counts, frames = found.frame_lengths, (found.log_probs if found.places is None else found.places)
        if len(counts) and not 0 <= counts.min() <= counts.max() <= frames.shape[1]:
            raise InferenceError("The model gave no valid frame counts for this audio.")
        return found

    def pad(self, waveforms: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Float32 ``(samples,)`` each -> ``(batch, longest or bucket)``, zeros behind, and lengths int64."""
        lengths = np.array([max(self._least, len(waveform)) for waveform in waveforms], np.int64)
        samples = bucket_of(int(lengths.max()), self._buckets)
        if len(waveforms) == 1 and len(waveforms[0]) == samples and waveforms[0].flags.c_contiguous:
            return waveforms[0][None], lengths
        padded = np.zeros((len(waveforms), samples), np.float32)
        for row, waveform in zip(padded, waveforms, strict=True):
            # As bytes: numpy's own copy lets the interpreter go, and the event loop, which has a result to
            # tell by now, would keep it while this core waits.
            row.data[: len(waveform)] = waveform.data
        return padded, lengths

    def run(self, waveforms: Sequence[NDArray[np.float32]], *, alone: bool) -> list[Frames]:
        """Log-probabilities of each waveform's frames, without the padding's.

        ``alone``: nothing else is running or waiting, so all cores may be used.
        """
        padded, lengths = self.pad(waveforms)
        return self.infer(padded, lengths, wide=alone).frames()

    def describe(self) -> dict[str, Any]:
        """For ``/models`` and the log."""
        return {
            "graph": self.graph,
            "provider": self.provider,
            "kernels": self.kernels,
            "threads_per_worker": self.threads,
            "max_batch": self._max_batch,
            "latency_mode": self.has_wide,
            "buckets": len(self._buckets),
            "max_padded_audio_s": round(self._max_padded / self.sample_rate_hz, 1),
        }


def _encoded(
    session: ort.InferenceSession, waveform: NDArray[np.float32], lengths: NDArray[np.int64]
) -> EncodedBatch:
    outputs = outputs_of(session, {"waveform": waveform, "lengths": lengths})
    if ROWS not in outputs:
        return EncodedBatch(outputs["log_probs"], outputs["frame_lengths"])
    rows, places = outputs[ROWS], outputs[PLACES]
    flat = np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), rows.shape[:-1])
    return EncodedBatch(rows.reshape(-1, rows.shape[-1]), outputs["frame_lengths"], flat)


def available_providers() -> list[str]:
    """Our names of what this build of ONNX Runtime offers; whether it works shows when a session opens."""
    offered = ort.get_available_providers()
    return [name for name, full in PROVIDERS.items() if full in offered]


@dataclass(frozen=True, slots=True)
class _Opened:
    provider: str
    kernels: Kernels
    session: ort.InferenceSession
    wide: ort.InferenceSession | None


def _open(bundle: Bundle, path: str, wanted: str, threads: int, wide: int, *, kernels: bool) -> _Opened:
    """A session on the wanted provider, verified: ONNX Runtime falls back to the CPU without a word."""
    offered = available_providers()
    if wanted == "auto":
        if "cuda" in offered:
            try:
                return _sessions(bundle, path, "cuda", threads, wide, kernels=kernels)
            except SettingsError as error:
                log.warning("provider_fallback", wanted="cuda", chosen="cpu", problem=str(error))
        return _sessions(bundle, path, "cpu", threads, wide, kernels=kernels)
    if wanted not in offered:
        raise SettingsError(
            f"ASR_PROVIDER={wanted}: this build of ONNX Runtime has only {', '.join(offered)}"
        )
    return _sessions(bundle, path, wanted, threads, wide, kernels=kernels)


def _sessions(bundle: Bundle, path: str, provider: str, threads: int, wide: int, *, kernels: bool) -> _Opened:
    """``wide``: threads of a second session, 0 for none; it and ``kernels`` are for the CPU only."""
    found: Kernels = "onnxruntime"
    try:
        if provider == "cpu":
            counts = [threads, wide] if wide else [threads]
            least = bundle.manifest.input.min_samples if kernels else None
            sessions, found = _cpu_sessions(path, counts, least)
        else:
            sessions = [_session(path, provider, session_options(threads, plan_shapes=True), threads)]
    except Exception as error:
        if provider != "cpu":
            raise SettingsError(f"ASR_PROVIDER={provider}: {error}") from error
        raise BundleError(bundle.name, "graphs", path.rsplit("/", 1)[-1], f"ONNX Runtime: {error}") from error
    for session in sessions:
        verify_provider(session, provider)
    return _Opened(provider, found, sessions[0], sessions[1] if len(sessions) > 1 else None)


def _cpu_sessions(
    path: str, counts: Sequence[int], least_samples: int | None
) -> tuple[list[ort.InferenceSession], Kernels]:
    """A session for each number of threads, with our kernels where ``least_samples`` of the graph are given.

    ONNX Runtime refuses to make products exact whose weights another node reads, too.
    """

    def opened(*, exact: bool) -> tuple[list[ort.InferenceSession], Kernels]:
        make_options = [partial(session_options, threads, exact=exact) for threads in counts]
        if least_samples is not None:
            return open_sessions(path, make_options, least_samples=least_samples, rows=True)
        return [
            _session(path, "cpu", make(), threads) for make, threads in zip(make_options, counts, strict=True)
        ], "onnxruntime"

    try:
        return opened(exact=True)
    except Exception as refused:
        try:
            found = opened(exact=False)
        except Exception:
            raise refused from None
        log.warning("products_inexact", graph=path, problem=str(refused))
        return found


def _session(path: str, provider: str, options: ort.SessionOptions, threads: int) -> ort.InferenceSession:
    return ort.InferenceSession(
        path,
        options,
        providers=[PROVIDERS[provider]],
        provider_options=[_provider_options(provider, threads)],
    )


def session_options(threads: int, *, plan_shapes: bool = False, exact: bool = True) -> ort.SessionOptions:
    """Fresh options as every session of the service has them; ``threads`` inside one inference.

    ``plan_shapes``: remember where in memory everything goes, for each shape. ``exact``: products of bytes.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = plan_shapes
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if exact:
        make_products_exact(options)
    return options


def _provider_options(provider: str, threads: int) -> dict[str, str]:
    options = dict(PROVIDER_OPTIONS.get(provider, {}))
    if provider == "openvino":  # has threads of its own and does not look at the session's
        options["num_of_threads"] = str(threads)
    return options


def verify_provider(session: ort.InferenceSession, provider: str) -> None:
    """Raise SettingsError when the session runs on another provider than ours of this name."""
    actual = session.get_providers()[0]
    if actual != PROVIDERS[provider]:
        raise SettingsError(f"ASR_PROVIDER={provider}: ONNX Runtime fell back to {actual} without a word")
