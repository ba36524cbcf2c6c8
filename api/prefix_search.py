"""The compiled prefix beam search; see ``beam.py`` for what it is and how to call it.

- Probabilities are linear and rescaled every frame, so no log-add is needed.
- A frame whose blank is nearly certain only updates the entries (exactly), it extends none.
- Per frame only the best few tokens above a floor extend entries; merging into entries already in the beam is
  exact whatever their token, by a 64-bit rolling hash of the prefix.
- A min-heap of the beam's size bounds what an extension must score, so most are never built.
- With hotwords a second heap of that size ranks without the credits that may still be taken back, and what is
  in either stays. However much half a hotword weighs, the texts that it would drive out are there when it
  does not come true, as they are without hotwords.

Hotwords (``hotwords.py``) and the language model (``ngram.py``) are a state per entry each, and share its
weight; either costs nothing while there is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from api.compiled import compiled, inner
from api.hotwords import (
    DEAD,
    POWERS,
    REACH,
    ROOT,
    SAFE_REACH,
    SPACE,
    SURE,
    HotwordAutomaton,
    Symbols,
    finish,
    step,
)
from api.ngram import NgramModel, advance

_NO_SYMBOLS = Symbols(np.zeros(1, np.int32), np.zeros(1, np.int32), {})
_0, _1 = np.uint64(0), np.uint64(1)  # of indices: numba asks of every signed one whether it is below 0
_ONE, _NONE = np.ones(1, np.float64), np.zeros(1, np.int32)
_NO_TRIE = (np.zeros((2, 2), np.int64), np.full((1, 4), DEAD, np.int32), np.ones((1, 4), np.float64))
_NO_NGRAM = (np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.int32), _NONE, _ONE, _NONE, _ONE, _ONE)


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What a search has found: the ``leaves`` int32 and ``scores`` float64 of the entries, any order.

    ``parents`` and ``tokens`` int32 are the tree that all prefixes share; node 0 is the empty one.
    """

    leaves: NDArray[np.int32]
    scores: NDArray[np.float64]
    parents: NDArray[np.int32]
    tokens: NDArray[np.int32]

    def spell(self, entry: int) -> NDArray[np.int32]:
        """Token ids of an entry, int32 ``(tokens,)``."""
        found = np.empty(len(self.tokens), np.int32)
        return found[_spell(int(self.leaves[entry]), self.parents, self.tokens, found) :].copy()


def search(
    log_probs: NDArray[np.float32],
    blank_id: int,
    beam: int,
    max_tokens: int,
    cuts: tuple[float, float, float, float],
    hotwords: HotwordAutomaton | None,
    guide: NgramModel | None,
) -> Prefixes:
    """All frames of ``log_probs`` float32 ``(frames, vocabulary)``, contiguous.

    ``cuts``: least log-posterior of a token, blank posterior from which a frame extends nothing, least share
    of the best entry's score, and least share of the best token's posterior that a hotword may gain by.
    """
    symbols, trie, boost, most_gain, width = _NO_SYMBOLS, _NO_TRIE, 0.0, 1.0, beam
    ngram, start, most = _NO_NGRAM, 0, 1.0
    if hotwords is not None:
        symbols, trie = hotwords.symbols, (hotwords.edges, hotwords.states, hotwords.factors)
        boost, most_gain, width = hotwords.boost, hotwords.most, 2 * beam
    if guide is not None:
        symbols, start, most = guide.symbols, guide.start, guide.most
        ngram = (
            guide.masks,
            guide.firsts,
            guide.following,
            guide.factors,
            guide.fail,
            guide.backoff,
            guide.reach,
        )
    frames, candidates = len(log_probs), width * (max_tokens + 1)
    tree = np.zeros((2, frames * width + 1), np.int32)
    leaves, scores = np.zeros(width, np.int32), np.zeros(width, np.float64)
    entries = _search(
        *(log_probs, blank_id, beam, max_tokens, *cuts),
        *(symbols.flat, symbols.offsets, symbols.count),
        *(hotwords is not None, boost, most_gain, *trie),
        *(guide is not None, start, most, *ngram),
        *(tree[0], tree[1], leaves, scores),
        np.zeros((9, width), np.float64),
        np.zeros((16, width), np.int32),
        np.zeros((4, width), np.uint64),
        np.zeros((2, candidates), np.float64),
        np.zeros((5, candidates), np.int32),
        np.zeros(max_tokens + 1, np.int32),
        np.zeros(max_tokens + 1, np.float32),
        np.zeros(log_probs.shape[1], np.float64),
        np.full(log_probs.shape[1], -1, np.int32),
        np.ones(2 * POWERS + 1, np.float64),
    )
    return Prefixes(leaves[:entries], scores[:entries], tree[0], tree[1])


