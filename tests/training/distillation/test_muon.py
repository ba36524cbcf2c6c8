"""Muon against what defines it: near-orthogonal updates, and progress on a problem where scales differ."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from training.distillation.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_singular_values_come_close_to_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    found = orthogonalised(matrix).float()
    assert found.shape == matrix.shape
    values = torch.linalg.svdvals(found)
    assert float(values.max()) < 1.35
    assert float(values.median()) > 0.6
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float((found * (left @ right)).sum() / min(shape)) > 0.6


def test_it_solves_an_ill_conditioned_least_squares_problem() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(256, 32) * torch.logspace(0, -1.5, 32)
    target = inputs @ torch.randn(32, 16)
    weight = torch.nn.Parameter(torch.zeros(16, 32, 1))
    optimiser = Muon([weight], lr=0.05)
    losses = []
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        loss = (inputs @ weight[:, :, 0].t() - target).square().mean()
        losses.append(float(loss.detach()))
        weight.grad = None
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.02 * losses[0]


def test_a_pool_gives_the_same_step_and_the_state_comes_back() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 8, 1), torch.randn(8, 8, 1)

    def two_steps(pool: ThreadPoolExecutor | None, reload: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone())
        optimiser = Muon([weight], lr=0.1, pool=pool)
        for step in range(2):
            if step and reload:
                state = optimiser.state_dict()
                optimiser = Muon([weight], lr=0.1, pool=pool)
                optimiser.load_state_dict(state)
            weight.grad = gradient.clone() * (step + 1)
            optimiser.step()
        return weight.detach()

    with ThreadPoolExecutor(2) as pool:
        assert torch.equal(two_steps(None, False), two_steps(pool, True))
