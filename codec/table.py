"""Product tables of the tANS code: from a matrix's marginal to the decode table and its inverse.

A symbol of the code is a pair of neighbouring weights, and its frequency follows from the marginal
alone. The table is not stored but rebuilt at load, so it must have the same bits on every machine:
every step is integer arithmetic, with a stated order for ties. Knows nothing of streams.

tANS: Duda, "Asymmetric numeral systems", arXiv:1311.2540.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MARGINAL_TOTAL = 1 << 16  # sum of a marginal
MAX_SYMBOLS = 32  # of a marginal: more would leave too few states for each pair
RARE = 32  # a pair due less than 1/RARE of a state gets none

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """What the encoder needs. A pair is symbol0 * n_symbols + symbol1.

    The encoder works on x = state + 2^P: with n = (x + delta_bits[pair]) >> 16 it emits the low n
    bits of x and goes on with x' = next_x[(x >> n) + delta_state[pair]].
    """

    log2_states: int  # P: 11 or 12
    n_symbols: int
    frequencies: IntArray  # (n_symbols^2,), sum 2^P
    substitute: IntArray  # (n_symbols^2,) the pair itself, or what stands for it if it has no state
    delta_bits: IntArray  # (n_symbols^2,)
    delta_state: IntArray  # (n_symbols^2,)
    next_x: IntArray  # (2^P,)


def quantize_marginal(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.uint16]:
    """How often each symbol occurs (2 or more,) -> its share of MARGINAL_TOTAL, at least 1."""
    n = counts.size
    return _apportion(counts.astype(np.int64), MARGINAL_TOTAL, MARGINAL_TOTAL - n + 1).astype(
        np.uint16
    )


def has_states(marginal: npt.NDArray[np.integer], log2_states: int) -> npt.NDArray[np.bool_]:
    """Which pairs (n_symbols^2,) are in the table.

    A state for a rare pair would cost all others more than the outliers that its few occurrences
    become. The pairs of the most frequent symbol are exempt, for they stand for the rare ones, but
    not those of symbols of probability 0.
    """
    m = marginal.astype(np.int64)
    kept: npt.NDArray[np.bool_] = np.outer(m, m) * RARE << log2_states >= MARGINAL_TOTAL**2
    mode = m.argmax()
    kept[mode, :] = kept[:, mode] = m > 0
    return kept.ravel()


def pair_frequencies(marginal: npt.NDArray[np.uint16], log2_states: int) -> IntArray:
    """Number of states of each pair (n_symbols^2,): 0 or 1 .. 2^(P-1), sum 2^P.

    With at most half of the states to a pair, every step reads at least one bit.
    """
    kept = has_states(marginal, log2_states)
    frequencies = np.zeros(kept.size, np.int64)
    frequencies[kept] = _apportion(
        _weights(marginal)[kept], 1 << log2_states, 1 << (log2_states - 1)
    )
    return frequencies


def decode_table(marginal: npt.NDArray[np.uint16], log2_states: int) -> npt.NDArray[np.uint32]:
    """One entry per state (2^P,); the next state is base + the next nbits bits of the stream.

    Bits 0..4 nbits, 5..12 symbol0, 13..20 symbol1, 21..31 base; for P = 12, where nbits >= 1 makes
    every base even, base / 2. A symbol has a byte, so that a float's exponent fits in its place.
    """
    pair, x = _spread(marginal, log2_states)
    nbits = log2_states - _floor_log2(x)
    base = (x << nbits) - (1 << log2_states)
    symbol0, symbol1 = np.divmod(pair, marginal.size)
    entries = nbits | symbol0 << 5 | symbol1 << 13 | base >> (log2_states - 11) << 21
    return entries.astype(np.uint32)


def build_table(marginal: npt.NDArray[np.uint16], log2_states: int) -> Table:
    """The encoder's counterpart of `decode_table`."""
    n, states = marginal.size, 1 << log2_states
    frequencies = pair_frequencies(marginal, log2_states)
    pair, x = _spread(marginal, log2_states)
    start = np.cumsum(frequencies) - frequencies
    next_x = np.empty(states, np.int64)
    next_x[start[pair] + x - frequencies[pair]] = np.arange(states) + states

    # A pair of frequency f emits `most` bits from x = f << most on, and one bit less below.
    most = log2_states - _floor_log2(np.maximum(frequencies, 1))

    # A rare pair keeps its more frequent symbol; the most frequent of all replaces the other. First
    # a symbol of probability 0 becomes the nearest one above 0: these follow each other.
    every = np.arange(n * n)
    used = np.flatnonzero(marginal)
    symbol0, symbol1 = (np.clip(s, used[0], used[-1]) for s in np.divmod(every, n))
    nearest = symbol0 * n + symbol1
    mode = marginal.argmax()
    kept_first = marginal[symbol0] >= marginal[symbol1]
    stand_in = np.where(kept_first, symbol0 * n + mode, mode * n + symbol1)
    return Table(
        log2_states=log2_states,
        n_symbols=n,
        frequencies=frequencies,
        substitute=np.where(frequencies[nearest] > 0, nearest, stand_in),
        delta_bits=(most << 16) - (frequencies << most),
        delta_state=start - frequencies,
        next_x=next_x,
    )