@compiled("int64(int64, int32[::1], int32[::1], int32[::1])")
def _spell(leaf, parents, tokens, found):  # type: ignore[no-untyped-def]
    """Write the tokens from the root to ``leaf`` to the end of ``found``; where they begin."""
    position = len(found)
    node = leaf
    while node != 0:
        position -= 1
        found[position] = tokens[node]
        node = np.int64(parents[node])
    return position


@inner()
def _best_tokens(row, blank, limit, floor, chosen, values):  # type: ignore[no-untyped-def]
    """The best ``limit`` non-blank tokens above the floor, best first; ties keep the lower id first."""
    count = 0
    for token in range(len(row)):
        value = row[token]
        if value < floor or token == blank:
            continue
        if count == limit:
            if value <= values[count - 1]:
                continue
            position = count - 1
        else:
            position = count
            count += 1
        while position > 0 and values[position - 1] < value:
            values[position] = values[position - 1]
            chosen[position] = chosen[position - 1]
            position -= 1
        values[position] = value
        chosen[position] = token
    return count


@inner(inline=True)
def _posterior(row, token, frame, posteriors, posteriors_of):  # type: ignore[no-untyped-def]
    """A token's posterior in this frame, computed once: many entries end in the same token."""
    if posteriors_of[token] != frame:
        posteriors[token] = math.exp(row[token])
        posteriors_of[token] = frame
    return posteriors[token]


@inner(inline=True)
def _push(heap, heap_items, size, limit, score, item):  # type: ignore[no-untyped-def]
    """Keep the ``limit`` best (score, item) in a min-heap; the caller has checked that it gets in."""
    if size < limit:
        position = np.uint64(size)
        while position > _0 and heap[(position - _1) >> _1] > score:
            heap[position] = heap[(position - _1) >> _1]
            heap_items[position] = heap_items[(position - _1) >> _1]
            position = (position - _1) >> _1
        heap[position] = score
        heap_items[position] = item
        return size + 1
    position = _0
    end = np.uint64(size)
    while True:
        child = (position << _1) + _1
        if child >= end:
            break
        if child + _1 < end and heap[child + _1] < heap[child]:
            child += _1
        if heap[child] >= score:
            break
        heap[position] = heap[child]
        heap_items[position] = heap_items[child]
        position = child
    heap[position] = score
    heap_items[position] = item
    return size


