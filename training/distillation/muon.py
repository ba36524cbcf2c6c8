"""Muon: momentum whose matrix is made orthogonal before it moves a matrix of weights.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale that lets AdamW's
learning rate and weight decay be kept is that of Liu et al. 2025, "Muon is scalable for LLM training".
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; it brings singular values near one fast rather than exactly."""
ITERATIONS = 4
SCALE = 0.5
"""Root mean square of an update relative to the learning rate, that of a typical AdamW step."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one, (rows, columns), in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.t()
    x = (x / (x.norm() + 1e-7)).contiguous()
    for _ in range(ITERATIONS):
        square = x @ x.t()
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    result: Tensor = x.t() if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon for weights that are matrices once flattened after the first axis; ``pool`` shares the work."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        pool: Executor | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.pool = pool

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, parameter in work:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        run = map if self.pool is None else self.pool.map
        for _ in run(lambda item: self._move(*item), work):
            pass

    @torch.no_grad()
    def _move(self, group: dict[str, Any], parameter: Tensor) -> None:
        gradient, buffer = parameter.grad, self.state[parameter]["momentum"]
        if gradient is None:
            return
        buffer.lerp_(gradient, 1.0 - group["momentum"])
        nesterov = gradient.lerp(buffer, group["momentum"]).flatten(1)
        update = orthogonalised(nesterov).to(parameter.dtype).view_as(parameter)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * SCALE * max(nesterov.shape) ** 0.5)
