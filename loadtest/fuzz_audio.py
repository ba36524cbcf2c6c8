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
import resource
import sys
import time
from pathlib import Path

import numpy as np

from api.audio import AudioReader
from api.errors import ClientError
from loadtest.clips import SAMPLE_RATE_HZ
from loadtest.fuzz_mutations import mutant
from loadtest.fuzz_seeds import make_seeds
from loadtest.fuzz_watch import FILE_MEMORY_MB, report, watch

MAX_AUDIO_S = 60.0


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
