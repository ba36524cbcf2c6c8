"""CTC prefix beam search with hotwords and a language model.

Source: Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional
Recurrent DNNs" (2014), algorithm 1. Each entry of the beam is a prefix with the probability of all its
alignments seen so far, apart for those that end in a blank and those that end in its last token. The compiled
search and the choices that make it fast are in ``prefix_search.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from api.ctc import Decoded, FloatArray, IntArray, align
from api.frames import Frames
from api.hotwords import HotwordAutomaton, build_hotwords
from api.ngram import NgramModel
from api.prefix_search import search
from api.vocabulary import Vocabulary

MAX_BEAM = 1024

STEP_WEIGHT = 2.0
"""How often it counts what a decoder's second choice is behind the first. Beside 100 words that were not
said, 29 % of 79 clips changed with 1, 13 % with 2, 6 % with 3; of 67 phrases of five words, 75, 73 and 70 %
were written, 67 % without hotwords."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What the search may leave out. Changes here change accuracy: measure.

    ``max_tokens``: tokens per frame that may extend an entry. ``token_floor``: their least log-posterior.
    ``blank_skip``: blank posterior from which a frame extends nothing. ``beam_floor``: an entry whose score
    is below the best one's by this many nats is dropped. ``hotword_floor``: a token this many nats behind
    the frame's most probable one earns no boost and is left out there: many such frames would add up to a
    word that nobody said. ``guard_silence``: where the blank wins every frame, hotwords and language model
    are left out altogether, so that they do not make words out of silence.
    """

    max_tokens: int = 12
    token_floor: float = -8.0
    blank_skip: float = 0.9995
    beam_floor: float = 16.0
    hotword_floor: float = 6.0
    guard_silence: bool = True


EXACT = Pruning(
    2**30,
    token_floor=-math.inf,
    blank_skip=math.inf,
    beam_floor=math.inf,
    hotword_floor=math.inf,
    guard_silence=False,
)


def beam_search(
    log_probs: FloatArray,
    blank_id: int,
    beam: int = 16,
    hotwords: HotwordAutomaton | None = None,
    n_best: int = 1,
    pruning: Pruning | None = None,
    guide: NgramModel | None = None,
) -> list[Decoded]:
    """The ``n_best`` most probable texts of one utterance, best first.

    ``log_probs`` float32 ``(frames, vocabulary)``, only valid frames. ``beam``: prefixes kept per frame, 1 to
    ``MAX_BEAM``. Times and confidences come from the best alignment of each text (``ctc.align``), so that
    they mean the same as those of ``ctc.greedy``. ``score`` is the text's log-probability plus its boosts
    and what the language model gives it. Raises ValueError for values out of range.
    """
    log_probs = np.ascontiguousarray(log_probs, dtype=np.float32)
    found = _texts(log_probs, blank_id, beam, hotwords, n_best, pruning or Pruning(), guide)
    return [align(log_probs, tokens, blank_id, score) for tokens, score in found]


def search_steps(
    frames: Frames,
    blank_id: int,
    beam: int = 16,
    hotwords: HotwordAutomaton | None = None,
    guide: NgramModel | None = None,
) -> Decoded:
    """The best text of a decoder network, which shows every token that it wrote in a few equal frames.

    One token is taken of each run of them, the most probable one where no hotword asks for another: a search
    through all the frames would change tokens within a run, which gives texts such as "loud louder".
    """
    steps = frames.at(frames.firsts())
    best = steps.max(axis=1, keepdims=True)
    steps *= STEP_WEIGHT
    steps -= (STEP_WEIGHT - 1.0) * best
    [(tokens, score)] = _texts(steps, blank_id, beam, hotwords, 1, Pruning(), guide)
    used, places = np.unique(np.append(tokens, blank_id), return_inverse=True)
    shown = Frames(frames.rows[:, used], frames.of_frame).whole()
    placed = align(shown, places[:-1].astype(np.int32), int(places[-1]), score)
    return replace(placed, token_ids=tokens)


def _texts(
    log_probs: FloatArray,
    blank_id: int,
    beam: int,
    hotwords: HotwordAutomaton | None,
    n_best: int,
    cut: Pruning,
    guide: NgramModel | None,
) -> list[tuple[IntArray, float]]:
    """Tokens and score of the best texts; see ``beam_search``."""
    if not 1 <= beam <= MAX_BEAM:
        raise ValueError(f"beam = {beam}: expected 1 to {MAX_BEAM}")
    if log_probs.ndim != 2 or not 0 <= blank_id < log_probs.shape[1]:
        raise ValueError(f"log_probs {log_probs.shape} with blank id {blank_id}")
    max_tokens = min(cut.max_tokens, log_probs.shape[1])
    cuts = (cut.token_floor, cut.blank_skip, math.exp(-cut.beam_floor), math.exp(-cut.hotword_floor))
    extras = hotwords is not None or guide is not None
    if cut.guard_silence and extras and _silent(log_probs, blank_id):
        hotwords = guide = None
    found = search(log_probs, blank_id, beam, max_tokens, cuts, hotwords, guide)
    scores = found.scores
    best = np.argsort(-scores, kind="stable")[:n_best]
    return [(found.spell(entry), float(scores[entry])) for entry in best if scores[entry] > -math.inf]


def _silent(log_probs: FloatArray, blank_id: int) -> bool:
    """Whether the blank wins every frame."""
    unsure = log_probs[log_probs[:, blank_id] < math.log(0.5)]  # elsewhere nothing can be more probable
    return bool((unsure.argmax(axis=1) == blank_id).all())


def warm_up(vocabulary: Vocabulary) -> None:
    """Have all that a search with hotwords needs compiled, or loaded from numba's cache."""
    log_probs = np.full((4, len(vocabulary)), -math.log(len(vocabulary)), np.float32)
    beam_search(log_probs, vocabulary.blank_id, beam=4)
    words = (vocabulary.decode([token]) for token in range(len(vocabulary)))
    spelled = next((word for word in words if word), None)
    if spelled is not None:
        beam_search(log_probs, vocabulary.blank_id, 4, build_hotwords([spelled], vocabulary))
