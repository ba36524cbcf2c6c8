"""``asr serve``."""

from __future__ import annotations

import errno
import gc
import os
import resource
import socket
import sys
from collections.abc import Mapping

import structlog
from dotenv import dotenv_values

from api.errors import SettingsError
from api.main import create_app
from api.redaction import plain_keys
from api.server import START_FAILED, Server, make_server
from api.settings import ENV_FILE, Settings, is_loopback, misspelt
from api.telemetry import configure_logging

_SWITCH_S = 1e-4
"""How long a thread waits for the interpreter before it asks for it.

A worker that comes back from an inference needs it for a moment only, and its core does nothing until then;
Python's 5 ms would let the event loop go on to the end of what it is at.
"""

_COLLECT = (7_000, 20, 20)
"""Objects between two garbage collections, and younger collections between two older ones.

Python's 700, 10 and 10 come by every tenth request, to find next to nothing: what a request makes is freed by
counting references.
"""


_OTHER_FILES = 128
"""Open files besides connections: models, logs, the event loop's own, and large uploads in the spool."""


def run(settings: Settings) -> int:
    """Serve until told to stop; 3 where the service could not start."""
    sys.setswitchinterval(_SWITCH_S)
    in_file = dotenv_values(ENV_FILE)
    _read_tracing_variables(in_file)
    configure_logging(
        log_format=settings.log_format,
        level=settings.log_level,
        log_text=settings.log_text,
        secrets=plain_keys(settings),
        environment=settings.env,
    )
    listener = _listen(settings)
    servers: list[Server] = []
    app = create_app(settings, on_failed_start=lambda: servers[0].fail())
    server = make_server(app, settings)
    servers.append(server)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    structlog.get_logger("api.serve").info(
        "listening", address=f"http://{host}:{port}", models=settings.models
    )
    if not is_loopback(settings.host) and not settings.has_keys:
        structlog.get_logger("api.serve").warning(
            "anonymous", problem="anyone who reaches the port may use it"
        )
    if problem := _make_room_for_files(settings.max_connections):
        # Not refused: it serves until so many come at once, and the limit may be somebody else's to raise.
        structlog.get_logger("api.serve").warning("too_few_files", problem=problem)
    for name, likely in misspelt([*os.environ, *in_file]).items():
        structlog.get_logger("api.serve").warning("unknown_setting", name=name, likely=likely)
    gc.collect()
    gc.freeze()  # modules and classes stay: no collection needs to look through them
    gc.set_threshold(*_COLLECT)
    server.run(sockets=[listener])
    if not server.failed:
        return 0
    # Once more, as the last line: that is where people and Kubernetes look for the reason of an exit.
    print(f"asr: the service did not start: {app.state.service.failure}", file=sys.stderr)
    return START_FAILED


def _make_room_for_files(max_connections: int) -> str | None:
    """Raise the soft limit of open files to what the connections need; say so where the hard one is lower.

    The usual soft limit of 1,024 is below the setting's default, and is there for programs that use select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    may_open = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (may_open, hard))
    if may_open == needed:
        return None
    return (
        f"ASR_MAX_CONNECTIONS={max_connections}: needs {needed} open files, and this process may open "
        f"{may_open} (ulimit -Hn): connections beyond that are cut where 503 was meant, and uploads "
        f"fail; raise the limit, or lower the setting to at most {max(0, may_open - _OTHER_FILES)}"
    )


def _listen(settings: Settings) -> socket.socket:
    """Take the port before anything is loaded, so that a port in use is one clear line at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"ASR_PORT={settings.port}: is in use by another program; stop it, or choose another port"
            ) from None
        raise SettingsError(f"ASR_HOST={settings.host}, ASR_PORT={settings.port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def _read_tracing_variables(in_file: Mapping[str, str | None]) -> None:
    """OpenTelemetry reads its variables from the environment only; they may stand in the file, too."""
    for name, value in in_file.items():
        if name.startswith("OTEL_") and value:
            os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit("use: asr serve")
