"""The student's pieces against a real (random) network of the teacher's widths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from training.distillation.dataset import VOCABULARY_SIZE
from training.distillation.examples import Batch
from training.distillation.kernels import load
from training.distillation.loss import ctc_loss, posterior_loss
from training.distillation.pieces import PieceStudy, borders, relative_error
from training.distillation.student import QUARTZNET_5X5, Distiller, student_config, student_of_size
from training.errors import ConfigError
from training.recipes.quartznet_ctc.architectures import quartznet
from training.recipes.quartznet_ctc.model import QuartzNet

TEACHER = quartznet(VOCABULARY_SIZE, blocks_per_group=3, repeat=1)


def some_batch() -> Batch:
    torch.manual_seed(1)
    lengths = torch.tensor([96, 61])
    features = torch.randn(2, 96, 64) * (torch.arange(96)[None, :, None] < lengths[:, None, None])
    empty = torch.zeros(2, 48, 1)
    return Batch(features, lengths, empty, empty, empty.long()[..., 0], (lengths - 1) // 2 + 1, [[], []], 1.6)


def test_each_block_of_the_student_answers_one_stretch_of_the_teacher() -> None:
    assert borders(student_config(QUARTZNET_5X5), TEACHER) == [0, 3, 6, 9, 12, 15, 16, 17]


def test_a_student_of_another_make_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose size 5x5"):
        borders(student_config("m"), TEACHER)


def test_relative_error_is_one_for_the_mean_and_nought_for_the_target() -> None:
    torch.manual_seed(0)
    target, lengths = torch.randn(2, 5, 3) + 4.0, torch.tensor([5, 3])
    target[1, 3:] = 0.0
    own = torch.arange(5)[None, :, None] < lengths[:, None, None]
    mean = target.sum(dim=(0, 1)) / 8 * own
    assert relative_error(target, target, lengths).item() == 0.0
    assert relative_error(mean, target, lengths).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.skipif(load() is None, reason="needs AVX512-BF16 and a C++ compiler")
def test_pieces_learn_alone_and_no_gradient_crosses_a_border() -> None:
    torch.manual_seed(0)
    teacher = QuartzNet(TEACHER).eval()
    distiller = Distiller(student_of_size(QUARTZNET_5X5), components=4)
    study = PieceStudy(teacher, distiller.model)
    batch = some_batch()
    study.measure(batch)
    optimiser = torch.optim.AdamW(distiller.model.parameters(), lr=2e-3)
    history = []
    for _ in range(25):
        losses = study.losses(batch)
        history.append({name: float(value.detach()) for name, value in losses.items()})
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    assert set(history[0]) == {*(f"piece{index}" for index in range(8)), "head"}
    for name in history[0]:
        assert history[-1][name] < 0.7 * history[0][name], name
    optimiser.zero_grad()
    study.losses(batch)["piece3"].backward()
    touched = {name.split(".")[1] for name, p in distiller.model.named_parameters() if p.grad is not None}
    assert touched == {"3"}


@pytest.mark.skipif(load() is None, reason="needs AVX512-BF16 and a C++ compiler")
def test_joined_pieces_are_the_whole_student() -> None:
    torch.manual_seed(0)
    distiller = Distiller(student_of_size(QUARTZNET_5X5), components=4)
    study = PieceStudy(QuartzNet(TEACHER).eval(), distiller.model, joined=True)
    batch = replace(some_batch(), texts=[[3, 4], [5]])
    losses = study.losses(batch, with_ctc=True)
    answer = study.student(batch.features, batch.lengths)
    teacher = study.teacher(batch.features, batch.lengths)
    whole = posterior_loss(answer.log_probs, teacher.log_probs.exp(), teacher.lengths)
    assert losses["head"].item() == pytest.approx(whole.item(), rel=0.02)
    assert losses["ctc"].item() == pytest.approx(
        ctc_loss(answer.log_probs, answer.lengths, batch.texts).item(), rel=0.02
    )
    losses["piece3"].backward()
    touched = {name.split(".")[1] for name, p in distiller.model.named_parameters() if p.grad is not None}
    assert touched == {"0", "1", "2", "3"}
