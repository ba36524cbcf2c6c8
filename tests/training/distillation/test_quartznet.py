"""The fast channels-last path against the ordinary network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from training.distillation.kernels import cpu_has_bfloat16, kernels, load
from training.distillation.quartznet import FastQuartzNet, PlainQuartzNet, channels_last, upsampled
from training.masks import frame_mask
from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNet, QuartzNetConfig

needs_kernels = pytest.mark.skipif(
    not cpu_has_bfloat16(), reason="the kernels want a CPU with AVX512-BF16, this one has not"
)
CONFIG = QuartzNetConfig(
    29,
    (
        BlockConfig(64, 1, 11, stride=4, separable=False),
        BlockConfig(64, 2, 11, residual=True),
        BlockConfig(96, 3, 13, residual=True),
        BlockConfig(128, 1, 9, dilation=2),
        BlockConfig(128, 1, 1, separable=False),
    ),
    upsample=2,
)


def features(lengths: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    frames = int(lengths.max())
    return torch.randn(len(lengths), frames, 64) * frame_mask(lengths, frames)[:, :, None]


@needs_kernels
def test_the_compiler_is_there_where_the_instructions_are() -> None:
    if load() is None:
        pytest.skip("no C++ compiler or no ninja here: the plain path is used")
    assert hasattr(kernels(), "depthwise")


@needs_kernels
@pytest.mark.parametrize("size", [1, 7, 25, 40])
def test_depthwise_convolution_and_its_gradients(size: int) -> None:
    if load() is None:
        pytest.skip("no C++ compiler or no ninja here")
    torch.manual_seed(0)
    size += 1 - size % 2
    x = torch.randn(3, 29, 64).bfloat16()
    gradient = torch.randn(3, 29, 64).bfloat16()
    taps = torch.randn(size, 64)
    reference = taps.clone().requires_grad_()
    expected = functional.conv1d(x.float().mT, reference.t()[:, None], padding=size // 2, groups=64).mT
    expected.backward(gradient.float())
    found = kernels().depthwise(x, taps, size // 2)
    torch.testing.assert_close(found.float(), expected.detach(), rtol=1e-2, atol=2e-2)
    of_weight = kernels().depthwise_weight_gradient(x, gradient, size, size // 2)
    assert reference.grad is not None
    torch.testing.assert_close(of_weight, reference.grad, rtol=1e-4, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("training", [False, True])
def test_fast_path_equals_the_network(training: bool) -> None:
    if load() is None:
        pytest.skip("no C++ compiler or no ninja here")
    torch.manual_seed(0)
    # Batch statistics of the ordinary network include padding; so full lengths where they are used.
    lengths = torch.tensor([160, 160, 160] if training else [160, 121, 77])
    model = QuartzNet(CONFIG).train(training)
    reference = copy.deepcopy(model)
    values = features(lengths)
    output = FastQuartzNet(model)(values, lengths, (-2, -1))
    expected = reference(values.mT, lengths, (-2, -1))
    assert output.lengths.tolist() == expected.lengths.tolist()
    own = frame_mask(output.lengths, output.log_probs.shape[1])[:, :, None]
    difference = ((output.log_probs - expected.log_probs) * own).abs().max()
    assert float(difference.detach()) < 0.15
    assert output.hidden[0].shape == expected.hidden[0].mT.shape
    if not training:
        return
    direction = torch.randn_like(expected.log_probs)
    (output.log_probs * direction).sum().backward()
    (expected.log_probs * direction).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        cosine = functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert float(cosine) > 0.93, name
    for (name, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(buffer, other, rtol=0.02, atol=0.01)


@needs_kernels
def test_a_padded_batch_gives_what_each_item_alone_gives() -> None:
    lengths = torch.tensor([160, 121, 77])
    values = features(lengths)
    network = channels_last(QuartzNet(CONFIG)).eval()
    with torch.inference_mode():
        together = network(values, lengths)
    for item, length in enumerate(lengths.tolist()):
        with torch.inference_mode():
            alone = network(values[item : item + 1, :length], lengths[item : item + 1])
        frames = int(alone.lengths[0])
        torch.testing.assert_close(
            together.log_probs[item, :frames], alone.log_probs[0, :frames], atol=0.05, rtol=0.01
        )


def test_plain_path_has_the_same_interface() -> None:
    lengths = torch.tensor([90, 50])
    model = QuartzNet(CONFIG).eval()
    output = PlainQuartzNet(model)(features(lengths), lengths, (-2,))
    assert output.log_probs.shape == (2, 46, 29)
    assert output.hidden[0].shape == (2, 23, 128)


def test_upsampled_frames_stand_side_by_side() -> None:
    values = torch.arange(12.0).reshape(1, 2, 6)
    assert upsampled(values, 2).tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]]


@needs_kernels
def test_shapes_the_kernels_cannot_take_are_refused() -> None:
    if load() is None:
        pytest.skip("no C++ compiler or no ninja here")
    with pytest.raises(ValueError, match="multiples of 32"):
        FastQuartzNet(QuartzNet(QuartzNetConfig(29, (BlockConfig(40, 1, 5),))))
