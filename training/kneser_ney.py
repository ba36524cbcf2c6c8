"""Texts -> a character n-gram language model, as the service's table.

Smoothing: interpolated modified Kneser-Ney (Chen and Goodman 1999). Rare n-grams are dropped and the
back-off weights normalised again, so the probabilities after each context sum to one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from api.ngram import NgramTable
from training.errors import DataError

ORDER = 7
MIN_COUNT = 2
"""Of n-grams longer than three characters."""
_SPACE = " "

Probabilities = dict[str, dict[str, float]]
"""Context -> character after it -> probability."""


def character_ngrams(texts: Iterable[str], order: int = ORDER, min_count: int = MIN_COUNT) -> NgramTable:
    """The language model of `texts`, each read as if it stood between two spaces.

    Raises DataError where there is no text.
    """
    counts = _count(texts, order)
    symbols = [_SPACE, *sorted(set(counts[0][""]) - {_SPACE})] if counts[0][""] else []
    if len(symbols) < 2:
        raise DataError("the language model has no text to learn from")
    kept = {
        context: {
            character: probability
            for character, probability in after.items()
            if len(context) < 3 or counts[len(context)][context][character] >= min_count
        }
        for context, after in _kneser_ney(counts, symbols).items()
    }
    return _table({context: after for context, after in kept.items() if after}, symbols, order)


def _table(states: Probabilities, symbols: Sequence[str], order: int) -> NgramTable:
    """A context is a state if it has edges; so are its suffixes, which are at least as frequent."""
    contexts = sorted(states, key=lambda context: (len(context), context))
    state_of = {context: index for index, context in enumerate(contexts)}
    symbol_of = {symbol: index for index, symbol in enumerate(symbols)}

    def lower(context: str) -> str:
        """The longest proper suffix that is a state."""
        return next(context[cut:] for cut in range(1, len(context) + 1) if context[cut:] in state_of)

    def probability_of(context: str, character: str) -> float:
        factor = 1.0
        while character not in states[context]:
            factor *= backoff[context]
            context = lower(context)
        return factor * states[context][character]

    backoff: dict[str, float] = {"": 1.0}
    for context in contexts[1:]:
        shorter = lower(context)
        left = 1.0 - sum(states[context].values())
        below = 1.0 - sum(probability_of(shorter, character) for character in states[context])
        backoff[context] = max(left, 1e-9) / max(below, 1e-9)
    edges = []
    for context in contexts:
        for character, probability in sorted(states[context].items()):
            longest = (context + character)[-(order - 1) :]
            after = longest if longest in state_of else lower(longest)
            edges.append((state_of[context], symbol_of[character], state_of[after], np.log(probability)))
    state, symbol, after_state, log_prob = zip(*edges, strict=True)
    return NgramTable(
        symbols=np.array([ord(symbol) for symbol in symbols], np.int32),
        fail=np.array([-1, *(state_of[lower(context)] for context in contexts[1:])], np.int32),
        backoff=np.log([backoff[context] for context in contexts]).astype(np.float32),
        edge_state=np.array(state, np.int32),
        edge_symbol=np.array(symbol, np.int32),
        edge_next=np.array(after_state, np.int32),
        edge_log_prob=np.minimum(np.array(log_prob, np.float32), 0.0),
    )


Counts = list[defaultdict[str, Counter[str]]]
"""For each context length: context -> characters after it."""


def _count(texts: Iterable[str], order: int) -> Counts:
    counts: Counts = [defaultdict(Counter) for _ in range(order)]
    for text in texts:
        words = [word for word in text.split(_SPACE) if word]
        line = _SPACE + _SPACE.join(words) + _SPACE
        for position in range(1, len(line)) if len(line) > 2 else ():
            for length in range(min(order, position + 1)):
                counts[length][line[position - length : position]][line[position]] += 1
    return counts


def _continuations(counts: Counts) -> Counts:
    """What counts of the shorter n-grams: after how many different characters one occurs.

    The start of a text is one of these; the longest n-grams keep their counts (Kneser and Ney 1995).
    """
    found: Counts = [defaultdict(Counter) for _ in counts[:-1]]
    for target, shorter, longer in zip(found, counts, counts[1:], strict=False):
        extended: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for context, after in longer.items():
            for character, times in after.items():
                target[context[1:]][character] += 1
                extended[context[1:]][character] += times
        for context, after in shorter.items():
            for character, times in after.items():
                target[context][character] += times > extended[context][character]
    return [*found, counts[-1]]


def _discounts(contexts: Mapping[str, Counter[str]]) -> tuple[float, ...]:
    """What a count of 0, 1, 2, and 3 or more gives away (Chen and Goodman 1999, equation 26).

    Where texts are so few that the estimate leaves its range, the nearest value inside it.
    """
    seen = Counter(times for after in contexts.values() for times in after.values())
    share = seen[1] / (seen[1] + 2 * seen[2]) if seen[1] else 0.5
    found = [0.0]
    for times in (1, 2, 3):
        ratio = seen[times + 1] / seen[times] if seen[times] else 0.0
        found.append(min(max(times - (times + 1) * share * ratio, 0.05), 0.95 * times))
    return tuple(found)


def _kneser_ney(counts: Counts, symbols: Sequence[str]) -> Probabilities:
    """Each probability interpolated with the context one character shorter."""
    found: Probabilities = {}
    for length, contexts in enumerate(_continuations(counts)):
        discounts = _discounts(contexts)
        for context, after in contexts.items():
            total = sum(after.values())
            given_away = sum(discounts[min(times, 3)] for times in after.values())
            characters = symbols if length == 0 else after
            below = found[context[1:]] if length else dict.fromkeys(symbols, 1.0 / len(symbols))
            found[context] = {
                c: (after[c] - discounts[min(after[c], 3)] + given_away * below[c]) / total
                for c in characters
            }
    return found
