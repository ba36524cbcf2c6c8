"""The model in the box, and the teacher where it was made: verified, and batched equals alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from api.bundle import list_bundles, verify_bundle
from tests.training.networks import chirps
from training.calibration import manifest_waveforms, shared_folder
from training.evaluate import bundle_recogniser
from training.inference import Waveform, compare, cpu_session, run_graph

MODELS = Path(__file__).resolve().parents[2] / "models"


def real_clips(count: int) -> list[Waveform]:
    """Real speech where it lies beside the project, synthetic sound otherwise."""
    manifest = shared_folder() / "speech" / "test" / "manifest.jsonl"
    if not manifest.is_file():
        return chirps(count)
    return [clip for clip, _ in manifest_waveforms(manifest, 16_000, count, language="en")]


@pytest.mark.parametrize("name", ["en-quartznet-small", "en-quartznet15x5"])
def test_batched_equals_alone(name: str) -> None:
    if name not in list_bundles(MODELS):
        pytest.skip(f"{name} is not in {MODELS}")
    bundle = verify_bundle(MODELS, name)
    clips = real_clips(6)
    for graph in bundle.manifest.graphs:
        session = cpu_session(bundle.graph_path(graph))
        alone = [run_graph(session, [clip])[0] for clip in clips]
        assert compare(alone, run_graph(session, clips)).worst_log_prob < 1e-4, f"{name}, {graph}"


def test_the_model_in_the_box_says_nothing_in_silence() -> None:
    if "en-quartznet-small" not in list_bundles(MODELS):
        pytest.skip("en-quartznet-small is not in models/")
    recognise = bundle_recogniser(verify_bundle(MODELS, "en-quartznet-small"))
    generator = np.random.default_rng(0)
    for level in (0.0, 1e-4, 1e-2):
        noise = generator.normal(0, level, 32_000).astype(np.float32)
        assert recognise(noise) == "", f"noise of level {level}"
