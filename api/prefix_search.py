"""The compiled prefix beam search; see ``beam.py`` for what it is and how to call it.

- Probabilities are linear and rescaled every frame, so no log-add is needed.
- A frame whose blank is nearly certain only updates the entries (exactly), it extends none.
- Per frame only the best few tokens above a floor extend entries; merging into entries already in the beam is
  exact whatever their token, by a 64-bit rolling hash of the prefix.
- A min-heap of the beam's size bounds what an extension must score, so most are never built.

Hotwords (``hotwords.py``) and the language model (``ngram.py``) are a state per entry each, and share its
weight; either costs nothing while there is none.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from api.hotwords import DEAD, ROOT, SPACE, finish, step
from api.ngram import advance

POWERS = 128  # most credits one token can change


@njit(cache=True, nogil=True, error_model="numpy")
def trace(leaf, parents, tokens):  # type: ignore[no-untyped-def]
    length = 0
    node = leaf
    while node != 0:
        length += 1
        node = parents[node]
    found = np.empty(length, np.int32)
    node = leaf
    while node != 0:
        length -= 1
        found[length] = tokens[node]
        node = parents[node]
    return found


@njit(cache=True, nogil=True, error_model="numpy")
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


@njit(cache=True, nogil=True, inline="always")
def _push(heap, heap_items, size, limit, score, item):  # type: ignore[no-untyped-def]
    """Keep the ``limit`` best (score, item) in a min-heap; the caller has checked that it gets in."""
    if size < limit:
        position = size
        while position > 0 and heap[(position - 1) >> 1] > score:
            heap[position] = heap[(position - 1) >> 1]
            heap_items[position] = heap_items[(position - 1) >> 1]
            position = (position - 1) >> 1
        heap[position] = score
        heap_items[position] = item
        return size + 1
    position = 0
    while True:
        child = 2 * position + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= score:
            break
        heap[position] = heap[child]
        heap_items[position] = heap_items[child]
        position = child
    heap[position] = score
    heap_items[position] = item
    return size


@njit(cache=True, nogil=True, error_model="numpy")
def search(log_probs, options, symbols, symbol_count, boosted, boost, trie, guided, ngram):  # type: ignore[no-untyped-def]
    """All frames; returns leaf node and score of each entry, and the tree of prefixes.

    Arrays of entries have two rows, the current frame's and the next one's. ``ended``/``held``: probability
    of the prefix ending in blank / in its last token. ``weight``: e to the boosts, times the language model's
    factors. Both are rescaled by their largest value every frame; ``log_scale`` remembers by how much.
    """
    blank, beam, max_tokens, token_floor, blank_skip, beam_cut, hotword_cut = options
    flat, offsets = symbols
    edges, states = trie
    start, most, slots, following_gram, factors, fail, backoff = ngram
    frames = log_probs.shape[0]
    parents = np.zeros(frames * beam + 1, np.int32)
    tokens = np.full(frames * beam + 1, -1, np.int32)
    nodes = 1
    ended = np.zeros((2, beam), np.float64)
    held = np.zeros((2, beam), np.float64)
    weight = np.ones((2, beam), np.float64)
    node = np.zeros((2, beam), np.int32)
    last = np.full((2, beam), -1, np.int32)
    prefix_hash = np.zeros((2, beam), np.uint64)
    parent_hash = np.zeros((2, beam), np.uint64)
    state = np.full((2, beam), ROOT, np.int32)
    gram = np.full((2, beam), start, np.int32)
    capacity = beam * (max_tokens + 1)
    candidate_ended = np.zeros(beam, np.float64)
    candidate_probability = np.zeros(capacity, np.float64)
    candidate_weight = np.zeros(capacity, np.float64)
    candidate_state = np.zeros(capacity, np.int32)
    candidate_gram = np.zeros(capacity, np.int32)
    candidate_from = np.zeros(capacity, np.int32)
    candidate_token = np.zeros(capacity, np.int32)
    heap = np.zeros(beam, np.float64)
    heap_items = np.zeros(beam, np.int32)
    chosen = np.zeros(max_tokens + 1, np.int32)
    values = np.zeros(max_tokens + 1, np.float32)
    first_child = np.zeros(beam, np.int32)
    next_sibling = np.zeros(beam, np.int32)
    powers = np.ones(2 * POWERS + 1, np.float64)
    ended[0, 0] = 1.0
    entries = 1
    now = 0
    log_scale = 0.0
    most_gain = 1.0
    most_factor = 1.0
    longest = 1
    for token in range(len(offsets) - 1):
        longest = max(longest, offsets[token + 1] - offsets[token])
    if guided:
        most_factor = max(1.0, most**longest)
    if boosted:
        most_gain = math.exp(boost * longest)
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
                    held[now, entry] *= math.exp(row[last[now, entry]])
                ended[now, entry] = total * blank_probability
                largest = max(largest, ended[now, entry] + held[now, entry])
            log_scale += math.log(largest)
            for entry in range(entries):
                ended[now, entry] /= largest
                held[now, entry] /= largest
            continue
        # Entries that stay what they are, and extensions that lead to another entry of the beam.
        for entry in range(entries):
            total = ended[now, entry] + held[now, entry]
            candidate_ended[entry] = total * blank_probability
            candidate_probability[entry] = 0.0
            if last[now, entry] >= 0:
                candidate_probability[entry] = held[now, entry] * math.exp(row[last[now, entry]])
            first_child[entry] = -1
        for child in range(entries):
            next_sibling[child] = -1
            if last[now, child] < 0:
                continue
            for entry in range(entries):
                if prefix_hash[now, entry] == parent_hash[now, child]:
                    next_sibling[child] = first_child[entry]
                    first_child[entry] = child
                    source = ended[now, entry]
                    if last[now, entry] != last[now, child]:
                        source += held[now, entry]
                    candidate_probability[child] += source * math.exp(row[last[now, child]])
                    break
        best = 0.0
        size = 0
        for entry in range(entries):
            score = (candidate_ended[entry] + candidate_probability[entry]) * weight[now, entry]
            best = max(best, score)
            size = _push(heap, heap_items, size, beam, score, entry)
        # Extensions to new prefixes.
        count = _best_tokens(row, blank, max_tokens, token_floor, chosen, values)
        candidates = entries
        for index in range(count):
            values[index] = math.exp(values[index])
        winner = max(blank_probability, values[0]) if count > 0 else blank_probability
        for entry in range(entries):
            total = ended[now, entry] + held[now, entry]
            reach = most_factor
            if boosted and (state[now, entry] != DEAD or longest > 1):
                reach *= most_gain  # in the middle of a word that no hotword starts, no token gains
            for index in range(count):
                token = chosen[index]
                bound = best * beam_cut
                if size == beam:
                    bound = max(bound, heap[0])
                if total * values[index] * weight[now, entry] * reach <= bound:
                    break
                probability = total * values[index]
                if token == last[now, entry]:
                    probability = ended[now, entry] * values[index]
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
                            symbol_count,
                            slots,
                            following_gram,
                            factors,
                            fail,
                            backoff,
                        )
                        new_weight *= factor
                score = probability * new_weight
                if score <= bound:
                    continue
                child = first_child[entry]
                while child >= 0 and last[now, child] != token:
                    child = next_sibling[child]
                if child >= 0:
                    continue
                candidate_probability[candidates] = probability
                candidate_weight[candidates] = new_weight
                candidate_state[candidates] = following
                candidate_gram[candidates] = new_gram
                candidate_from[candidates] = entry
                candidate_token[candidates] = token
                size = _push(heap, heap_items, size, beam, score, candidates)
                candidates += 1
                best = max(best, score)
        if not best > 0.0:  # nothing is possible any more (underflow): leave the frame out
            continue
        # The survivors become the next frame's entries.
        following_row = 1 - now
        kept = 0
        largest = 0.0
        largest_weight = 0.0
        for index in range(size):
            if heap[index] < best * beam_cut or heap[index] <= 0.0:
                continue
            item = heap_items[index]
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
            else:
                source_entry = candidate_from[item]
                token = candidate_token[item]
                parents[nodes] = node[now, source_entry]
                tokens[nodes] = token
                ended[following_row, kept] = 0.0
                weight[following_row, kept] = candidate_weight[item]
                node[following_row, kept] = nodes
                last[following_row, kept] = token
                above = prefix_hash[now, source_entry]
                parent_hash[following_row, kept] = above
                mixed = (above ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15)
                prefix_hash[following_row, kept] = mixed ^ (mixed >> np.uint64(29))
                state[following_row, kept] = candidate_state[item]
                gram[following_row, kept] = candidate_gram[item]
                nodes += 1
            largest = max(largest, ended[following_row, kept] + held[following_row, kept])
            largest_weight = max(largest_weight, weight[following_row, kept])
            kept += 1
        for entry in range(kept):
            ended[following_row, entry] /= largest
            held[following_row, entry] /= largest
            weight[following_row, entry] /= largest_weight
        log_scale += math.log(largest) + math.log(largest_weight)
        entries = kept
        now = following_row
    leaves = node[now, :entries].copy()
    scores = np.empty(entries, np.float64)
    for entry in range(entries):
        total = (ended[now, entry] + held[now, entry]) * weight[now, entry]
        scores[entry] = (math.log(total) if total > 0.0 else -np.inf) + log_scale
        if boosted:
            scores[entry] += boost * finish(state[now, entry], states)
        if guided and last[now, entry] >= 0:
            _, factor = advance(
                gram[now, entry], SPACE, symbol_count, slots, following_gram, factors, fail, backoff
            )
            scores[entry] += math.log(factor)
    return leaves, scores, parents, tokens
