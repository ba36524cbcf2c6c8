"""From recordings to a bundle that the service serves."""

import os

# As in api/__init__.py: whoever trains on private recordings must not have to opt out.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
