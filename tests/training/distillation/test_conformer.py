"""The CPU's way of training a Conformer against the network that is exported."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.training.conformers import random_conformer
from training.conformer import ConformerConfig, ConformerCtc
from training.distillation.conformer import FastConformer
from training.distillation.kernels import cpu_has_bfloat16, kernels, load
from training.frontend import FrontendConfig
from training.masks import frame_mask

SHAPE = ConformerConfig(
    features=64, width=64, layers=2, heads=4, inner=96, kernel=7, subsampling_factor=4,
    subsampling_channels=32, scale_input=False, upsample=2,
)  # fmt: skip


def network(shape: ConformerConfig = SHAPE) -> ConformerCtc:
    return random_conformer(shape, 29, FrontendConfig())


def features(lengths: Tensor) -> Tensor:
    torch.manual_seed(1)
    frames = int(lengths.max())
    return torch.randn(len(lengths), frames, 64) * frame_mask(lengths, frames)[:, :, None]


def plainly(model: ConformerCtc, values: Tensor, lengths: Tensor) -> Tensor:
    """The network's own way from features to log-probabilities."""
    logits = model.network(values, attention_mask=frame_mask(lengths, values.shape[1])).logits
    return functional.log_softmax(logits.reshape(len(logits), -1, model.outputs), dim=-1)


@pytest.fixture(params=["kernels", "torch"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[FastConformer]:
    if request.param == "torch":
        monkeypatch.setattr("training.distillation.conformer.load", lambda: None)
    elif load() is None:
        pytest.skip("no AVX512-BF16, C++ compiler or ninja here")
    return FastConformer


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, subsampling_factor=8, upsample=4, scale_input=True)])
def test_it_gives_what_the_network_gives(fast: type[FastConformer], shape: ConformerConfig) -> None:
    model, lengths = network(shape).eval(), torch.tensor([160, 121, 77, 1])
    values = features(lengths)
    with torch.no_grad():
        found, expected = fast(model)(values, lengths, (0, 1)), plainly(model, values, lengths)
    assert found.log_probs.shape == expected.shape
    assert [hidden.shape[2] for hidden in found.hidden] == [64, 64]
    own = frame_mask(found.lengths, expected.shape[1])
    assert found.lengths.tolist() == [
        shape.upsample * -(-int(length) // shape.subsampling_factor) for length in lengths
    ]
    assert (found.log_probs - expected)[own].abs().max() < 0.05  # bfloat16 has eight bits
    assert expected[own].std() > 0.2


def test_gradients_and_statistics_are_the_networks(fast: type[FastConformer]) -> None:
    """In training mode, on full lengths: the network's batch statistics include padding."""
    model = network().train()
    reference, lengths = copy.deepcopy(model), torch.tensor([96, 96, 96])
    values = features(lengths)
    direction = torch.randn(3, 48, 29)
    (fast(model)(values, lengths).log_probs * direction).sum().backward()  # type: ignore[no-untyped-call]
    (plainly(reference, values, lengths) * direction).sum().backward()  # type: ignore[no-untyped-call]
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        ours, theirs = parameter.grad, expected[name].grad
        assert ours is not None, name
        assert theirs is not None, name
        if theirs.norm() > 1e-3:  # the bias before a norm changes nothing
            assert functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99, name
    buffers = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(buffer, buffers[name], rtol=0.02, atol=0.01)


@pytest.mark.skipif(
    not cpu_has_bfloat16(), reason="the kernels want a CPU with AVX512-BF16, this one has not"
)
@pytest.mark.parametrize(("frames", "bands"), [(1, 1), (2, 5), (9, 8), (16, 32)])
def test_strided_depthwise_convolution_and_its_gradients(frames: int, bands: int) -> None:
    if load() is None:
        pytest.skip("no C++ compiler or no ninja here")
    torch.manual_seed(0)
    x = torch.randn(3, frames, bands, 64).bfloat16()
    weight = torch.randn(64, 1, 3, 3, requires_grad=True)
    given = x.float().permute(0, 3, 1, 2).requires_grad_()
    expected = functional.conv2d(given, weight, stride=2, padding=1, groups=64)
    gradient = torch.randn_like(expected).bfloat16()
    expected.backward(gradient.float())  # type: ignore[no-untyped-call]
    taps = weight.detach().flatten(1).t().contiguous()
    found = kernels().strided_depthwise(x, taps)
    torch.testing.assert_close(found.float(), expected.detach().permute(0, 2, 3, 1), rtol=1e-2, atol=2e-2)
    of_x, of_taps = kernels().strided_depthwise_gradients(gradient.permute(0, 2, 3, 1).contiguous(), x, taps)
    assert given.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(of_x.float(), given.grad.permute(0, 2, 3, 1), rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(of_taps, weight.grad.flatten(1).t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (replace(SHAPE, subsampling="striding"), "dw_striding"),
        (replace(SHAPE, bias=False), "biases"),
        (replace(SHAPE, subsampling_channels=16), "multiples of 32"),
    ],
)
def test_shapes_that_it_does_not_know_are_refused(shape: ConformerConfig, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        FastConformer(network(shape))
