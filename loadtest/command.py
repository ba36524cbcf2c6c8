"""The command line that every program over one bundle shares."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadtest.processes import ROOT


def bundle_parser(description: str | None) -> argparse.ArgumentParser:
    """``--model`` and ``--models-dir``, under the program's own text."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="en-whisper-tiny-ctc", help="name of a bundle")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    return parser
