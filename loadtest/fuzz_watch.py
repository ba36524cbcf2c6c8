"""Watches children that decode mutants: follows what each says, starts the next where one dies, counts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from loadtest.processes import ROOT

FILE_TIMEOUT_S = 30.0  # wall clock, on a machine that may be busy; a healthy file takes 2 ms
FILE_CPU_S = 5.0
FILE_MEMORY_MB = 200.0
GROWTH_MB = 10.0  # per 10,000 files, in the longest-lived child
MIN_FILES_FOR_GROWTH = 5_000
MAX_DESCRIPTORS_MORE = 8


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
