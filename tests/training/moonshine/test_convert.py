"""A published Moonshine as a bundle, as it is: `python -m training.convert moonshine`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from api.bundle import load_bundle, verify_bundle
from api.decoding import decode
from api.engine import Engine
from api.manifest import Source
from tests.training.networks import chirps, write_corpus
from training import convert
from training.bundle_writer import Card
from training.dynamic_int8 import graphs_of
from training.errors import QualityGateError
from training.exported import Exported
from training.moonshine import publish as moonshine_publish
from training.moonshine.checkpoint import Published
from training.moonshine.model import FRAME_STRIDE_S, MIN_SAMPLES
from training.publish import Recordings, publish
from training.quantize import Gate

CARD = Card("A random network", ("en",), Source(title="tests", url=""), "MIT")
GATE = Gate(min_speed=0.0, max_wer_increase=9.0)


def arguments(folder: Path, models_dir: Path) -> list[str]:
    given = ["moonshine", str(folder / "model.safetensors"), "--name", "en-random", "--language", "en"]
    return [*given, "--models-dir", str(models_dir)]


def test_it_becomes_a_bundle_in_float32(base: Path, published: Published, tmp_path: Path) -> None:
    """Which says what the network says, in its engine."""
    assert convert.main(arguments(base, tmp_path)) == 0
    bundle = verify_bundle(tmp_path, "en-random")
    manifest = bundle.manifest
    assert manifest.graphs.keys() == {"float32"}
    assert manifest.decoder
    assert (manifest.max_window_s, manifest.frame_stride_s) == (30.0, FRAME_STRIDE_S)
    assert manifest.text_normalisation == ("nfc",), "it writes capitals"
    assert bundle.vocabulary == published.tokens.vocabulary()
    engine, clips = Engine(bundle, threads=1), chirps(3)
    for clip, found in zip(clips, engine.run(clips, alone=False), strict=True):
        with torch.inference_mode():
            steps, count, frames = published.network.generate(
                torch.from_numpy(clip)[None], torch.tensor([len(clip)])
            )
        wanted = steps[0, : int(count)].argmax(-1).tolist()
        said = decode(found, bundle, 0)
        assert said.token_ids.tolist() == wanted
        assert len(found.whole()) == int(frames)
        assert bundle.vocabulary.decode(wanted)
    shortest = np.zeros(MIN_SAMPLES, np.float32)
    (nothing,) = engine.run([shortest], alone=True)
    assert decode(nothing, bundle, 0).token_ids.tolist() == []


def test_four_bits_want_recordings(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main([*arguments(base, tmp_path), "--four-bits"]) == 2
    assert "--four-bits needs --calibration" in capsys.readouterr().err
    assert not (tmp_path / "en-random").exists()


def test_with_recordings_it_becomes_a_bundle_in_int8(base: Path, tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, chirps(3))
    made = convert.from_moonshine(base / "model.safetensors")
    bundle = publish(made, "en-random", tmp_path / "models", CARD, Recordings(manifest, manifest), gate=GATE)
    assert bundle.manifest.default_graph == "int8"
    assert bundle.graph_path().stat().st_size < 0.7 * len(made.graph.SerializeToString())
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(bundle.graph_path()).graph.initializer}
    assert kinds["encoder.conv2.weight"] == kinds["encoder.conv3.weight"] == TensorProto.FLOAT
    assert "encoder.layers.0.fc1.weight" not in kinds, "it is in bytes"
    (served,) = Engine(bundle).run(chirps(1), alone=True)
    assert served.whole().shape[1] == bundle.manifest.vocabulary.size


def test_making_four_bits_leaves_the_network_as_it_is(published: Published) -> None:
    before = {name: value.clone() for name, value in published.network.state_dict().items()}
    ((_, graph),) = moonshine_publish.in_four_bits(published.network, chirps(1))
    assert "MatMulNBits" in {node.op_type for node in graph.graph.node}
    given = {name for inner in graphs_of(graph.graph) for node in inner.node for name in node.input}
    assert "decoder.embed_scale" in given, "columns were made alike first"
    after = published.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_with_recordings_it_becomes_a_bundle_in_four_bits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, told what it writes itself; the gate asks for no speed, which tiny networks lack."""
    taken: list[Exported] = []

    def kept(made: Exported, *told: object, keep_float: bool) -> object:
        taken.append(made)
        return publish(made, *told, keep_float=keep_float, gate=GATE)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "publish", kept)
    manifest = write_corpus(tmp_path, chirps(2))
    given = [*arguments(base, tmp_path / "models"), "--four-bits", "--calibration", str(manifest)]
    assert convert.main(given) == 0
    assert [made.form for made in taken] == ["int4"]
    bundle = load_bundle(tmp_path / "models", "en-random")
    assert bundle.manifest.graphs.keys() == {"float32", "int4"}
    assert bundle.manifest.default_graph == "int4"
    assert bundle.graph_path().stat().st_size < 0.4 * len(taken[0].graph.SerializeToString())
    (served,) = Engine(bundle).run(chirps(1), alone=True)
    assert served.whole().shape[1] == bundle.manifest.vocabulary.size


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_what_is_missing_beside_the_weights_is_said(
    base: Path, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / missing).unlink()
    assert convert.main(arguments(folder, tmp_path / "models")) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"convert: {missing} is missing beside the weights"
    assert not (tmp_path / "models").exists()


def test_weights_of_another_name_are_not_taken_for_those_of_the_folder(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    given = [
        str(folder / "other.safetensors") if word.endswith("model.safetensors") else word
        for word in arguments(folder, tmp_path / "models")
    ]
    assert convert.main(given) == 2
    assert "other.safetensors: expected model.safetensors" in capsys.readouterr().err


def test_a_configuration_of_another_network_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`transformers` would fill a third layer with random numbers."""
    folder = shutil.copytree(base, tmp_path / "base")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"decoder_num_hidden_layers": 3}))
    assert convert.main(arguments(folder, tmp_path / "models")) == 2
    assert "its weights lack model.decoder.layers.2" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(described | {"model_type": "whisper"}))
    assert convert.main(arguments(folder, tmp_path / "models")) == 2
    assert "model_type 'whisper', expected 'moonshine'" in capsys.readouterr().err


def test_a_graph_that_says_something_else_is_refused(published: Published) -> None:
    made = moonshine_publish.exported_published(published.network, published.tokens)
    assert "same best token in 100.00%" in made.agreement(chirps(2))
    for tensor in made.graph.graph.initializer:
        if tensor.name == "encoder.groupnorm.bias":
            tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) + 0.5).tobytes()
    with pytest.raises(QualityGateError, match="PyTorch and ONNX disagree"):
        made.agreement(chirps(2))
