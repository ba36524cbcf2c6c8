"""``asr serve``: what it makes of the limit of open files, in a process that has another one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import json, resource, sys
from api.commands.serve import _make_room_for_files
soft, hard, connections = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
problem = _make_room_for_files(connections)
print(json.dumps([problem, *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "after", "words"),
    [
        (512, 1024, 300, 512, None),
        (256, 1024, 300, 428, None),
        (256, 1024, 896, 1024, None),
        (256, 1024, 897, 1024, ["ASR_MAX_CONNECTIONS=897", "may open 1024", "at most 896"]),
        (1024, 1024, 60000, 1024, ["ASR_MAX_CONNECTIONS=60000", "may open 1024", "at most 896"]),
    ],
)
def test_connections_beyond_the_limit_of_open_files_are_told(
    soft: int, hard: int, connections: int, after: int, words: list[str] | None
) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(soft), str(hard), str(connections)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    problem, soft_after, hard_after = json.loads(done.stdout)
    assert (soft_after, hard_after) == (after, hard)
    if words is None:
        assert problem is None
    else:
        assert all(word in problem for word in words)
