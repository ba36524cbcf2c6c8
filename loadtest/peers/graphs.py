"""The peers' graphs: the network as PyTorch's exporter writes it, and our INT8 trunk in sherpa-onnx's form.

    python -m loadtest.peers.graphs ARCHIVE.nemo BUNDLE OUT

Runs in a process of its own: the servers under test never import torch.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from api.bundle import load_bundle
from training.frontend import LogMel
from training.nemo import NemoModel, read_nemo

EXPORTED = "exported.onnx"
SHERPA_INT8 = "sherpa.int8.onnx"
SHERPA_TOKENS = "tokens.txt"
FEATURES, COUNTS = "frontend.features", "frontend.frame_counts"
OPSET = 17


class _Whole(nn.Module):
    """Front end and network in a row, as a person who deploys a checkpoint writes it."""

    def __init__(self, found: NemoModel, frontend: nn.Module) -> None:
        super().__init__()
        self.frontend, self.network = frontend, found.model

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, counts = self.frontend(waveform, lengths)
        output = self.network(features, counts)
        return output.log_probs, output.lengths


class _TracedLogMel(LogMel):
    """Windows in a form that torch.onnx.export knows for any length."""

    def windows(self, padded: Tensor, frames: int) -> Tensor:
        starts = torch.arange(frames) * self.config.hop_samples
        return padded[:, starts[:, None] + torch.arange(2 * self.config.half_window)]


def export_as_pytorch(found: NemoModel, path: Path) -> None:
    """torch.onnx.export with dynamic axes and no rewriting: every convolution stays a Conv1d."""
    whole = _Whole(found, _TracedLogMel(found.frontend)).eval()
    example = (torch.zeros(1, 5 * 16000), torch.tensor([5 * 16000]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole,
            example,
            str(path),
            input_names=["waveform", "lengths"],
            output_names=["log_probs", "frame_lengths"],
            dynamic_axes={
                "waveform": {0: "batch", 1: "samples"},
                "lengths": {0: "batch"},
                "log_probs": {0: "batch", 1: "frames"},
                "frame_lengths": {0: "batch"},
            },
            opset_version=OPSET,
            dynamo=False,
        )


def cut_for_sherpa(graph: Path, path: Path, vocabulary_size: int) -> None:
    """The bundle's own nodes behind the front end, with the metadata that sherpa-onnx reads."""
    model = onnx.load(str(graph))
    front = {node.name for node in model.graph.node if node.name.startswith("frontend.")}
    nodes = [node for node in model.graph.node if node.name not in front]
    used = {name for node in nodes for name in node.input}
    kept = [constant for constant in model.graph.initializer if constant.name in used]
    inputs = [
        helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, ["batch", 64, "frames"]),
        helper.make_tensor_value_info(COUNTS, onnx.TensorProto.INT64, ["batch"]),
    ]
    trunk = helper.make_graph(nodes, "trunk", inputs, list(model.graph.output), kept)
    cut = helper.make_model(trunk, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    metadata = {
        "model_type": "EncDecCTCModel",
        "normalize_type": "per_feature",
        "subsampling_factor": "2",
        "vocab_size": str(vocabulary_size),
        "version": "1",
    }
    helper.set_model_props(cut, metadata)
    onnx.checker.check_model(cut)
    onnx.save(cut, str(path))


def build(archive: Path, bundle_folder: Path, out: Path) -> None:
    """Write all peers' files to `out`, unless they are there."""
    out.mkdir(parents=True, exist_ok=True)
    bundle = load_bundle(bundle_folder.parent, bundle_folder.name)
    if not (out / EXPORTED).is_file():
        export_as_pytorch(read_nemo(archive), out / EXPORTED)
    tokens = bundle.vocabulary.tokens
    cut_for_sherpa(bundle.graph_path("int8"), out / SHERPA_INT8, len(tokens))
    lines = [
        f"{'<blk>' if number == bundle.manifest.blank_id else token} {number}"
        for number, token in enumerate(tokens)
    ]
    (out / SHERPA_TOKENS).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
