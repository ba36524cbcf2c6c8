"""``asr bench``: what the loaded engine does on this machine, in this process."""

from __future__ import annotations

import asyncio
import json
import platform
import time

import numpy as np

from api.cgroup import cpu_limit_cores
from api.commands.runtime import open_service, warnings_only
from api.errors import SettingsError
from api.settings import Settings

MAX_CLIP_S = 600.0  # one inference of more takes gigabytes


def run(settings: Settings, clip_s: float, clips: int) -> int:
    """Latency of one clip alone, then throughput with 1, 8 and 32 clips in flight; the last line is JSON."""
    if clips < 1:
        raise SettingsError(f"--clips {clips}: must be 1 or more")
    if not 0 < clip_s <= MAX_CLIP_S:  # also what is not a number
        raise SettingsError(f"--seconds {clip_s:g}: must be above 0, at most {MAX_CLIP_S:g}")
    warnings_only()
    print(json.dumps(asyncio.run(_run(settings, clip_s, clips))))
    return 0


async def _run(settings: Settings, clip_s: float, clips: int) -> dict[str, object]:
    async with open_service(settings) as service:
        model = service.models()[0]
        rate_hz = model.bundle.manifest.sample_rate_hz
        rng = np.random.default_rng(0)
        clip = rng.normal(0.0, 0.1, round(clip_s * rate_hz)).astype(np.float32)

        async def infer() -> float:
            start_s = time.perf_counter()
            await model.batcher.submit(clip, len, deadline_s=time.monotonic() + 600, wait=True)
            return time.perf_counter() - start_s

        for _ in range(3):
            await infer()
        print(f"{model.name} {model.graph} on {cpu_limit_cores():g} cores, clips of {clip_s:g} s")
        print(f"{'in flight':>10} {'p50 ms':>8} {'p95 ms':>8} {'audio s/s':>10}")
        rows = []
        for in_flight in (1, 8, 32):
            slots = asyncio.Semaphore(in_flight)

            async def one(slots: asyncio.Semaphore = slots) -> float:
                async with slots:
                    return await infer()

            start_s = time.perf_counter()
            latencies_s = await asyncio.gather(*(one() for _ in range(clips)))
            rate = clips * clip_s / (time.perf_counter() - start_s)
            p50, p95 = (float(np.percentile(latencies_s, share)) * 1000 for share in (50, 95))
            print(f"{in_flight:>10} {p50:>8.1f} {p95:>8.1f} {rate:>10.1f}")
            rows.append({"in_flight": in_flight, "p50_ms": p50, "p95_ms": p95, "audio_s_per_s": rate})
        return {
            "model": model.name,
            "graph": model.graph,
            "machine": platform.processor() or platform.machine(),
            "cores": cpu_limit_cores(),
            "clip_s": clip_s,
            "rows": rows,
        }
