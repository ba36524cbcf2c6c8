"""Mutated audio files through the real decoder, in a child process that may die.

    python -m loadtest.fuzz_audio [--count 100000] [--seed 1] [--save DIR]
    python -m loadtest.fuzz_audio --seed 1 --only 4711        one mutant again, here, with its traceback

Every mutant must become audio or a typed client error of `api/errors.py`. Anything else is a finding, and so
is a child that crashes, works too long on one file, takes too much memory for one, keeps memory, descriptors
or temporary files. A finding is named by its number; the run goes on in a new child. Ends with a table and
one JSON line; the exit status is 1 where something was found.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from api.audio import AudioReader
from api.errors import ClientError
from loadtest.clips import SAMPLE_RATE_HZ
from loadtest.fuzz_mutations import mutant
from loadtest.fuzz_seeds import make_seeds
from loadtest.processes import ROOT

MAX_AUDIO_S = 60.0
FILE_TIMEOUT_S = 30.0  # wall clock, on a machine that may be busy; a healthy file takes 2 ms
FILE_CPU_S = 5.0
FILE_MEMORY_MB = 200.0
GROWTH_MB = 10.0  # per 10,000 files, in the longest-lived child
MIN_FILES_FOR_GROWTH = 5_000
MAX_DESCRIPTORS_MORE = 8


def outcome_of(data: bytes) -> str:
    """ "audio", "audio with a warning", or a client error's code.

    Raises whatever else the decoder raises, and AssertionError for audio that is not what it promises.
    """
    samples = 0
    try:
        with AudioReader(io.BytesIO(data), sample_rate_hz=SAMPLE_RATE_HZ, max_audio_s=MAX_AUDIO_S) as reader:
            for block in reader:
                if block.dtype != np.float32 or block.ndim != 1 or not np.abs(block).max() <= 1.0:
                    raise AssertionError(f"not a waveform: {block.dtype} {block.shape}")
                samples += len(block)
            if not abs(samples / SAMPLE_RATE_HZ - reader.duration_s) < 0.01 + 0.01 * reader.duration_s:
                raise AssertionError(f"{samples} samples of {reader.duration_s:.3f} s")
            return "audio with a warning" if reader.warnings else "audio"
    except ClientError as error:
        return error.code


# --- the child: decodes, and says what it is about to do before it does it ------------------------------


def child(pipe: int, base_seed: int, start: int, stop: int) -> None:
    """Write "> number" before each mutant and a JSON line after it."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seeds = make_seeds()
    for number in range(start, stop):
        os.write(pipe, f"> {number}\n".encode())
        kind, done, data = mutant(seeds, base_seed, number)
        before_mb, start_s = _peak_mb(), time.process_time()
        try:
            outcome = outcome_of(data)
        except Exception as error:
            outcome = f"finding: {type(error).__name__}: {error}"
        taken_mb = max(0.0, _peak_mb() - before_mb)
        line = {
            "number": number,
            "format": kind,
            "mutations": done,
            "outcome": outcome,
            "cpu_s": round(time.process_time() - start_s, 5),
            "rss_mb": round(_rss_mb(), 2),
            "peak_mb": round(taken_mb, 1),
            "descriptors": len(os.listdir("/proc/self/fd")),
        }
        os.write(pipe, json.dumps(line).encode() + b"\n")
        if taken_mb > FILE_MEMORY_MB / 4:  # else a later file could hide below this peak
            Path("/proc/self/clear_refs").write_text("5")


def _rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


# --- the parent: watches, starts the next child, counts -------------------------------------------------


@dataclass
class Finding:
    """What went wrong with which mutant; ``number`` is -1 for the run as a whole."""

    number: int
    problem: str


