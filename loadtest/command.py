"""The command line that every program over one bundle shares."""

from __future__ import annotations

import argparse
from pathlib import Path

from api.settings import Settings
from loadtest.processes import ROOT

(DEFAULT_MODEL,) = Settings.model_fields["models"].default
"""What the service serves unless told otherwise."""


def bundle_parser(description: str | None) -> argparse.ArgumentParser:
    """``--model`` and ``--models-dir``, under the program's own text."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name of a bundle")
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    return parser
