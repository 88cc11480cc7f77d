"""Which code a matrix gets: how many low bits go raw, and which symbols the table holds.

A histogram of integers in, the cheapest parameters and the bits they will take out. Floats may
decide here, as their result is stored. Predictions are within 0.2 % of what is then needed.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from codec.table import MARGINAL_TOTAL, MAX_SYMBOLS, has_states

MAX_RAW_BITS = 4
FAST_RAW_BITS = (
    2  # beyond, four weights no longer fit a 32-bit window, nor a weight a byte of a dot product,
)
# which makes a matvec about half as long again: so many bits a weight must be gained by it
SLOW_BITS = 0.15
OUTLIER_BITS = 32
MAX_HIGH = 2**15 - MAX_SYMBOLS  # |q >> raw_bits|, for an outlier's remainder to fit 16 bits
MAX_INTEGER = MAX_HIGH << MAX_RAW_BITS

# A pair that is due less than one state has one all the same, but at the spread's far end, where
# it costs about log2(2^P / 0.8) bits: fitted to the exact rates of Gaussian and Laplace tables.
_SMALLEST_SHARE = 0.8

FloatArray = npt.NDArray[np.float64]


class Code(NamedTuple):
    """What fixes a code but for its marginal; a symbol is (q >> raw_bits) - min_symbol."""

    raw_bits: int
    min_symbol: int
    n_symbols: int
    bits: float  # predicted, of all streams and outliers


def choose_code(
    counts: npt.NDArray[np.integer] | FloatArray,
    lowest: int,
    log2_states: int,
    max_raw_bits: int = MAX_RAW_BITS,
) -> Code:
    """The code for counts[i] weights of lowest + i, |lowest + i| <= MAX_HIGH << max_raw_bits.

    The one of fewest bits, except that more than FAST_RAW_BITS raw bits have to be worth it.
    """
    n_weights = float(counts.sum())
    q = np.arange(counts.size) + lowest
    best = Code(0, 0, 0, np.inf)
    for raw_bits in range(max_raw_bits + 1):
        high = q >> raw_bits
        if max(-high[0], high[-1]) > MAX_HIGH:
            continue
        # A pair has at least one bit beside its raw ones, which may settle it.
        if (raw_bits + 0.5) * n_weights > best.bits:
            break
        high_counts = np.bincount(high - high[0], counts).astype(np.float64)
        code = _choose_symbols(high_counts, int(high[0]), log2_states)
        bits = code.bits + raw_bits * n_weights
        handicap = SLOW_BITS * n_weights if raw_bits > FAST_RAW_BITS >= best.raw_bits else 0
        if bits + handicap < best.bits:
            best = code._replace(raw_bits=raw_bits, bits=bits)
    return best


def _choose_symbols(counts: FloatArray, lowest: int, log2_states: int) -> Code:
    """The best range of symbols if no bits are raw; what is beyond it becomes an outlier."""
    # Counts of -32 .. 32, where the ends stand for all beyond: no range with 0 in it has them.
    zero, n_weights = MAX_SYMBOLS, counts.sum()
    value = np.clip(np.arange(counts.size) + lowest, -zero, zero)
    near = np.bincount(value + zero, counts, 2 * zero + 1)
    used = np.flatnonzero(near)
    low, high = min(int(used[0]), zero), max(int(used[-1]), zero)
    high += low == high  # a code has at least two symbols

    best = Code(0, 0, 0, np.inf)
    while high > low:
        if high - low < MAX_SYMBOLS:
            p = near[low : high + 1] / n_weights
            below, above = near[:low].sum(), near[high + 1 :].sum()
            p[0] += below / n_weights
            p[-1] += above / n_weights
            bits = n_weights / 2 * _pair_bits(p, log2_states) + OUTLIER_BITS * (below + above)
            if bits < best.bits:
                best = Code(0, low - zero, high - low + 1, float(bits))
            if bits > 1.01 * best.bits:  # past the optimum, where bits grow but for ripples
                break
        if high == zero or (low < zero and near[low] <= near[high]):
            low += 1
        else:
            high -= 1
    return best


def _pair_bits(p: FloatArray, log2_states: int) -> float:
    """Expected bits of a pair of symbols of probabilities p (n,), with rare pairs' outliers."""
    states = 1 << log2_states
    p = np.maximum(p, 1 / MARGINAL_TOTAL)
    weights = np.outer(p, p).ravel()
    kept = has_states(np.rint(p * MARGINAL_TOTAL).astype(np.int64), log2_states)
    falling = np.sort(weights[kept])[::-1]
    if falling[0] > 0.5:  # the cap
        shares = np.append(states / 2, _shares(falling[1:], states / 2))
    else:
        shares = _shares(falling, states)
    # A rare pair pays for its outlier and for a pair of the table.
    rare_bits = weights[~kept].sum() * (OUTLIER_BITS + log2_states / 2)
    return float(falling @ np.log2(states / shares) + rare_bits)


def _shares(falling: FloatArray, states: float) -> FloatArray:
    """`states` in proportion to falling weights, though no share is below _SMALLEST_SHARE."""
    # scale[i] is right if the weights up to i share freely and those after it have the least.
    left = states - _SMALLEST_SHARE * np.arange(falling.size - 1, -1, -1)
    scale = left / np.cumsum(falling)
    last_free = np.flatnonzero(falling * scale >= _SMALLEST_SHARE)[-1]
    shares: FloatArray = np.maximum(_SMALLEST_SHARE, falling * scale[last_free])
    return shares
