"""Half an hour of everything at once: does memory, a descriptor, a thread or a spooled file stay behind?

    python -m loadtest.soak [--model en-moonshine-tiny] [--minutes 30] [--clients 6] [--out FOLDER]

Callers send what real ones send, each time something else: clips of 2 to 15 s in forty formats, long files as
streams, batches with a bad file in them, OpenAI's form with times, damaged files, wrong fields, clients that
leave in the middle of an upload or while they wait, live sessions, and a scraper. Each kind says what it may
be answered. Somebody speaks live all the time, in real time, and must be understood the same way throughout.

The process is read every few seconds. It passes when (1) every answer was one that its kind allows, (2)
memory does not grow, (3) idle after the load, it holds no more descriptors and spooled files than idle before
it, nor more threads than asyncio's pool may have started since, and (4) no request is left. Growth is judged
after a warm-up, on the medians of ten equal stretches of time: a leak lifts every one above the one before, a
file larger than any before it lifts one, once. So what counts is the median of the nine rises, when nine of
it are more than 2 % of the memory. The exit status says whether it passed; the last line is JSON, and
``--out`` keeps the samples (CSV) and a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from loadtest.command import bundle_parser
from loadtest.mixed_load import Callers, Tally, drive
from loadtest.processes import LiveServer, api_server, hardware

STRETCHES = 10
GROWTH_SHARE = 0.02
WARM_UP_SHARE = 0.2
IDLE_TIMEOUT_S = 60.0
POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Of asyncio's own pool, which starts one more whenever all are busy, up to this many, and keeps them."""


@dataclass(frozen=True)
class Sample:
    """The service's process at one moment; memory in MB (10^6 bytes)."""

    at_s: float
    rss_mb: float
    descriptors: int
    threads: int
    spooled: int


@dataclass(frozen=True)
class Growth:
    """Memory over the measured time, MB: its level, all that was added, what a steady leak added of it."""

    level_mb: float
    added_mb: float
    steady_mb: float
    measured_s: float

    @property
    def counts(self) -> bool:
        """Whether memory grows, by the measure that the module's text gives."""
        return self.steady_mb > GROWTH_SHARE * self.level_mb

    def __str__(self) -> str:
        minutes = self.measured_s / 60
        return (
            f"memory {self.level_mb:.0f} MB, {self.added_mb:+.1f} MB in {minutes:.0f} minutes, "
            f"of which {self.steady_mb:+.1f} steadily"
        )


def growth(samples: Sequence[Sample]) -> Growth:
    """See the module's text; medians of stretches, because readings swing with the requests in progress.

    ValueError with fewer than two samples per stretch.
    """
    if len(samples) < 2 * STRETCHES:
        raise ValueError(f"{len(samples)} samples; at least {2 * STRETCHES} say something")
    bounds = [len(samples) * cut // STRETCHES for cut in range(STRETCHES + 1)]
    parts = [samples[first:end] for first, end in itertools.pairwise(bounds)]
    levels = [statistics.median(sample.rss_mb for sample in part) for part in parts]
    rises = [after - before for before, after in itertools.pairwise(levels)]
    return Growth(
        level_mb=statistics.fmean(levels),
        added_mb=sum(rises),
        steady_mb=statistics.median(rises) * len(rises),
        measured_s=samples[-1].at_s - samples[0].at_s,
    )


class Reader:
    """Reads the process every few seconds, in a task of its own."""

    def __init__(self, running: LiveServer, spool: Path, every_s: float, bar: Any) -> None:
        self.running, self.spool, self.every_s, self.bar = running, spool, every_s, bar
        self.started_s = time.monotonic()
        self.samples: list[Sample] = []

    def read(self) -> Sample:
        """One reading, now."""
        process = self.running.process
        return Sample(
            at_s=time.monotonic() - self.started_s,
            rss_mb=self.running.rss_mb(),
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            spooled=len(self.running.spool_files(self.spool)),
        )

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.every_s)
            sample = self.read()
            self.samples.append(sample)
            held = f"{sample.rss_mb:.0f} MB, {sample.descriptors} fds, {sample.threads} threads"
            self.bar.set_postfix_str(held, refresh=False)
            self.bar.update(min(sample.at_s, self.bar.total) - self.bar.n)


async def idle(running: LiveServer, reader: Reader) -> tuple[Sample, dict[str, Any]]:
    """What the process holds once nothing is in progress; the fewest of some readings, and /health."""
    until_s = time.monotonic() + IDLE_TIMEOUT_S
    async with httpx.AsyncClient(base_url=running.url, trust_env=False) as http:
        while True:
            health = (await http.get("/health", headers={"Connection": "close"})).json()
            if not health["requests_in_progress"] or time.monotonic() > until_s:
                break
            await asyncio.sleep(0.5)
    readings = []
    for _ in range(10):
        await asyncio.sleep(0.5)
        readings.append(reader.read())
    return min(readings, key=lambda sample: (sample.descriptors, sample.threads)), health


