"""The usual server: FastAPI, one ONNX Runtime session with its defaults, a plain `def` route.

    python -m loadtest.peers.naive PORT onnx GRAPH VOCABULARY     a graph that takes waveforms
    python -m loadtest.peers.naive PORT sherpa GRAPH TOKENS       sherpa-onnx's recogniser, same route

No queue, no limit, no deadline, no metrics: this is what is compared with, not something to deploy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import soundfile
import uvicorn
from fastapi import FastAPI, File
from numpy.typing import NDArray

Recognise = Callable[[NDArray[np.float32]], str]
SAMPLE_RATE_HZ = 16000


def onnx_recogniser(graph: str, vocabulary: str) -> Recognise:
    """Waveform in, argmax and collapse in Python; threads as ONNX Runtime chooses them."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    tokens = Path(vocabulary).read_text(encoding="utf-8").split("\n")
    blank = tokens.index("<blank>")

    def recognise(samples: NDArray[np.float32]) -> str:
        inputs = {"waveform": samples[None], "lengths": np.array([len(samples)], np.int64)}
        log_probs = session.run(["log_probs"], inputs)[0][0]
        best = log_probs.argmax(axis=-1)
        kept = [
            token for at, token in enumerate(best) if token != blank and (at == 0 or token != best[at - 1])
        ]
        return "".join(tokens[token] for token in kept).replace("\u2581", " ").strip()

    return recognise


def sherpa_recogniser(graph: str, tokens: str) -> Recognise:
    """sherpa-onnx with its own front end and greedy search."""
    import sherpa_onnx

    recogniser: Any = sherpa_onnx.OfflineRecognizer.from_nemo_ctc(
        model=graph, tokens=tokens, num_threads=1, feature_dim=64
    )

    def recognise(samples: NDArray[np.float32]) -> str:
        stream = recogniser.create_stream()
        stream.accept_waveform(SAMPLE_RATE_HZ, samples)
        recogniser.decode_stream(stream)
        return str(stream.result.text).replace("\u2581", " ").strip()

    return recognise


def make_app(recognise: Recognise) -> FastAPI:
    """One route beside a health check."""
    app = FastAPI()

    @app.get("/health/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/transcribe")
    def transcribe(file: Annotated[bytes, File()]) -> dict[str, str]:
        samples, _ = soundfile.read(BytesIO(file), dtype="float32")
        return {"text": recognise(samples)}

    return app


def main() -> None:
    """Read the command line and serve."""
    port, kind, graph, tokens = sys.argv[1:]
    recognise = {"onnx": onnx_recogniser, "sherpa": sherpa_recogniser}[kind](graph, tokens)
    recognise(np.zeros(SAMPLE_RATE_HZ, np.float32))
    uvicorn.run(make_app(recognise), host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
