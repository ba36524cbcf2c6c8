"""Log-probabilities -> tokens, in the way a bundle or a request asks for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from api.beam import beam_search
from api.bundle import Bundle
from api.ctc import Decoded, greedy
from api.hotwords import HotwordAutomaton


def decode(
    log_probs: NDArray[np.float32], bundle: Bundle, beam: int, hotwords: HotwordAutomaton | None = None
) -> Decoded:
    """float32 ``(frames, vocabulary)`` of one utterance, only valid frames.

    ``beam`` 0 is greedy; otherwise the beam search of that width, with the bundle's language model where it
    has one.
    """
    blank_id = bundle.vocabulary.blank_id
    if beam:
        return beam_search(log_probs, blank_id, beam, hotwords, guide=bundle.guide)[0]
    return greedy(log_probs[None], np.array([len(log_probs)], dtype=np.int64), blank_id)[0]
