"""Choosing a token: a row of logits -> the ids that may be chosen, their weights, and one of them.

One call a token. A decode step leaves the caches full of weights, and a NumPy function then takes 10 us instead of 1:
the twenty that this took before were 4 % of a step of the 350M model.

The order is llama.cpp's: bias, penalties, top-k, top-p, min-p, and the temperature last. A vocabulary has 65,536 ids or
more, so nothing here sorts all of it. A candidate is an id and its logit, in two arrays.
"""

from __future__ import annotations

import numpy as np

from .compiler import F32, device, kernel
from .math import exp
from .scalar import load_f32 as load_scalar
from .scalar import load_f64, load_i32, store_f64, store_i32, store_i64
from .scalar import store_f32 as store_scalar
from .simd import W, fma, keep_first, load_f32, max_lanes, maximum, splat_f32, store_f32, sum_lanes
from .widths import LOGITS_BINS, LOGITS_GROUP

LOWEST = -3.4028234663852886e38  # a finite float32; -inf marks what may not be chosen
UNIT = 2.0**-53
BINS_A_UNIT = 32  # of logits: the last bin begins 16 below the best
WORST_FIRST, BEST_FIRST = 1, -1  # orders of a heap


@device
def find_non_finite(x, n):
    """The first of n logits that is NaN or infinite, or -1."""
    sums, whole = splat_f32(0.0), n // W * W
    for i in range(0, whole, W):
        sums = fma(load_f32(x + 4 * i), splat_f32(0.0), sums)  # 0 times NaN and 0 times infinity are NaN
    first = 0 if sum_lanes(sums) != 0 else whole
    for i in range(first, n):
        if load_scalar(x + 4 * i) * 0 != 0:
            return i
    return -1


@device
def penalize(x, n, recent, n_recent, counts, repeat, frequency, presence):
    """Lower the logit of each id among the n_recent at `recent`, where it stands counts[id] times.

    Once an id: its count is negative until all are done.
    """
    for i in range(n_recent):
        token = load_i32(recent + 4 * i)
        count = load_i32(counts + 4 * token)
        value = load_scalar(x + 4 * token) if token < n else np.float32(-np.inf)
        if count > 0 and value >= LOWEST:
            value = value * repeat if value <= 0 else value / repeat
            store_scalar(x + 4 * token, max(min(value - (count * frequency + presence), -LOWEST), LOWEST))
            store_i32(counts + 4 * token, -count)
    for i in range(n_recent):
        at = counts + 4 * load_i32(recent + 4 * i)
        store_i32(at, abs(load_i32(at)))


