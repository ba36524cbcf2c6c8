"""NeMo archives: a small one built here in NeMo's layout, every way one can be wrong, and the real one."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.training.archives import stored, write_archive
from tests.training.networks import CONFIGS, random_network
from training.calibration import manifest_waveforms, shared_folder
from training.config import load_config
from training.errors import ConfigError
from training.evaluate import Utterance, error_rates
from training.frontend import FrontendConfig, LogMel, mel_filters
from training.nemo import read_nemo
from training.nemo_archive import NemoError
from training.nemo_import import as_checkpoint, bundle_vocabulary
from training.recipes.quartznet_ctc.model import QuartzNet
from training.recipes.quartznet_ctc.recipe import QuartzNetRecipe

LETTERS = [" ", "a", "b", "c", "d"]


def nemo_config(model: QuartzNet) -> dict[str, Any]:
    """model_config.yaml of `model`, as NeMo writes it."""
    blocks = [
        {
            "filters": block.filters,
            "repeat": block.repeat,
            "kernel": [block.kernel],
            "stride": [block.stride],
            "dilation": [block.dilation],
            "dropout": block.dropout,
            "residual": block.residual,
            "separable": block.separable,
            "se": block.squeeze_excitation,
            "stride_last": block.stride_last,
        }
        for block in model.config.blocks
    ]
    return {
        "sample_rate": 16_000,
        "preprocessor": {
            "normalize": "per_feature",
            "window_size": 0.02,
            "window_stride": 0.01,
            "window": "hann",
            "features": 64,
            "n_fft": 512,
        },
        "encoder": {"feat_in": 64, "activation": "relu", "jasper": blocks},
        "decoder": {"feat_in": 32, "num_classes": 5, "vocabulary": LETTERS},
    }


def nemo_state(model: QuartzNet) -> dict[str, torch.Tensor]:
    """The weights under NeMo's names: modules of a block numbered in one list, ReLU and dropout included."""
    state = {"preprocessor.featurizer.fb": torch.tensor(mel_filters(FrontendConfig()))[None].float()}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "head":
            state[f"decoder.decoder_layers.0.{parts[1]}"] = value
            continue
        index, kind = int(parts[1]), parts[2]
        block = model.config.blocks[index]
        layers = ["depthwise", "pointwise", "norm"] if block.separable else ["pointwise", "norm"]
        if kind == "layers":
            position = int(parts[3]) * (len(layers) + 2) + layers.index(parts[4])
            middle = "" if parts[4] == "norm" else "conv."
            state[f"encoder.encoder.{index}.mconv.{position}.{middle}{parts[5]}"] = value
        elif kind == "residual":
            middle = "0.1." if parts[3] == "norm" else "0.0.conv."
            state[f"encoder.encoder.{index}.res.{middle}{parts[4]}"] = value
        else:
            position = block.repeat * (len(layers) + 2) - 2
            layer = {"reduce": 0, "expand": 2}[parts[3]]
            state[f"encoder.encoder.{index}.mconv.{position}.fc.{layer}.weight"] = value
    return state


def archive_of(path: Path, model: QuartzNet, config: dict[str, Any] | None = None) -> Path:
    members = {
        "model_config.yaml": yaml.safe_dump(config or nemo_config(model)).encode(),
        "model_weights.ckpt": stored(nemo_state(model)),
    }
    return write_archive(path, members)


@pytest.mark.parametrize("name", ["quartznet", "citrinet"])
def test_weights_arrive_where_they_belong(tmp_path: Path, name: str) -> None:
    model = random_network(CONFIGS[name])
    found = read_nemo(archive_of(tmp_path / "model.nemo", model))
    assert found.vocabulary == tuple(LETTERS)
    assert found.blank_id == 5
    features, lengths = torch.randn(2, 64, 50), torch.tensor([50, 33])
    with torch.inference_mode():
        torch.testing.assert_close(
            found.model(features, lengths).log_probs, model(features, lengths).log_probs
        )


def test_the_bundle_vocabulary_marks_space_and_blank(tmp_path: Path) -> None:
    found = read_nemo(archive_of(tmp_path / "model.nemo", random_network(CONFIGS["quartznet"])))
    assert as_checkpoint(found).vocabulary.tokens == ("\u2581", "a", "b", "c", "d", "<blank>")


