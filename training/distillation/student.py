"""The student's shape and the heads that exist only while it learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.conformer import ConformerConfig, ConformerCtc
from training.distillation.conformer import FastConformer
from training.distillation.dataset import VOCABULARY_SIZE
from training.distillation.examples import Batch, Corpus
from training.distillation.loss import activation_loss, ctc_loss, dense_loss, posterior_loss
from training.distillation.quartznet import FastQuartzNet, PlainQuartzNet, channels_last, upsampled
from training.distillation.whisper import FastWhisper, WhisperCorpus
from training.frontend import FrontendConfig
from training.recipes.quartznet_ctc.architectures import quartznet
from training.recipes.quartznet_ctc.model import BlockConfig, QuartzNet, QuartzNetConfig
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc

SIZES: dict[str, tuple[int, list[tuple[int, int, int]], int]] = {
    # name: stem filters, residual blocks (filters, repeat, kernel), filters of the last layer
    "tiny": (32, [(32, 1, 7)], 64),
    "s": (256, [(256, 3, 13), (256, 3, 17), (320, 3, 21), (320, 3, 25), (384, 3, 29)], 512),
    "m": (256, [(256, 4, 13), (384, 4, 15), (448, 4, 19), (512, 4, 23), (512, 4, 27)], 640),
    "l": (256, [(384, 4, 13), (448, 4, 15), (512, 4, 19), (512, 4, 23), (512, 4, 27), (512, 4, 31)], 768),
}


QUARTZNET_5X5 = "5x5"
"""The published QuartzNet5x5: strides, widths and kernels of the 15x5 teacher, a third of its blocks."""
_CONFORMER = ConformerConfig(
    features=64, width=256, layers=6, heads=4, inner=768, kernel=15, subsampling_factor=4,
    subsampling_channels=64, scale_input=False, upsample=2,
)  # fmt: skip
CONFORMERS = {
    "conformer": _CONFORMER,
    "conformer-tiny": replace(
        _CONFORMER, width=32, layers=4, heads=2, inner=64, kernel=7, subsampling_channels=32
    ),
}
"""Frames of 40 ms in the layers, two of 20 ms out of each, as the teacher has."""
LAYER_MATRICES = ("_proj.weight", "linear1.weight", "linear2.weight", "conv1.weight", "conv2.weight")
"""Of a Conformer's layers: attention, feed-forward, pointwise convolutions."""
WHISPERS = {
    "whisper-tiny": EncoderConfig(),
    "whisper-micro": EncoderConfig(width=64, layers=2, heads=1, inner=64),
}
"""An encoder of Whisper's shape; the first goes on from OpenAI's weights (`--init-from tiny.en.pt`)."""
WHISPER_MATRICES = ("_proj.weight", "fc1.weight", "fc2.weight")
SIZE_NAMES = (*SIZES, QUARTZNET_5X5, *CONFORMERS, *WHISPERS)


def student_config(size: str) -> QuartzNetConfig:
    """QuartzNet5x5, or a trunk at 40 ms (stride 4 in the stem) that emits two 20 ms frames per step."""
    if size == QUARTZNET_5X5:
        return quartznet(VOCABULARY_SIZE, blocks_per_group=1)
    stem, body, last = SIZES[size]
    blocks = [BlockConfig(stem, 1, 11, stride=4, separable=False)]
    blocks += [BlockConfig(filters, repeat, kernel, residual=True) for filters, repeat, kernel in body]
    blocks.append(BlockConfig(last, 1, 1, separable=False))
    return QuartzNetConfig(VOCABULARY_SIZE, tuple(blocks), upsample=2)


def corpus_type(size: str) -> type[Corpus]:
    """How a student of that size reads the cache."""
    return WhisperCorpus if size in WHISPERS else Corpus


@dataclass(frozen=True)
class LossWeights:
    """How much each part counts."""

    hidden: float = 1.0
    dense: float = 0.3
    posterior: float = 0.5
    ctc: float = 0.3


@dataclass(frozen=True)
class Student:
    """A network that learns, and what the training-only heads hang on."""

    model: QuartzNet | ConformerCtc | WhisperCtc
    fast: FastQuartzNet | PlainQuartzNet | FastConformer | FastWhisper
    """How `model` is run while it learns."""
    hidden: tuple[int, int]
    """Blocks or layers that answer the teacher's acoustic and its last activations."""
    dense: int
    """Which of the two answers the dense labels."""
    widths: tuple[int, int]
    matrices: tuple[str, ...]
    """Ends of the names of the weights that Muon moves."""
    factor: int = 1
    """Frames out of each of the trunk's."""


