"""Weights of four bits that make up for each other's errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from api.bundle import load_bundle, verify_bundle
from api.engine import Engine
from api.manifest import Source
from tests.training.conformers import FAST, archive_of, random_conformer
from tests.training.networks import VOCABULARY, chirps, random_checkpoint, write_corpus
from training import publish as publish_command
from training.bundle_writer import Card
from training.checkpoint import Checkpoint, save_checkpoint
from training.errors import ConfigError
from training.four_bits import GROUP, SMALL_GROUP, rounded
from training.frontend import FrontendConfig
from training.inference import compare, cpu_session, run_graph
from training.nemo_import import exported_nemo
from training.publish import Recordings, exported_checkpoint, publish
from training.quantize import Gate
from training.recipes.whisper_ctc.export import export_graph
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc
from training.rounding import compensated, four_bit_candidates


def correlated(rows: int, inputs: int) -> Tensor:
    """Inputs that go together, as those of a network do."""
    generator = torch.Generator().manual_seed(3)
    few = torch.randn(rows, inputs // 8, generator=generator)
    return few @ torch.randn(inputs // 8, inputs, generator=generator) + 0.1 * torch.randn(
        rows, inputs, generator=generator
    )


@pytest.mark.parametrize("inputs", [GROUP, 3 * GROUP, 2 * GROUP - 40, 9 * SMALL_GROUP])
def test_outputs_differ_far_less_than_if_each_weight_were_rounded_by_itself(inputs: int) -> None:
    weight = torch.randn(24, inputs, generator=torch.Generator().manual_seed(1))
    seen, unseen = correlated(4000, inputs).reshape(2, 2000, inputs)
    found = compensated(weight, seen.T @ seen)

    def error(other: Tensor) -> float:
        return float((unseen @ (other - weight).T).square().mean())

    assert error(found) < 0.2 * error(rounded(weight))


@pytest.mark.parametrize("inputs", [GROUP, 3 * GROUP, 9 * SMALL_GROUP, 13 * SMALL_GROUP])
def test_what_is_found_stays_as_it_is_when_it_is_served(inputs: int) -> None:
    weight = torch.randn(24, inputs, generator=torch.Generator().manual_seed(1))
    weight[3] = 0.0
    weight[5, :GROUP] = 0.0
    weight[6] *= 1e-6
    weight[7, :SMALL_GROUP] *= 1e-4
    inputs_seen = correlated(500, inputs)
    found = compensated(weight, inputs_seen.T @ inputs_seen)
    assert torch.equal(rounded(found), found)
    assert not found[3].any()
    assert not found[5, :GROUP].any()


def test_an_input_that_is_never_there_does_no_harm() -> None:
    weight = torch.randn(8, GROUP)
    seen = correlated(500, GROUP)
    seen[:, 7] = 0.0
    found = compensated(weight, seen.T @ seen)
    assert found.isfinite().all()
    assert float((seen @ (found - weight).T).square().mean()) < float(
        (seen @ (rounded(weight) - weight).T).square().mean()
    )


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    """An encoder with a CTC head, random."""
    torch.manual_seed(0)
    config = EncoderConfig(bands=80, width=GROUP, layers=2, heads=2, inner=2 * GROUP, positions=1500)
    network = WhisperCtc(config, 12)
    network.encoder.start_from_random()
    return export_graph(network.eval())


def test_a_graph_in_four_bits_answers_nearly_as_before(graph: onnx.ModelProto) -> None:
    clips = chirps(4)
    before = graph.SerializeToString()
    found = dict(four_bit_candidates(graph, chirps(12)))
    assert graph.SerializeToString() == before, "the float graph is measured beside them"
    exact = run_graph(cpu_session(graph), clips)
    everything, but_ends = found.values()
    for model, products in ((everything, 2 * 6 + 4), (but_ends, 2 * 6 + 2)):
        operators = Counter(node.op_type for node in model.graph.node)
        assert operators["MatMulNBits"] == products, "layers, two convolutions, a head of two"
        floats = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_scales_half")]
        assert all(np.isfinite(numpy_helper.to_array(tensor)).all() for tensor in floats)
        assert compare(exact, run_graph(cpu_session(model), clips)).worst_posterior < 0.1
    assert len(everything.SerializeToString()) < 0.3 * len(before)


def test_a_published_network_becomes_a_bundle_in_four_bits(tmp_path: Path) -> None:
    archive = archive_of(tmp_path / "model.nemo", random_conformer(FAST))
    manifest = write_corpus(tmp_path, chirps(8))
    made = exported_nemo(archive).in_four_bits()
    card = Card("A random network", ("en",), Source(title="tests", url=""), "Apache-2.0")
    gate = Gate(min_speed=0.0, max_wer_increase=9.0)
    bundle = publish(made, "en-random", tmp_path / "models", card, Recordings(manifest, manifest), gate=gate)
    assert (bundle.manifest.default_graph, set(bundle.manifest.graphs)) == ("int4", {"int4"})
    (exact,) = run_graph(cpu_session(made.graph), chirps(1))
    (served,) = Engine(bundle).run(chirps(1), alone=True)
    assert np.abs(np.exp(served.whole()) - np.exp(exact)).max() < 0.2
    assert "ends float32" in (bundle.path / "README.md").read_text(encoding="utf-8")


def test_convolutions_have_no_four_bits() -> None:
    with pytest.raises(ConfigError, match="--four-bits is for matrix products"):
        exported_checkpoint(random_checkpoint()).in_four_bits()


def test_a_bundle_is_given_four_bits_beside_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, and once more: the card has each section once."""
    torch.manual_seed(0)
    config = EncoderConfig(bands=80, width=GROUP, layers=1, heads=2, inner=GROUP, positions=1500)
    network = WhisperCtc(config, len(VOCABULARY))
    network.encoder.start_from_random()
    checkpoint = Checkpoint(network, FrontendConfig(), VOCABULARY)
    save_checkpoint(tmp_path / "model.safetensors", checkpoint)
    manifest = str(write_corpus(tmp_path, chirps(4)))
    card = {
        "title": "A random network",
        "languages": ["en"],
        "source": {"title": "tests", "url": "https://example.org"},
        "licence": "Apache-2.0",
        "limits": "It knows nothing.",
    }
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    given = [str(tmp_path / "model.safetensors"), "--name", "en-random"]
    given += ["--models-dir", str(tmp_path / "models"), "--calibration", manifest, "--validation", manifest]
    given += ["--test", manifest, "--min-speed", "0", "--max-wer-increase", "9"]
    assert publish_command.main(given) == 2
    assert "--card is needed" in capsys.readouterr().err
    assert publish_command.main([*given, "--card", str(tmp_path / "card.json")]) == 0
    before = load_bundle(tmp_path / "models", "en-random")
    for _ in range(2):
        assert publish_command.main([*given, "--add-four-bits"]) == 0
    after = verify_bundle(tmp_path / "models", "en-random")
    assert after.manifest.graph_without_vnni == "int4"
    assert set(after.manifest.graphs) == {"int8", "int4"}
    assert after.manifest.files["model.int8.onnx"] == before.manifest.files["model.int8.onnx"]
    assert {found.decoding for found in after.manifest.evaluation} == {"greedy, int8", "greedy, int4"}
    assert {found.graph for found in after.manifest.speed} == {"int8", "int4"}
    said = (after.path / "README.md").read_text(encoding="utf-8")
    for title in ("Error rates", "Speed", "Four bits", "Quantization", "Limits"):
        assert said.count(f"\n## {title}\n") == 1, title
    assert said.count("greedy, int4") == 2