def findings(
    tally: Tally, growth_: Growth, before: Sample, after: Sample, health: dict[str, Any]
) -> list[str]:
    """What is wrong, in words; empty when the soak passed."""
    found = [f"{count} times {what}" for what, count in Counter(tally.wrong).most_common(20)]
    if growth_.counts:
        found.append(f"memory grows: {growth_}")
    for name, more in (("descriptors", 0), ("threads", POOL_THREADS), ("spooled", 0)):
        was, is_now = getattr(before, name), getattr(after, name)
        if is_now > was + more:
            found.append(f"idle, {is_now} {name} after the load, {was} before")
    if health["requests_in_progress"]:
        found.append(f"{health['requests_in_progress']} requests still in progress")
    return found


@dataclass(frozen=True)
class Report:
    """All that one run found."""

    tally: Tally
    samples: list[Sample]
    growth: Growth
    before: Sample
    after: Sample
    findings: list[str]


async def soak(running: LiveServer, spool: Path, given: argparse.Namespace) -> Report:
    """Warm up, look at the idle process, load it, look again."""
    callers = Callers(given.seed)
    total_s = given.minutes * 60
    warm_s = WARM_UP_SHARE * total_s
    form = "{l_bar}{bar}| {elapsed} {postfix}"
    with tqdm(total=total_s, unit="s", desc="soak", bar_format=form, mininterval=10) as bar:
        reader = Reader(running, spool, given.every_s, bar)
        watching = asyncio.create_task(reader.run())
        try:
            warm = await drive(running.url, callers, given.clients, warm_s, given.seed)
            before, _ = await idle(running, reader)
            loaded_s = reader.read().at_s
            tally = await drive(running.url, callers, given.clients, total_s - warm_s, given.seed + 1)
        finally:
            watching.cancel()
        after, health = await idle(running, reader)
    tally.wrong += warm.wrong
    tally.answers += warm.answers
    growth_ = growth([sample for sample in reader.samples if sample.at_s >= loaded_s])
    return Report(
        tally, reader.samples, growth_, before, after, findings(tally, growth_, before, after, health)
    )


def save(report: Report, folder: Path) -> None:
    """`soak.csv` with every sample, and `soak.png`."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "soak.csv").open("w", newline="", encoding="utf-8") as sink:
        writer = csv.DictWriter(sink, Sample.__dataclass_fields__)
        writer.writeheader()
        writer.writerows(asdict(sample) for sample in report.samples)
    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    minutes = [sample.at_s / 60 for sample in report.samples]
    for panel, name, label in zip(
        panels,
        ("rss_mb", "descriptors", "threads"),
        ("resident memory, MB", "descriptors", "threads"),
        strict=True,
    ):
        panel.plot(minutes, [getattr(sample, name) for sample in report.samples], linewidth=1)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("minutes")
    figure.savefig(folder / "soak.png", dpi=120)


def table(report: Report) -> str:
    """Answers by kind, the process before and after, the verdict."""
    lines = ["| request | answer | times |", "|---|---|--:|"]
    lines += [
        f"| {kind} | {answer} | {count} |" for (kind, answer), count in sorted(report.tally.answers.items())
    ]
    lines += [
        "",
        str(report.growth),
        *(
            f"idle {when} the load: {sample.rss_mb:.0f} MB, {sample.descriptors} descriptors, "
            f"{sample.threads} threads, {sample.spooled} spooled files"
            for when, sample in (("before", report.before), ("after", report.after))
        ),
        "",
        *(report.findings or ["passed"]),
    ]
    return "\n".join(lines)


def main() -> int:
    """The command; 1 where something was found."""
    parser = bundle_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--every-s", type=float, default=5.0, help="seconds between two readings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for soak.csv and soak.png")
    given = parser.parse_args()
    if given.minutes * 60 * (1 - WARM_UP_SHARE) < 2 * STRETCHES * given.every_s:
        parser.error(f"--minutes {given.minutes:g} with --every-s {given.every_s:g}: too few readings")
    with (
        tempfile.TemporaryDirectory(prefix="asr-soak-") as folder,
        api_server(given.model, given.models_dir, spool_dir=folder) as running,
    ):
        report = asyncio.run(soak(running, Path(folder), given))
    if given.out:
        save(report, given.out)
    print(f"{given.model}, {given.minutes:g} minutes, {given.clients} clients, {hardware()}\n")
    print(table(report))
    print(
        json.dumps(
            {
                "model": given.model,
                "minutes": given.minutes,
                "requests": sum(report.tally.answers.values()),
                "growth": asdict(report.growth),
                "before": asdict(report.before),
                "after": asdict(report.after),
                "findings": report.findings,
            }
        )
    )
    return bool(report.findings)


if __name__ == "__main__":
    raise SystemExit(main())
