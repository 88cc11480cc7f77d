"""Which code a matrix gets: weights to a group, raw low bits, which rows share a table, symbols.

Histograms of integers in, the cheapest parameters and the bits they will take out. Floats may
decide here, as their result is stored. Predictions are within 0.2 % of what is then needed; below a
bit a weight they may be 3 % too high, as a table that has a group at its cap does better than that.
"""

from collections.abc import Collection
from functools import cache
from itertools import combinations_with_replacement, pairwise
from math import factorial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from codec import classes
from codec.table import MARGINAL_TOTAL, MAX_SYMBOLS, has_states

MAX_RAW_BITS = 4
FAST_RAW_BITS = (
    2  # beyond, four weights no longer fit a 32-bit window, nor a weight a byte of a dot product,
)
# which makes a matvec about half as long again: so many bits a weight must be gained by it
SLOW_BITS = 0.15
OUTLIER_BITS = 32
MAX_HIGH = 2**15 - MAX_SYMBOLS[2]  # |q >> raw_bits|, for an outlier's remainder to fit 16 bits
MAX_INTEGER = MAX_HIGH << MAX_RAW_BITS

# A group that is due less than one state has one all the same, but at the spread's far end, where
# it costs about log2(2^P / 0.8) bits: fitted to the exact rates of Gaussian and Laplace tables.
_SMALLEST_SHARE = 0.8

GROUPS = tuple(MAX_SYMBOLS)  # weights that may be one symbol of the code
_MARGINAL_BITS = 16  # of a symbol
_ZERO = MAX_SYMBOLS[2]  # place of 0 among -32 .. 32
_ONE_UNIT = np.ones(1, np.int64)

# What integers may be clipped to before they are counted: further ones are outliers all the same.
CLIP = MAX_SYMBOLS[2] << MAX_RAW_BITS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class RowClass(NamedTuple):
    """Units of rows [first_unit, end_unit), and the symbols that their table holds."""

    first_unit: int
    end_unit: int
    low: int  # of q >> raw_bits; low <= 0 <= high
    high: int
    bits: float  # predicted, of the streams and outliers of these rows, without raw bits


class Code(NamedTuple):
    """What fixes a code but for its marginals; a symbol is (q >> raw_bits) - min_symbol."""

    group: int
    raw_bits: int
    min_symbol: int
    n_symbols: int
    bits: float  # predicted, of all streams and outliers
    classes: tuple[RowClass, ...]


def choose_code(
    counts: npt.NDArray[np.integer] | FloatArray,
    lowest: int,
    log2_states: int,
    max_raw_bits: int = MAX_RAW_BITS,
    largest: int = 0,
    rows: IntArray = _ONE_UNIT,
    groups: Collection[int] = GROUPS,
) -> Code:
    """The code for counts[..., i] weights of lowest + i, at most MAX_HIGH << max_raw_bits. Those
    beyond CLIP may be counted as CLIP if `largest` is the largest |q|.

    counts (units, n) tells units apart of so many `rows` (units,), which are in order of spread and
    may get classes of their own; counts (n,) are of one class.
    The one of fewest bits, with `groups` of so many weights and raw bits for pairs only, except
    that more than FAST_RAW_BITS raw bits have to be worth it.
    """
    units = np.atleast_2d(counts).astype(np.float64)
    n_weights = float(units.sum())
    q = np.arange(units.shape[1]) + lowest
    best, least = Code(2, 0, 0, 0, np.inf, ()), np.inf
    for raw_bits, group in [(0, 2), (0, 4), *((b, 2) for b in range(1, max_raw_bits + 1))]:
        if group not in groups:
            continue
        # A group of entropy P is due one state, and there is no gain in more of these.
        if group == 4 and log2_states * n_weights < group * best.bits < np.inf:
            continue
        high = q >> raw_bits
        if max(-high[0], high[-1], -(-largest >> raw_bits)) > MAX_HIGH:
            continue
        # A group has at least one bit beside its raw ones, which may settle it.
        if (raw_bits + 1 / group) * n_weights > best.bits:
            break
        found = _choose_classes(_near(units, high), rows, log2_states, group)
        min_symbol = min(found, key=lambda c: c.low).low
        n_symbols = max(found, key=lambda c: c.high).high - min_symbol + 1
        bits = sum(c.bits for c in found) + raw_bits * n_weights
        handicap = SLOW_BITS * n_weights if raw_bits > FAST_RAW_BITS >= best.raw_bits else 0
        total = bits + _MARGINAL_BITS * len(found) * n_symbols
        if total + handicap < least:
            best, least = Code(group, raw_bits, min_symbol, n_symbols, bits, tuple(found)), total
    return best


def predicted_bits(
    counts: npt.NDArray[np.integer] | FloatArray,
    lowest: int,
    log2_states: int,
    rows: IntArray,
) -> float:
    """All bits that are stored of units like those of `choose_code`, but for the rows' own.

    Much faster than `choose_code`: what one class would take, less what classes save by entropy.
    """
    code = choose_code(counts.sum(axis=0), lowest, log2_states)
    near = _near(counts.astype(np.float64), np.arange(counts.shape[1]) + lowest >> code.raw_bits)
    _, saved = classes.split(near, rows, classes.MAX_STATES >> log2_states, _MARGINAL_BITS)
    bits = max(code.bits - saved, counts.sum() / code.group)
    # The state bits of each row's last group are not stored.
    unread = code.group * rows.sum() * (bits / counts.sum() - code.raw_bits)
    return float(bits + _MARGINAL_BITS * code.n_symbols - unread)


