"""The service: audio in over HTTP, text out. `create_app(settings)` in `api.main` wires everything."""

import os

# ONNX Runtime's wheels report usage to their maker unless told not to, before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
