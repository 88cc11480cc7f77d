"""Which code a matrix gets: weights to a group, raw low bits, which rows share a table, symbols.

Histograms of integers in, the cheapest parameters and the bits they will take out. Floats may
decide here, as their result is stored. Predictions are within 0.2 % of what is then needed; below a
bit a weight they may be 3 % too high, as a table that has a group at its cap does better than that.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import cache
from itertools import combinations, combinations_with_replacement, pairwise
from math import factorial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from codec import classes
from codec.table import MARGINAL_TOTAL, MAX_SYMBOLS, has_states

MAX_RAW_BITS = 4
# Beyond, four weights no longer fit a 32-bit window, nor a weight a byte of a dot product, which
# makes a matvec about half as long again: so many bits a weight must be gained by it.
FAST_RAW_BITS = 2
SLOW_BITS = 0.15
# The same for narrow classes with fewer raw bits, for which kernels have a loop of their own.
_MIXED_BITS = 0.004
# What an outlier costs where codes are compared: in a file about half of it, but a matvec reads 32
# bits, and adds it up apart from all else.
OUTLIER_BITS = 32
# In a file: where it is in its row, and these, for a remainder of a few units.
_REMAINDER_BITS = 5.0
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
    raw_bits: int
    low: int  # of q >> raw_bits; low <= 0 <= high
    high: int
    bits: float  # predicted, of the streams and outliers of these rows
    outliers: float  # predicted, how many


class Code(NamedTuple):
    """What fixes a code but for its marginals; a symbol is (q >> raw_bits) - min_symbol."""

    group: int
    raw_bits: int  # of the last class, at most of any
    min_symbol: int
    n_symbols: int
    n_weights: float  # to be coded
    bits: float  # predicted, of all streams and outliers
    outliers: float  # predicted, how many
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
    codes = list(_codes(units, lowest, log2_states, max_raw_bits, largest, rows, groups))
    return codes[int(np.argmin([_price(code) for code in codes]))]


def predicted_bits(
    counts: npt.NDArray[np.integer] | FloatArray,
    lowest: int,
    log2_states: int,
    rows: IntArray,
) -> float:
    """All bits that are stored of units like those of `choose_code`, but for the rows' own.

    Much faster than `choose_code`: what one class would take, less what classes save by entropy.
    """
    units = counts.astype(np.float64)
    n_weights, n_rows = float(units.sum()), int(rows.sum())
    q = np.arange(units.shape[1]) + lowest
    outlier_bits = np.log2(n_weights / n_rows) + _REMAINDER_BITS
    price, predicted = np.inf, np.inf
    for code in _codes(units.sum(axis=0, keepdims=True), lowest, log2_states):
        near = _near(units, q >> code.raw_bits)
        cost = classes.class_bits(near, rows, _MARGINAL_BITS)
        _, saved = classes.split([cost], classes.MAX_STATES >> log2_states)
        least = n_weights / code.group
        if _price(code) - saved < price:
            price = _price(code) - saved
            stored = code.bits - code.outliers * (OUTLIER_BITS - outlier_bits)
            bits = max(stored - saved, least)
            # The state bits of each row's last group are not stored.
            unread = code.group * n_rows * (bits / n_weights - code.raw_bits)
            predicted = bits + _MARGINAL_BITS * code.n_symbols - unread
    return float(predicted)


def _codes(
    units: FloatArray,
    lowest: int,
    log2_states: int,
    max_raw_bits: int = MAX_RAW_BITS,
    largest: int = 0,
    rows: IntArray = _ONE_UNIT,
    groups: Collection[int] = GROUPS,
) -> Iterator[Code]:
    """What may be the best code of `choose_code`, in order of raw bits; at least one. Then those
    whose narrow rows have fewer raw bits than the others.
    """
    n_weights = float(units.sum())
    q = np.arange(units.shape[1]) + lowest
    least = np.inf
    for raw_bits, group in [(0, 2), (0, 4), *((b, 2) for b in range(1, max_raw_bits + 1))]:
        if group not in groups:
            continue
        # A group of entropy P is due one state, and there is no gain in more of these.
        if group == 4 and log2_states * n_weights < group * least < np.inf:
            continue
        high = q >> raw_bits
        if max(-high[0], high[-1], -(-largest >> raw_bits)) > MAX_HIGH:
            continue
        # A group has at least one bit beside its raw ones, which may settle it.
        if (raw_bits + 1 / group) * n_weights > least:
            break
        near = _near(units, high)
        cost = classes.class_bits(near, rows, _MARGINAL_BITS)
        code = _code([near], [cost], (raw_bits,), log2_states, group)
        least = min(least, code.bits)
        yield code
    if len(units) == 1 or 2 not in groups:
        return
    fit = {
        raw_bits: _near(units, q >> raw_bits)
        for raw_bits in range(min(FAST_RAW_BITS, max_raw_bits) + 1)
        if max(-lowest, q[-1], largest) >> raw_bits < MAX_HIGH
    }
    costs = {raw_bits: _bounded_class_bits(fit[raw_bits], rows, raw_bits) for raw_bits in fit}
    for pair in combinations(fit, 2):
        of_pair = [fit[b] for b in pair], [costs[b] for b in pair]
        code = _code(*of_pair, pair, log2_states, 2)
        if code.classes[0].raw_bits < code.raw_bits:
            yield code


def _code(
    near: Sequence[FloatArray],
    costs: Sequence[FloatArray],
    raw_bits: Sequence[int],
    log2_states: int,
    group: int,
) -> Code:
    """The best classes, each with one of the given numbers of raw bits, in this order.

    For each of the numbers there are counts (units, 65) as of `_near` and what classes cost.
    """
    found = _choose_classes(near, costs, raw_bits, log2_states, group)
    min_symbol = min(c.low for c in found)
    return Code(
        group=group,
        raw_bits=found[-1].raw_bits,
        min_symbol=min_symbol,
        n_symbols=max(c.high for c in found) - min_symbol + 1,
        n_weights=float(near[0].sum()),
        bits=sum(c.bits for c in found),
        outliers=sum(c.outliers for c in found),
        classes=tuple(found),
    )


def _bounded_class_bits(near: FloatArray, rows: IntArray, raw_bits: int) -> FloatArray:
    """`class_bits` that can be compared between numbers of raw bits: what symbols cannot hold are
    outliers.
    """
    first, last = _ZERO - MAX_SYMBOLS[2] // 2, _ZERO + MAX_SYMBOLS[2] // 2 - 1
    inside = near[:, first : last + 1].copy()
    below, above = near[:, :first].sum(axis=1), near[:, last + 1 :].sum(axis=1)
    inside[:, 0] += below
    inside[:, -1] += above
    further = raw_bits * inside.sum(axis=1) + OUTLIER_BITS * (below + above)
    return classes.class_bits(inside, rows, _MARGINAL_BITS, further)


def _price(code: Code) -> float:
    """Bits, and what else speaks against it."""
    handicap = SLOW_BITS if code.raw_bits > FAST_RAW_BITS else 0.0
    if code.classes[0].raw_bits < code.raw_bits:
        handicap = _MIXED_BITS
    bits = code.bits + _MARGINAL_BITS * len(code.classes) * code.n_symbols
    return bits + handicap * code.n_weights


def _near(counts: FloatArray, value: IntArray) -> FloatArray:
    """Counts (units, n) of each value (n,) -> of -32 .. 32, whose ends stand for all beyond."""
    index = np.clip(value, -_ZERO, _ZERO) + _ZERO
    first = np.flatnonzero(np.diff(index, prepend=-1))
    near = np.zeros((len(counts), 2 * _ZERO + 1))
    near[:, index[first]] = np.add.reduceat(counts, first, axis=1)
    return near


def _choose_classes(
    near: Sequence[FloatArray],
    costs: Sequence[FloatArray],
    raw_bits: Sequence[int],
    log2_states: int,
    group: int,
) -> list[RowClass]:
    """Those of `_code`."""
    ranges, _ = classes.split(costs, classes.MAX_STATES >> log2_states)
    joined = [near[kind][first:end].sum(axis=0) for first, end, kind in ranges]
    symbols = [_choose_symbols(counts, log2_states, group) for counts in joined]
    low, high = min(s[0] for s in symbols), max(s[1] for s in symbols)
    if high - low >= MAX_SYMBOLS[group]:  # classes that lean to different sides get one range
        low, high, *_ = _choose_symbols(np.sum(joined, axis=0), log2_states, group)
        symbols = [(low, high, *_bits(counts, low, high, log2_states, group)) for counts in joined]
    return [
        RowClass(first, end, raw_bits[kind], low, high, bits + raw_bits[kind] * n_weights, outliers)
        for (first, end, kind), n_weights, (low, high, bits, outliers) in zip(
            ranges, map(np.sum, joined), symbols, strict=True
        )
    ]


def _choose_symbols(
    near: FloatArray, log2_states: int, group: int
) -> tuple[int, int, float, float]:
    """The best range of symbols, low and high, its bits and outliers, which all beyond it are.

    `near` are the counts of -32 .. 32; no range with 0 in it has both of the ends.
    """
    used = np.flatnonzero(near)
    low, high = min(int(used[0]), _ZERO), max(int(used[-1]), _ZERO)
    high += low == high  # a code has at least two symbols

    best = (0, 0, np.inf, 0.0)
    while high > low:
        if high - low < MAX_SYMBOLS[group]:
            bits, outliers = _bits(near, low - _ZERO, high - _ZERO, log2_states, group)
            if bits < best[2]:
                best = (low - _ZERO, high - _ZERO, bits, outliers)
            if bits > 1.01 * best[2]:  # past the optimum, where bits grow but for ripples
                break
        if high == _ZERO or (low < _ZERO and near[low] <= near[high]):
            low += 1
        else:
            high -= 1
    return best


def _bits(
    near: FloatArray, low: int, high: int, log2_states: int, group: int
) -> tuple[float, float]:
    """Bits of streams and outliers if the symbols low .. high have states; how many outliers."""
    n_weights, first, last = near.sum(), low + _ZERO, high + _ZERO
    p = near[first : last + 1] / n_weights
    below, above = near[:first].sum(), near[last + 1 :].sum()
    p[0] += below / n_weights
    p[-1] += above / n_weights
    bits, rare = _group_bits(p, log2_states, group)
    n_groups, outside = n_weights / group, below + above
    return float(n_groups * bits + OUTLIER_BITS * outside), float(n_groups * rare + outside)


def _group_bits(p: FloatArray, log2_states: int, group: int) -> tuple[float, float]:
    """Expected bits of a group of symbols of probabilities p (n,), with rare groups' outliers; and
    the share of these groups.
    """
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
    rare = (weights * times)[~kept].sum()
    kept_bits = (falling * times_kept) @ np.log2(states / shares)
    return float(kept_bits + rare * (OUTLIER_BITS + log2_states / 2)), float(rare)


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
