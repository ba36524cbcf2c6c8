"""A student of Whisper's kind: the fast path is the network, and the cache is heard as Whisper hears."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.training.distillation.test_distillation import trainer
from tests.training.test_whisper_ctc import openai_checkpoint
from training.distillation.augment import AugmentConfig
from training.distillation.dataset import BLANK_ID
from training.distillation.examples import BatchMaker, Corpus
from training.distillation.whisper import LEAD_FRAMES, FastWhisper, WhisperCorpus
from training.masks import frame_mask
from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc

SHAPE = EncoderConfig(width=64, layers=2, heads=2, inner=96)


@pytest.fixture
def heard(cache: Path) -> WhisperCorpus:
    return WhisperCorpus(cache, min_confidence=-100.0, validation_fraction=0.3)


def network() -> WhisperCtc:
    torch.manual_seed(2)
    model = WhisperCtc(SHAPE, 29)
    model.encoder.start_from_random()
    return model


def features(lengths: Tensor) -> Tensor:
    torch.manual_seed(1)
    frames = int(lengths.max())
    return torch.randn(len(lengths), frames, 80) * frame_mask(lengths, frames)[:, :, None]


def plainly(model: WhisperCtc, values: Tensor, lengths: Tensor) -> Tensor:
    hidden, _ = model.encoder(values, lengths)
    return functional.log_softmax(model.ctc_head(hidden), dim=-1)


def test_it_gives_what_the_network_gives() -> None:
    model, lengths = network().eval(), torch.tensor([161, 120, 77, 1])
    values = features(lengths)
    with torch.no_grad():
        found, expected = FastWhisper(model)(values, lengths, (0, 1)), plainly(model, values, lengths)
    assert found.lengths.tolist() == [81, 60, 39, 1]
    assert [hidden.shape for hidden in found.hidden] == [(4, 81, 64)] * 2
    own = frame_mask(found.lengths, 81)
    assert (found.log_probs - expected)[own].abs().max() < 0.05  # bfloat16 has eight bits
    assert expected[own].std() > 0.2


def test_gradients_are_the_networks() -> None:
    model, lengths = network().train(), torch.tensor([96, 71])
    reference, values = copy.deepcopy(model), features(lengths)
    direction = torch.randn(2, 48, 29) * frame_mask(torch.tensor([48, 36]), 48)[:, :, None]
    (FastWhisper(model)(values, lengths).log_probs * direction).sum().backward()
    (plainly(reference, values, lengths) * direction).sum().backward()  # type: ignore[no-untyped-call]
    expected = dict(reference.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours, theirs = parameter.grad, expected[name].grad
            assert ours is not None, name
            assert theirs is not None, name
            assert functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99, name
            compared += 1
    assert compared == len([name for name in expected if name != "encoder.embed_positions.weight"])


def test_a_padded_batch_is_heard_as_the_front_end_hears_each_item(heard: WhisperCorpus) -> None:
    first, second = (heard.features(index) for index in (1, 4))
    lengths = torch.tensor([len(first), len(second)])
    padded = torch.nn.utils.rnn.pad_sequence([first, second], batch_first=True, padding_value=3.0)
    found = heard.normalise(padded, lengths)
    for row, index in zip(found, (1, 4), strict=True):
        start, count = heard.pcm_spans[index]
        samples = torch.from_numpy(heard.pcm[start : start + count].astype(np.float32) / 32768.0)
        expected, (frames,) = heard.frontend(samples[None], torch.tensor([count]))
        torch.testing.assert_close(row[:frames], expected[0], atol=1e-5, rtol=0)
        assert not row[frames:].any()


def test_the_teacher_answers_earlier(heard: WhisperCorpus, cache: Path) -> None:
    plain = Corpus(cache, min_confidence=-100.0, validation_fraction=0.3)
    posteriors, hidden = heard.targets(3)
    expected, activations = plain.targets(3)
    assert torch.equal(posteriors[:-LEAD_FRAMES], expected[LEAD_FRAMES:])
    assert torch.equal(hidden[:-LEAD_FRAMES], activations[LEAD_FRAMES:])
    assert posteriors.shape == expected.shape
    assert hidden.shape == activations.shape
    assert torch.all(posteriors[-LEAD_FRAMES:, BLANK_ID] == 1.0)
    heard.label_spans[3] = (heard.label_spans[3][0], 2)
    posteriors, hidden = heard.targets(3)
    assert len(posteriors) == len(hidden) == 2
    assert torch.all(posteriors[:, BLANK_ID] == 1.0)


def test_loudness_varies_where_it_is_heard(heard: WhisperCorpus) -> None:
    maker = BatchMaker(heard, 60.0, 0, heard.augmentation)
    quiet = BatchMaker(heard, 60.0, 0, None)
    maker.config = AugmentConfig(
        warp_probability=0, noise_probability=0, band_masks=0, time_masks_per_s=0, max_gain_db=8.0
    )
    louder = (maker(0).features - quiet(0).features).abs().flatten(1).amax(dim=1)
    assert louder.max() <= 8.0 / 10.0 / 4.0 + 1e-5
    assert len(set(louder.tolist())) == len(louder)


def test_where_nobody_speaks_nothing_is_to_be_said(heard: WhisperCorpus) -> None:
    silent = replace(heard.augmentation, lone_noise=1.0)
    batch = BatchMaker(heard, 4.0, 0, silent)(0)
    plain = BatchMaker(heard, 4.0, 0, replace(silent, lone_noise=0.0))(0)
    assert len(batch.texts) == len(batch.features) == len(plain.features) + 1
    frames = int(batch.target_lengths[-1])
    assert batch.texts[-1] == []
    assert torch.all(batch.teacher[-1, :frames, BLANK_ID] == 1.0)
    assert torch.all(batch.dense[-1] == BLANK_ID)
    assert batch.features[-1, : int(batch.lengths[-1])].std() > 0.01
    student = trainer(heard, size="whisper-micro")
    assert math.isfinite(student.train_step([batch], 0.0)["posterior"])


def test_it_goes_on_from_openais_weights(heard: WhisperCorpus, tmp_path: Path) -> None:
    student = trainer(heard, size="whisper-micro")
    encoder = {name: value + 0.25 for name, value in student.distiller.model.encoder.state_dict().items()}
    student.initialise_from(openai_checkpoint(tmp_path / "micro.pt", encoder))
    for part in (student.distiller, student.average):
        for name, value in part.model.encoder.state_dict().items():
            if name != "embed_positions.weight":  # computed, not taken in half precision
                assert torch.equal(value, encoder[name].half().float()), name
    assert math.isfinite(student.train_step([BatchMaker(heard, 4.0, 0, heard.augmentation)(0)], 0.0)["ctc"])
