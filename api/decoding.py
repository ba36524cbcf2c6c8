"""Log-probabilities -> tokens, in the way a bundle or a request asks for."""

from __future__ import annotations

from api.beam import beam_search, search_steps
from api.bundle import Bundle
from api.ctc import Decoded, greedy_of
from api.frames import Frames
from api.hotwords import HotwordAutomaton

GUIDED_BEAM = 3
"""The narrowest beam that a language model helps. It charges for every character and nothing for silence,
so a beam that keeps one or two prefixes keeps the short ones (validation WER with and without it: 78.6 and
61.7 % for a beam of 1, 59.1 and 58.6 for 2, 53.8 and 57.6 for 3)."""


def usual_beam(bundle: Bundle, max_beam: int) -> int:
    """Width of the beam search where nobody asks for one; 0, greedy, without a language model that helps."""
    beam = min(bundle.default_beam, max_beam)
    return beam if beam >= GUIDED_BEAM else 0


def in_words(bundle: Bundle, beam: int) -> str:
    """What ``decode`` does at this width."""
    if not beam:
        return "greedy"
    return f"beam {beam}" + (" with language model" if bundle.guide and beam >= GUIDED_BEAM else "")


def decode(frames: Frames, bundle: Bundle, beam: int, hotwords: HotwordAutomaton | None = None) -> Decoded:
    """The tokens of one utterance.

    ``beam`` 0 is greedy; otherwise the beam search of that width, from ``GUIDED_BEAM`` on with the bundle's
    language model where it has one.
    """
    blank_id = bundle.vocabulary.blank_id
    if beam:
        guide = bundle.guide if beam >= GUIDED_BEAM else None
        if bundle.manifest.decoder:
            return search_steps(frames, blank_id, beam, hotwords, guide)
        return beam_search(frames.whole(), blank_id, beam, hotwords, guide=guide)[0]
    return greedy_of(frames, blank_id)
