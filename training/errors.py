"""What can go wrong on the way from recordings to a bundle. Every message says what to change.

TrainingError
├── ConfigError             the configuration file: field and reason
├── DataError               the recordings or their texts
│   ├── ManifestError       a manifest cannot be read: file and line
│   ├── EmptyManifestError  nothing is left to train on, with the reasons counted
│   └── SplitError          too few speakers for the parts asked for
├── CheckpointError         a weights file is not what the recipe reads
├── DivergedError           the loss is no finite number any more
├── OutOfMemoryError        the device's memory ran out; the state is saved
├── DiskFullError           a file was not written for want of room: path and space
└── QualityGateError        an exported or quantized graph disagrees with the network
    └── Int8RefusedError    no INT8 graph is fast and accurate enough
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from api.errors import BundleError

Arguments = ParamSpec("Arguments")


class TrainingError(Exception):
    """Base of all; the commands print the message without a traceback and exit with 2: see `in_one_line`."""


class ConfigError(TrainingError):
    """A configuration field is missing, unknown or out of range."""


class DataError(TrainingError):
    """The data cannot be used as it is."""


class ManifestError(DataError):
    """A manifest cannot be read."""


class EmptyManifestError(DataError):
    """No utterance is left."""


class SplitError(DataError):
    """A speaker-disjoint split is not possible."""


class CheckpointError(TrainingError):
    """A weights file is not one that the recipe knows."""


class DivergedError(TrainingError):
    """The loss is no finite number any more; the state of the last whole epoch stays the newest."""


class OutOfMemoryError(TrainingError):
    """The device's memory ran out; the same command with smaller batches goes on from the saved state."""


class DiskFullError(TrainingError):
    """A file has no room; the one that was there before is whole."""


class QualityGateError(TrainingError):
    """A graph does not agree with the network it came from, or is worse than allowed."""


class Int8RefusedError(QualityGateError):
    """The float32 graph is good, and no INT8 graph passes the gate."""


def in_one_line(
    program: str, *also: type[Exception]
) -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Let a command end with one line on standard error and status 2 for what its user can mend.

    That is a TrainingError, a BundleError, what the file system refuses (a file that is not there, a full
    disk), a text in another encoding than UTF-8, and `also`.
    """

    mendable: tuple[type[Exception], ...] = (TrainingError, BundleError, OSError, UnicodeDecodeError, *also)

    def decorate(command: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(command)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            try:
                return command(*args, **kwargs)
            except mendable as error:
                print(f"{program}: {error}", file=sys.stderr)
                return 2

        return run

    return decorate
