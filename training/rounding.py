"""Matrices of four bits that change least of what they give on real sound: GPTQ (Frantar et al. 2022).

A matrix is rounded column by column, and every error made is taken back, as far as that goes, by the columns
that are still exact: where two inputs go together, one's weight makes up for the other's. Then levels and
scales are improved in turn. Nothing is learned; recordings without texts are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from training.four_bits import HIGHEST, LOWEST, group_of, quantize_to_four_bits, storable
from training.inference import Waveform, tensors_of
from training.transformer_quantize import products

DAMPING = 0.01
"""Of the mean square of the inputs, added to each: inputs that hardly vary are not relied on."""
PASSES = 2
"""Over levels and scales, after the first round: more gain a hundredth."""
BLOCK = 64
"""Columns whose errors are handed on together."""
SHRINKINGS = tuple(1.0 - 0.05 * step for step in range(7))
"""Of a group's largest weight, whose loss may be worth what all others gain by a finer scale."""
MADE_UP_FOR = "weights of four bits in groups of 128, made up for"
PARTS = 6
"""Of a graph, which are rounded one after the other."""


def compensated(weight: Tensor, products: Tensor) -> Tensor:
    """The matrix of four bits whose outputs differ least from the given one's.

    Args:
        weight: (outputs, inputs) float32.
        products: (inputs, inputs), the sum of x xT over the inputs x that it is to meet.

    Returns (outputs, inputs) with values that :func:`training.four_bits.rounded` leaves as they are: the
    largest weight of each group takes the lowest level.
    """
    exact = weight.detach().double()
    square = products.double().clone()
    unused = square.diagonal() == 0
    square[unused, unused] = 1.0
    importance = square.diagonal().clone()
    square.diagonal().add_(DAMPING * importance.mean())
    found = _Levels.of(exact, importance)
    found.make_up(exact, square, importance.argsort(descending=True))
    for _ in range(PASSES):
        found.improve(exact, square)
        found.fit_scales(exact, square)
    found.improve(exact, square)
    return found.values().float()