@pytest.mark.parametrize(
    "pieces",
    [["<unk>", "the", "##re", "a", "##s"], ["<unk>", "\u2581the", "re", "\u2581a", "s"]],
    ids=["older archives", "newer archives"],
)
def test_word_pieces_become_words(tmp_path: Path, pieces: list[str]) -> None:
    model = random_network(CONFIGS["quartznet"])
    config = nemo_config(model)
    config["decoder"]["vocabulary"] = pieces
    vocabulary = as_checkpoint(read_nemo(archive_of(tmp_path / "model.nemo", model, config))).vocabulary
    assert vocabulary.decode([1, 2, 0, 3, 4, 1]) == "there as the"
    assert vocabulary.kind == "wordpiece"


@pytest.mark.parametrize("first", [["[PAD]", "[UNK]", "##a"], ["<s>", "<unk>", "\u2581", "a"]])
def test_control_tokens_stand_for_no_text(first: list[str]) -> None:
    vocabulary = bundle_vocabulary([*first, "<"])
    assert vocabulary.special_ids == {0, 1}
    assert vocabulary.decode(range(len(first) + 1)).replace(" ", "") == "a<"


def test_tokens_that_are_bytes_are_refused() -> None:
    with pytest.raises(NemoError, match="<0x0A>"):
        bundle_vocabulary(["<unk>", "<0x0A>", "\u2581a"])


def test_half_precision_is_read(tmp_path: Path) -> None:
    model = random_network(CONFIGS["quartznet"])
    half = {name: value.half() for name, value in nemo_state(model).items() if "fb" not in name}
    config = yaml.safe_dump(nemo_config(model)).encode()
    path = write_archive(
        tmp_path / "half.nemo", {"model_config.yaml": config, "model_weights.ckpt": stored(half)}
    )
    assert read_nemo(path).model.head.weight.dtype == torch.float32


