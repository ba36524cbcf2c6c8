"""Half an hour of everything at once: does memory, a descriptor, a thread or a spooled file stay behind?

    python -m loadtest.soak [--model en-quartznet-small] [--minutes 30] [--clients 6] [--out FOLDER]

Callers send what real ones send, each time something else: clips of 2 to 15 s in forty formats, long files as
streams, batches with a bad file in them, OpenAI's form with times, damaged files, wrong fields, clients that
leave in the middle of an upload or while they wait, and a scraper. Each kind says what it may be answered.

The process is read every few seconds. It passes when (1) every answer was one that its kind allows, (2)
memory does not grow, (3) idle after the load, it holds no more descriptors, threads and spooled files than
idle before it, and (4) no request is left. Growth is judged after a warm-up, on the medians of ten equal
stretches of time: a leak lifts every one above the one before, a file larger than any before it lifts one,
once. So what counts is the median of the nine rises, when nine of it are more than 2 % of the memory. The
exit status says whether it passed; the last line is JSON, and ``--out`` keeps the samples (CSV) and a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from loadtest.clips import cut_clips, speech, wav_clip
from loadtest.fuzz_mutations import mutant
from loadtest.fuzz_seeds import make_seeds
from loadtest.load import Clip
from loadtest.processes import ROOT, LiveServer, api_server, hardware

STRETCHES = 10
GROWTH_SHARE = 0.02
WARM_UP_SHARE = 0.2
LONG_S = 90.0
IDLE_TIMEOUT_S = 60.0
LEFT = "left"
"""What stands in for a status where the caller went away, as it meant to."""


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


@dataclass
class Tally:
    """Answers by kind of request, and those that their kind does not allow."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, kind: Kind, said: str) -> None:
        """Count one answer: its status and, for an error, its code."""
        self.answers[kind.name, said] += 1
        if said not in kind.allowed:
            self.wrong.append(f"{kind.name}: {said}")


Ask = Callable[[httpx.AsyncClient, random.Random], Awaitable[str]]


@dataclass(frozen=True)
class Kind:
    """A sort of request: how it is made, which answers it may get, how often it comes."""

    name: str
    ask: Ask
    allowed: frozenset[str]
    weight: int


UNREADABLE = frozenset(
    f"400 {code}"
    for code in (
        "undecodable_audio", "empty_file", "no_audio_stream", "no_audio_samples", "not_finite_samples",
    )
)  # fmt: skip


def said(response: httpx.Response) -> str:
    """``"200"``, or the status and the code of the error."""
    if response.status_code == 200:
        return "200"
    try:
        return f"{response.status_code} {response.json()['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} without an error body"


