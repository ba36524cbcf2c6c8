"""The peers of the benchmark run the network that the service runs, whatever the clip's length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from loadtest.peers.graphs import export_as_pytorch
from tests.training.networks import CONFIGS, random_network
from training.frontend import FrontendConfig, LogMel
from training.nemo import NemoModel


def test_the_graph_that_pytorch_exports_takes_any_length(tmp_path: Path) -> None:
    found = NemoModel(random_network(CONFIGS["quartznet"]), FrontendConfig(), ("a", "b"))
    export_as_pytorch(found, tmp_path / "exported.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "exported.onnx")
    frontend = LogMel(found.frontend)
    for samples in (8_000, 16_123, 100_000):
        waveform = np.random.default_rng(samples).normal(0, 0.1, (2, samples)).astype(np.float32)
        lengths = np.array([samples, samples // 2])
        log_probs, counts = session.run(None, {"waveform": waveform, "lengths": lengths})
        with torch.inference_mode():
            expected = found.model(*frontend(torch.from_numpy(waveform), torch.from_numpy(lengths)))
        np.testing.assert_array_equal(counts, expected.lengths.numpy())
        for row, truth, count in zip(log_probs, expected.log_probs.numpy(), counts, strict=True):
            np.testing.assert_allclose(np.exp(row[:count]), np.exp(truth[:count]), atol=1e-4)
