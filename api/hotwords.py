"""Hotwords: words and phrases that the beam search prefers, as an Aho-Corasick automaton over characters.

Source: Aho and Corasick, "Efficient string matching" (CACM 1975). The automaton reads what tokens spell, not
token ids, so that it works for any way a word can be cut into pieces. Its states are prefixes of hotwords
that began at a word boundary; ``DEAD`` is the middle of a word that no hotword starts.

A prefix of length n is worth n credits for as long as it can still become a hotword. Where it cannot, the
credits are taken back; where it ends at a word boundary they stay. The search turns credits into a boost of
``boost`` nats each. So a hotword wins only where the audio gives it up to ``boost`` nats less per character
than the best other reading, ``MOST_NATS`` in all, and is preferred as a whole word only. Credits that may
still be taken back (``SURE``) bring a reading into the beam and put no other one out of it: a hotword that
does not come true leaves the text as it is.

Cost per step is independent of the number of hotwords: one hash look-up, and suffix links at word boundaries.

``prefix_search.py`` compiles ``step`` and ``finish`` into itself. Where numba compiles at the first call, its
cache does not notice when they change here: delete ``api/__pycache__/*.nb?`` then.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from api.compiled import compiled, inner
from api.vocabulary import Vocabulary

ROOT = 0
DEAD = -1
SPACE = 0  # symbol of the word boundary

CREDITS, TERMINAL, FAIL, KEPT = range(4)  # columns of the states
SURE, REACH, SAFE_REACH = range(3)  # columns of their factors

# Nats per character. On 50 utterances of LibriSpeech test-other, with the five rarest long words of each and
# 100 distractors, 1.0 took WER from 13.3 to 10.1 % with 1 false hotword; 1.5 reached 10.0 % with 6, 3.0 lost
# again (QuartzNet15x5, beam 16).
DEFAULT_BOOST = 1.0
MAX_BOOST = 5.0

POWERS = 128  # most credits one token can change

MOST_NATS = 32.0
MOST_CREDITS = 64
"""What one hotword is worth at most. Else a sentence could turn any word of it that the audio denies."""

_MOST_KEPT_CHARACTERS = 20_000
"""Longer lists are built anew each time: a megabyte of memory each for sixteen of these, not sixty."""

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Symbols:
    """What each token spells, as symbols (characters, or bytes of a byte-level vocabulary); 0 is the space.

    ``flat`` and ``offsets``: the symbols of token i are ``flat[offsets[i]:offsets[i + 1]]``.
    """

    flat: IntArray
    offsets: IntArray
    ids: dict[str | int, int]

    @property
    def count(self) -> int:
        """Number of distinct symbols, the space included."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class HotwordAutomaton:
    """Arrays for the compiled loops, and what belongs to them.

    ``edges`` int64 ``(slots, 2)``: open-addressed hash table of key and child.
    ``states`` int32 ``(states, 4)``: columns ``CREDITS``, ``TERMINAL``, ``FAIL`` and ``KEPT`` (see ``step``).
    ``factors`` float64 ``(states, 4)``, one line of memory for what every frame reads of an entry's state:
    ``SURE``, what is left of a text's weight if the hotword does not come true; ``REACH``, no symbol
    multiplies it by more from there; ``SAFE_REACH``, no symbol but the space leaves more of it if the hotword
    does not come true. ``most``: the largest ``REACH``.
    ``unknown`` lists hotwords that the vocabulary cannot spell; they are left out.
    """

    symbols: Symbols
    edges: NDArray[np.int64]
    states: IntArray
    factors: NDArray[np.float64]
    most: float
    boost: float
    unknown: tuple[str, ...]

    def credits_of(self, text: str) -> int:
        """Credits of a finished text; what the search multiplies by ``boost``."""
        units = _spell(text, self.symbols)
        if units is None:
            raise ValueError(f"the vocabulary cannot spell {text!r}")
        return int(_credits(np.array(units, np.int32), self.symbols.count, self.edges, self.states))


@lru_cache(maxsize=64)
def symbols_of(vocabulary: Vocabulary) -> Symbols:
    """Symbols of every token of a vocabulary."""
    ids: dict[str | int, int] = {(0x20 if vocabulary.kind == "bpe" else " "): SPACE}
    flat: list[int] = []
    offsets = [0]
    for unit in vocabulary.units:
        flat.extend(ids.setdefault(symbol, len(ids)) for symbol in unit)
        offsets.append(len(flat))
    return Symbols(np.array(flat, np.int32), np.array(offsets, np.int32), ids)


