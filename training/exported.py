"""A network as a float32 graph, with what its bundle must say of it and the ways to INT8 that suit it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from torch import nn

from api.manifest import GraphName
from api.vocabulary import Vocabulary
from training.bundle_writer import Graphs
from training.errors import ConfigError, QualityGateError
from training.export import AGREEMENT_TOLERANCE, MIN_SAMPLES
from training.graph import as_file, fits_one_file
from training.inference import LogProbs, Waveform, compare, cpu_session, run_graph
from training.recipes.whisper_ctc.export import export_graph as export_whisper
from training.recipes.whisper_ctc.model import FRAME_STRIDE_S, MAX_WINDOW_S, WhisperCtc
from training.recipes.whisper_ctc.model import MIN_SAMPLES as WHISPER_MIN_SAMPLES
from training.rounding import four_bit_candidates
from training.torch_inference import Forward, run_torch
from training.transformer_quantize import candidates, dynamic_candidates, exact_candidates
from training.vocabulary import casing_steps

if TYPE_CHECKING:
    from training.conformer import ConformerCtc

Ways = Callable[[onnx.ModelProto, Sequence[Waveform]], Iterable[tuple[str, onnx.ModelProto]]]
"""A float32 graph and recordings to find ranges on -> graphs in INT8 by the name of the way."""
Candidates = Callable[[Path, Path, Sequence[Waveform]], Iterable[tuple[str, Path]]]
"""The same with files: the graph, a folder to write to, recordings."""
View = Callable[[LogProbs], LogProbs]
"""What of an output is compared."""
DYNAMIC_RANGES = (
    " Dynamic ranges are found anew for each batch: an item's result depends a little on its neighbours."
)


def as_it_is(log_probs: LogProbs) -> LogProbs:
    """All of it."""
    return log_probs


@dataclass(frozen=True)
class Exported:
    """What conversion and training hand to whoever writes the bundle."""

    graph: onnx.ModelProto
    vocabulary: Vocabulary
    parameters: int
    frame_stride_s: float
    max_window_s: float
    min_samples: int
    agreement: Callable[[Sequence[Waveform]], str]
    """One line on PyTorch against ONNX on a padded batch. Raises QualityGateError."""
    ways: Ways
    ways_described: str
    """For the model card, before the table of what each gave."""
    exact_batches: bool
    """Whether INT8 has to give for an item in a batch what the item alone gives."""
    text_normalisation: tuple[str, ...]
    sample_rate_hz: int = 16_000
    form: GraphName = "int8"
    """What the ways lead to."""
    decoder: bool = False
    """Whether the graph searches with a decoder network."""
    four_bits: Ways | None = None
    """The ways to weights of four bits, where the work is matrix products."""

    def in_four_bits(self) -> Exported:
        """The same on its way to four bits. Raises ConfigError where there is none."""
        if self.four_bits is None:
            raise ConfigError(
                "--four-bits is for matrix products and graphs of up to 2 GB; this has convolutions, or more"
            )
        return replace(
            self,
            ways=self.four_bits,
            ways_described="Matrix products: weights of four bits, inputs rounded to 8 bits row by row.",
            form="int4",
        )

    def graphs(self, files: Mapping[GraphName, bytes | Path], default: GraphName) -> Graphs:
        """For the bundle."""
        return Graphs(
            files=files,
            default=default,
            opset=next(entry.version for entry in self.graph.opset_import if entry.domain == ""),
            parameters=self.parameters,
            frame_stride_s=self.frame_stride_s,
            max_window_s=self.max_window_s,
            min_samples=self.min_samples,
            sample_rate_hz=self.sample_rate_hz,
            decoder=self.decoder,
        )


def exported_transformer(
    network: nn.Module,
    graph: onnx.ModelProto,
    vocabulary: Vocabulary,
    *,
    frame_stride_s: float,
    max_window_s: float,
    min_samples: int,
    text_normalisation: tuple[str, ...],
    sample_rate_hz: int = 16_000,
    exact_batches: bool = False,
) -> Exported:
    """A network whose work is matrix products; with `exact_batches` in INT8 with fixed ranges only."""
    tried: Candidates = candidates if fits_one_file(graph) else dynamic_candidates
    if exact_batches:
        tried = exact_candidates
    return Exported(
        graph,
        vocabulary,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        frame_stride_s=frame_stride_s,
        max_window_s=max_window_s,
        min_samples=min_samples,
        agreement=lambda clips: agreement(network, graph, clips),
        ways=ways_of(tried),
        ways_described="Matrix products with constant weights: S8 weights per channel, U8 activations."
        + ("" if exact_batches else DYNAMIC_RANGES),
        exact_batches=exact_batches,
        text_normalisation=text_normalisation,
        sample_rate_hz=sample_rate_hz,
        four_bits=four_bit_candidates if fits_one_file(graph) else None,
    )


def exported_conformer(
    model: ConformerCtc,
    graph: onnx.ModelProto,
    vocabulary: Vocabulary,
    max_window_s: float,
    *,
    exact_batches: bool = False,
) -> Exported:
    """A Conformer with its graph; its tokens say how it writes."""
    return exported_transformer(
        model,
        graph,
        vocabulary,
        frame_stride_s=model.frame_stride_s,
        max_window_s=max_window_s,
        min_samples=MIN_SAMPLES,
        text_normalisation=casing_steps(vocabulary),
        sample_rate_hz=model.frontend.config.sample_rate_hz,
        exact_batches=exact_batches,
    )


def exported_whisper(
    model: WhisperCtc,
    vocabulary: Vocabulary,
    text_normalisation: tuple[str, ...],
    max_window_s: float = MAX_WINDOW_S,
    *,
    exact_batches: bool = False,
) -> Exported:
    """A Whisper encoder with a CTC head; its window is at most what it has positions for."""
    return exported_transformer(
        model,
        export_whisper(model),
        vocabulary,
        frame_stride_s=FRAME_STRIDE_S,
        max_window_s=min(max_window_s, MAX_WINDOW_S),
        min_samples=WHISPER_MIN_SAMPLES,
        text_normalisation=text_normalisation,
        exact_batches=exact_batches,
    )


def agreement(
    network: Forward, graph: onnx.ModelProto, clips: Sequence[Waveform], view: View = as_it_is
) -> str:
    """PyTorch against ONNX on a padded batch, in a `view`. Raises QualityGateError above the tolerance."""
    both = run_torch(network, clips), run_graph(cpu_session(graph), clips)
    expected, found_frames = ([view(one) for one in several] for several in both)
    if [len(one) for one in expected] != [len(one) for one in found_frames]:
        raise QualityGateError("PyTorch and ONNX disagree: texts of different lengths")
    found = compare(expected, found_frames)
    if not found.worst_posterior <= AGREEMENT_TOLERANCE:  # NaN is no agreement either
        raise QualityGateError(
            f"PyTorch and ONNX disagree, tolerance {AGREEMENT_TOLERANCE:.0e}: {found.describe()}"
        )
    return found.describe()


def ways_of(tried: Candidates) -> Ways:
    """Candidates that read and write files, for graphs in memory."""

    def ways(
        graph: onnx.ModelProto, calibration: Sequence[Waveform]
    ) -> Iterator[tuple[str, onnx.ModelProto]]:
        with as_file(graph) as path:
            for how, quantized in tried(path, path.parent, calibration):
                yield how, onnx.load(quantized)

    return ways
