"""The models in the box, and the teacher where it was made: verified, and batched equals alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest

from api.bundle import list_bundles, load_bundle, verify_bundle
from api.commands.runtime import open_service
from api.settings import Settings
from api.transcriber import Options
from tests.tiny_bundle import wav
from tests.training.networks import chirps
from training.calibration import manifest_waveforms, shared_folder
from training.inference import Waveform, compare, cpu_session, run_graph

MODELS = Path(__file__).resolve().parents[2] / "models"


def real_clips(count: int) -> list[Waveform]:
    """Real speech where it lies beside the project, synthetic sound otherwise."""
    manifest = shared_folder() / "speech" / "test" / "manifest.jsonl"
    if not manifest.is_file():
        return chirps(count)
    return [clip for clip, _ in manifest_waveforms(manifest, 16_000, count, language="en")]


EXACT = ("en-whisper-tiny-ctc", "en-quartznet-small")
"""Their ranges are fixed; those with a decoder round every row of what they hear by itself."""
BOX = ("en-moonshine-tiny", "en-whisper-tiny", *EXACT)


@pytest.mark.parametrize("name", [*EXACT, "en-quartznet15x5"])
def test_batched_equals_alone(name: str) -> None:
    if name not in list_bundles(MODELS):
        pytest.skip(f"{name} is not in {MODELS}")
    bundle = verify_bundle(MODELS, name)
    clips = real_clips(6)
    for graph in bundle.manifest.graphs:
        session = cpu_session(bundle.graph_path(graph))
        alone = [run_graph(session, [clip])[0] for clip in clips]
        assert compare(alone, run_graph(session, clips)).worst_log_prob < 1e-4, f"{name}, {graph}"


@pytest.mark.parametrize("name", BOX)
def test_whoever_writes_with_a_decoder_says_so(name: str) -> None:
    """The service warns of hotwords by that."""
    if name not in list_bundles(MODELS):
        pytest.skip(f"{name} is not in {MODELS}")
    manifest = load_bundle(MODELS, name).manifest
    graph = onnx.load(MODELS / name / manifest.graphs[manifest.default_graph].file, load_external_data=False)
    assert manifest.decoder == any(node.op_type == "Loop" for node in graph.graph.node)


@pytest.mark.parametrize("name", BOX)
@pytest.mark.parametrize("beam", [None, 0])
async def test_a_model_in_the_box_makes_no_text_of_noise(beam: int | None, name: str) -> None:
    """Silence and steady noise never reach it; of noise that swells one clip in a hundred reads as a word."""
    if name not in list_bundles(MODELS):
        pytest.skip(f"{name} is not in {MODELS}")
    generator = np.random.default_rng(0)
    swell = 1 + 0.9 * np.sin(2 * np.pi * 2.3 * np.arange(32_000) / 16_000)
    levels = [0.0, *np.geomspace(1e-4, 0.05, 20)]
    settings = Settings(models_dir=MODELS, models=(name,), calibrate=False, workers=2)
    async with open_service(settings) as service:

        async def text(samples: np.ndarray) -> str:
            found = await service.transcriber("").transcribe(io.BytesIO(wav(samples)), Options(beam=beam))
            return found.text

        steady = [await text(generator.normal(0, level, 32_000)) for level in levels]
        swelling = [await text(generator.normal(0, level, 32_000) * swell) for level in levels]
    assert steady == [""] * len(levels)
    assert swelling.count("") >= len(levels) - 1, swelling