def build_hotwords(
    hotwords: Sequence[str], vocabulary: Vocabulary, boost: float = DEFAULT_BOOST
) -> HotwordAutomaton | None:
    """The automaton, or None when there is nothing to look for. The last few lists are kept.

    ``hotwords`` are given in the model's own casing (see ``text_normalisation`` of the bundle); runs of white
    space count as one space. ``boost``: nats per character, 0 to ``MAX_BOOST``. Raises ValueError otherwise.
    """
    if not 0.0 <= boost <= MAX_BOOST:
        raise ValueError(f"boost = {boost}: expected 0 to {MAX_BOOST} nats per character")
    cleaned = tuple(sorted({" ".join(word.split()) for word in hotwords} - {""}))
    if not cleaned or boost == 0.0:
        return None
    build = _build_cached if sum(map(len, cleaned)) <= _MOST_KEPT_CHARACTERS else _build_cached.__wrapped__
    return build(cleaned, vocabulary, boost)


@lru_cache(maxsize=16)
def _build_cached(hotwords: tuple[str, ...], vocabulary: Vocabulary, boost: float) -> HotwordAutomaton | None:
    symbols = symbols_of(vocabulary)
    spelled, unknown = [], []
    for word in hotwords:
        units = _spell(word, symbols)
        if units is None:
            unknown.append(word)
        else:
            spelled.append(units)
    lengths = np.array([0, *(len(units) for units in spelled)], np.int64)
    flat = np.array([symbol for units in spelled for symbol in units], np.int32)
    slots = 1 << max(4, int(2 * len(flat) + 1).bit_length())
    most = max(1, min(MOST_CREDITS, int(MOST_NATS / boost)))
    edges, states, gains = _build(flat, np.cumsum(lengths), symbols.count, slots, most)
    reach = np.exp(boost * np.minimum(gains, POWERS))
    reach *= 1.0 + 1e-9  # products are rounded, and nothing within reach may be left out
    factors = np.ones((len(states), 4))
    factors[:, SURE] = np.exp(-boost * (states[:, CREDITS] - states[:, KEPT]))
    factors[:, REACH], factors[:, SAFE_REACH] = reach
    return HotwordAutomaton(symbols, edges, states, factors, float(reach[0].max()), boost, tuple(unknown))


def _build(
    flat: IntArray, offsets: NDArray[np.int64], count: int, slots: int, most: int
) -> tuple[NDArray[np.int64], IntArray, IntArray]:
    """Trie in a hash table, then suffix links in order of depth. ``most``: credits of a hotword.

    With them the most credits that a symbol changes from each state, int32 ``(2, states)``: see ``_gain``.
    """
    room = len(flat) + 1
    edges = np.zeros((slots, 2), np.int64)
    states = np.zeros((room, 4), np.int32)
    states[ROOT, FAIL] = DEAD
    parents = np.full(room, DEAD, np.int32)
    read = np.zeros(room, np.int32)
    size = _grow(flat, offsets, count, edges, states, parents, read)
    order = np.argsort(states[:size, CREDITS], kind="stable")
    np.minimum(states[:, CREDITS], most, out=states[:, CREDITS])
    _link(order, count, edges, states, parents, read, np.zeros((2, size), np.int32))
    gains = np.zeros((2, size), np.int32)
    _gain(order, count, edges, states, parents, read, gains)
    return edges, states[:size].copy(), gains


def _spell(text: str, symbols: Symbols) -> list[int] | None:
    """Symbols of a text in the composed or, failing that, the decomposed form; None if one is missing."""
    for form in ("NFC", "NFD"):
        composed = unicodedata.normalize(form, text)
        units: Sequence[str | int] = composed.encode() if 0x20 in symbols.ids else composed
        found = [symbols.ids.get(unit, -1) for unit in units]
        if -1 not in found:
            return found
    return None


