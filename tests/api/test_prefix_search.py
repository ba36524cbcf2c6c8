"""The compiled search, which leaves out what cannot get into the beam, against one that tries everything."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from api import hotwords as automaton
from api.beam import EXACT, Pruning
from api.hotwords import CREDITS, DEAD, KEPT, POWERS, ROOT, SPACE, HotwordAutomaton, build_hotwords
from api.ngram import NgramModel, weigh
from api.prefix_search import search
from api.vocabulary import Vocabulary
from tests.api.test_beam import log_softmax
from training.kneser_ney import character_ngrams

LETTERS = Vocabulary(("\u2581", "a", "b", "c", "<blank>"), 4)
PIECES = Vocabulary(
    ("\u2581a", "\u2581ab", "b", "c", "\u2581", "bc", "cab", "c\u2581a", "<blank>"), 8, kind="wordpiece"
)

# Plain Python, also where numba has compiled them.
step = getattr(automaton.step, "py_func", automaton.step)
finish = getattr(automaton.finish, "py_func", automaton.finish)

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Probabilities of ending in a blank and in the last token, the weight's logarithm, and both states."""

    ended: float
    held: float
    log_weight: float
    state: int
    gram: int

    @property
    def total(self) -> float:
        return self.ended + self.held

    @property
    def score(self) -> float:
        return self.total * math.exp(self.log_weight)


@dataclass(frozen=True)
class PlainSearch:
    """Builds every extension that the choices of ``Pruning`` allow, then sorts: no bound, heap or hash."""

    blank: int
    beam: int
    cut: Pruning
    hotwords: HotwordAutomaton | None
    guide: NgramModel | None

    def run(self, log_probs: np.ndarray) -> dict[Prefix, float]:
        """Score of every prefix in the beam after the last frame."""
        entries = {(): Entry(1.0, 0.0, 0.0, ROOT, self.guide.start if self.guide else 0)}
        for row in np.exp(log_probs.astype(np.float64)):
            if row[self.blank] >= self.cut.blank_skip:
                entries = {prefix: self.stay(entry, prefix, row, {}) for prefix, entry in entries.items()}
                continue
            found = {prefix: self.stay(entry, prefix, row, entries) for prefix, entry in entries.items()}
            for prefix, entry in entries.items():
                found |= self.extend(entry, prefix, row, entries)
            entries = self.survivors(found)
        return {prefix: self.final_score(entry, prefix) for prefix, entry in entries.items()}

    def stay(self, entry: Entry, prefix: Prefix, row: np.ndarray, entries: dict[Prefix, Entry]) -> Entry:
        """A blank, the last token once more, or that token behind the prefix without it."""
        held = entry.held * row[prefix[-1]] if prefix else 0.0
        if prefix and (above := entries.get(prefix[:-1])):
            held += (above.ended if prefix[-2:-1] == prefix[-1:] else above.total) * row[prefix[-1]]
        return Entry(entry.total * row[self.blank], held, entry.log_weight, entry.state, entry.gram)

    def extend(
        self, entry: Entry, prefix: Prefix, row: np.ndarray, entries: dict[Prefix, Entry]
    ) -> dict[Prefix, Entry]:
        """One more token, where that is not in the beam already."""
        least = math.exp(self.cut.token_floor)
        tokens = [token for token in range(len(row)) if token != self.blank and row[token] >= least]
        tokens = sorted(tokens, key=lambda token: -row[token])[: self.cut.max_tokens]
        least_gaining = max(row[token] for token in (self.blank, *tokens)) * math.exp(-self.cut.hotword_floor)
        found = {}
        for token in tokens:
            if (*prefix, token) in entries:
                continue
            gain, state = self.credits(entry.state, token)
            if gain > 0 and row[token] < least_gaining:
                continue
            log_factor, gram = self.language(entry.gram, self.spelled(token))
            probability = (entry.ended if prefix[-1:] == (token,) else entry.total) * row[token]
            log_weight = entry.log_weight + self.nats(gain) + log_factor
            found[(*prefix, token)] = Entry(0.0, probability, log_weight, state, gram)
        return found

    def survivors(self, found: dict[Prefix, Entry]) -> dict[Prefix, Entry]:
        """The best by score; with hotwords also the best without what may still be taken back."""
        rankings = [{prefix: entry.score for prefix, entry in found.items()}]
        if self.hotwords is not None:
            states = self.hotwords.states
            unsure = {
                prefix: states[entry.state, CREDITS] - states[entry.state, KEPT] if entry.state != DEAD else 0
                for prefix, entry in found.items()
            }
            boost = self.hotwords.boost
            rankings.append({x: score * math.exp(-boost * unsure[x]) for x, score in rankings[0].items()})
        kept = set()
        for scores in rankings:
            least = max(scores.values()) * math.exp(-self.cut.beam_floor)
            best = sorted(scores, key=lambda prefix, by=scores: -by[prefix])[: self.beam]
            kept |= {prefix for prefix in best if scores[prefix] >= least and scores[prefix] > 0.0}
        return {prefix: found[prefix] for prefix in kept}

    def spelled(self, token: int) -> list[int]:
        extra = self.hotwords or self.guide
        if extra is None:
            return []
        symbols = extra.symbols
        return symbols.flat[symbols.offsets[token] : symbols.offsets[token + 1]].tolist()

    def credits(self, state: int, token: int) -> tuple[int, int]:
        """Credits that a token earns, and the state after it."""
        gain, words = 0, self.hotwords
        if words is not None:
            for symbol in self.spelled(token):
                state, change = step(state, symbol, words.symbols.count, words.edges, words.states)
                gain, state = gain + int(change), int(state)
        return gain, state

    def nats(self, gain: int) -> float:
        return self.hotwords.boost * max(-POWERS, min(gain, POWERS)) if self.hotwords is not None else 0.0

    def language(self, gram: int, symbols: list[int]) -> tuple[float, int]:
        """What the language model gives these symbols, in nats, and its state after them."""
        total, guide = 0.0, self.guide
        for symbol in symbols if guide is not None else []:
            word, bit = divmod(symbol, 64)
            while not int(guide.masks[gram, word]) >> bit & 1:
                total += math.log(guide.backoff[gram])
                gram = int(guide.fail[gram])
            edge = guide.firsts[gram, word] + (int(guide.masks[gram, word]) & ((1 << bit) - 1)).bit_count()
            total += math.log(guide.factors[edge])
            gram = int(guide.following[edge])
        return total, gram

    def final_score(self, entry: Entry, prefix: Prefix) -> float:
        taken_back = int(finish(entry.state, self.hotwords.states)) if self.hotwords is not None else 0
        word_end = self.language(entry.gram, [SPACE])[0] if prefix else 0.0
        boost = self.hotwords.boost if self.hotwords is not None else 0.0
        return math.log(entry.total) + entry.log_weight + boost * taken_back + word_end


