"""`asr serve` as a real process with the tone model, and nothing of the caller's settings."""

from __future__ import annotations

from pathlib import Path

from loadtest import processes
from loadtest.processes import LiveServer


def variables(models_dir: Path, **settings: object) -> dict[str, str]:
    """The service's variables: the tone model, JSON logs, a free port, and `settings` (without ``ASR_``)."""
    given = {
        "models_dir": models_dir,
        "models": "tiny",
        "port": 0,
        "calibrate": "false",
        "log_format": "json",
    }
    return processes.asr_variables(given | settings)


def environment(models_dir: Path, **settings: object) -> dict[str, str]:
    """The whole environment of a service."""
    return processes.environment(variables(models_dir, **settings))


def start(models_dir: Path, log_path: Path, *, wait: bool = True, **settings: object) -> LiveServer:
    """Start `asr serve`; with ``wait`` until it is ready."""
    return processes.start_api(log_path, variables(models_dir, **settings), wait=wait)