def _near(counts: FloatArray, value: IntArray) -> FloatArray:
    """Counts (units, n) of each value (n,) -> of -32 .. 32, whose ends stand for all beyond."""
    index = np.clip(value, -_ZERO, _ZERO) + _ZERO
    first = np.flatnonzero(np.diff(index, prepend=-1))
    near = np.zeros((len(counts), 2 * _ZERO + 1))
    near[:, index[first]] = np.add.reduceat(counts, first, axis=1)
    return near


def _choose_classes(
    near: FloatArray, rows: IntArray, log2_states: int, group: int
) -> list[RowClass]:
    """Classes of rows for counts (units, 65) as of `_near`, if no bits are raw."""
    most = classes.MAX_STATES >> log2_states
    ranges, _ = classes.split(near, rows, most, _MARGINAL_BITS)
    joined = [near[first:end].sum(axis=0) for first, end in ranges]
    symbols = [_choose_symbols(counts, log2_states, group) for counts in joined]
    low, high = min(s[0] for s in symbols), max(s[1] for s in symbols)
    if high - low >= MAX_SYMBOLS[group]:  # classes that lean to different sides get one range
        low, high, _ = _choose_symbols(near.sum(axis=0), log2_states, group)
        symbols = [(low, high, _bits(counts, low, high, log2_states, group)) for counts in joined]
    return [
        RowClass(first, end, low, high, bits)
        for (first, end), (low, high, bits) in zip(ranges, symbols, strict=True)
    ]


def _choose_symbols(near: FloatArray, log2_states: int, group: int) -> tuple[int, int, float]:
    """The best range of symbols, low and high, and its bits; what is beyond becomes an outlier.

    `near` are the counts of -32 .. 32; no range with 0 in it has both of the ends.
    """
    used = np.flatnonzero(near)
    low, high = min(int(used[0]), _ZERO), max(int(used[-1]), _ZERO)
    high += low == high  # a code has at least two symbols

    best = (0, 0, np.inf)
    while high > low:
        if high - low < MAX_SYMBOLS[group]:
            bits = _bits(near, low - _ZERO, high - _ZERO, log2_states, group)
            if bits < best[2]:
                best = (low - _ZERO, high - _ZERO, bits)
            if bits > 1.01 * best[2]:  # past the optimum, where bits grow but for ripples
                break
        if high == _ZERO or (low < _ZERO and near[low] <= near[high]):
            low += 1
        else:
            high -= 1
    return best


def _bits(near: FloatArray, low: int, high: int, log2_states: int, group: int) -> float:
    """Bits of streams and outliers if the symbols low .. high have states."""
    n_weights, first, last = near.sum(), low + _ZERO, high + _ZERO
    p = near[first : last + 1] / n_weights
    below, above = near[:first].sum(), near[last + 1 :].sum()
    p[0] += below / n_weights
    p[-1] += above / n_weights
    in_streams = n_weights / group * _group_bits(p, log2_states, group)
    return float(in_streams + OUTLIER_BITS * (below + above))


def _group_bits(p: FloatArray, log2_states: int, group: int) -> float:
    """Expected bits of a group of symbols of probabilities p (n,), with rare groups' outliers."""
    states = 1 << log2_states
    p = np.clip(p, 1 / MARGINAL_TOTAL, 1 - 1 / MARGINAL_TOTAL)
    groups, times = _combinations(p.size, group)
    weights = p[groups].prod(axis=0)
    marginal = np.rint(p * MARGINAL_TOTAL).astype(np.int64)
    kept = has_states(marginal, groups, log2_states, times)
    order = np.flatnonzero(kept)[np.argsort(-weights[kept])]
    falling, times_kept = weights[order], times[order]
    if falling[0] > 0.5:  # the cap
        shares = np.append(states / 2, _shares(falling[1:], times_kept[1:], states / 2))
    else:
        shares = _shares(falling, times_kept, states)
    # A rare group pays for its outlier and for a group of the table.
    rare_bits = (weights * times)[~kept].sum() * (OUTLIER_BITS + log2_states / 2)
    return float((falling * times_kept) @ np.log2(states / shares) + rare_bits)


@cache
def _combinations(n_symbols: int, group: int) -> tuple[IntArray, IntArray]:
    """Groups (group, n) of any symbols in rising order, and in how many orders they may be (n,)."""
    groups = np.array(list(combinations_with_replacement(range(n_symbols), group))).T
    # Orders are n! over how often each symbol is there, factorial: a run of equals divides by 1, 2,
    # 3, ...
    run, divisor = np.ones(groups.shape[1], np.int64), np.ones(groups.shape[1], np.int64)
    for before, symbol in pairwise(groups):
        run = np.where(symbol == before, run + 1, 1)
        divisor *= run
    return groups, factorial(group) // divisor


def _shares(falling: FloatArray, times: IntArray, states: float) -> FloatArray:
    """`states` in proportion to falling weights, of which each is there so many times, though no
    share is below _SMALLEST_SHARE.
    """
    # scale[i] is right if the weights up to i share freely and those after it have the least.
    left = states - _SMALLEST_SHARE * (times.sum() - np.cumsum(times))
    scale = left / np.cumsum(falling * times)
    last_free = np.flatnonzero(falling * scale >= _SMALLEST_SHARE)[-1]
    shares: FloatArray = np.maximum(_SMALLEST_SHARE, falling * scale[last_free])
    return shares
