"""Stage 2b: each piece of the student learns what the same stretch of the teacher does, on its input.

    python -m training.distillation.pieces --teacher TEACHER.nemo --cache CACHE --run runs/pieces \\
        --size 5x5 --max-minutes 20

A student with the teacher's widths at the borders of its pieces (QuartzNet5x5: stem, one block for each
three of the teacher's, the wide convolution, the last, the head) starts from random weights. The teacher
runs on the augmented batch; every piece sees the teacher's activations before its stretch and answers those
after it (mean squared error over the target's variance). No gradient crosses a border, so several shallow
problems are solved at once instead of one deep one. The idea is that of Li et al. 2020, "Blockwisely
supervised neural architecture search with knowledge distillation". Neither weights nor decoder of the teacher
are copied.

``--joined`` goes on from there (``weights``, then ``pieces --joined --init-from`` with another ``--run``):
each piece hears the one before it and gradients cross the borders, so the pieces learn to live with each
other's errors. The targets at the borders stay (deep supervision), with the teacher's posteriors and CTC on
the text at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from training.distillation.distill import arguments_of, run
from training.distillation.examples import Batch, BatchMaker, Corpus
from training.distillation.loss import ctc_loss, posterior_loss
from training.distillation.quartznet import FastQuartzNet, channels_last
from training.distillation.student import QUARTZNET_5X5, LossWeights
from training.distillation.trainer import TrainConfig, Trainer
from training.errors import ConfigError, in_one_line
from training.nemo import read_nemo
from training.recipes.quartznet_ctc.model import Block, QuartzNet, QuartzNetConfig


def borders(student: QuartzNetConfig, teacher: QuartzNetConfig) -> list[int]:
    """For each of the student's blocks the teacher's block whose output it answers.

    Runs of residual blocks of one shape in the teacher become one block of the student. Raises ConfigError
    where the two do not line up.
    """
    found: list[int] = []
    blocks = teacher.blocks
    for index, block in enumerate(blocks):
        goes_on = block.residual and index + 1 < len(blocks) and blocks[index + 1] == block
        if not goes_on:
            found.append(index)
    shapes = [(blocks[index].filters, blocks[index].stride) for index in found]
    if shapes != [(block.filters, block.stride) for block in student.blocks]:
        raise ConfigError("the student's blocks are not one per stretch of the teacher's: choose size 5x5")
    return found


def relative_error(predicted: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """Squared error over the target's variance in time; both (B,T,C), zero beyond lengths (B,)."""
    predicted, target = predicted.float(), target.float()
    mean = target.sum(dim=(0, 1)) / lengths.sum()
    variance = target.square().sum() - mean.square().sum() * lengths.sum()
    return (predicted - target).square().sum() / variance.clamp(min=1e-6)


class PieceStudy:
    """The teacher's activations at the borders, and each piece's error against them.

    A piece is given what the teacher hands to its stretch or, ``joined``, what the piece before it made.
    """

    def __init__(self, teacher: QuartzNet, student: QuartzNet, joined: bool = False) -> None:
        self.borders = borders(student.config, teacher.config)
        fast_teacher, fast_student = channels_last(teacher), channels_last(student)
        if not isinstance(fast_teacher, FastQuartzNet) or not isinstance(fast_student, FastQuartzNet):
            raise SystemExit("stage pieces needs the fast path: a CPU with AVX512-BF16 and a C++ compiler")
        self.teacher, self.student = fast_teacher.requires_grad_(False), fast_student
        self.sizes = [1.0] * len(self.borders)
        self.joined = joined

    @torch.no_grad()
    def measure(self, batch: Batch) -> None:
        """Take the size of the teacher's activations at each border from ``batch``."""
        hidden = self.teacher(batch.features, batch.lengths, tuple(self.borders)).hidden
        self.sizes = [max(1e-6, float(values.float().std())) for values in hidden]

    def losses(self, batch: Batch, with_ctc: bool = False) -> dict[str, Tensor]:
        """Relative error of each piece and the head's divergence; CTC where it is asked for."""
        with torch.no_grad():
            answer = self.teacher(batch.features, batch.lengths, tuple(self.borders))
        losses: dict[str, Tensor] = {}
        network = self.student.model
        given, lengths = batch.features.to(torch.bfloat16), batch.lengths
        for index, (module, target) in enumerate(zip(network.blocks, answer.hidden, strict=True)):
            target = target / self.sizes[index]  # batch norms follow: only the student's range changes
            out, lengths = self.student.block(given, lengths, cast(Block, module))
            losses[f"piece{index}"] = relative_error(out, target, lengths)
            given = out if self.joined else target
        weight, bias = network.head.weight[:, :, 0], cast(Tensor, network.head.bias)
        logits = functional.linear(given, weight.to(given.dtype), bias.to(given.dtype)).float()
        log_probs = functional.log_softmax(logits, dim=-1)
        losses["head"] = posterior_loss(log_probs, answer.log_probs.exp(), answer.lengths)
        if with_ctc:
            losses["ctc"] = ctc_loss(log_probs, answer.lengths, batch.texts)
        return losses


class PieceTrainer(Trainer):
    """The trainer of stage 3 with local targets in place of its losses."""

    def __init__(self, config: TrainConfig, corpus: Corpus, archive: Path, joined: bool) -> None:
        super().__init__(config, corpus)
        student = self.distiller.model
        if not isinstance(student, QuartzNet):
            raise SystemExit(f"stage pieces needs a QuartzNet: choose size {QUARTZNET_5X5}")
        self.study = PieceStudy(read_nemo(archive).model.eval(), student, joined)
        first = BatchMaker(corpus, config.batch_s, config.seed, None)(0)
        self.study.measure(first)

    def _losses(self, batch: Batch, with_ctc: bool) -> dict[str, Tensor]:
        return self.study.losses(batch, with_ctc and self.study.joined)

    def _total(self, losses: dict[str, Tensor], weights: LossWeights) -> Tensor:
        if not self.study.joined:
            return torch.stack(list(losses.values())).sum()
        total = weights.posterior * losses["head"]
        if "ctc" in losses:
            total = total + weights.ctc * losses["ctc"]
        errors = [value for name, value in losses.items() if name.startswith("piece")]
        return total + weights.hidden * torch.stack(errors).sum()


@in_one_line("pieces")
def main() -> int:
    """Command line."""
    parser = arguments_of(__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help=".nemo archive")
    parser.add_argument("--joined", action="store_true", help="each piece hears the one before it")
    arguments = parser.parse_args()
    run(arguments, lambda config, corpus: PieceTrainer(config, corpus, arguments.teacher, arguments.joined))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
