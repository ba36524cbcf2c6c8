"""An encoder that learns to hear a clip alone as the published one hears it before silence."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.compression.conftest import LANGUAGE
from training.compression import train, unpad
from training.compression.corpus import LabelledCorpus, SoundMaker, padded
from training.compression.label import Large
from training.compression.network import decoder_layers, listen, small_network
from training.compression.unpad import UnpadConfig, Unpadder, metric, silence_after
from training.recipes.whisper_ctc.frontend import WhisperLogMel, own_in_range


def unpadder(base: Path, corpus: LabelledCorpus) -> Unpadder:
    config = UnpadConfig(layers=(0, 1), workers=1, batch_s=8.0, warmup_steps=1, learning_rate=1e-3)
    return Unpadder(config, small_network(Large(str(base), LANGUAGE).network, [0, 1], corpus.cut), corpus)


def test_silence_sounds_as_digital_silence_does() -> None:
    """Zeros behind the samples, and what is put behind the features: the same but for the last frames."""
    frontend, generator = WhisperLogMel(), np.random.default_rng(0)
    samples = [0.1 * generator.standard_normal(count).astype(np.float32) for count in (8_000, 12_000)]
    quiet = 400
    more = [np.concatenate([clip, np.zeros(160 * quiet, np.float32)]) for clip in samples]

    def heard(clip: np.ndarray) -> torch.Tensor:
        log_mel, counts = frontend.log_mel(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
        return own_in_range(log_mel, counts)[0]

    wanted, alone = ([heard(clip) for clip in clips] for clips in (more, samples))
    features = torch.zeros(2, max(map(len, alone)), frontend.bands)
    for row, values in zip(features, alone, strict=True):
        row[: len(values)] = values
    lengths = torch.tensor([len(values) for values in alone])
    found, longer = silence_after(features, lengths, quiet, 3000)
    assert longer.tolist() == [len(values) for values in wanted]
    for row, count, values in zip(found, lengths.tolist(), wanted, strict=True):
        torch.testing.assert_close(row[: count - 2], values[: count - 2])
        torch.testing.assert_close(row[count + 2 : len(values)], values[count + 2 :])
        assert not row[len(values) :].any()


def test_no_more_silence_than_there_are_positions_for() -> None:
    found, longer = silence_after(torch.rand(2, 50, 4), torch.tensor([50, 20]), 40, 70)
    assert longer.tolist() == [70, 60]
    assert found.shape == (2, 70, 4)


def test_an_error_counts_as_much_as_keys_and_values_change(base: Path, corpus: LabelledCorpus) -> None:
    network = small_network(Large(str(base), LANGUAGE).network, [0, 1], corpus.cut)
    torch.manual_seed(0)
    states = torch.randn(4000, 128) @ torch.randn(128, 128)
    factor = metric(network, states)
    different = torch.randn(7, 128)
    shares = [different.square().sum(dim=1) / states.var(dim=0).sum()]
    for layer in decoder_layers(network):
        for projection in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj):
            change = (different @ projection.weight.T).square().sum(dim=1)
            shares.append(change / (states @ projection.weight.T).var(dim=0).sum())
    wanted = torch.stack(shares).mean(dim=0).detach()
    torch.testing.assert_close((different @ factor).square().sum(dim=1), wanted, rtol=1e-3, atol=1e-4)


def test_sounds_need_no_texts(corpus: LabelledCorpus) -> None:
    assert set(corpus.train) < set(corpus.sounds), "one in five of the cache has no text"
    maker = SoundMaker(corpus, 8.0, 3)
    assert {index for row in maker._joined(np.random.default_rng(0)) for index in row} == set(corpus.sounds)
    first, again = (SoundMaker(corpus, 8.0, 3).sound(0) for _ in range(2))
    assert torch.equal(first.features, again.features)
    assert first.audio_s > 0


def test_what_a_clip_alone_gives_comes_nearer(base: Path, corpus: LabelledCorpus) -> None:
    trainer = unpadder(base, corpus)
    before = copy.deepcopy(trainer.network.state_dict())
    errors = [trainer.train_step(trainer.batches(step), 0.0)["error"] for step in range(40)]
    assert np.mean(errors[-8:]) < 0.5 * np.mean(errors[:8])
    for name, value in trainer.network.state_dict().items():
        learned = name.startswith("encoder.") and name != "encoder.embed_positions.weight"
        moved = not torch.equal(value, before[name])
        assert moved <= learned, f"{name}: only the encoder learns"
    features, lengths = padded([corpus.features(corpus.validation[0])])
    with torch.no_grad():
        wanted, _, _ = listen(trainer.published, *silence_after(features, lengths, 800, 3000))
        wanted = wanted[:, : (int(lengths[0]) + 1) // 2]
        found = [listen(each, features, lengths)[0] for each in (trainer.published, trainer.average)]
    before_and_after = [float((states - wanted).square().mean()) for states in found]
    assert before_and_after[1] < 0.7 * before_and_after[0], "of a speaker it never heard"


def test_the_command_goes_on_where_it_stopped_and_train_after_it(
    base: Path, cache: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = ["--cache", str(cache), "--labels", str(labels), "--workers", "1", "--batch-s", "8"]
    ours = [*given, "--base", str(base), "--run", str(run), "--layers", "1"]
    assert unpad.main([*ours, "--steps", "2"]) == 0
    assert unpad.main([*ours[:-2], "--steps", "3"]) == 0
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["counters"][0] == 3
    more = [*given, "--init-from", str(run / "last.pt"), "--run", str(tmp_path / "next"), "--exact"]
    assert train.main([*more, "--steps", "1"]) == 0
    assert json.loads((tmp_path / "next" / "config.json").read_text())["layers"] == [1]
    elsewhere = [*given, "--init-from", str(run / "last.pt"), "--run", str(tmp_path / "other")]
    assert train.main([*elsewhere, "--layers", "0", "--steps", "1"]) == 2
    assert f"--layers 0: {run / 'last.pt'} has layers 1" in capsys.readouterr().err
