"""Losses and augmentation of the distillation, against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from training.distillation import augment, loss
from training.distillation.augment import AugmentConfig
from training.distillation.dataset import BLANK_ID, VOCABULARY_SIZE, encode_text, normalise_text
from training.distillation.evaluate import word_error_rates


def spikes(path: list[int]) -> np.ndarray:
    posteriors = np.full((len(path), VOCABULARY_SIZE), 1e-3, np.float32)
    posteriors[np.arange(len(path)), path] = 1.0
    return posteriors


def test_dense_labels_spread_each_character_to_its_nearest_frames() -> None:
    b = BLANK_ID
    labels = loss.dense_labels(spikes([b, b, 3, b, b, b, 7, b, b]), reach=2)
    assert labels.tolist() == [3, 3, 3, 3, 3, 7, 7, 7, 7]
    labels = loss.dense_labels(spikes([b, b, b, 3, b, b, b, b, b, 4, 4]), reach=1)
    assert labels.tolist() == [b, b, 3, 3, 3, b, b, b, 4, 4, 4]


def test_dense_labels_of_silence_stay_blank() -> None:
    assert loss.dense_labels(spikes([BLANK_ID] * 5)).tolist() == [BLANK_ID] * 5


def test_losses_do_not_see_padding() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([5, 3])
    log_probs = torch.randn(2, 6, VOCABULARY_SIZE).log_softmax(-1)
    teacher = torch.randn(2, 6, VOCABULARY_SIZE).softmax(-1)
    hidden, target, weights = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.rand(4)
    labels = torch.randint(0, VOCABULARY_SIZE, (2, 6))

    def all_losses() -> list[float]:
        return [
            float(loss.activation_loss(hidden, target, weights, lengths)),
            float(loss.posterior_loss(log_probs, teacher, lengths)),
            float(loss.dense_loss(log_probs, labels, lengths)),
            float(loss.ctc_loss(log_probs, lengths, [[1, 2], [3]])),
        ]

    before = all_losses()
    hidden[1, 3:] = 99.0
    log_probs[1, 3:] = -99.0
    teacher[1, 3:] = 1.0 / VOCABULARY_SIZE
    labels[1, 3:] = 0
    assert all_losses() == pytest.approx(before)


def test_posterior_loss_is_zero_at_the_teacher_and_positive_elsewhere() -> None:
    teacher = torch.randn(1, 4, VOCABULARY_SIZE).softmax(-1)
    lengths = torch.tensor([4])
    assert float(loss.posterior_loss(teacher.log(), teacher, lengths)) == pytest.approx(0.0, abs=1e-6)
    assert float(loss.posterior_loss(torch.zeros_like(teacher).log_softmax(-1), teacher, lengths)) > 0.01


def test_activation_loss_of_predicting_the_mean_is_one() -> None:
    target = torch.randn(4, 500, 8)
    found = loss.activation_loss(torch.zeros_like(target), target, torch.rand(8), torch.full((4,), 500))
    assert float(found) == pytest.approx(1.0, abs=0.1)


def test_ctc_loss_skips_what_cannot_be_said_and_what_nobody_wrote_down() -> None:
    log_probs = torch.randn(3, 4, VOCABULARY_SIZE).log_softmax(-1)
    lengths = torch.tensor([4, 4, 4])
    found = loss.ctc_loss(log_probs, lengths, [[1, 2], [], [5, 5, 5]])
    expected = functional.ctc_loss(
        log_probs[:1].transpose(0, 1), torch.tensor([1, 2]), torch.tensor([4]), torch.tensor([2]),
        blank=BLANK_ID, reduction="sum",
    )  # fmt: skip
    assert float(found) == pytest.approx(float(expected) / 2)
    assert float(loss.ctc_loss(log_probs, lengths, [[], [], []])) == 0.0


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.25])
def test_stretched_time_reads_between_frames(scale: float) -> None:
    values = torch.arange(20.0)[:, None].repeat(1, 3)
    count = round(20 / scale)
    found = augment.stretch_time(values, count, scale)
    assert found.shape == (count, 3)
    expected = np.minimum(np.arange(count) * scale, 19)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)


def test_stretched_posteriors_still_sum_to_one() -> None:
    posteriors = torch.randn(30, VOCABULARY_SIZE).softmax(-1)
    found = augment.stretch_time(posteriors, 27, 30 / 27)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(27))


def test_noise_is_added_at_the_asked_ratio() -> None:
    generator = np.random.default_rng(0)
    speech = torch.randn(200, 64) * 2
    noise = augment.coloured_noise(200, 64, generator)
    assert noise.shape == (200, 64)
    mixed = augment.add_noise(speech, noise, 10.0)
    added = (mixed.double().exp() - speech.double().exp()).sum()
    ratio_db = 10 * torch.log10(speech.double().exp().sum() / added)
    assert float(ratio_db) == pytest.approx(10.0, abs=0.01)


def test_spec_augment_masks_inside_the_item_only() -> None:
    generator = np.random.default_rng(0)
    features = torch.ones(2, 300, 64)
    config = AugmentConfig(band_masks=0, time_masks_per_s=3.0)
    augment.spec_augment(features, torch.tensor([300, 100]), config, generator)
    assert 0 < int((features[1, :100, 0] == 0).sum()) < 100
    assert bool((features[1, 100:] == 1).all())
    features = torch.ones(20, 300, 64)
    augment.spec_augment(features, torch.full((20,), 300), AugmentConfig(time_masks_per_s=0.0), generator)
    masked = (features.sum(dim=1) == 0).sum(dim=1)
    assert 0 < int(masked.max()) <= 20
    assert bool(((features.sum(dim=1) == 0) | (features.sum(dim=1) == 300)).all())


def test_fit_length_repeats_what_is_too_short() -> None:
    generator = np.random.default_rng(0)
    values = torch.arange(5.0)[:, None]
    assert augment.fit_length(values, 12, generator).shape == (12, 1)
    assert augment.fit_length(values, 3, generator).shape == (3, 1)


def test_texts_are_normalised_into_the_alphabet() -> None:
    assert normalise_text("  It\u2019s 5 O'Clock \u2014 NOW! ") == "it's o'clock now"
    assert encode_text("a b'") == [1, 0, 2, 27]
    with pytest.raises(KeyError):
        encode_text("\u00e9")


def test_word_error_rates_by_group() -> None:
    rates = word_error_rates(["a b", "c", "a b c d"], ["a", "c", "a x c d e"], ["one", "two", "two"])
    assert rates == {"one": 0.5, "two": 0.4, "all": pytest.approx(3 / 7)}