@inner(inline=True)
def edge_slot(node, symbol, count, edges):  # type: ignore[no-untyped-def]
    """Key of an edge, and its place in the hash table or the free place for it (Fibonacci hashing)."""
    key = np.int64(node) * count + symbol + 1
    mask = np.uint64(edges.shape[0] - 1)
    index = ((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while edges[index, 0] != 0 and edges[index, 0] != key:
        index = (index + np.uint64(1)) & mask
    return key, index


@inner()
def step(state, symbol, count, edges, states):  # type: ignore[no-untyped-def]
    """Next state and change of credits for one more symbol.

    Following a hotword: one credit, up to the most. Leaving it at a word boundary where it is complete: its
    credits stay. Leaving it otherwise: the credits go, but for those of hotwords completed on the way
    (``KEPT``); then the suffix (``FAIL``) is tried.
    """
    gain = 0
    while state != DEAD:
        key, index = edge_slot(state, symbol, count, edges)
        if edges[index, 0] == key:
            following = np.int32(edges[index, 1])
            return following, gain + states[following, CREDITS] - states[state, CREDITS]
        if symbol == SPACE and states[state, TERMINAL]:
            suffix = states[state, FAIL]
            while suffix != DEAD:
                key, index = edge_slot(suffix, symbol, count, edges)
                if edges[index, 0] == key:
                    following = np.int32(edges[index, 1])
                    return following, gain + states[following, CREDITS]
                suffix = states[suffix, FAIL]
            return np.int32(ROOT), gain
        gain += states[state, KEPT] - states[state, CREDITS]
        state = states[state, FAIL]
        if state != DEAD:
            gain += states[state, CREDITS]
    return np.int32(ROOT if symbol == SPACE else DEAD), gain


@inner()
def finish(state, states):  # type: ignore[no-untyped-def]
    """Change of credits when the text ends in ``state``: what is not complete is taken back."""
    gain = 0
    while state != DEAD and not states[state, TERMINAL]:
        gain += states[state, KEPT] - states[state, CREDITS]
        state = states[state, FAIL]
        if state != DEAD:
            gain += states[state, CREDITS]
    return gain


@compiled("int64(int32[::1], int64, int64[:,::1], int32[:,::1])")
def _credits(symbols, count, edges, states):  # type: ignore[no-untyped-def]
    state = np.int32(ROOT)
    total = 0
    for symbol in symbols:
        state, gain = step(state, symbol, count, edges, states)
        total += gain
    return total + finish(state, states)


@compiled("int64(int32[::1], int64[::1], int64, int64[:,::1], int32[:,::1], int32[::1], int32[::1])")
def _grow(flat, offsets, count, edges, states, parents, read):  # type: ignore[no-untyped-def]
    """The trie's edges and states; how many states. ``read``: the symbol that leads to each.

    One credit per symbol, without an end, so that they are the depth as well.
    """
    size = 1
    for word in range(len(offsets) - 1):
        node = np.int64(ROOT)
        for position in range(offsets[word], offsets[word + 1]):
            symbol = flat[position]
            key, index = edge_slot(node, symbol, count, edges)
            if edges[index, 0] == 0:
                edges[index, 0] = key
                edges[index, 1] = size
                states[size, CREDITS] = states[node, CREDITS] + 1
                parents[size] = node
                read[size] = symbol
                size += 1
            node = edges[index, 1]
        states[node, TERMINAL] = 1
    return size


@compiled("int64(int64[::1], int64, int64[:,::1], int32[:,::1], int32[::1], int32[::1], int32[:,::1])")
def _link(order, count, edges, states, parents, read, credits):  # type: ignore[no-untyped-def]
    """Suffix links, of short prefixes before long ones (``order``).

    Rows of ``credits``: those of the longest hotword completed on the way to a state, and those that the
    state's suffixes completed meanwhile. They overlap in the text, so only the larger one is kept.
    """
    for position in range(1, len(order)):
        node = order[position]
        above = parents[node]
        symbol = read[node]
        completed = symbol == SPACE and states[above, TERMINAL] != 0
        credits[0, node] = states[above, CREDITS] if completed else credits[0, above]
        start = states[above, FAIL]
        suffix, gain = step(start, symbol, count, edges, states)
        before = states[start, CREDITS] if start != DEAD else 0
        after = states[suffix, CREDITS] if suffix != DEAD else 0
        credits[1, node] = credits[1, above] + gain - (after - before)
        states[node, FAIL] = suffix
        states[node, KEPT] = max(credits[0, node], credits[1, node])
        states[node, CREDITS] = max(states[node, CREDITS], states[node, KEPT])
    return 0


@compiled("int64(int64[::1], int64, int64[:,::1], int32[:,::1], int32[::1], int32[::1], int32[:,::1])")
def _gain(order, count, edges, states, parents, read, gains):  # type: ignore[no-untyped-def]
    """Fill ``gains``: bounds of what one more symbol earns from each state, at least 0.

    Following a hotword earns one credit. But a state may fall back to suffixes that are worth more: its own
    credits had reached the most, or the suffixes overlap with what it completed. The second row is without
    the credits that may still be taken back after the symbol, and for every symbol but the space.
    """
    for node in range(len(order)):
        gains[1, node] = states[node, KEPT] - states[node, CREDITS]
    for position in range(1, len(order)):
        node = order[position]
        above = parents[node]
        gains[0, above] = max(gains[0, above], states[node, CREDITS] - states[above, CREDITS])
        if read[node] != SPACE:
            gains[1, above] = max(gains[1, above], states[node, KEPT] - states[above, CREDITS])
    for position in range(len(order)):
        node = order[position]
        if states[node, TERMINAL]:
            _, gain = step(node, SPACE, count, edges, states)
            gains[0, node] = max(gains[0, node], gain)
        suffix = states[node, FAIL]
        if suffix != DEAD:
            fallen = states[node, KEPT] - states[node, CREDITS] + states[suffix, CREDITS]
            gains[0, node] = max(gains[0, node], fallen + gains[0, suffix])
            gains[1, node] = max(gains[1, node], fallen + gains[1, suffix])
    return 0
