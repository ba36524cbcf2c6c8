"""Character n-gram language model for the beam search, as a back-off automaton.

A state is a context (the last few characters); an edge reads one more character and has its log-probability.
Where a state has no edge for a character, the state's back-off weight is paid and the search goes on from the
context without its oldest character (Katz 1987). As an automaton with failure links: Allauzen, Mohri and
Roark, "Generalized algorithms for constructing statistical language models" (ACL 2003). Like hotwords it
reads what tokens spell, not token ids. `training/ngram.py` makes the file:

    symbols        int32 (symbols,)   code point, or byte for a byte-level vocabulary; the space comes first
    fail           int32 (states,)    the shorter context; -1 for state 0, the empty one
    backoff        float32 (states,)  natural logarithm
    edge_state     int32 (edges,)     where an edge starts
    edge_symbol    int32 (edges,)     index into symbols
    edge_next      int32 (edges,)     the state after it
    edge_log_prob  float32 (edges,)   natural logarithm

A text counts as one that stands between two spaces. The search adds, for each character,
``weight * log P(character | context) + bonus``: the usual shallow fusion with an insertion bonus (Hannun et
al. 2014), which keeps a language model from preferring short texts.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from api.compiled import compiled, inner
from api.hotwords import SPACE, Symbols, symbols_of
from api.vocabulary import Vocabulary

EMPTY = 0
MAX_VALUES = 50_000_000  # of one array
_DTYPES = {
    "symbols": np.int32,
    "fail": np.int32,
    "backoff": np.float32,
    "edge_state": np.int32,
    "edge_symbol": np.int32,
    "edge_next": np.int32,
    "edge_log_prob": np.float32,
}
_SPACE_CODE = 0x20


@dataclass(frozen=True, slots=True)
class NgramTable:
    """The file's arrays, checked; see the top of this module."""

    symbols: NDArray[np.int32]
    fail: NDArray[np.int32]
    backoff: NDArray[np.float32]
    edge_state: NDArray[np.int32]
    edge_symbol: NDArray[np.int32]
    edge_next: NDArray[np.int32]
    edge_log_prob: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Raises ValueError naming the array that does not hold; a checked table always terminates."""
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1 or not 1 <= len(array) <= MAX_VALUES:
                raise ValueError(f"{name}: {array.dtype} {array.shape}, expected one row of {dtype.__name__}")
        states, edges = len(self.fail), len(self.edge_state)
        lengths = {"backoff": states, "edge_symbol": edges, "edge_next": edges, "edge_log_prob": edges}
        for name, length in lengths.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name}: {len(getattr(self, name))} values, expected {length}")
        ranges = {"edge_state": states, "edge_next": states, "edge_symbol": len(self.symbols)}
        for name, end in ranges.items():
            values = getattr(self, name)
            if values.min() < 0 or values.max() >= end:
                raise ValueError(f"{name}: {values.min()} to {values.max()}, expected 0 to {end - 1}")
        if self.fail[0] != -1 or (self.fail[1:] < 0).any() or (self.fail[1:] >= np.arange(1, states)).any():
            raise ValueError("fail: each state but the first must fall back to an earlier one")
        for name in ("backoff", "edge_log_prob"):
            values = getattr(self, name)
            if not np.isfinite(values).all() or np.abs(values).max() > 100.0:
                raise ValueError(f"{name}: expected finite natural logarithms of at most 100")
        if (self.edge_log_prob > 0.0).any():
            raise ValueError("edge_log_prob: expected probabilities of at most 1")
        if self.symbols[SPACE] != _SPACE_CODE or len(np.unique(self.symbols)) != len(self.symbols):
            raise ValueError("symbols: expected distinct ones, the space first")
        if len(np.unique(self.edge_symbol[self.edge_state == EMPTY])) != len(self.symbols):
            raise ValueError("edge_state: the empty context must have an edge for every symbol")

    def save(self, path: Path) -> None:
        """Write the file, compressed."""
        with path.open("wb") as sink:
            np.savez_compressed(sink, **{name: getattr(self, name) for name in _DTYPES})


def load_table(path: Path) -> NgramTable:
    """Read a file. Raises ValueError where it is not one; nothing in it is executed."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = sorted(set(_DTYPES) - set(stored.files))
            if missing:
                raise ValueError(f"{missing[0]}: missing")
            return NgramTable(**{name: stored[name] for name in _DTYPES})
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"not an n-gram file: {error}") from error


@dataclass(frozen=True, slots=True)
class NgramModel:
    """A table in the ``symbols`` of one vocabulary, weighted, in the form that the search reads.

    ``masks`` uint64 and ``firsts`` int32 ``(states, words)``: a bit for each symbol that leads on, 64 of them
    to a word, and the edge of each word's first. The edges of a state lie together, by symbol, so that a
    look-up touches two places in memory that the one before has likely touched.
    ``following`` int32 and ``factors`` float64 ``(edges,)``: state after an edge, and what it multiplies the
    prefix's probability by. ``fail`` int32 and ``backoff`` float64 ``(states,)``: likewise for falling back.
    ``reach`` float64 ``(states,)``: no symbol's factor is larger from there. ``start``: the state after a
    space. ``most``: the largest factor of one symbol.
    """

    symbols: Symbols
    masks: NDArray[np.uint64]
    firsts: NDArray[np.int32]
    following: NDArray[np.int32]
    factors: NDArray[np.float64]
    fail: NDArray[np.int32]
    backoff: NDArray[np.float64]
    reach: NDArray[np.float64]
    start: int
    most: float

    def score(self, symbols: NDArray[np.int32]) -> float:
        """Weighted log-probability with bonuses of a text's symbols (numbered as in ``symbols_of``)."""
        arrays = (self.masks, self.firsts, self.following, self.factors, self.fail, self.backoff)
        return float(_score(symbols, self.start, *arrays))