@dataclass
class Tally:
    """Everything that was seen."""

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    findings: list[Finding] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    children: list[list[float]] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def finished(self, line: Mapping[str, object]) -> None:
        """Count one mutant by the child's line."""
        number, outcome = int(str(line["number"])), str(line["outcome"])
        cpu_s, peak_mb = float(str(line["cpu_s"])), float(str(line["peak_mb"]))
        self.cpu_s.append(cpu_s)
        self.slowest = max(self.slowest, (cpu_s, number))
        self.children[-1].append(float(str(line["rss_mb"])))
        self.descriptors.append(int(str(line["descriptors"])))
        if outcome.startswith("finding: "):
            self.findings.append(Finding(number, outcome.removeprefix("finding: ")))
        if cpu_s > FILE_CPU_S:
            self.findings.append(Finding(number, f"took {cpu_s:.1f} s of processor time"))
        if peak_mb > FILE_MEMORY_MB:
            self.findings.append(Finding(number, f"took {peak_mb:.0f} MB at once"))
        self.outcomes[str(line["format"])][outcome.split(":")[0]] += 1

    def growth_mb(self) -> float:
        """RSS gained per 10,000 files: slope of a line through the later four fifths of the longest life."""
        life = max(self.children, key=len, default=[])
        if len(life) < MIN_FILES_FOR_GROWTH:
            return 0.0
        late = np.array(life[len(life) // 5 :])
        return float(np.polyfit(np.arange(len(late)), late, 1)[0] * 10_000)


def watch(command: Sequence[str], count: int, timeout_s: float = FILE_TIMEOUT_S) -> Tally:
    """Run children until ``count`` mutants have been tried.

    ``command`` gets the number to start from and the descriptor to write to appended. A child that ends early
    or is silent for ``timeout_s`` costs the mutant it had announced.
    """
    tally, number = Tally(), 0
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=count, unit="file", disable=None) as bar:
        while number < count:
            tally.children.append([])
            number = _follow(command, number, tally, timeout_s, scratch, bar)
            left = os.listdir(scratch)
            if left:
                tally.findings.append(Finding(number - 1, f"left files behind: {left[:3]}"))
                for name in left:
                    (Path(scratch) / name).unlink()
    _judge_run(tally)
    return tally


def _follow(
    command: Sequence[str],
    number: int,
    tally: Tally,
    timeout_s: float,
    scratch: str,
    bar: tqdm[NoReturn],
) -> int:
    """Read one child's lines to its end; the number the next child starts from."""
    begun = number - 1
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as log, os.fdopen(read_end) as pipe:
        running = subprocess.Popen(
            [*command, str(number), str(write_end)],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": scratch},
            pass_fds=[write_end],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        os.close(write_end)
        try:
            for line in _lines(pipe.fileno(), timeout_s):
                if line.startswith(b"> "):
                    begun = int(line[2:])
                    bar.update(begun - bar.n)
                else:
                    tally.finished(json.loads(line))
            status = running.wait()
            problem = f"the child died of {_cause(status)}" if status else ""
        except TimeoutError:
            running.send_signal(signal.SIGABRT)  # faulthandler tells where it was
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(5)
            problem = f"silent for {timeout_s:.0f} s"
        finally:
            running.kill()
            running.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    if problem and begun < number:
        raise RuntimeError(f"{problem} before its first file:\n{said[-2000:]}")
    if problem:
        ours = re.search(r'File ".*/(api/\w+\.py)", line (\d+)', said)
        where = f" in {ours[1]} line {ours[2]}" if ours else ""
        tally.findings.append(Finding(begun, problem + where))
    return begun + 1


def _cause(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _lines(pipe: int, timeout_s: float) -> Iterator[bytes]:
    """Whole lines until the other end closes. Raises TimeoutError."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], timeout_s)[0]:
            raise TimeoutError
        more = os.read(pipe, 1 << 16)
        if not more:
            return
        *lines, rest = (rest + more).split(b"\n")
        yield from lines


def _judge_run(tally: Tally) -> None:
    growth_mb = tally.growth_mb()
    if growth_mb > GROWTH_MB:
        tally.findings.append(Finding(-1, f"memory grows by {growth_mb:.1f} MB in 10,000 files"))
    if tally.descriptors and max(tally.descriptors) - tally.descriptors[0] > MAX_DESCRIPTORS_MORE:
        tally.findings.append(Finding(-1, f"descriptors grew to {max(tally.descriptors)}"))


def table(tally: Tally) -> str:
    """Outcomes by format as Markdown, the commonest outcome first."""
    totals: Counter[str] = sum(tally.outcomes.values(), Counter())
    columns = [name for name, _ in totals.most_common()]
    lines = ["| format | files | " + " | ".join(columns) + " |", "|---|--:|" + "--:|" * len(columns)]
    for kind, counts in [*tally.outcomes.items(), ("together", totals)]:
        cells = " | ".join(f"{counts[name]:,}" for name in columns)
        lines.append(f"| {kind} | {counts.total():,} | {cells} |")
    return "\n".join(lines)


def report(tally: Tally, base_seed: int) -> None:
    """The table, times, memory, findings, and the JSON line."""
    times_ms = np.array(tally.cpu_s or [0.0]) * 1e3
    p50_ms, p99_ms = np.percentile(times_ms, [50, 99])
    rss = max(tally.children, key=len, default=[]) or [0.0]
    print(table(tally))
    print(
        f"\nprocessor time of a file: median {p50_ms:.1f} ms, 99 of 100 under {p99_ms:.1f} ms, most "
        f"{times_ms.max():.0f} ms (number {tally.slowest[1]}); memory of the longest-lived child "
        f"{rss[0]:.0f} to {rss[-1]:.0f} MB over {len(rss):,} files, {tally.growth_mb():+.2f} MB per 10,000; "
        f"{len(tally.children)} children"
    )
    for finding in tally.findings:
        print(f"FINDING  --seed {base_seed} --only {finding.number}: {finding.problem}")
    summary = {
        "seed": base_seed,
        "files": sum(counts.total() for counts in tally.outcomes.values()),
        "children": len(tally.children),
        "cpu_ms": {"p50": round(float(p50_ms), 2), "p99": round(float(p99_ms), 2)},
        "growth_mb_per_10k": round(tally.growth_mb(), 2),
        "findings": [[finding.number, finding.problem] for finding in tally.findings],
    }
    print(json.dumps(summary))


def save(folder: Path, number: int, data: bytes) -> None:
    """Write a mutant to ``folder``, which is made where it is missing; its name is its number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(number)).write_bytes(data)


def child_command(base_seed: int, count: int) -> list[str]:
    """What `watch` runs, but for the numbers it appends."""
    program = [sys.executable, "-m", "loadtest.fuzz_audio"]
    return [*program, "--seed", str(base_seed), "--count", str(count), "--child"]


def main() -> int:
    """The command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="this mutant, in this process")
    parser.add_argument("--save", type=Path, help="a folder for mutants that were findings, or for --only's")
    parser.add_argument("--child", type=int, nargs=2, metavar=("START", "PIPE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child[1], given.seed, given.child[0], given.count)
        return 0
    if given.only is not None:
        kind, done, data = mutant(make_seeds(), given.seed, given.only)
        if given.save:
            save(given.save, given.only, data)
        print(f"{kind}: {done}; {len(data)} bytes")
        print(outcome_of(data))
        return 0
    tally = watch(child_command(given.seed, given.count), given.count)
    report(tally, given.seed)
    if given.save:
        seeds = make_seeds()
        for number in {finding.number for finding in tally.findings} - {-1}:
            save(given.save, number, mutant(seeds, given.seed, number)[2])
    return 1 if tally.findings else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        raise SystemExit(main())
