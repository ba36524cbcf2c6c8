"""Which texts the log must never show."""

from __future__ import annotations

import contextlib
import os

from dotenv import dotenv_values

from api.settings import ENV_FILE, Settings


def plain_keys(settings: Settings) -> list[str]:
    """Plain keys from wherever the settings read them, for the log's filter; digests need no hiding."""
    variables = {**dotenv_values(ENV_FILE), **os.environ}
    # In whatever case: the settings do not mind.
    given = {name.upper(): value for name, value in variables.items()}.get("ASR_API_KEYS") or ""
    entries = given.split(",")
    with contextlib.suppress(OSError, UnicodeError):  # refused with a message in a moment
        entries += settings.key_file_entries()
    secrets = [entry.partition(":")[2].strip() for entry in entries]
    return [secret for secret in secrets if secret and not secret.startswith("sha256=")]