def nested_hotwords(rng: np.random.Generator, words: list[str]) -> list[str]:
    """Parts of what is said, some of them with another word at the end, and a few single words."""
    hotwords = [" ".join(words)]
    for _ in range(int(rng.integers(0, 7))):
        first, last = sorted(rng.integers(0, len(words) + 1, 2))
        other = "".join(rng.choice(list("abc"), int(rng.integers(0, 4))))
        hotwords.append(" ".join([*words[first:last], other]))
    return [*hotwords, *(word for word in words if rng.random() < 0.5)]


def sound(rng: np.random.Generator, said: list[int], size: int) -> np.ndarray:
    """Log-probabilities float32 ``(frames, size)`` in which ``said`` is more or less heard; blank last."""
    spread = rng.choice([0.5, 1.5, 3.0])
    scores = rng.normal(0.0, spread, (2 * len(said), size))
    scores[1::2, -1] += 4.0
    for row, token in zip(scores[::2], said, strict=True):
        row[token] += rng.choice([0.0, 1.5, 3.0])
    return log_softmax(scores[rng.random(len(scores)) < 0.8])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("vocabulary", [LETTERS, PIECES], ids=["letters", "pieces"])
def test_the_beam_is_that_of_a_search_without_bounds(vocabulary: Vocabulary, guided: bool) -> None:
    for seed in (*range(150), 514):  # the last one falls back to a suffix that completed hotwords
        rng = np.random.default_rng(seed)
        said = rng.integers(0, len(vocabulary) - 1, int(rng.integers(2, 20))).tolist()
        text = vocabulary.decode(said)
        # 5 nats per letter reach the most that a hotword is worth with the seventh letter.
        boost, words = float(rng.choice([0.3, 1.0, 3.0, 5.0])), nested_hotwords(rng, text.split())
        hotwords = build_hotwords(words, vocabulary, boost) if rng.random() < 0.9 else None
        guide = None
        if guided:
            texts = ["".join(rng.choice(list("abc "), 12)) for _ in range(4)]
            lines = [" ".join(line.split()) + " a" for line in texts]
            table = character_ngrams(lines, int(rng.integers(2, 6)), min_count=1)
            weight, bonus = float(rng.choice([0.5, 1.5])), float(rng.choice([0.0, 2.0, 4.0]))
            guide = weigh(table, vocabulary, weight, bonus)
        log_probs = sound(rng, said, len(vocabulary))
        beam, cut = int(rng.integers(1, 8)), Pruning() if rng.random() < 0.6 else EXACT
        with np.errstate(over="ignore"):  # of the automaton's hashes, which are to wrap
            expected = PlainSearch(vocabulary.blank_id, beam, cut, hotwords, guide).run(log_probs)
        found = search(
            log_probs,
            vocabulary.blank_id,
            beam,
            min(cut.max_tokens, len(vocabulary)),
            (cut.token_floor, cut.blank_skip, math.exp(-cut.beam_floor), math.exp(-cut.hotword_floor)),
            hotwords,
            guide,
        )
        scores = {tuple(found.spell(at).tolist()): float(x) for at, x in enumerate(found.scores)}
        assert scores == pytest.approx(expected, abs=1e-6), f"seed {seed}"