@device
def find_maxima(x, n, maxima):
    """maxima: the largest of each LOGITS_GROUP logits; the last group is filled up with -inf. Returns the largest."""
    best = load_f32(x)
    for group in range((n + LOGITS_GROUP - 1) // LOGITS_GROUP):
        at = x + 4 * LOGITS_GROUP * group
        peak = load_f32(at)
        for i in range(W, LOGITS_GROUP, W):
            peak = maximum(load_f32(at + 4 * i), peak)
        store_scalar(maxima + 4 * group, max_lanes(peak))
        best = maximum(peak, best)
    return max_lanes(best)


@device
def put(ids, values, i, token, value):
    store_i32(ids + 4 * i, token)
    store_scalar(values + 4 * i, value)


@device
def keep_at_least(x, n, maxima, floor, ids, values):
    """Candidates: every id whose logit is at least `floor`, in order. Returns how many."""
    count = 0
    for group in range((n + LOGITS_GROUP - 1) // LOGITS_GROUP):
        if load_scalar(maxima + 4 * group) >= floor:
            for token in range(LOGITS_GROUP * group, LOGITS_GROUP * (group + 1)):
                value = load_scalar(x + 4 * token)
                if value >= floor:
                    put(ids, values, count, token, value)
                    count += 1
    return count


@device
def comes_before(a, i, b, j, order):
    """Whether the candidate of logit a and id i is before that of b and j. Of equals the lower id is the better one."""
    is_better = a > b or (a == b and i < j)
    return is_better == (order == BEST_FIRST)


@device
def sift_down(ids, values, i, n, order):
    """Candidate i of the n of a heap, which may come too early in it, goes down to where it belongs."""
    token, value = load_i32(ids + 4 * i), load_scalar(values + 4 * i)
    while 2 * i + 1 < n:
        child = 2 * i + 1
        below, its = load_scalar(values + 4 * child), load_i32(ids + 4 * child)
        if child + 1 < n:
            other, its_other = load_scalar(values + 4 * child + 4), load_i32(ids + 4 * child + 4)
            if comes_before(other, its_other, below, its, order):
                child, below, its = child + 1, other, its_other
        if not comes_before(below, its, value, token, order):
            break
        put(ids, values, i, its, below)
        i = child
    put(ids, values, i, token, value)


@device
def make_heap(ids, values, n, order):
    for i in range(n // 2 - 1, -1, -1):
        sift_down(ids, values, i, n, order)


@device
def keep_top_k(x, n, maxima, k, ids, values):
    """Candidates: the k ids of the largest logits, the lower ids where they are equal. Returns how many there are."""
    count = 0
    for group in range((n + LOGITS_GROUP - 1) // LOGITS_GROUP):
        if count == k and load_scalar(maxima + 4 * group) <= load_scalar(values):
            continue
        for token in range(LOGITS_GROUP * group, LOGITS_GROUP * (group + 1)):
            value = load_scalar(x + 4 * token)
            if count < k and value >= LOWEST:
                put(ids, values, count, token, value)
                count += 1
                if count == k:
                    make_heap(ids, values, k, WORST_FIRST)
            elif count == k and value > load_scalar(values):
                put(ids, values, 0, token, value)
                sift_down(ids, values, 0, k, WORST_FIRST)
    return count


@device
def exp_of(value):
    return max_lanes(exp(splat_f32(value)))


@device
def sum_of_exp(x, n, best):
    """The sum of exp(logit - best) over n logits or candidates."""
    total = 0.0
    for i in range(0, n, W):
        total += sum_lanes(keep_first(exp(load_f32(x + 4 * i) - splat_f32(best)), n - i, 0.0))
    return total


@device
def bin_of(value, best):
    """0 for the best logits, the higher the worse they are."""
    return int(min((best - value) * BINS_A_UNIT, LOGITS_BINS - 1))


@device
def find_border(values, n, best, mass, masses, bins):
    """The bin in which the best of n candidates reach `mass`, the best itself having 1: (bin, mass before it)."""
    for i in range(0, n, W):
        store_f32(masses + 4 * i, exp(load_f32(values + 4 * i) - splat_f32(best)))
    for i in range(LOGITS_BINS):
        store_f64(bins + 8 * i, 0.0)
    for i in range(n):
        at = bins + 8 * bin_of(load_scalar(values + 4 * i), best)
        store_f64(at, load_f64(at) + load_scalar(masses + 4 * i))
    border, before = 0, 0.0
    while border < LOGITS_BINS - 1 and before + load_f64(bins + 8 * border) < mass:
        before += load_f64(bins + 8 * border)
        border += 1
    return border, before


@device
def swap(ids, values, i, j):
    token, value = load_i32(ids + 4 * i), load_scalar(values + 4 * i)
    put(ids, values, i, load_i32(ids + 4 * j), load_scalar(values + 4 * j))
    put(ids, values, j, token, value)


@device
def part_at_border(ids, values, n, best, border):
    """Of n candidates those of the bin `border` come first, then those of better bins; the others are dropped.

    Returns (how many of the border, how many in all).
    """
    end = 0
    for i in range(n):
        value = load_scalar(values + 4 * i)
        if bin_of(value, best) <= border:
            put(ids, values, end, load_i32(ids + 4 * i), value)
            end += 1
    i, first = 0, end
    while i < first:
        if bin_of(load_scalar(values + 4 * i), best) == border:
            i += 1
        else:
            first -= 1
            swap(ids, values, i, first)
    return first, end


@device
def keep_nucleus(ids, values, n, best, mass, masses, bins):
    """Of n candidates the best that together have `mass`, or the best one. Returns where they stand: (first, end).

    Only the bin in which they end has to be sorted, and as far as they go.
    """
    border, found = find_border(values, n, best, mass, masses, bins)
    first, end = part_at_border(ids, values, n, best, border)
    make_heap(ids, values, first, BEST_FIRST)
    while first > 0 and (first == end or found < mass):  # the best of the heap goes to where the heap ends
        first -= 1
        swap(ids, values, 0, first)
        found += exp_of(load_scalar(values + 4 * first) - best)
        sift_down(ids, values, 0, first, BEST_FIRST)
    return first, end


@device
def drop_below(ids, values, first, end, floor):
    """Candidates first .. end - 1 that reach `floor` move to the front. Returns how many."""
    count = 0
    for i in range(first, end):
        value = load_scalar(values + 4 * i)
        if value >= floor:
            put(ids, values, count, load_i32(ids + 4 * i), value)
            count += 1
    return count


@device
def keep_likely(x, n, maxima, best, top_k, top_p, log_min_p, ids, values, masses, bins):
    """The candidates that top-k, top-p and min-p leave. Returns how many."""
    floor = max(best + log_min_p, LOWEST)  # never -inf: that is what may not be chosen
    if 0 < top_k < n:
        count = keep_top_k(x, n, maxima, top_k, ids, values)
        total = sum_of_exp(values, count, best) if top_p < 1 else 0.0
    else:  # min-p first: what it drops counts in top-p's total, but could not be chosen anyway
        count = keep_at_least(x, n, maxima, floor, ids, values)
        total = sum_of_exp(x, n, best) if top_p < 1 else 0.0
    first, end = 0, count
    if top_p < 1:
        first, end = keep_nucleus(ids, values, count, best, top_p * total, masses, bins)
    return drop_below(ids, values, first, end, floor)


@device
def weigh(values, n, best, temp):
    """Logits of n candidates -> weights, in place; the best has 1. Returns their sum."""
    for i in range(0, n, W):
        store_f32(values + 4 * i, exp((load_f32(values + 4 * i) - splat_f32(best)) / splat_f32(temp)))
    total = 0.0
    for i in range(n):
        total += load_scalar(values + 4 * i)
    return total


@device
def choose(ids, values, n, border):
    """The candidate at which the sum of weights passes `border`."""
    total, at = 0.0, 0
    for i in range(n):
        total += load_scalar(values + 4 * i)
        at = i
        if total > border:
            break
    return load_i32(ids + 4 * at)


@kernel
def sample(x, n, maxima, biased, bias, n_biased, recent, n_recent, counts, repeat: F32, frequency: F32, presence: F32,
           top_k, top_p, log_min_p: F32, temp: F32, draw, ids, values, masses, bins, out):  # fmt: skip
    """Candidates of n logits, in ids and values (their weights); out = (how many, the id that is chosen).

    x is changed: the logits, filled up with -inf to whole groups of LOGITS_GROUP, one at least. ids, values and masses
    have room for as many, maxima for one number a group, bins for LOGITS_BINS float64. Penalties are for the n_recent
    ids at `recent`, each one that `counts` has an entry for. A temperature of 0 keeps the best id only. top_p and draw,
    a random number, are in units of 2**-53.
    out = (0, any) where every id is masked, (-1, an id) where its logit is not finite.
    """
    bad = find_non_finite(x, n)
    store_i64(out, -1)
    store_i64(out + 8, bad)
    if bad >= 0:
        return
    for i in range(n_biased):
        at = x + 4 * load_i32(biased + 4 * i)
        store_scalar(at, load_scalar(at) + load_scalar(bias + 4 * i))
    penalize(x, n, recent, n_recent, counts, repeat, frequency, presence)
    best = find_maxima(x, n, maxima)
    count = 0
    if best >= LOWEST:
        if temp == 0:
            count = min(keep_at_least(x, n, maxima, best, ids, values), 1)
        else:
            count = keep_likely(x, n, maxima, best, top_k, top_p * UNIT, log_min_p, ids, values, masses, bins)
    total = weigh(values, count, best, temp if temp > 0 else 1.0)
    store_i64(out, count)
    store_i64(out + 8, choose(ids, values, count, draw * UNIT * total))
