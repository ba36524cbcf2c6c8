"""The network: configuration, lengths, masking, and the head that emits several frames a step."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.networks import CONFIGS, random_network
from training.recipes.quartznet_ctc.architectures import quartznet
from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNet, QuartzNetConfig


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_gives_what_each_item_gives(name: str) -> None:
    model = random_network(CONFIGS[name])
    lengths = torch.tensor([97, 64, 31, 8])
    features = torch.randn(4, 64, 97, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        batch = model(features, lengths)
        for index, length in enumerate(lengths.tolist()):
            alone = model(features[index : index + 1, :, :length], lengths[index : index + 1])
            frames = int(alone.lengths[0])
            assert int(batch.lengths[index]) == frames == alone.log_probs.shape[1]
            torch.testing.assert_close(batch.log_probs[index, :frames], alone.log_probs[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_survives_json(name: str) -> None:
    config = CONFIGS[name]
    assert QuartzNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change", [{"surprise": 1}, {"blocks": [{"filters": 1, "surprise": 2}]}])
def test_an_unknown_field_is_refused(change: dict[str, object]) -> None:
    values = CONFIGS["quartznet"].to_dict() | change
    with pytest.raises(ValueError, match="surprise"):
        QuartzNetConfig.from_dict(values)


def test_the_default_is_quartznet_15x5() -> None:
    """18.9 million parameters in the paper's table, 15 residual blocks between stem and tail."""
    config = quartznet(29)
    assert len(config.blocks) == 18
    assert config.stride == 2
    assert QuartzNet(config).parameter_count() == pytest.approx(18.9e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "stride"), [("quartznet", 2), ("citrinet", 2), ("stride four, two frames a step", 2)]
)
def test_frames_come_at_the_stated_stride(name: str, stride: int) -> None:
    model = random_network(CONFIGS[name])
    output = model(torch.zeros(1, 64, 80), torch.tensor([80]))
    assert model.config.stride == stride
    assert output.lengths.tolist() == [80 // stride]


def test_log_probs_sum_to_one_per_frame() -> None:
    model = random_network(CONFIGS["stride four, two frames a step"])
    output = model(torch.randn(2, 64, 40), torch.tensor([40, 40]))
    torch.testing.assert_close(output.log_probs.exp().sum(-1), torch.ones(2, 20))


def test_two_frames_a_step_come_in_order() -> None:
    """The first half of the head's outputs is the earlier frame."""
    model = random_network(CONFIGS["stride four, two frames a step"])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(12.0))
        model.head.bias[:6] = torch.tensor([9.0, 0, 0, 0, 0, 0])
    best = model(torch.randn(1, 64, 8), torch.tensor([8])).log_probs[0].argmax(-1)
    assert best.tolist() == [0, 5, 0, 5]


def test_hidden_activations_of_the_blocks_asked_for() -> None:
    model = random_network(CONFIGS["quartznet"])
    output = model(torch.randn(1, 64, 40), torch.tensor([40]), hidden_blocks=(0, -2))
    assert [tuple(hidden.shape) for hidden in output.hidden] == [(1, 16, 20), (1, 24, 20)]


def test_the_network_learns() -> None:
    """Forty steps on one clip and its text: the loss falls to a tenth."""
    torch.manual_seed(0)
    model = QuartzNet(CONFIGS["quartznet"])
    features = torch.randn(1, 64, 80)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        output = model(features, torch.tensor([80]))
        loss = torch.nn.functional.ctc_loss(
            output.log_probs.transpose(0, 1),
            torch.tensor([[1, 2, 0, 3]]),
            output.lengths,
            torch.tensor([4]),
            blank=5,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        QuartzNet(QuartzNetConfig(6, ()))


def test_dropout_is_in_the_configuration() -> None:
    model = QuartzNet(QuartzNetConfig(6, (BlockConfig(16, 2, 5, dropout=0.5),)))
    features, lengths = torch.randn(1, 64, 20), torch.tensor([20])
    model.train()
    assert not torch.equal(model(features, lengths).log_probs, model(features, lengths).log_probs)
    model.eval()
    assert torch.equal(model(features, lengths).log_probs, model(features, lengths).log_probs)