@dataclass
class _Levels:
    """A matrix (outputs, inputs) float64 as whole numbers and scales of groups of inputs."""

    levels: Tensor
    """(outputs, inputs), from LOWEST to HIGHEST."""
    scales: Tensor
    """(outputs, groups), such as can be stored."""
    largest: Tensor
    """(outputs, inputs): one weight of each group, which has the lowest level."""
    group: int
    """How many inputs share a scale."""

    @classmethod
    def of(cls, exact: Tensor, importance: Tensor) -> _Levels:
        """Scales alone: each with the least error, weighed by the inputs' sizes (inputs,)."""
        largest = torch.zeros_like(exact, dtype=torch.bool)
        scales = []
        size = group_of(exact.shape[1])
        for start in range(0, exact.shape[1], size):
            group = exact[:, start : start + size]
            place = group.abs().argmax(dim=1, keepdim=True)
            largest[:, start : start + size].scatter_(1, place, True)
            scales.append(_scales(group, group.gather(1, place), importance[start : start + size]))
        found = storable(torch.stack(scales, dim=1), size)
        return cls(torch.zeros_like(exact), found, largest, size)

    def values(self) -> Tensor:
        """(outputs, inputs)."""
        return self.levels * self._scale_of(slice(None))

    def _scale_of(self, columns: slice) -> Tensor:
        """(outputs, columns)."""
        groups = torch.arange(self.levels.shape[1])[columns] // self.group
        return self.scales[:, groups]

    def _nearest(self, values: Tensor, column: int) -> Tensor:
        """Levels (outputs,) of a column."""
        scales = self.scales[:, column // self.group]
        levels = _levels(values, scales)
        return torch.where(self.largest[:, column] & (scales != 0), float(LOWEST), levels)

    def make_up(self, exact: Tensor, square: Tensor, order: Tensor) -> None:
        """Round columns in this order; those behind take back what goes wrong (Frantar et al. 2022).

        Columns of large inputs come first, while there are many left that can make up for them.
        """
        left = exact[:, order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square[order][:, order]))
        shares = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            errors = torch.empty_like(left[:, start:stop])
            for place in range(start, stop):
                column = int(order[place])
                self.levels[:, column] = self._nearest(left[:, place], column)
                values = self.levels[:, column] * self.scales[:, column // self.group]
                errors[:, place - start] = (left[:, place] - values) / shares[place, place]
                left[:, place:stop] -= errors[:, place - start, None] * shares[place, place:stop]
            left[:, stop:] -= errors @ shares[start:stop, stop:]

    def improve(self, exact: Tensor, square: Tensor) -> None:
        """Give each column in turn the best levels beside those of all others (Behdin et al. 2023)."""
        errors = self.values() - exact
        for start in range(0, exact.shape[1], BLOCK):
            stop = min(start + BLOCK, exact.shape[1])
            slopes = errors @ square[:, start:stop]
            for column in range(start, stop):
                scales = self.scales[:, column // self.group]
                before = self.levels[:, column].clone()
                best = before * scales - slopes[:, column - start] / square[column, column]
                self.levels[:, column] = self._nearest(best, column)
                change = (self.levels[:, column] - before) * scales
                errors[:, column] += change
                slopes += change[:, None] * square[column, start:stop]

    def fit_scales(self, exact: Tensor, square: Tensor) -> None:
        """Least squares: each row's scales that are best with its levels."""
        outputs, groups = self.scales.shape
        wanted = exact @ square
        normal, right = exact.new_empty(outputs, groups, groups), exact.new_empty(outputs, groups)
        for group in range(groups):
            own = slice(group * self.group, (group + 1) * self.group)
            right[:, group] = (self.levels[:, own] * wanted[:, own]).sum(dim=1)
            mixed = functional.pad(
                (self.levels[:, own] @ square[own]) * self.levels, (0, -len(square) % self.group)
            )
            normal[:, group] = mixed.reshape(outputs, groups, self.group).sum(dim=2)
        unused = self.scales == 0
        normal.diagonal(dim1=1, dim2=2).masked_fill_(unused, 1.0)
        found = torch.linalg.solve(normal, right).masked_fill(unused, 0.0)
        self.scales = storable(found, self.group)


def _levels(values: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, values / scales).round().clamp(LOWEST, HIGHEST)


def _scales(group: Tensor, largest: Tensor, importance: Tensor) -> Tensor:
    """Per row of a group (outputs, inputs) the scale with the least error, weighed by each input's size."""
    best, least = torch.zeros(len(group)).double(), torch.full((len(group),), torch.inf).double()
    for shrinking in SHRINKINGS:
        scales = (largest * shrinking / LOWEST).half().double()
        errors = ((_levels(group, scales) * scales - group).square() * importance).sum(dim=1)
        better = errors < least
        best, least = torch.where(better, scales[:, 0], best), torch.where(better, errors, least)
    return best


def four_bit_candidates(
    graph: onnx.ModelProto, calibration: Sequence[Waveform]
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """The ways to four bits of a graph without loops: all matrix products, and all but the ends."""
    names = products(graph)
    compensated_graph = onnx.ModelProto()
    compensated_graph.CopyFrom(graph)
    _compensate(compensated_graph, set(names), calibration)
    exact = {tensor.name: tensor for tensor in graph.graph.initializer}
    weights = {node.name: node.input[1] for node in graph.graph.node if node.name in names}
    for how, left_out in ((MADE_UP_FOR, set[str]()), (f"{MADE_UP_FOR}, ends float32", {names[0], names[-1]})):
        model = onnx.ModelProto()
        model.CopyFrom(compensated_graph)
        for tensor in model.graph.initializer:
            if tensor.name in {weights[name] for name in left_out}:
                tensor.CopyFrom(exact[tensor.name])
        quantize_to_four_bits(model, set(names) - left_out)
        yield how, model


def _compensate(graph: onnx.ModelProto, names: set[str], calibration: Sequence[Waveform]) -> None:
    """Give the weights of these MatMul nodes values of four bits, a part of the graph after the other.

    What a part is given has come through the parts before as they are rounded, which it makes up for as well.
    """
    nodes = [node for node in graph.graph.node if node.name in names]
    sources = list(dict.fromkeys(node.input[0] for node in nodes))
    size = -(-len(sources) // PARTS)
    places = {tensor.name: tensor for tensor in graph.graph.initializer}
    with tqdm(total=len(nodes), desc="four bits", unit="matrix", disable=None) as bar:
        for start in range(0, len(sources), size):
            part = sources[start : start + size]
            sums = _products_of(graph, part, calibration)
            for node in nodes:
                if node.input[0] in sums:
                    tensor = places.pop(node.input[1], None)
                    if tensor is None:  # two products share it
                        continue
                    weight = torch.from_numpy(numpy_helper.to_array(tensor).T.copy())
                    found = compensated(weight, sums[node.input[0]])
                    tensor.CopyFrom(numpy_helper.from_array(found.T.contiguous().numpy(), tensor.name))
                    bar.update()


def _products_of(
    graph: onnx.ModelProto, names: Sequence[str], calibration: Sequence[Waveform]
) -> dict[str, Tensor]:
    """The sums of x xT over the rows x of these tensors of a graph."""
    sums: dict[str, Tensor] = {}
    for found in tensors_of(graph, names, calibration):
        for name, values in zip(names, found, strict=True):
            rows = torch.from_numpy(values).flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(())) + rows.T @ rows
    return sums
