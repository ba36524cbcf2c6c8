"""A bundle is data from outside: every lie in it is refused, naming bundle, field, value and expectation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from api.bundle import list_bundles, load_bundle, sha256_of, verify_bundle
from api.decoding import in_words
from api.engine import Engine
from api.errors import BundleError
from api.kernels import Kernels, instructions
from api.manifest import GraphChoice
from tests.tiny_bundle import TOKENS, add_language_model, make_bundle
from training.bundle_writer import add_graph_without_vnni
from training.ngram import character_ngrams

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A models folder with one good bundle, `tiny`."""
    make_bundle(tmp_path, "tiny")
    return tmp_path


def change_manifest(models: Path, change: Change) -> None:
    path = models / "tiny" / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def refused(
    models: Path, name: str = "tiny", load: Callable[[Path, str], object] = load_bundle
) -> BundleError:
    with pytest.raises(BundleError) as caught:
        load(models, name)
    return caught.value


def test_a_good_bundle_loads_and_verifies(models: Path) -> None:
    bundle = verify_bundle(models, "tiny")
    assert bundle.name == "tiny"
    assert bundle.vocabulary.tokens == TOKENS
    assert bundle.graph_path() == models / "tiny" / "model.onnx"
    assert list_bundles(models) == ["tiny"]
    assert list_bundles(models / "nowhere") == []


def test_a_graph_that_is_not_there_is_refused(models: Path) -> None:
    bundle = load_bundle(models, "tiny")
    with pytest.raises(BundleError, match="expected one of float32"):
        bundle.graph_path("int8")


@pytest.mark.parametrize(
    ("wanted", "kernels", "expected"),
    [
        ("auto", "avx2", "int4"),
        ("auto", "vnni", "float32"),
        ("auto", "onnxruntime", "float32"),
        ("float32", "avx2", "float32"),
        ("int4", "vnni", "int4"),
    ],
)
def test_a_processor_without_vnni_may_have_a_graph_of_its_own(
    models: Path, wanted: GraphChoice, kernels: Kernels, expected: str
) -> None:
    folder = models / "tiny"
    assert load_bundle(models, "tiny").choose_graph("auto", kernels) == "float32", "it has no other"
    content = (folder / "model.onnx").read_bytes()
    bundle = add_graph_without_vnni(models, "tiny", "int4", content)
    assert verify_bundle(models, "tiny").manifest == bundle.manifest
    assert bundle.choose_graph(wanted, kernels) == expected
    graph = Engine(bundle, graph=wanted).graph
    assert graph == bundle.choose_graph(wanted, instructions())
    assert Engine(bundle, graph="auto", kernels=False).graph == "float32"


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../tiny", "a/b", "a\\b", "/etc", "tiny/../tiny", ".hidden", "a\0b", "C:x"]
)
def test_names_cannot_leave_the_models_folder(models: Path, name: str) -> None:
    error = refused(models, name)
    assert error.field == "name"
    assert "plain folder name" in str(error)


def test_an_unknown_name_says_what_there_is(models: Path) -> None:
    assert "bundles in the folder: tiny" in str(refused(models, "other"))


