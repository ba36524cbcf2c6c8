"""Weights out of files as packages carry them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import MoonshineConfig, MoonshineForConditionalGeneration

from training.moonshine import packaged
from training.moonshine.packaged import unpack

WIDTH, HEADS = 64, 2


@pytest.fixture(scope="module")
def published() -> Any:
    """A random network."""
    torch.manual_seed(0)
    config = MoonshineConfig(
        vocab_size=90,
        hidden_size=WIDTH,
        intermediate_size=96,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=HEADS,
        decoder_num_attention_heads=HEADS,
    )
    network = MoonshineForConditionalGeneration(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return network


class Graph:
    """Nodes and constants, named as the exporter of these packages names them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, values: Any) -> str:
        """Its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def rounded(self, name: str, values: np.ndarray, *, added: bool = False) -> str:
        """In 8 bits; `added`: bytes are multiplied, then the float zero is added."""
        low, high = float(values.min()), float(values.max())
        scale = np.float32((high - low) / 255)
        zero = np.float32(low) if added else np.uint8(np.clip(round(-low / scale), 0, 255))
        whole = np.round((values - low) / scale) if added else np.round(values / scale) + float(zero)
        self.constant(f"{name}_scale", scale)
        self.constant(f"{name}_zero_point", zero)
        return self.constant(f"{name}_quantized", np.clip(whole, 0, 255).astype(np.uint8))

    def weights(self, state: dict[str, np.ndarray], prefix: str, *, suffix: str = "") -> None:
        """Every tensor of one side of a network."""
        for number, (full, values) in enumerate(sorted(state.items())):
            name = full.removeprefix(prefix)
            place = name.removesuffix(".weight")
            if name.startswith("groupnorm."):
                kind = "Mul" if name.endswith("weight") else "Add"
                source = self.constant(f"onnx::{kind}_{number}", values[:, None])
                self.nodes.append(helper.make_node(kind, ["x", source], [name], name=f"/groupnorm/{kind}"))
            elif name.startswith("conv") and values.ndim == 3:
                self.rounded(name, values, added=True)
            elif values.ndim == 2 and "embed_tokens" not in name:
                source = self.rounded(f"onnx::MatMul_{number}{suffix}", values.T)
                path = "/" + place.replace(".", "/").replace("layers/", "layers.")
                node = helper.make_node("MatMulInteger", ["x", source], [name], name=f"{path}/MatMul_quant")
                self.nodes.append(node)
            elif values.ndim == 2:
                self.rounded(f"{name}{suffix}", values)
            else:
                self.constant(f"{name}{suffix}", values)

    def graph(self, name: str) -> onnx.GraphProto:
        """What was collected."""
        return helper.make_graph(self.nodes, name, [], [], self.constants)


@pytest.fixture
def files(published: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Encoder, and a decoder whose weights are in both branches of a choice."""
    state = {name: value.numpy() for name, value in published.state_dict().items()}
    encoder, inner = Graph(), Graph()
    sides: dict[str, dict[str, np.ndarray]] = {"encoder": {}, "decoder": {}}
    for name, value in state.items():
        if name != "proj_out.weight":
            sides[name.split(".")[1]][name] = value
    encoder.weights(sides["encoder"], "model.encoder.")
    inner.weights(sides["decoder"], "", suffix="_merged_0")
    choice = helper.make_node(
        "If",
        ["use_cache_branch"],
        [],
        name="choice",
        then_branch=inner.graph("then"),
        else_branch=inner.graph("else"),
    )
    past = [
        helper.make_tensor_value_info(
            f"past_key_values.{layer}.decoder.key", TensorProto.FLOAT, ["b", HEADS, "n", WIDTH // HEADS]
        )
        for layer in range(2)
    ]
    paths = tmp_path / "encoder.onnx", tmp_path / "decoder.onnx"
    onnx.save(helper.make_model(encoder.graph("encoder")), paths[0])
    onnx.save(helper.make_model(helper.make_graph([choice], "decoder", past, [])), paths[1])
    return paths


def test_weights_come_back_as_what_they_were_rounded_to(published: Any, files: tuple[Path, Path]) -> None:
    found = unpack(*files)
    assert found.config.encoder_num_attention_heads == HEADS
    assert found.config.decoder_num_hidden_layers == 2
    wanted = published.state_dict()
    for name, value in found.state_dict().items():
        step = float(wanted[name].max() - wanted[name].min()) / 255
        torch.testing.assert_close(value, wanted[name], atol=step, rtol=0, msg=name)
        if value.ndim == 1:
            assert torch.equal(value, wanted[name]), name


def test_a_folder_is_written_and_the_mean_of_two(files: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")
    given = [str(files[0]), str(files[1]), "--tokenizer", str(tokenizer)]
    assert packaged.main([*given, "--out", str(tmp_path / "one")]) == 0
    mean = [*given, "--mean-with", str(tmp_path / "one"), "--out", str(tmp_path / "mean")]
    assert packaged.main(mean) == 0
    assert (tmp_path / "mean" / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    one, both = (
        MoonshineForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "mean")
    )
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, msg=name)


def test_what_is_no_moonshine_is_a_message(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.ort"
    broken.write_bytes(b"nothing")
    out = ["--tokenizer", str(broken), "--out", str(tmp_path / "out")]
    assert packaged.main([str(broken), str(files[1]), *out]) == 2
    assert f"{broken}: no graph can be read" in capsys.readouterr().err
    assert packaged.main([str(files[0]), str(files[0]), *out]) == 2
    assert "no Moonshine" in capsys.readouterr().err
