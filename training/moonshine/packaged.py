"""A Moonshine as packages carry it (ONNX or ORT files in INT8) -> a folder as `transformers` stores it.

    python -m training.moonshine.packaged ENCODER DECODER --tokenizer tokenizer.json --out FOLDER
        [--mean-with FOLDER]

For who reaches a package index and no model hub: wheels of ``moonshine-voice`` up to 0.1.0 hold
``encoder_model.ort`` and ``decoder_model_merged.ort`` of the English tiny network, packages of
``@moonshine-ai/moonshine-js`` on npm the same as ``.onnx``; ``tokenizer.json`` is in the wheel of
``useful-moonshine-onnx``. Weights that were rounded to 8 bits come back as what they were rounded to. The two
packages rounded different ones of a training's last weights, so their mean errs less than either.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper

from training.errors import CheckpointError, in_one_line
from training.moonshine.model import Shape

Arrays = dict[str, npt.NDArray[Any]]
PRODUCTS = frozenset({"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
QUANTIZED = "_quantized"
COPY = re.compile(r"_merged_\d+$")
"""What the two halves of a merged decoder add to a name."""
OLD_NAMES = ((".dense.", ".o_proj."), (".up_proj.", ".fc1."), (".down_proj.", ".fc2."))
"""Parts of names of the first exports, and what they were called later."""
EMBEDDING = "model.decoder.embed_tokens.weight"


def read_model(path: Path) -> onnx.ModelProto:
    """An ONNX file, or one in ONNX Runtime's own format. Raises CheckpointError."""
    try:
        if path.suffix != ".ort":
            return onnx.load(path)
        with tempfile.TemporaryDirectory(prefix="asr-graph-") as scratch:
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.optimized_model_filepath = f"{scratch}/graph.onnx"
            options.add_session_config_entry("session.save_model_format", "ONNX")
            ort.InferenceSession(str(path), options)
            return onnx.load(options.optimized_model_filepath)
    except Exception as error:
        raise CheckpointError(f"{path}: no graph can be read: {str(error).splitlines()[0]}") from error


def weights_of(graph: onnx.GraphProto, outer: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
    """Names that nodes have in the network, and float32 weights as `transformers` lays them out."""
    own: Arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    known: Arrays = {**(outer or {}), **own}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from weights_of(attribute.g, known)
        place = node.name.lstrip("/").replace("/", ".")
        if node.op_type in PRODUCTS:
            for source in node.input:
                if source.endswith(QUANTIZED) and source in known:
                    name = source.removesuffix(QUANTIZED)
                    yield f"{place.split('.MatMul')[0]}.weight", _exact(known, name).T
        elif place.startswith("groupnorm.") and node.op_type in ("Mul", "Add"):
            found = [known[source] for source in node.input if source in known]
            if found:
                yield f"groupnorm.{'weight' if node.op_type == 'Mul' else 'bias'}", found[0].reshape(-1)
    for name, values in own.items():
        plain = COPY.sub("", name.removesuffix(QUANTIZED))
        if re.fullmatch(r"conv\d\.weight", plain):  # they are added to, not taken from, their zero
            if name.endswith(QUANTIZED):
                scale, zero = own[f"{plain}_scale"], own[f"{plain}_zero_point"]
                values = values.astype(np.float32) * scale + zero
            yield plain, values
        elif plain.endswith("embed_tokens.weight") and values.ndim == 2:
            yield plain, _exact(own, name.removesuffix(QUANTIZED)) if name.endswith(QUANTIZED) else values
        elif values.dtype == np.float32 and re.search(r"norm\.weight$|\w\.bias$", plain):
            yield plain, values


def _exact(known: Mapping[str, Any], name: str) -> npt.NDArray[np.float32]:
    """What bytes stand for."""
    whole = known[f"{name}{QUANTIZED}"].astype(np.float32) - known[f"{name}_zero_point"].astype(np.float32)
    found: npt.NDArray[np.float32] = (whole * known[f"{name}_scale"]).astype(np.float32)
    return found


def state_of(encoder: onnx.ModelProto, decoder: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """Weights under the names of `transformers`."""
    found: Arrays = {f"model.encoder.{name}": values for name, values in weights_of(encoder.graph)}
    found |= {name.replace("model.decoder.model.", "model."): v for name, v in weights_of(decoder.graph)}
    state = {}
    for name, values in found.items():
        for old, new in OLD_NAMES:
            name = name.replace(old, new)
        if name.startswith("model."):
            state[name] = torch.from_numpy(np.array(values, np.float32))
    if EMBEDDING not in state and "proj_out.weight" in found:
        state[EMBEDDING] = torch.from_numpy(np.array(found["proj_out.weight"], np.float32))
    return state


def config_of(state: Mapping[str, torch.Tensor], decoder: onnx.ModelProto) -> Any:
    """A `transformers.MoonshineConfig`. Raises CheckpointError where weights are missing."""
    from transformers import MoonshineConfig

    heads = [
        each.type.tensor_type.shape.dim[1].dim_value
        for each in decoder.graph.input
        if each.name.endswith(".decoder.key")
    ]
    try:
        vocabulary, width = state[EMBEDDING].shape
        inner = len(state["model.encoder.layers.0.mlp.fc1.weight"])
        layers = {
            side: len({name.split(".")[3] for name in state if name.startswith(f"model.{side}.layers.")})
            for side in ("encoder", "decoder")
        }
        turned = (Shape.turned + 0.5) / (width // heads[0])
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"no Moonshine: {error} is missing") from error
    return MoonshineConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        encoder_num_hidden_layers=layers["encoder"],
        decoder_num_hidden_layers=layers["decoder"],
        encoder_num_attention_heads=heads[0],
        decoder_num_attention_heads=heads[0],
        max_position_embeddings=Shape.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": turned},
    )


def unpack(encoder: Path, decoder: Path) -> Any:
    """A `transformers.MoonshineForConditionalGeneration`. Raises CheckpointError."""
    from transformers import MoonshineForConditionalGeneration

    speaking = read_model(decoder)
    state = state_of(read_model(encoder), speaking)
    network = MoonshineForConditionalGeneration(config_of(state, speaking))
    try:
        found = network.load_state_dict(state | {"proj_out.weight": state[EMBEDDING]}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{encoder}, {decoder}: {error}") from error
    if wrong := [*found.missing_keys, *found.unexpected_keys]:
        raise CheckpointError(f"{encoder}, {decoder}: {wrong[0]} is missing or unknown ({len(wrong)} in all)")
    return network


@in_one_line("packaged")
def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", type=Path)
    parser.add_argument("decoder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--mean-with", type=Path, help="another that was unpacked: half of each")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    network = unpack(arguments.encoder, arguments.decoder)
    if arguments.mean_with:
        from transformers import MoonshineForConditionalGeneration

        other = MoonshineForConditionalGeneration.from_pretrained(arguments.mean_with)
        with torch.no_grad():
            for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)
    network.save_pretrained(arguments.out)
    shutil.copy(arguments.tokenizer, arguments.out / "tokenizer.json")
    print(f"{arguments.out}: {sum(parameter.numel() for parameter in network.parameters()):,} weights")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