def test_a_folder_behind_a_link_is_refused(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    make_bundle(outside, "linked")
    (models / "linked").symlink_to(outside / "linked")
    assert "leaves the models folder" in str(refused(models, "linked"))


def test_a_file_behind_a_link_is_refused(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "model.onnx"
    (models / "tiny" / "model.onnx").rename(outside)
    (models / "tiny" / "model.onnx").symlink_to(outside)
    assert "leaves the bundle's folder" in str(refused(models))


@pytest.mark.parametrize("file", ["../vocab.txt", "/etc/passwd", "sub/vocab.txt", "..", "a\\b"])
def test_file_names_cannot_leave_the_folder(models: Path, file: str) -> None:
    def change(values: dict[str, Any]) -> None:
        values["files"][file] = "0" * 64

    change_manifest(models, change)
    error = refused(models)
    assert (error.field, error.value) == ("files", file)


@pytest.mark.parametrize("file", ["model.onnx", "vocab.txt"])
def test_a_changed_file_is_refused(models: Path, file: str) -> None:
    path = models / "tiny" / file
    path.write_bytes(path.read_bytes() + b"\n")
    error = refused(models)
    assert error.field == f"files[{file!r}]"
    assert sha256_of(path) in str(error)


def test_a_missing_file_is_refused(models: Path) -> None:
    (models / "tiny" / "vocab.txt").unlink()
    assert "the file is missing" in str(refused(models))


def test_a_file_nobody_vouches_for_is_refused(models: Path) -> None:
    (models / "tiny" / "model.onnx.data").write_bytes(b"x")
    assert refused(models).value == "model.onnx.data"


def test_the_model_card_may_change(models: Path) -> None:
    (models / "tiny" / "README.md").write_text("more", encoding="utf-8")
    assert load_bundle(models, "tiny").name == "tiny"


def put(*path: str, value: object) -> Change:
    """A change that sets a nested field."""

    def change(values: dict[str, Any]) -> None:
        target = values
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (put("vocabulary", "size", value=40), "vocabulary.size", "expected 10"),
        (put("blank_id", value=10), "blank_id", "expected 0 to 9"),
        (put("blank_id", value=1), "vocabulary", "expected '<blank>'"),
        (put("vocabulary", "special_ids", value=[99]), "vocabulary", "special_ids holds 99"),
        (put("name", value="other"), "name", "expected 'tiny'"),
        (put("schema_version", value=2), "schema_version", "1"),
        (put("surprise", value=1), "surprise", "Extra inputs are not permitted"),
        (put("sample_rate_hz", value="16000"), "sample_rate_hz", "valid integer"),
        (put("frame_stride_s", value=0), "frame_stride_s", "greater than 0"),
        (put("languages", value=[]), "languages", "at least 1"),
        (put("languages", value=["english"]), "languages.0", "pattern"),
        (put("default_graph", value="int8"), "default_graph", "expected one of float32"),
        (put("graph_without_vnni", value="int4"), "graph_without_vnni", "expected one of float32"),
        (put("graphs", "float32", "file", value="other.onnx"), "graphs.float32.file", "`files` lists"),
        (put("vocabulary", "file", value="words.txt"), "vocabulary.file", "`files` lists"),
        (put("files", "model.onnx", value="zz"), "files.model.onnx", "pattern"),
        (put("max_window_s", value=0.001), "max_window_s", "greater than or equal to 1"),
        (put("input", "min_samples", value=10**12), "input.min_samples", "as max_window_s"),
    ],
)
def test_each_lie_names_its_field(models: Path, change: Change, field: str, words: str) -> None:
    change_manifest(models, change)
    error = refused(models)
    assert error.bundle == "tiny"
    assert error.field == field
    assert words in error.problem


def test_a_language_model_comes_along(models: Path) -> None:
    add_language_model(models / "tiny", character_ngrams(["abc abd"], 3), beam=24)
    bundle = verify_bundle(models, "tiny")
    assert bundle.guide is not None
    assert (bundle.default_beam, in_words(bundle, 24)) == (24, "beam 24 with language model")
    assert (in_words(bundle, 2), in_words(bundle, 0)) == ("beam 2", "greedy")


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        (put("language_model", "weight", value=0), "language_model.weight", "greater than 0"),
        (put("language_model", "beam", value=0), "language_model.beam", "greater than or equal to 1"),
        (put("language_model", "file", value="other.npz"), "language_model.file", "`files` lists"),
        (put("language_model", "file", value="vocab.txt"), "language_model.file", "pickle"),
        (put("language_model", value=None), "files", "lies in the folder"),
    ],
)
def test_a_language_model_that_lies_is_refused(models: Path, change: Change, field: str, words: str) -> None:
    add_language_model(models / "tiny", character_ngrams(["abc abd"], 3))
    change_manifest(models, change)
    if field == "files":
        change_manifest(models, lambda values: values["files"].pop("ngram.npz"))
    error = refused(models)
    assert error.field == field
    assert words in error.problem


