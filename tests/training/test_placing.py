"""Where a decoder's tokens stand: where it listened, in order, and so that collapsing gives them back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from api.ctc import greedy
from training.recipes.whisper_seq2seq.model import TOKEN_FRAMES, DecoderConfig, places_of, spread

END = 3


def attention(peaks: list[float], audio: int, level: float = 0.01) -> Tensor:
    """(1, tokens, audio frames) with a bump of seven audio frames at each peak, and a common ground."""
    frames = torch.arange(audio, dtype=torch.float32)
    bumps = [torch.exp(-0.5 * ((frames - peak) / 2.0) ** 2) * 0.3 for peak in peaks]
    return (torch.stack(bumps) + level)[None]


def places(peaks: list[float], audio: int = 100) -> list[int]:
    heard = attention(peaks, audio)
    return places_of(heard, torch.tensor([len(peaks)]), torch.tensor([audio]))[0].tolist()


def test_a_token_is_where_it_was_listened_to() -> None:
    assert places([10, 31, 60, 90]) == [5, 15, 30, 45]


def test_a_frame_that_every_token_listens_to_is_nobodys_place() -> None:
    """The end of the audio, where a decoder looks to see whether there is more."""
    heard = attention([10, 40, 70], 100)
    heard[:, :, 96:] += 0.5
    assert places_of(heard, torch.tensor([3]), torch.tensor([100]))[0].tolist() == [5, 20, 35]


def test_a_place_against_the_order_is_taken_back_to_the_middle() -> None:
    early, wrong, late = places([20, 80, 40])
    assert early == 10
    assert early < wrong < late


def test_one_token_astray_moves_no_other() -> None:
    """The full stop of `her.` listened to the beginning of the clip, and halved the times of all words."""
    peaks = list(range(20, 180, 16))
    right = places(peaks, 200)
    assert places([*peaks, 0], 200) == [*right, right[-1] + 2]
    assert places([190, *peaks[1:]], 200)[1:] == [right[1] + 2, *right[2:]]
    assert places([*peaks[:4], 190, *peaks[5:]], 200) == [*right[:4], (right[3] + right[5]) // 2, *right[5:]]
    assert places([*peaks[:-2], 6, 2], 200)[:-2] == right[:-2]


def test_tokens_at_one_place_stand_apart_and_stay_inside() -> None:
    assert places([50, 50, 50]) == [25, 27, 29]
    found = places([99, 99, 99, 99])
    assert found == [43, 45, 47, 49]


def test_a_token_alone_is_where_most_is_listened() -> None:
    assert places([44]) == [22]


@pytest.mark.parametrize("audio", [99, 100])
def test_the_last_half_frame_counts(audio: int) -> None:
    assert places([10, 98], audio) == [5, 49]


def test_what_lies_beyond_an_item_is_no_place() -> None:
    heard = torch.cat([attention([10, 30], 100), attention([10, 90], 100)])
    found = places_of(heard, torch.tensor([2, 2]), torch.tensor([100, 40]))
    assert found[0].tolist() == [5, 15]
    assert int(found[1, 1]) <= 19


def test_collapsing_gives_back_tokens_and_places() -> None:
    tokens = [[0, 0, 2, 1], [1, 1]]
    steps = torch.full((2, 5, 4), -9.0)
    for item, ids in enumerate(tokens):
        for step, token in enumerate(ids):
            steps[item, step, token] = -0.1
        steps[item, len(ids) :, END] = 0.0
    where = torch.tensor([[0, 2, 9, 30, 0], [3, 5, 0, 0, 0]])
    lengths = torch.tensor([40, 12])
    frames = spread(steps, where, torch.tensor([4, 2]), lengths, END)
    assert frames.shape == (2, 40, 4)
    found = greedy(frames.numpy(), lengths.numpy(), END)
    assert [one.token_ids.tolist() for one in found] == tokens
    assert found[0].start_frames.tolist() == [0, 2, 9, 30]
    widths = (found[0].end_frames - found[0].start_frames).tolist()
    assert widths == [1, TOKEN_FRAMES, TOKEN_FRAMES, TOKEN_FRAMES], "one until the next, and a blank between"
    np.testing.assert_allclose(found[0].token_confidences, np.exp(-0.1), rtol=1e-5)


def test_no_token_is_blanks() -> None:
    frames = spread(
        torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), torch.tensor([9]), END
    )
    assert greedy(frames.numpy(), np.array([9]), END)[0].token_ids.tolist() == []


def test_heads_are_those_of_the_checkpoint_or_of_the_upper_layers() -> None:
    config = DecoderConfig(vocabulary=4, width=8, layers=4, heads=2, inner=8)
    assert [config.heads_of(layer) for layer in range(4)] == [[], [], [0, 1], [0, 1]]
    assert config.followers == 4
    told = DecoderConfig(4, 8, 4, 2, 8, alignment_heads=((3, 1), (1, 0)))
    assert [told.heads_of(layer) for layer in range(4)] == [[], [0], [], [1]]
    assert told.followers == 2