class Harmful:
    """What a hostile checkpoint would run when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [stored, pickle.dumps])
def test_nothing_in_the_checkpoint_is_executed(tmp_path: Path, save: Any) -> None:
    trace = tmp_path / "executed"
    config = yaml.safe_dump(nemo_config(random_network(CONFIGS["quartznet"]))).encode()
    members = {"model_config.yaml": config, "model_weights.ckpt": save({"weight": Harmful(trace)})}
    with pytest.raises(NemoError, match="not tensors only"):
        read_nemo(write_archive(tmp_path / "harmful.nemo", members))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("section", "name", "value", "problem"),
    [
        ("preprocessor", "normalize", "all_features", "preprocessor.normalize"),
        ("preprocessor", "window_size", 0.015, "preprocessor.window_size: 240"),
        ("preprocessor", "_target_", "nemo.modules.AudioToMFCCPreprocessor", "preprocessor._target_"),
        ("preprocessor", "n_window_size", 401, "preprocessor.window_size: 401"),
        ("preprocessor", "log", False, "preprocessor.log"),
        ("preprocessor", "mag_power", 1.0, "preprocessor.mag_power"),
        ("preprocessor", "window_stride", "short", "model_config.yaml: could not convert"),
        ("encoder", "jasper", [{"filters": 16}], "model_config.yaml: 'kernel' is missing"),
        ("encoder", "jasper", [None], "model_config.yaml"),
        ("encoder", "jasper", [{"filters": 16, "kernel": [3], "residual_mode": "max"}], "residual_mode"),
        ("encoder", "activation", "selu", "encoder.activation"),
        ("encoder", "jasper", [], "encoder.jasper"),
        ("decoder", "vocabulary", [1, 2], "decoder.vocabulary"),
        ("decoder", "vocabulary", ["a", "b"], "head.weight has shape"),
    ],
)
def test_what_is_not_known_is_named(
    tmp_path: Path, section: str, name: str, value: object, problem: str
) -> None:
    model = random_network(CONFIGS["quartznet"])
    config = nemo_config(model)
    config[section][name] = value
    with pytest.raises(NemoError, match=problem):
        read_nemo(archive_of(tmp_path / "model.nemo", model, config))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = random_network(CONFIGS["quartznet"])
    state = nemo_state(model)
    del state["encoder.encoder.1.res.0.0.conv.weight"]
    config = yaml.safe_dump(nemo_config(model)).encode()
    path = write_archive(
        tmp_path / "a.nemo", {"model_config.yaml": config, "model_weights.ckpt": stored(state)}
    )
    with pytest.raises(NemoError, match=r"blocks\.1\.residual\.pointwise\.weight is missing"):
        read_nemo(path)


def test_other_mel_filters_are_refused(tmp_path: Path) -> None:
    model = random_network(CONFIGS["quartznet"])
    state = nemo_state(model)
    state["preprocessor.featurizer.fb"] = state["preprocessor.featurizer.fb"] * 2
    config = yaml.safe_dump(nemo_config(model)).encode()
    path = write_archive(
        tmp_path / "a.nemo", {"model_config.yaml": config, "model_weights.ckpt": stored(state)}
    )
    with pytest.raises(NemoError, match="mel filters"):
        read_nemo(path)


def test_a_damaged_download_is_refused(tmp_path: Path) -> None:
    whole = archive_of(tmp_path / "a.nemo", random_network(CONFIGS["quartznet"])).read_bytes()
    (tmp_path / "cut.nemo").write_bytes(whole[:-20_000])
    (tmp_path / "packed.nemo").write_bytes(gzip.compress(whole)[:-2_000])
    for path in (tmp_path / "cut.nemo", tmp_path / "packed.nemo", tmp_path):
        with pytest.raises(NemoError, match="not a NeMo archive") as caught:
            read_nemo(path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_transfer_states_the_archives_stride_and_rate(tmp_path: Path) -> None:
    config = load_config(_transfer(tmp_path))
    recipe = QuartzNetRecipe(config)
    assert recipe.network(recipe.codec()) is not None
    other = QuartzNetRecipe(load_config(_transfer(tmp_path), ["model.frame_stride_s=0.04"]))
    with pytest.raises(ConfigError, match=r"frame_stride_s: 0\.04, the archive gives a frame every 0\.02 s"):
        other.network(other.codec())
    model = random_network(CONFIGS["quartznet"])
    slow = nemo_config(model)
    slow["preprocessor"] |= {"sample_rate": 8_000, "window_stride": 0.01, "window_size": 0.02}
    state = {name: value for name, value in nemo_state(model).items() if not name.endswith("fb")}
    members = {"model_config.yaml": yaml.safe_dump(slow).encode(), "model_weights.ckpt": stored(state)}
    write_archive(tmp_path / "model.nemo", members)
    with pytest.raises(ConfigError, match="hears 8000 Hz, recordings are read at 16000 Hz"):
        recipe.network(recipe.codec())


def _transfer(folder: Path) -> Path:
    archive_of(folder / "model.nemo", random_network(CONFIGS["quartznet"]))
    path = folder / "config.yaml"
    path.write_text(
        "name: ru\nlanguage: ru\ndata: {manifest: m.jsonl}\nmodel: {transfer_from: model.nemo}\n"
        "bundle: {licence: MIT}\n"
    )
    return path


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.nemo"
    path.write_text("not a tar", encoding="utf-8")
    with pytest.raises(NemoError, match="not a NeMo archive") as caught:
        read_nemo(path)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(NemoError, match=r"model_config\.yaml is missing"):
        read_nemo(write_archive(tmp_path / "empty.nemo", {"readme.txt": b"x"}))


@pytest.mark.slow
def test_the_real_archive_transcribes_read_speech() -> None:
    """QuartzNet15x5 on a tenth of the hard read set: at most 15 % word error rate, greedy."""
    archive = shared_folder() / "models" / "quartznet15x5_en.nemo"
    manifest = shared_folder() / "speech" / "test" / "manifest.jsonl"
    if not archive.is_file() or not manifest.is_file():
        pytest.skip(f"{shared_folder()} is not here; set ASR_SHARED_DIR")
    found = read_nemo(archive)
    assert found.model.parameter_count() == pytest.approx(18.9e6, rel=0.01)
    checkpoint, frontend = as_checkpoint(found), LogMel(found.frontend)
    heard = []
    for clip, text in manifest_waveforms(manifest, 16_000, 12, with_text=True, source="libriother"):
        with torch.inference_mode():
            output = found.model(*frontend(torch.from_numpy(clip)[None], torch.tensor([len(clip)])))
        best = torch.unique_consecutive(output.log_probs[0].argmax(-1)).tolist()
        heard.append(Utterance(text, checkpoint.vocabulary.decode(i for i in best if i != found.blank_id)))
    assert error_rates(heard).wer <= 0.15
