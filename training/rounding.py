"""Matrices of four bits that change least of what they give on real sound: GPTQ (Frantar et al. 2022).

A matrix is rounded column by column, and every error made is taken back, as far as that goes, by the columns
that are still exact: where two inputs go together, one's weight makes up for the other's. Nothing is learned;
recordings without texts are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from tqdm import tqdm

from training.four_bits import GROUP, HIGHEST, LOWEST, quantize_to_four_bits
from training.inference import Waveform, tensors_of
from training.transformer_quantize import products

DAMPING = 0.01
"""Of the mean square of the inputs, added to each: inputs that hardly vary are not relied on."""
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
    left = weight.detach().double().clone()
    inputs = left.shape[1]
    square = products.double().clone()
    unused = square.diagonal() == 0
    square[unused, unused] = 1.0
    importance = square.diagonal().clone()
    square.diagonal().add_(DAMPING * importance.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    shares = torch.linalg.cholesky(inverse, upper=True)
    found = torch.empty_like(left)
    for start in range(0, inputs, GROUP):
        stop = min(start + GROUP, inputs)
        group = left[:, start:stop]
        largest = group.abs().argmax(dim=1)
        scales = _scales(group, group.gather(1, largest[:, None]), importance[start:stop])
        errors = torch.empty_like(group)
        for place in range(stop - start):
            column = start + place
            levels = _levels(left[:, column], scales)
            levels = torch.where(largest == place, float(LOWEST), levels)
            found[:, column] = levels * scales
            errors[:, place] = (left[:, column] - found[:, column]) / shares[column, column]
            left[:, column:stop] -= errors[:, place, None] * shares[column, column:stop]
        left[:, stop:] -= errors @ shares[start:stop, stop:]
    return found.float()


def _levels(values: Tensor, scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, values / scales).round().clamp(LOWEST, HIGHEST)


def _scales(group: Tensor, largest: Tensor, importance: Tensor) -> Tensor:
    """Per row of (outputs, GROUP) the float16 scale with the least error, weighed by each input's size."""
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
