"""The recipe around the Conformer: transfer of an encoder, what is frozen, and settings that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.training.conformers import FAST, archive_of, random_conformer
from tests.training.networks import chirps
from training.config import DataSettings, RunConfig, check
from training.conformer import ConformerCtc
from training.conformer_graph import MAX_WINDOW_S
from training.errors import CheckpointError, ConfigError
from training.recipes.conformer_ctc.recipe import ConformerRecipe
from training.stages.prepare import _limits
from training.torch_inference import run_torch
from training.vocabulary import CharacterCodec

SHAPE = {"width": 32, "layers": 2, "heads": 4, "inner": 128, "subsampling_channels": 16, "upsample": 4}
CODEC = CharacterCodec("abc")


def recipe(**model: object) -> ConformerRecipe:
    values = {
        "name": "tiny",
        "language": "tr",
        "data": {"manifest": "manifest.jsonl"},
        "model": model,
        "bundle": {"licence": "Apache-2.0"},
    }
    return ConformerRecipe(check(RunConfig, values, "config"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive_of(tmp_path_factory.mktemp("nemo") / "model.nemo", random_conformer(FAST))


def test_an_encoder_is_kept_and_the_head_is_new(archive: Path) -> None:
    made = recipe(transfer_from=archive, shape=SHAPE)
    network = made.network(CODEC)
    assert isinstance(network, ConformerCtc)
    source = random_conformer(FAST).network.state_dict()
    for name, value in network.network.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(value, source[name]), name
    assert network.network.ctc_head.weight.shape == (4 * 5, 32, 1)
    assert (made.facts().frame_stride_s, network.frame_stride_s) == (0.02, 0.02)
    (clip,) = chirps(1)
    (log_probs,) = run_torch(network.eval(), [clip])
    frames = len(clip) // 160 + 1
    assert log_probs.shape == (-(-frames // 8) * 4, 5)


def test_recordings_that_the_graph_could_not_hear_are_not_trained_on() -> None:
    made = recipe(shape=SHAPE)
    assert _limits(DataSettings(max_duration_s=30.0), made.facts()).max_duration_s == MAX_WINDOW_S


def test_only_what_shall_learn_learns(archive: Path) -> None:
    network = recipe(transfer_from=archive, shape=SHAPE, frozen_encoder=True, frozen_norms=True).network(
        CODEC
    )
    learning = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert learning == {"network.ctc_head.weight", "network.ctc_head.bias"}
    network.train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(norms) == 2
    assert not any(norm.training for norm in norms)
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    log_probs, _ = network(torch.randn(2, 8000), torch.tensor([8000, 6000]))
    log_probs.sum().backward()
    assert all(
        torch.equal(norm.running_mean, mean)
        for norm, mean in zip(norms, before, strict=True)
        if norm.running_mean is not None
    )
    free = recipe(transfer_from=archive, shape=SHAPE).network(CODEC).train()
    assert all(module.training for module in free.modules() if isinstance(module, nn.BatchNorm1d))
    assert all(weight.requires_grad for weight in free.parameters())


def test_a_frozen_encoder_rests(archive: Path) -> None:
    """Its normalisations would go on with new statistics, and dropout would hide what it hears."""
    network = recipe(transfer_from=archive, shape=SHAPE, frozen_encoder=True).network(CODEC).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    given = torch.randn(2, 8000), torch.tensor([8000, 6000])
    assert network.training
    assert torch.equal(network(*given)[0], network(*given)[0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_new_network_lets_its_input_through() -> None:
    """With the start of transformers it varies by 1e-6 over time, and nothing is learned from it for long."""
    torch.manual_seed(0)
    network = recipe(shape=SHAPE | {"subsampling_channels": 64, "width": 128}).network(CODEC)
    assert isinstance(network, ConformerCtc)
    subsampling = network.network.encoder.subsampling
    with torch.inference_mode():
        heard = subsampling(torch.randn(1, 400, 80), torch.ones(1, 400, dtype=torch.bool))[0]
    assert heard.std(dim=0).mean() > 1e-3


def test_another_runs_weights_are_a_start(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    first = recipe(shape=SHAPE).network(CODEC)
    save_file(first.state_dict(), tmp_path / "weights.safetensors")
    second = recipe(shape=SHAPE, checkpoint=tmp_path / "weights.safetensors").network(CODEC)
    (clip,) = chirps(1)
    (one,), (other,) = run_torch(first.eval(), [clip]), run_torch(second.eval(), [clip])
    assert (one == other).all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": 3}, r"model\.shape\.layers: 3, the archive has 2"),
        ({"subsampling_factor": 4}, r"model\.shape\.subsampling_factor: 4, the archive has 8"),
    ],
)
def test_a_shape_that_is_not_the_archives_is_named(
    archive: Path, changes: dict[str, object], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        recipe(transfer_from=archive, shape=SHAPE | changes).network(CODEC)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transfer_from and checkpoint: give one"):
        recipe(transfer_from="a.nemo", checkpoint="b.safetensors")
    with pytest.raises(ConfigError, match="upsample 0: expected at least 1"):
        recipe(shape=SHAPE | {"upsample": 0})
    with pytest.raises(CheckpointError, match=r"model\.transfer_from: .*none\.nemo"):
        recipe(transfer_from=tmp_path / "none.nemo", shape=SHAPE).network(CODEC)
