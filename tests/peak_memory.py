"""What a file takes at its most, in a process of its own: peaks only rise, an earlier one would hide it."""

from __future__ import annotations

import struct
import subprocess
import sys

PROGRAM = """
import resource, sys
def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
{imports}
data, before_mb = sys.stdin.buffer.read(), peak_mb()
try: {call}
except {error} as error: print(getattr(error, "code", error), peak_mb() - before_mb, sep="\\t")
"""


def claiming_a_gigabyte(m4a: bytes) -> bytes:
    """The file with a sample table that claims eighty million samples; FFmpeg made room for all of them."""
    data = bytearray(m4a)
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, 80_000_000)
    return bytes(data)


def refusal(imports: str, call: str, error: str, data: bytes) -> tuple[str, float]:
    """Of `call` on `data`: the code (or else the words) of its `error`, and the growth of the peak, MB."""
    program = PROGRAM.format(imports=imports, call=call, error=error)
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, input=data, capture_output=True, check=True)
    said, grown_mb = run.stdout.decode().split("\t")
    return said, float(grown_mb)
