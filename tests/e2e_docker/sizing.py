"""make sizing: what one replica with one CPU serves through HTTP, for the table in docs/deploy.md.

One container of asr-api:e2e, limited as in production, a closed loop of clients without pauses, every
transcript checked. Prints audio-seconds per second, latencies, memory, and how long it took to get ready.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
import urllib.request

import soundfile

from tests.e2e_docker.load import Clip, Load, Tally, learn
from tests.e2e_docker.tools import Report, audio_files, main, require_docker, run, succeeds, wait_for

CLIENTS = 8
SECONDS = 30.0
IMAGE = "asr-api:e2e"


def duration_s(data: bytes) -> float:
    """Length of a recording."""
    return float(soundfile.info(io.BytesIO(data)).duration)


async def closed_loop(url: str, clips: list[Clip]) -> tuple[Tally, float]:
    """The tally of SECONDS of load and its real length."""
    started_s = time.monotonic()
    async with Load(url, clips, CLIENTS, {}, think_s=0.0) as load:
        await asyncio.sleep(SECONDS)
    return load.tally, time.monotonic() - started_s


def proof(report: Report) -> None:
    require_docker()
    container = run(
        "docker", "run", "--detach", "--read-only", "--cap-drop=ALL", "--cpus=1", "--memory=1536m",
        "--tmpfs=/tmp:size=768m,mode=1777", "--env=ASR_ALLOW_ANONYMOUS=true", "--publish=127.0.0.1::8000",
        IMAGE,
    ).strip()  # fmt: skip
    try:
        url = "http://" + run("docker", "port", container, "8000").splitlines()[0].strip()

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"{url}/health/ready", timeout=2) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        ready_s = wait_for("the container", ready, 120, every_s=0.05)
        busy = f"load of the machine {os.getloadavg()[0]:.1f}"
        report.check(True, f"ready: {ready_s:.1f} s after docker run ({busy})", round(ready_s, 1))
        clips = asyncio.run(learn(url, audio_files(), {}))
        mean_s = sum(duration_s(clip.data) for clip in clips) / len(clips)
        cpu_before = cpu_seconds(container)
        tally, elapsed_s = asyncio.run(closed_loop(url, clips))
        cores = (cpu_seconds(container) - cpu_before) / elapsed_s
        report.check(not tally.failures, f"clients: {tally.line()}", tally.answered)
        rate = tally.answered * mean_s / elapsed_s
        report.check(
            rate > 0,
            f"throughput: {rate:.0f} audio-seconds per second, clips of {mean_s:.1f} s",
            round(rate, 1),
        )
        report.check(True, f"cores used: {cores:.2f} of 1", round(cores, 2))
        report.check(
            True, f"per used core: {rate / cores:.0f} audio-seconds per second", round(rate / cores, 1)
        )
        stats = json.loads(run("docker", "stats", "--no-stream", "--format", "{{json .}}", container))
        report.check(True, f"memory: {stats['MemUsage']}", stats["MemUsage"])
    finally:
        succeeds("docker", "rm", "--force", container)


def cpu_seconds(container: str) -> float:
    """CPU time that the container has used, as its own cgroup counts it."""
    v1, v2 = "/sys/fs/cgroup/cpuacct/cpuacct.usage", "/sys/fs/cgroup/cpu.stat"
    script = f"cat {v1} 2>/dev/null || sed -n 's/usage_usec \\(.*\\)/\\1000/p' {v2}"
    return int(run("docker", "exec", container, "sh", "-c", script)) / 1e9


if __name__ == "__main__":
    main("sizing", proof)
