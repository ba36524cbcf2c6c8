"""API keys: what is kept of them, and how one is checked."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

KEY_SUBPROTOCOL = "openai-insecure-api-key."
"""What a key follows among the subprotocols that a caller offers: a browser's only place for it."""

_KEY_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_MIN_SECRET_LENGTH = 16


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One API key: the name that logs may show, and the SHA-256 of the secret (never the secret)."""

    name: str
    digest: bytes = field(repr=False)

    @classmethod
    def parse(cls, entry: str) -> ApiKey:
        """``name:secret`` or ``name:sha256=<64 hex>``. Raises ValueError, without the secret in it."""
        name, separator, secret = entry.partition(":")
        name, secret = name.strip(), secret.strip()
        if not separator or not _KEY_NAME.match(name):
            raise ValueError("each API key is written name:secret or name:sha256=<hex digest>")
        if secret.startswith("sha256="):
            digest_hex = secret.removeprefix("sha256=")
            if not re.fullmatch(r"[0-9a-fA-F]{64}", digest_hex):
                raise ValueError(f"the sha256 digest of API key {name!r} is not 64 hex digits")
            return cls(name, bytes.fromhex(digest_hex))
        if len(secret) < _MIN_SECRET_LENGTH:
            raise ValueError(
                f"the secret of API key {name!r} is shorter than {_MIN_SECRET_LENGTH} characters"
            )
        return cls(name, hashlib.sha256(secret.encode()).digest())


def find_key(keys: Sequence[ApiKey], secret: str) -> ApiKey | None:
    """The key that ``secret`` belongs to, or None.

    Digests are compared in constant time, and all of them, so that the time tells nothing.
    """
    digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found
