"""Settings every test shares."""

from __future__ import annotations

from hypothesis import settings

# Shared machines pause: a slow example is no failure, and pytest-timeout ends what hangs.
settings.register_profile("asr", deadline=None)
settings.load_profile("asr")