def build_tables(marginals: npt.NDArray[np.uint16], log2_states: int) -> Table:
    """The tables of several classes, marginals (n_classes, n_symbols), as one.

    Pair p of class c is c * n_symbols^2 + p; its next_x are as if the class were alone.
    """
    n_classes, n = marginals.shape
    tables = [build_table(marginal, log2_states) for marginal in marginals]
    first = np.repeat(np.arange(n_classes), n * n)

    def joined(field: str) -> IntArray:
        return np.concatenate([getattr(table, field) for table in tables])

    return Table(
        log2_states=log2_states,
        n_symbols=n,
        frequencies=joined("frequencies"),
        substitute=joined("substitute") + first * (n * n),
        delta_bits=joined("delta_bits"),
        delta_state=joined("delta_state") + (first << log2_states),
        next_x=joined("next_x"),
    )


def decode_tables(marginals: npt.NDArray[np.uint16], log2_states: int) -> npt.NDArray[np.uint32]:
    """`decode_table` of each class: marginals (n_classes, n_symbols) -> (n_classes, 2^P)."""
    return np.stack([decode_table(marginal, log2_states) for marginal in marginals])


def _weights(marginal: npt.NDArray[np.uint16]) -> IntArray:
    """Probability of each pair (n_symbols^2,) times MARGINAL_TOTAL^2."""
    m = marginal.astype(np.int64)
    return np.outer(m, m).ravel()


def _spread(marginal: npt.NDArray[np.uint16], log2_states: int) -> tuple[IntArray, IntArray]:
    """The pair that each state decodes to, and the state's x among that pair's: both (2^P,).

    The states of a pair of frequency f are numbered x = f .. 2f - 1. Duda's tuned spread puts x at
    a position proportional to 1 / (p ln(1 + 1/x)), nearly (x + 1/2) / p. As p is the probability
    itself and not f / 2^P, positions make good much of what rounding f has lost.
    """
    frequencies = pair_frequencies(marginal, log2_states)
    pair = np.repeat(np.arange(frequencies.size), frequencies)
    first = np.cumsum(frequencies) - frequencies
    x = frequencies[pair] + np.arange(pair.size) - first[pair]
    key = (2 * x + 1 << 48) // (2 * _weights(marginal)[pair])  # dividend < 2^61
    order = np.argsort(key, kind="stable")  # ties: lower pair first
    return pair[order], x[order]


def _apportion(weights: IntArray, total: int, cap: int) -> IntArray:
    """Shares of `total` in proportion to weights, each 1 .. cap, by Webster's divisor method.

    A share is its weight over a common divisor, rounded to nearest. The divisor is the smallest
    integer that does not exceed the total; units still left go to the shares next in line to be
    rounded up (ties: lower index).
    """
    # Scaled so that the next smaller divisor raises no share by more than one.
    weights = weights << 60 - int(weights.max()).bit_length()

    def shares(half_divisor: int) -> IntArray:
        share: IntArray = np.clip((weights // half_divisor + 1) >> 1, 1, cap)
        return share

    too_small, enough = 0, 1 << 60
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        if shares(middle).sum() > total:
            too_small = middle
        else:
            enough = middle
    share = shares(enough)
    in_line = np.where(share < cap, weights // (2 * share + 1), -1)
    share[np.argsort(-in_line, kind="stable")[: total - share.sum()]] += 1
    return share


def _floor_log2(x: IntArray) -> IntArray:
    """floor(log2(x)) of integers 1 .. 2^16 - 1."""
    return np.searchsorted(1 << np.arange(16), x, side="right") - 1