def weigh(table: NgramTable, vocabulary: Vocabulary, weight: float, bonus: float) -> NgramModel:
    """The model that the search reads.

    ``weight`` scales log-probabilities, ``bonus`` (nats) is added per symbol. What the vocabulary spells and
    the table does not know is as probable as the table's rarest symbol. Raises ValueError out of range.
    """
    if not 0.0 < weight <= 5.0:
        raise ValueError(f"weight = {weight}: expected more than 0, at most 5")
    if not 0.0 <= bonus <= 10.0:
        raise ValueError(f"bonus = {bonus}: expected 0 to 10 nats per symbol")
    symbols = symbols_of(vocabulary)
    ids = {code if isinstance(code, int) else ord(code): index for code, index in symbols.ids.items()}
    spelled = np.array([ids.get(int(code), -1) for code in table.symbols], np.int32)
    known = spelled[table.edge_symbol] >= 0
    state, after = table.edge_state[known], table.edge_next[known]
    symbol, log_prob = spelled[table.edge_symbol[known]], table.edge_log_prob[known]
    unknown = np.array(sorted(set(range(symbols.count)) - set(spelled.tolist())), np.int32)
    rarest = float(table.edge_log_prob[table.edge_state == EMPTY].min())
    state = np.concatenate([state, np.zeros_like(unknown)])
    symbol = np.concatenate([symbol, unknown])
    after = np.concatenate([after, np.zeros_like(unknown)])
    log_prob = np.concatenate([log_prob, np.full(len(unknown), rarest, np.float32)])
    order = np.lexsort((symbol, state))
    state, symbol = state[order].astype(np.int32), symbol[order].astype(np.int32)
    after, log_prob = after[order], log_prob[order]
    factors = np.exp(weight * log_prob.astype(np.float64) + bonus)
    shape = (len(table.fail), symbols.count // 64 + 1)
    masks, firsts = np.zeros(shape, np.uint64), np.zeros(shape, np.int32)
    _index(state, symbol, masks, firsts)
    (start,) = after[(state == EMPTY) & (symbol == SPACE)]
    backoff = np.exp(weight * table.backoff.astype(np.float64))
    reach = np.zeros(len(table.fail), np.float64)
    _reach(state, factors, table.fail, backoff, reach)
    return NgramModel(
        symbols,
        masks,
        firsts,
        np.ascontiguousarray(after, np.int32),
        factors,
        table.fail,
        backoff,
        reach,
        int(start),
        math.exp(bonus),
    )


@compiled("int64(int32[::1], int32[::1], uint64[:,::1], int32[:,::1])")
def _index(state, symbol, masks, firsts):  # type: ignore[no-untyped-def]
    """Fill ``masks`` and ``firsts``, which come with zeros; edges are in the order of state and symbol."""
    for edge in range(len(state)):
        word = symbol[edge] >> 6
        if masks[state[edge], word] == np.uint64(0):
            firsts[state[edge], word] = edge
        masks[state[edge], word] |= np.uint64(1) << np.uint64(symbol[edge] & 63)
    return 0


@compiled("int64(int32[::1], float64[::1], int32[::1], float64[::1], float64[::1])")
def _reach(state, factors, fail, backoff, reach):  # type: ignore[no-untyped-def]
    """Fill ``reach``, which comes with zeros: a state falls back to an earlier one."""
    for edge in range(len(state)):
        reach[state[edge]] = max(reach[state[edge]], factors[edge])
    for index in range(1, len(fail)):
        reach[index] = max(reach[index], backoff[index] * reach[fail[index]])
    for index in range(len(reach)):
        reach[index] *= 1.0 + 1e-9  # products are rounded, and nothing within reach may be left out
    return 0


@inner(inline=True)
def _ones(word):  # type: ignore[no-untyped-def]
    """How many bits of a uint64 are set (Warren, Hacker's Delight, 2nd edition, 5-1)."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@inner(inline=True)
def advance(state, symbol, masks, firsts, following, factors, fail, backoff):  # type: ignore[no-untyped-def]
    """State after one more symbol, and the factor that it costs."""
    factor = 1.0
    column = np.uint64(symbol >> 6)
    bit = np.uint64(1) << np.uint64(symbol & 63)
    while True:
        place = np.uint64(state)  # numba asks of every signed index whether it is below 0
        word = masks[place, column]
        if word & bit != np.uint64(0):
            edge = np.uint64(firsts[place, column] + _ones(word & (bit - np.uint64(1))))
            return following[edge], factor * factors[edge]
        factor *= backoff[place]
        state = fail[place]


@compiled(
    "float64(int32[::1], int64, uint64[:,::1], int32[:,::1], int32[::1], float64[::1], int32[::1], "
    "float64[::1])"
)
def _score(symbols, state, masks, firsts, following, factors, fail, backoff):  # type: ignore[no-untyped-def]
    total = 0.0
    for symbol in symbols:
        state, factor = advance(state, symbol, masks, firsts, following, factors, fail, backoff)
        total += math.log(factor)
    if len(symbols) > 0:
        state, factor = advance(state, SPACE, masks, firsts, following, factors, fail, backoff)
        total += math.log(factor)
    return total
