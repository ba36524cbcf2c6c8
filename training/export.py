"""Trained network -> ONNX graph that takes a waveform: front end inside, masked, every convolution in 2-D.

The graph is written node by node instead of traced. That keeps names stable (the quantizer and the profiler
address layers by them), folds batch normalisation into the weights, drops what only training needs, and
writes each 1-D convolution as a 2-D one of height one, which ONNX Runtime's blocked kernels take.

    waveform (batch, samples) float32, lengths (batch,) int64
        -> log_probs (batch, frames, vocabulary) float32, frame_lengths (batch,) int64
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from training.errors import QualityGateError
from training.frontend import FrontendConfig, LogMel
from training.graph import OPSET, GraphBuilder
from training.graph_frontend import add_frontend
from training.inference import Agreement, LogProbs, Waveform, compare, cpu_session, run_graph
from training.recipes.quartznet_ctc.model import Block, ConvNorm, QuartzNet, same_padding
from training.torch_inference import run_torch

AGREEMENT_TOLERANCE = 1e-4
"""Largest difference of a posterior between PyTorch and ONNX."""
MIN_SAMPLES = 160


def export_graph(model: QuartzNet, frontend: FrontendConfig) -> onnx.ModelProto:
    """The whole graph of a network in evaluation mode, float32."""
    graph = GraphBuilder()
    features, frame_counts = add_frontend(graph, frontend)
    trunk = _Trunk(graph, frame_counts)
    values = graph.add("Unsqueeze", [features, graph.ints("axis_height", [2])], "trunk.input")
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    for index, block in enumerate(blocks):
        following = blocks[index + 1].layers[0] if index + 1 < len(blocks) else None
        looks_around = isinstance(following, ConvNorm) and following.kernel > 1
        values = trunk.block(f"blocks.{index}", block, values, mask_output=looks_around)
    _add_head(graph, trunk, model, values)
    return graph.build("quartznet_ctc", model.config.vocabulary_size)


class _Trunk:
    """Adds blocks, and keeps the frame counts and the mask of the current stride."""

    def __init__(self, graph: GraphBuilder, lengths: str) -> None:
        self.graph = graph
        self.lengths = lengths
        self._mask: str | None = None

    def masked(self, name: str, values: str) -> str:
        """Zeros beyond each item's frames; the mask (batch, 1, 1, frames) is made once per stride."""
        graph = self.graph
        if self._mask is None:
            shape = graph.add("Shape", [values], f"{name}.shape")
            frames = graph.add("Gather", [shape, graph.ints("three", [3])], f"{name}.frames", axis=0)
            column = graph.add(
                "Unsqueeze", [self.lengths, graph.ints("axes_1_2_3", [1, 2, 3])], f"{name}.lengths"
            )
            self._mask = graph.mask(frames, column, f"{name}.mask")
        return graph.add("Mul", [values, self._mask], name)

    def convolution(self, name: str, values: str, conv: nn.Conv1d, norm: nn.BatchNorm1d | None = None) -> str:
        """A Conv1d as a Conv2d of height one, with the batch normalisation after it folded in."""
        weight, bias = folded(conv, norm)
        inputs = [values, self.graph.weights(f"{name}.weight", weight[:, :, None, :].numpy())]
        if bias is not None:
            inputs.append(self.graph.weights(f"{name}.bias", bias.numpy()))
        kernel, dilation = conv.kernel_size[0], conv.dilation[0]
        padding = same_padding(kernel, dilation)
        return self.graph.add(
            "Conv",
            inputs,
            name,
            kernel_shape=[1, kernel],
            strides=[1, conv.stride[0]],
            dilations=[1, dilation],
            pads=[0, padding, 0, padding],
            group=conv.groups,
        )

    def block(self, name: str, block: Block, values: str, mask_output: bool) -> str:
        """One block. Its input is masked already where its first convolution looks around."""
        graph, out = self.graph, values
        for index, layer in enumerate(block.layers):
            if not isinstance(layer, ConvNorm):
                raise TypeError(f"{name}: unknown layer {type(layer).__name__}")
            where = f"{name}.layers.{index}"
            if index:
                out = graph.add("Relu", [out], f"{where}.relu")
                out = self.masked(f"{where}.masked", out) if layer.kernel > 1 else out
            if layer.depthwise is not None:
                out = self.convolution(f"{where}.depthwise", out, layer.depthwise)
            out = self.convolution(f"{where}.pointwise", out, layer.pointwise, layer.norm)
            self._advance(f"{where}.lengths", layer)
        if block.squeeze is not None:
            out = self._squeeze(f"{name}.squeeze", block, out)
        if block.residual is not None:
            around = self.convolution(
                f"{name}.residual", values, block.residual.pointwise, block.residual.norm
            )
            out = graph.add("Add", [out, around], f"{name}.sum")
        out = graph.add("Relu", [out], f"{name}.relu")
        return self.masked(f"{name}.masked", out) if mask_output else out

    def _advance(self, name: str, layer: ConvNorm) -> None:
        """Frame counts after a convolution; integer division is floor here, both sides are positive."""
        span = layer.dilation * (layer.kernel - 1)
        change = 2 * same_padding(layer.kernel, layer.dilation) - span - 1
        if layer.stride == 1 and change == -1:
            return
        graph = self.graph
        grown = graph.add("Add", [self.lengths, graph.ints(f"{name}.change", [change])], f"{name}.grown")
        stepped = graph.add("Div", [grown, graph.ints(f"{name}.stride", [layer.stride])], f"{name}.steps")
        self.lengths = graph.add("Add", [stepped, graph.ints("one", [1])], name)
        self._mask = None

    def _squeeze(self, name: str, block: Block, values: str) -> str:
        """Squeeze-and-excitation over an item's own frames."""
        graph, squeeze = self.graph, block.squeeze
        if squeeze is None:
            return values
        own = self.masked(f"{name}.own", values)
        total = graph.add("ReduceSum", [own, graph.ints("axes_2_3", [2, 3])], f"{name}.total", keepdims=0)
        count = graph.add("Cast", [self.lengths], f"{name}.count_float", to=onnx.TensorProto.FLOAT)
        count = graph.add("Unsqueeze", [count, graph.ints("one", [1])], f"{name}.count")
        mean = graph.add("Div", [total, count], f"{name}.mean")
        reduce = graph.weights(f"{name}.reduce.weight", squeeze.reduce.weight.detach().numpy().T)
        expand = graph.weights(f"{name}.expand.weight", squeeze.expand.weight.detach().numpy().T)
        inner = graph.add("MatMul", [mean, reduce], f"{name}.reduce")
        inner = graph.add("Relu", [inner], f"{name}.relu")
        gate = graph.add("MatMul", [inner, expand], f"{name}.expand")
        gate = graph.add("Sigmoid", [gate], f"{name}.sigmoid")
        gate = graph.add("Unsqueeze", [gate, graph.ints("axes_2_3", [2, 3])], f"{name}.gate")
        return graph.add("Mul", [values, gate], name)


