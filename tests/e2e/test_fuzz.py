"""schemathesis over the whole OpenAPI document of the live service: never a 5xx, always the envelope.

Damaged audio goes through the decoder in a child process (`make fuzz-audio` does the same 100,000 times).
"""

from __future__ import annotations

import sys

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error

from loadtest import fuzz_audio, fuzz_watch
from loadtest.fuzz_mutations import mutant
from loadtest.fuzz_seeds import RECIPES, make_seeds
from loadtest.processes import LiveServer


def test_nothing_in_the_document_breaks_the_service(server: LiveServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {
        "/transcribe",
        "/transcribe/batch",
        "/v1/audio/transcriptions",
        "/v1/models/{model_id}",
    }
    for operation in operations:

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def holds(case: Case) -> None:
            response = case.call(timeout=30)
            case.validate_response(response, checks=[not_a_server_error])
            assert response.headers["x-request-id"]
            if response.status_code >= 400:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["message"]

        holds()
    assert "Traceback" not in server.log


def test_damaged_audio_is_audio_or_a_client_error() -> None:
    """Ten mutants of each format; the numbers are the ones that `--only` takes."""
    count = 10 * len(RECIPES)
    tally = fuzz_watch.watch(fuzz_audio.child_command(7, count), count)
    assert tally.findings == []
    assert len(tally.children) == 1
    assert set(tally.outcomes) == set(RECIPES)
    assert sum(outcomes.total() for outcomes in tally.outcomes.values()) == count
    seen = set().union(*tally.outcomes.values())
    assert seen >= {"audio", "audio with a warning", "undecodable_audio", "no_audio_stream"}


def test_a_mutant_is_named_by_its_number() -> None:
    once, again = make_seeds(), make_seeds()
    assert once == again
    assert [mutant(once, 3, number) for number in range(100)] == [
        mutant(again, 3, number) for number in range(100)
    ]
    assert mutant(once, 3, 5) != mutant(once, 4, 5)


CHILD = """
import json, os, signal, sys, tempfile, time
start, pipe = int(sys.argv[1]), int(sys.argv[2])
for number in range(start, 4):
    os.write(pipe, f"> {number}\\n".encode())
    if number == 1:
        ACT
    line = dict(number=number, format="wav", outcome="audio", cpu_s=CPU)
    line |= dict(rss_mb=1.0, peak_mb=MEMORY, descriptors=3)
    os.write(pipe, json.dumps(line).encode() + b"\\n")
"""


@pytest.mark.parametrize(
    ("act", "problem", "answered"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", 3),
        ("sys.exit(7)", "exit status 7", 3),
        ("time.sleep(600)", "silent", 3),
        ("tempfile.mkstemp(); sys.exit(0)", "left files behind", 3),
    ],
)
def test_a_child_that_dies_costs_one_file_and_is_named(act: str, problem: str, answered: int) -> None:
    script = CHILD.replace("ACT", act).replace("CPU", "0.001").replace("MEMORY", "1.0")
    tally = fuzz_watch.watch([sys.executable, "-c", script], 4, timeout_s=8)
    assert [finding.number for finding in tally.findings] == [1]
    assert problem in tally.findings[0].problem
    assert tally.outcomes["wav"].total() == answered


@pytest.mark.parametrize(
    ("cpu_s", "memory_mb", "problem"), [("9.0", "1.0", "processor time"), ("0.1", "900.0", "at once")]
)
def test_slow_and_greedy_files_are_findings(cpu_s: str, memory_mb: str, problem: str) -> None:
    script = CHILD.replace("ACT", "pass").replace("CPU", cpu_s).replace("MEMORY", memory_mb)
    tally = fuzz_watch.watch([sys.executable, "-c", script], 4)
    assert [finding.number for finding in tally.findings] == [0, 1, 2, 3]
    assert all(problem in finding.problem for finding in tally.findings)


def test_memory_that_grows_with_every_file_is_a_finding() -> None:
    tally = fuzz_watch.Tally(children=[[100.0 + 0.002 * number for number in range(10_000)], [1.0]])
    assert tally.growth_mb() == pytest.approx(20.0)
    tally = fuzz_watch.Tally(children=[[100.0] * 10_000])
    assert tally.growth_mb() == pytest.approx(0.0)