@compiled(
    "int64(float32[:,::1], int64, int64, int64, float64, float64, float64, float64, "
    "int32[::1], int32[::1], int64, "
    "int64, float64, float64, int64[:,::1], int32[:,::1], float64[:,::1], "
    "int64, int64, float64, uint64[:,::1], int32[:,::1], int32[::1], float64[::1], int32[::1], float64[::1], "
    "float64[::1], "
    "int32[::1], int32[::1], int32[::1], float64[::1], "
    "float64[:,::1], int32[:,::1], uint64[:,::1], float64[:,::1], int32[:,::1], int32[::1], float32[::1], "
    "float64[::1], int32[::1], float64[::1])"
)
def _search(  # type: ignore[no-untyped-def]
    log_probs, blank, beam, max_tokens, token_floor, blank_skip, beam_cut, hotword_cut,
    flat, offsets, symbol_count,
    boosted, boost, most_gain, edges, states, hotword_factors,
    guided, start, most, masks, firsts, following_gram, factors, fail, backoff, gram_reach,
    parents, tokens, leaves, scores,
    floats, integers, hashes, likelihoods, origins, chosen, values, posteriors, posteriors_of, powers,
):  # fmt: skip
    """All frames; how many entries are in the beam at the end. What comes last is room to work in.

    Arrays of entries have two rows, the current frame's and the next one's. ``ended``/``held``: probability
    of the prefix ending in blank / in its last token. ``weight``: e to the boosts, times the language model's
    factors. Both are rescaled by their largest value every frame; ``log_scale`` remembers by how much.
    ``above``: the entry whose prefix is this one without its last token, -1 where that is not in the beam.
    ``safe`` scores, and their heap, are without the credits that may still be taken back.
    """
    frames = log_probs.shape[0]
    ended, held, weight = floats[0:2], floats[2:4], floats[4:6]
    candidate_ended, heap, safe_heap = floats[6], floats[7], floats[8]
    node, last, state, gram = integers[0:2], integers[2:4], integers[4:6], integers[6:8]
    heap_items, first_child, next_sibling, safe_items = integers[8], integers[9], integers[10], integers[11]
    above, place, new_entries = integers[12:14], integers[14], integers[15]
    prefix_hash, parent_hash = hashes[0:2], hashes[2:4]
    candidate_probability, candidate_weight = likelihoods[0], likelihoods[1]
    candidate_state, candidate_gram, candidate_from, candidate_token, kept_already = (
        origins[0], origins[1], origins[2], origins[3], origins[4],
    )  # fmt: skip
    last[0, 0] = -1
    above[0, 0] = -1
    state[0, 0] = ROOT
    gram[0, 0] = start
    weight[0, 0] = 1.0
    nodes = 1
    ended[0, 0] = 1.0
    entries = 1
    now = 0
    log_scale = 0.0
    most_factor = 1.0
    longest = 1
    for token in range(len(offsets) - 1):
        longest = max(longest, offsets[token + 1] - offsets[token])
    if guided:
        most_factor = max(1.0, most ** (longest - 1))  # of the symbols behind a token's first
    if boosted:
        most_gain **= longest - 1
        for gain in range(-POWERS, POWERS + 1):
            powers[gain + POWERS] = math.exp(boost * gain)
    for frame in range(frames):
        row = log_probs[frame]
        blank_probability = math.exp(row[blank])
        if blank_probability >= blank_skip:
            largest = 0.0
            for entry in range(entries):
                total = ended[now, entry] + held[now, entry]
                if held[now, entry] > 0.0:
                    held[now, entry] *= _posterior(row, last[now, entry], frame, posteriors, posteriors_of)
                ended[now, entry] = total * blank_probability
                largest = max(largest, ended[now, entry] + held[now, entry])
            log_scale += math.log(largest)
            scale = 1.0 / largest
            for entry in range(entries):
                ended[now, entry] *= scale
                held[now, entry] *= scale
            continue
        # Entries that stay what they are, and extensions that lead to another entry of the beam.
        for entry in range(entries):
            first_child[entry] = -1
            next_sibling[entry] = -1
        for entry in range(entries):
            candidate_ended[entry] = (ended[now, entry] + held[now, entry]) * blank_probability
            candidate_probability[entry] = 0.0
            token = last[now, entry]
            if token < 0:
                continue
            probability = held[now, entry]
            source = above[now, entry]
            if source >= 0:
                next_sibling[entry] = first_child[source]
                first_child[source] = entry
                probability += ended[now, source]
                if last[now, source] != token:
                    probability += held[now, source]
            candidate_probability[entry] = probability * _posterior(
                row, token, frame, posteriors, posteriors_of
            )
        best = 0.0
        safe_best = 0.0
        size = 0
        safe_size = 0
        for entry in range(entries):
            score = (candidate_ended[entry] + candidate_probability[entry]) * weight[now, entry]
            best = max(best, score)
            if size < beam or score > heap[0]:
                size = _push(heap, heap_items, size, beam, score, entry)
            if boosted:
                kept_already[entry] = 0
                if state[now, entry] != DEAD:
                    score *= hotword_factors[state[now, entry], SURE]
                safe_best = max(safe_best, score)
                if safe_size < beam or score > safe_heap[0]:
                    safe_size = _push(safe_heap, safe_items, safe_size, beam, score, entry)
        # Extensions to new prefixes.
        count = _best_tokens(row, blank, max_tokens, token_floor, chosen, values)
        candidates = entries
        for index in range(count):
            values[index] = _posterior(row, chosen[index], frame, posteriors, posteriors_of)
        winner = max(blank_probability, values[0]) if count > 0 else blank_probability
        for entry in range(entries):
            total = ended[now, entry] + held[now, entry]
            reach = 1.0
            safe_reach = 1.0
            if boosted and state[now, entry] != DEAD:  # else no first symbol gains
                reach = hotword_factors[state[now, entry], REACH]
                safe_reach = hotword_factors[state[now, entry], SAFE_REACH]
            if longest > 1:
                reach *= most_gain
                safe_reach = reach
            if guided:
                most_after = most_factor * max(1.0, gram_reach[gram[now, entry]])
                reach *= most_after
                safe_reach *= most_after
            for index in range(count):
                token = chosen[index]
                bound = best * beam_cut
                if size == beam:
                    bound = max(bound, heap[0])
                score = total * values[index] * weight[now, entry]
                if boosted:
                    safe_bound = safe_best * beam_cut
                    if safe_size == beam:
                        safe_bound = max(safe_bound, safe_heap[0])
                    if score * reach <= bound:
                        if score * reach <= safe_bound:
                            break
                        spelled = offsets[token]
                        spaced = spelled < offsets[token + 1] and flat[spelled] == SPACE
                        if score * safe_reach <= safe_bound and not spaced:
                            continue  # of single symbols, only the space makes credits sure
                elif score * reach <= bound:
                    break
                probability = total * values[index]
                if token == last[now, entry]:
                    probability = ended[now, entry] * values[index]
                child = first_child[entry]
                while child >= 0 and last[now, child] != token:
                    child = next_sibling[child]
                if child >= 0:  # in the beam already
                    continue
                following = state[now, entry]
                new_gram = gram[now, entry]
                new_weight = weight[now, entry]
                if boosted:
                    gain = 0
                    for position in range(offsets[token], offsets[token + 1]):
                        if following != DEAD or flat[position] == SPACE:
                            following, change = step(following, flat[position], symbol_count, edges, states)
                            gain += change
                    if gain > 0 and values[index] < winner * hotword_cut:
                        continue
                    if gain != 0:
                        new_weight *= powers[min(max(gain, -POWERS), POWERS) + POWERS]
                if guided:
                    for position in range(offsets[token], offsets[token + 1]):
                        new_gram, factor = advance(
                            new_gram,
                            flat[position],
                            masks,
                            firsts,
                            following_gram,
                            factors,
                            fail,
                            backoff,
                        )
                        new_weight *= factor
                score = probability * new_weight
                safe_score = score
                if boosted and following != DEAD:
                    safe_score *= hotword_factors[following, SURE]
                if score <= bound and (not boosted or safe_score <= safe_bound):
                    continue
                candidate_probability[candidates] = probability
                candidate_weight[candidates] = new_weight
                candidate_state[candidates] = following
                candidate_gram[candidates] = new_gram
                candidate_from[candidates] = entry
                candidate_token[candidates] = token
                if score > bound:
                    size = _push(heap, heap_items, size, beam, score, candidates)
                    best = max(best, score)
                if boosted:
                    kept_already[candidates] = 0
                    if safe_score > safe_bound:
                        safe_size = _push(safe_heap, safe_items, safe_size, beam, safe_score, candidates)
                        safe_best = max(safe_best, safe_score)
                candidates += 1
        if not best > 0.0:  # nothing is possible any more (underflow): leave the frame out
            continue
        # The survivors become the next frame's entries.
        following_row = 1 - now
        kept = 0
        largest = 0.0
        largest_weight = 0.0
        for entry in range(entries):
            place[entry] = -1
        added = 0
        for index in range(size + safe_size):
            if index < size:
                if heap[index] < best * beam_cut or heap[index] <= 0.0:
                    continue
                item = heap_items[index]
                kept_already[item] = 1
            else:
                score = safe_heap[index - size]
                item = safe_items[index - size]
                if score < safe_best * beam_cut or score <= 0.0 or kept_already[item] == 1:
                    continue
            held[following_row, kept] = candidate_probability[item]
            if item < entries:
                ended[following_row, kept] = candidate_ended[item]
                weight[following_row, kept] = weight[now, item]
                node[following_row, kept] = node[now, item]
                last[following_row, kept] = last[now, item]
                prefix_hash[following_row, kept] = prefix_hash[now, item]
                parent_hash[following_row, kept] = parent_hash[now, item]
                state[following_row, kept] = state[now, item]
                gram[following_row, kept] = gram[now, item]
                above[following_row, kept] = above[now, item]
                place[item] = kept
            else:
                source_entry = candidate_from[item]
                token = candidate_token[item]
                parents[nodes] = node[now, source_entry]
                tokens[nodes] = token
                ended[following_row, kept] = 0.0
                weight[following_row, kept] = candidate_weight[item]
                node[following_row, kept] = nodes
                last[following_row, kept] = token
                hashed = prefix_hash[now, source_entry]
                parent_hash[following_row, kept] = hashed
                mixed = (hashed ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15)
                prefix_hash[following_row, kept] = mixed ^ (mixed >> np.uint64(29))
                state[following_row, kept] = candidate_state[item]
                gram[following_row, kept] = candidate_gram[item]
                above[following_row, kept] = source_entry
                new_entries[added] = kept
                added += 1
                nodes += 1
            largest = max(largest, ended[following_row, kept] + held[following_row, kept])
            largest_weight = max(largest_weight, weight[following_row, kept])
            kept += 1
        scale = 1.0 / largest
        weight_scale = 1.0 / largest_weight
        for entry in range(kept):
            ended[following_row, entry] *= scale
            held[following_row, entry] *= scale
            weight[following_row, entry] *= weight_scale
            source = above[following_row, entry]
            if source >= 0:
                source = place[source]
            if source < 0 and last[following_row, entry] >= 0:  # it may be back
                for index in range(added):
                    if prefix_hash[following_row, new_entries[index]] == parent_hash[following_row, entry]:
                        source = new_entries[index]
                        break
            above[following_row, entry] = source
        log_scale += math.log(largest) + math.log(largest_weight)
        entries = kept
        now = following_row
    for entry in range(entries):
        leaves[entry] = node[now, entry]
        total = (ended[now, entry] + held[now, entry]) * weight[now, entry]
        scores[entry] = (math.log(total) if total > 0.0 else -np.inf) + log_scale
        if boosted:
            scores[entry] += boost * finish(state[now, entry], states)
        if guided and last[now, entry] >= 0:
            _, factor = advance(
                gram[now, entry], SPACE, masks, firsts, following_gram, factors, fail, backoff
            )
            scores[entry] += math.log(factor)
    return entries