def folded(conv: nn.Conv1d, norm: nn.BatchNorm1d | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution with the normalisation after it folded in, in float64."""
    weight = conv.weight.detach().double()
    bias = conv.bias.detach().double() if conv.bias is not None else None
    if norm is None:
        return weight.float(), bias.float() if bias is not None else None
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a normalisation without running statistics cannot be folded")
    scale = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.detach().double() - norm.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias * scale
    return (weight * scale[:, None, None]).float(), shift.float()


def _add_head(graph: GraphBuilder, trunk: _Trunk, model: QuartzNet, values: str) -> None:
    """Head, `upsample` frames per trunk frame, log-softmax over the vocabulary."""
    config = model.config
    logits = trunk.convolution("head", values, model.head)
    flat = graph.add("Squeeze", [logits, graph.ints("axis_height", [2])], "head.flat")
    frames = graph.add("Transpose", [flat], "head.frames", perm=[0, 2, 1])
    lengths = trunk.lengths
    if config.upsample > 1:
        shape = graph.ints("head.shape", [0, -1, config.vocabulary_size])
        frames = graph.add("Reshape", [frames, shape], "head.upsampled")
        lengths = graph.add("Mul", [lengths, graph.ints("head.upsample", [config.upsample])], "head.lengths")
    graph.add("LogSoftmax", [frames], "log_probs", axis=-1)
    graph.add("Identity", [lengths], "frame_lengths")


@dataclass(frozen=True)
class ExportCheck:
    """The graph beside PyTorch on the same sound."""

    agreement: Agreement
    """PyTorch in float32 against the graph."""
    graph_error: float
    """Largest difference of a log-probability between the graph and PyTorch in float64."""
    torch_error: float
    """The same between PyTorch in float32 and in float64: what float32 costs this network at all."""

    def describe(self) -> str:
        """One line for a report."""
        return (
            f"opset {OPSET}; {self.agreement.describe()}; from float64 the graph is "
            f"{self.graph_error:.1e} away, PyTorch in float32 {self.torch_error:.1e}"
        )


def check_agreement(
    model: QuartzNet,
    frontend: FrontendConfig,
    graph: onnx.ModelProto,
    waveforms: Sequence[Waveform],
    tolerance: float = AGREEMENT_TOLERANCE,
) -> ExportCheck:
    """Compare PyTorch and the graph on a padded batch.

    Raises QualityGateError where a posterior differs by more than `tolerance`, or where the graph's
    log-probabilities are further from PyTorch in float64 than `tolerance` and than twice PyTorch's own
    float32. (A deep network on a hard clip can lose 1e-3 to float32 whoever computes it.)
    """
    actual = run_graph(cpu_session(graph.SerializeToString()), waveforms)
    single = _torch_log_probs(model, frontend, waveforms, torch.float32)
    exact = _torch_log_probs(model, frontend, waveforms, torch.float64)
    check = ExportCheck(
        agreement=compare(single, actual),
        graph_error=compare(exact, actual).worst_log_prob,
        torch_error=compare(exact, single).worst_log_prob,
    )
    close = check.graph_error <= max(tolerance, 2 * check.torch_error)
    if not (check.agreement.worst_posterior <= tolerance and close):  # NaN is no agreement either
        raise QualityGateError(f"PyTorch and ONNX disagree, tolerance {tolerance:.0e}: {check.describe()}")
    return check


def _torch_log_probs(
    model: QuartzNet, frontend: FrontendConfig, waveforms: Sequence[Waveform], dtype: torch.dtype
) -> list[LogProbs]:
    network, log_mel = copy.deepcopy(model).eval().to(dtype), LogMel(frontend).to(dtype)
    return run_torch(lambda waveform, lengths: network(*log_mel(waveform.to(dtype), lengths)), waveforms)