def test_a_damaged_language_model_names_what_is_wrong(models: Path) -> None:
    table = character_ngrams(["abc abd"], 3)
    add_language_model(models / "tiny", table)
    path = models / "tiny" / "ngram.npz"
    arrays = {name: getattr(table, name) for name in table.__dataclass_fields__}
    np.savez(path, **(arrays | {"fail": np.zeros_like(table.fail)}))
    change_manifest(models, put("files", "ngram.npz", value=sha256_of(path)))
    error = refused(models)
    assert error.field == "language_model.file"
    assert "fail: each state but the first" in error.problem


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"name": "tiny"}'])
def test_a_manifest_that_is_none_is_refused(models: Path, content: str) -> None:
    (models / "tiny" / "manifest.json").write_text(content, encoding="utf-8")
    assert refused(models).bundle == "tiny"


def test_a_token_twice_is_refused(models: Path) -> None:
    path = models / "tiny" / "vocab.txt"
    path.write_text(path.read_text(encoding="utf-8").replace("\nb\n", "\na\n"), encoding="utf-8")
    change_manifest(models, put("files", "vocab.txt", value=sha256_of(path)))
    assert refused(models).value == "a"


def change_graph(models: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = models / "tiny" / "model.onnx"
    graph = onnx.load(path)
    change(graph)
    path.write_bytes(graph.SerializeToString())
    change_manifest(models, put("files", "model.onnx", value=sha256_of(path)))


@pytest.mark.parametrize("file", [".weights", "./.weights", "README.md", "model.onnx.data"])
def test_weights_beside_the_graph_need_a_sha256_too(models: Path, file: str) -> None:
    """Dot files and the model card need none, and ONNX Runtime would read them as weights."""
    folder = models / "tiny"

    def move_out(graph: onnx.ModelProto) -> None:
        tensor = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        (folder / file).write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, file)
        tensor.ClearField("raw_data")

    change_graph(models, move_out)
    listed = file == "model.onnx.data"
    if listed:
        change_manifest(models, put("files", file, value=sha256_of(folder / file)))
        assert verify_bundle(models, "tiny").name == "tiny"
    else:
        error = refused(models)
        assert (error.field, error.value) == ("graphs.float32.file", Path(file).name)
        assert "not listed with its sha256" in error.problem


def test_a_vocabulary_larger_than_the_graph_is_refused(models: Path) -> None:
    """Manifest and vocab.txt agree with each other but not with the graph."""
    path = models / "tiny" / "vocab.txt"
    path.write_text(path.read_text(encoding="utf-8") + "z\n", encoding="utf-8")

    def change(values: dict[str, Any]) -> None:
        values["vocabulary"]["size"] = 11
        values["files"]["vocab.txt"] = sha256_of(path)

    change_manifest(models, change)
    load_bundle(models, "tiny")
    error = refused(models, load=verify_bundle)
    assert (error.field, error.value) == ("vocabulary.size", 11)
    assert "expected 10" in error.problem


def test_a_wrong_frame_stride_is_refused(models: Path) -> None:
    change_manifest(models, put("frame_stride_s", value=0.04))
    error = refused(models, load=verify_bundle)
    assert (error.field, error.value) == ("frame_stride_s", 0.04)
    assert "0.0200" in error.problem


def test_a_graph_with_other_inputs_is_refused(models: Path) -> None:
    def rename(graph: onnx.ModelProto) -> None:
        for node in graph.graph.node:
            node.input[:] = ["audio" if name == "waveform" else name for name in node.input]
        next(entry for entry in graph.graph.input if entry.name == "waveform").name = "audio"

    change_graph(models, rename)
    error = refused(models, load=verify_bundle)
    assert error.field == "graphs.float32.inputs"
    assert "waveform" in error.problem


def test_a_graph_that_is_none_is_refused(models: Path) -> None:
    (models / "tiny" / "model.onnx").write_bytes(b"not a graph")
    change_manifest(models, put("files", "model.onnx", value=sha256_of(models / "tiny" / "model.onnx")))
    assert "ONNX Runtime refuses it" in str(refused(models, load=verify_bundle))


def test_outputs_that_are_no_log_probabilities_are_refused(models: Path) -> None:
    def drop_softmax(graph: onnx.ModelProto) -> None:
        for node in graph.graph.node:
            if node.op_type == "LogSoftmax":
                node.op_type = "Identity"
                del node.attribute[:]

    change_graph(models, drop_softmax)
    assert refused(models, load=verify_bundle).field == "graphs.float32.log_probs"