def conformer_student(shape: ConformerConfig) -> Student:
    """A new Conformer; the middle layer and the last but one answer the teacher's two."""
    model = ConformerCtc(shape, VOCABULARY_SIZE, FrontendConfig())
    for module in model.modules():
        if isinstance(module, nn.Conv1d) and module.groups > 1:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # before a norm it changes nothing
    hidden = (shape.layers // 2 - 1, shape.layers - 2)
    return Student(
        model, FastConformer(model), hidden, 1, (shape.width, shape.width), LAYER_MATRICES, shape.upsample
    )


def whisper_student(shape: EncoderConfig) -> Student:
    """A new encoder of Whisper's kind; the middle layer and the last answer the teacher's two."""
    model = WhisperCtc(shape, VOCABULARY_SIZE)
    model.encoder.start_from_random()
    hidden = (shape.layers // 2 - 1, shape.layers - 1)
    return Student(model, FastWhisper(model), hidden, 1, (shape.width, shape.width), WHISPER_MATRICES)


def quartznet_student(config: QuartzNetConfig) -> Student:
    """A new QuartzNet; its last residual block and its last block answer the teacher's two."""
    model = QuartzNet(config)
    residual = max(index for index, block in enumerate(config.blocks) if block.residual)
    hidden = (residual, len(config.blocks) - 1)
    middle, last = (config.blocks[index].filters for index in hidden)
    return Student(
        model, channels_last(model), hidden, 0, (middle, last), ("pointwise.weight",), config.upsample
    )


def student_of_size(size: str) -> Student:
    """A new student with random weights."""
    if size in CONFORMERS:
        return conformer_student(CONFORMERS[size])
    if size in WHISPERS:
        return whisper_student(WHISPERS[size])
    return quartznet_student(student_config(size))


class Distiller(nn.Module):
    """The student and its training-only heads: to the teacher's activations and to dense labels."""

    def __init__(self, student: Student, components: int) -> None:
        super().__init__()
        self.model, self.fast, self.student = student.model, student.fast, student
        self.components, self.factor = components, student.factor
        middle, last = student.widths
        self.acoustic_head = nn.Linear(middle, self.factor * components)
        self.character_head = nn.Linear(last, self.factor * components)
        self.dense_head = nn.Linear(student.widths[student.dense], self.factor * VOCABULARY_SIZE)

    def losses(self, batch: Batch, hidden_weights: Tensor, with_ctc: bool = True) -> dict[str, Tensor]:
        """Each part of the loss on a batch; ``hidden_weights`` (2 * components,)."""
        output = self.fast(batch.features, batch.lengths, self.student.hidden)

        def head(linear: nn.Linear, hidden: Tensor) -> Tensor:
            out = functional.linear(hidden, linear.weight.to(hidden.dtype), linear.bias.to(hidden.dtype))
            return upsampled(out, self.factor).float()

        frames = output.log_probs.shape[1]
        targets, lengths = batch.hidden[:, :frames], batch.target_lengths
        first, second = targets[..., : self.components], targets[..., self.components :]
        weights = hidden_weights[: self.components], hidden_weights[self.components :]
        dense = head(self.dense_head, output.hidden[self.student.dense])
        losses = {
            "hidden": 0.5
            * activation_loss(head(self.acoustic_head, output.hidden[0]), first, weights[0], lengths)
            + 0.5 * activation_loss(head(self.character_head, output.hidden[1]), second, weights[1], lengths),
            "dense": dense_loss(dense, batch.dense[:, :frames], lengths),
            "posterior": posterior_loss(output.log_probs, batch.teacher[:, :frames], lengths),
        }
        if with_ctc:
            losses["ctc"] = ctc_loss(output.log_probs, output.lengths, batch.texts)
        return losses


def mix(start: LossWeights, end: LossWeights, progress: float) -> LossWeights:
    """Weights between two settings, linear in ``progress`` (0..1)."""
    names = LossWeights.__dataclass_fields__
    return LossWeights(**{n: (1 - progress) * getattr(start, n) + progress * getattr(end, n) for n in names})


def total_loss(losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
    """Weighted sum of the parts."""
    parts = [getattr(weights, name) * value for name, value in losses.items()]
    return torch.stack(parts).sum()