class Callers:
    """The kinds of requests, over one set of files."""

    def __init__(self, seed: int) -> None:
        lengths_s = [2.0, 3.5, 5.0, 8.0, 12.0, 15.0]
        self.clips = cut_clips(lengths_s)[0]
        self.long: Clip = wav_clip("long", speech(LONG_S)[0][: int(LONG_S * 16000)])
        self.formats = make_seeds()
        self.seed = seed
        self.mutants = 0
        self.kinds = [
            Kind("clip", self.clip, frozenset({"200"}), 30),
            Kind("another format", self.other_format, frozenset({"200"}), 15),
            Kind("OpenAI with times", self.openai, frozenset({"200"}), 15),
            Kind("beam and hotwords", self.hotwords, frozenset({"200"}), 10),
            Kind("long, streamed", self.streamed, frozenset({"200"}), 3),
            Kind("batch", self.batch, frozenset({"200"}), 5),
            Kind("damaged file", self.damaged, UNREADABLE | {"200", "422 audio_too_long"}, 15),
            Kind("wrong field", self.wrong_field, frozenset({"422 invalid_value", "404 model_not_found"}), 5),
            Kind("leaves while waiting", self.leaves, frozenset({LEFT, "200"}), 5),
            Kind("leaves in the upload", self.half_upload, frozenset({LEFT}), 5),
            Kind("scrape and health", self.scrape, frozenset({"200"}), 5),
        ]

    async def clip(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        return said(await http.post("/transcribe", files=_file(rng.choice(self.clips))))

    async def other_format(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        name = rng.choice(sorted(self.formats))
        return said(await http.post("/transcribe", files={"file": (name, self.formats[name])}))

    async def openai(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        kind = rng.choice(["json", "verbose_json", "text", "srt", "vtt"])
        form: dict[str, Any] = {"model": "whisper-1", "response_format": kind}
        if kind == "verbose_json":
            form["timestamp_granularities[]"] = ["word", "segment"]
        return said(
            await http.post("/v1/audio/transcriptions", data=form, files=_file(rng.choice(self.clips)))
        )

    async def hotwords(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        words = [f"word{chr(97 + rng.randrange(26)) * 3}" for _ in range(rng.randrange(1, 40))]
        beam = rng.choice([0, 8, 16])
        form: dict[str, Any] = {"beam": str(beam)}
        if beam:  # greedy decoding takes no hotwords
            form["hotwords[]"] = [*words, "hello"]
        return said(await http.post("/transcribe", data=form, files=_file(rng.choice(self.clips))))

    async def streamed(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        form, last = {"stream": "true"}, ""
        async with http.stream("POST", "/transcribe", data=form, files=_file(self.long)) as response:
            if response.status_code != 200:
                await response.aread()
                return said(response)
            async for line in response.aiter_lines():
                last = line or last
        return "200" if last == "data: [DONE]" else f"a stream that ends with {last[:80]!r}"

    async def batch(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        chosen = rng.sample(self.clips, 3)
        files = [("files", (clip.name, clip.content)) for clip in chosen]
        files.insert(rng.randrange(4), ("files", ("bad.wav", b"not a sound at all")))
        response = await http.post("/transcribe/batch", files=files)
        if response.status_code != 200:
            return said(response)
        body = response.json()
        counts = body["succeeded"], body["failed"]
        return "200" if counts == (3, 1) else f"succeeded and failed {counts}"

    async def damaged(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        self.mutants += 1
        name, _, data = mutant(self.formats, self.seed, self.mutants)
        return said(await http.post("/transcribe", files={"file": (name, data)}))

    async def wrong_field(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        form = rng.choice([{"beam": "-1"}, {"model": "nobody-has-this"}, {"format": "docx"}])
        return said(await http.post("/transcribe", data=form, files=_file(self.clips[0])))

    async def leaves(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        try:
            async with asyncio.timeout(rng.uniform(0.001, 0.3)):
                return said(await http.post("/transcribe", files=_file(self.clips[-1])))
        except TimeoutError:
            return LEFT

    async def half_upload(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        url = http.base_url
        head = (
            f"POST /transcribe HTTP/1.1\r\nHost: {url.host}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n"
            f"Content-Length: {2 * len(self.long.content)}\r\n\r\n--b\r\n"
            'Content-Disposition: form-data; name="file"; filename="half.wav"\r\n\r\n'
        )
        _, writer = await asyncio.open_connection(url.host, url.port)
        with contextlib.suppress(ConnectionError):
            writer.write(head.encode() + self.long.content[: rng.randrange(len(self.long.content))])
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return LEFT

    async def scrape(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        for path in ("/metrics", "/health", "/health/live", "/models", "/v1/models"):
            response = await http.get(path)
            if response.status_code != 200:
                return said(response)
        return "200"


def _file(clip: Clip) -> dict[str, tuple[str, bytes]]:
    return {"file": (clip.name, clip.content)}


async def drive(base_url: str, callers: Callers, clients: int, duration_s: float, seed: int) -> Tally:
    """`clients` callers, each with one request at a time and a connection of its own, for `duration_s`."""
    tally = Tally()
    until_s = time.monotonic() + duration_s
    weights = [kind.weight for kind in callers.kinds]

    async def caller(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        async with httpx.AsyncClient(base_url=base_url, timeout=120.0, trust_env=False) as http:
            while time.monotonic() < until_s:
                (kind,) = rng.choices(callers.kinds, weights)
                try:
                    answer = await kind.ask(http, rng)
                except httpx.HTTPError as error:
                    answer = f"connection: {type(error).__name__}"
                tally.note(kind, answer)

    await asyncio.gather(*(caller(number) for number in range(clients)))
    return tally


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
    for name in ("descriptors", "threads", "spooled"):
        was, is_now = getattr(before, name), getattr(after, name)
        if is_now > was:
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "soak.csv").open("w", newline="", encoding="utf-8") as sink:
        writer = csv.DictWriter(sink, Sample.__dataclass_fields__)
        writer.writeheader()
        writer.writerows(asdict(sample) for sample in report.samples)
    figure, panels = plt.subplots(3, 1, sharex=True, figsize=(8, 6), layout="constrained")
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
    plt.close(figure)


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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="en-quartznet-small")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
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
