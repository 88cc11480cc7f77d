"""Product tables of the tANS code: from a matrix's marginal to the decode table and its inverse.

A symbol of the code is a group of two or four neighbouring weights, and its frequency follows from
the marginal alone. The table is not stored but rebuilt at load, so it must have the same bits on
every machine: every step is integer arithmetic, with a stated order for ties. Knows nothing of
streams.

tANS: Duda, "Asymmetric numeral systems", arXiv:1311.2540.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MARGINAL_TOTAL = 1 << 16  # sum of a marginal
# Most symbols of a marginal, by weights in a group: more pairs would have too few states each, and
# of four symbols each has four bits in an entry.
MAX_SYMBOLS = {2: 32, 4: 16}
RARE = 32  # a group due less than 1/RARE of a state gets none, of one more if too many are left

_WEIGHT_BITS = 32  # of a group's weight: its probability is weight / 2^32
_SYMBOL_BITS = 16  # of an entry, for all symbols of a group: the lowest

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """What the encoder needs. A group's symbols are the digits, to base n_symbols, of its number.

    The encoder works on x = state + 2^P: with n = (x + delta_bits[group]) >> 16 it emits the low n
    bits of x and goes on with x' = next_x[(x >> n) + delta_state[group]].
    """

    log2_states: int  # P: 11 or 12
    n_symbols: int
    group: int  # weights that are one symbol of the code: 2 or 4
    frequencies: IntArray  # (n_groups,), n_groups = n_symbols^group; sum 2^P
    substitute: IntArray  # (n_groups,) the group itself, or, without a state, what stands for it
    delta_bits: IntArray  # (n_groups,)
    delta_state: IntArray  # (n_groups,)
    next_x: IntArray  # (2^P,)


def quantize_marginal(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.uint16]:
    """How often each symbol occurs (2 or more,) -> its share of MARGINAL_TOTAL, at least 1."""
    n = counts.size
    return _apportion(counts.astype(np.int64), MARGINAL_TOTAL, MARGINAL_TOTAL - n + 1).astype(
        np.uint16
    )


def all_groups(n_symbols: int, group: int) -> IntArray:
    """The symbols (group, n_symbols^group) of every group, in order."""
    return np.indices((n_symbols,) * group).reshape(group, -1)


def has_states(
    marginal: npt.NDArray[np.integer],
    groups: IntArray,
    log2_states: int,
    times: IntArray | int = 1,
) -> npt.NDArray[np.bool_]:
    """Which groups (n,) are in the table: symbols (group, n), all that there are.

    A state for a rare group would cost all others more than the outliers that its few occurrences
    become, and the more so the more groups there are. Those of at most one symbol beside the most
    frequent one are exempt, for they stand for the rare ones, but not those of symbols of
    probability 0. `times` (n,) each group may stand for so many in which its symbols are in another
    order.
    """
    weights = _weights(marginal, groups)
    exempt = ((groups != marginal.argmax()).sum(axis=0) <= 1) & (weights > 0)
    least = (1 << _WEIGHT_BITS - log2_states) // RARE
    while True:
        kept: npt.NDArray[np.bool_] = exempt | (weights >= least)
        if (kept * times).sum() <= 1 << log2_states - 1:
            return kept
        least *= 2


def group_frequencies(marginal: npt.NDArray[np.uint16], log2_states: int, group: int) -> IntArray:
    """Number of states of each group (n_symbols^group,): 0 or 1 .. 2^(P-1), sum 2^P.

    With at most half of the states to a group, every step reads at least one bit.
    """
    groups = all_groups(marginal.size, group)
    kept = has_states(marginal, groups, log2_states)
    frequencies = np.zeros(kept.size, np.int64)
    frequencies[kept] = _apportion(
        _weights(marginal, groups)[kept], 1 << log2_states, 1 << (log2_states - 1)
    )
    return frequencies


def decode_table(
    marginal: npt.NDArray[np.uint16], log2_states: int, group: int
) -> npt.NDArray[np.uint32]:
    """One entry per state (2^P,); the next state is base + the next nbits bits of the stream.

    Bits 0..15 the symbols, the first lowest, each in 8 or, of four, in 4 bits; 16..20 32 - nbits,
    by which a word is shifted to the right to leave its first nbits bits; 21..31 base, or for P =
    12, where nbits >= 1 makes every base even, base / 2.
    """
    number, x = _spread(marginal, log2_states, group)
    nbits = log2_states - _floor_log2(x)
    base = (x << nbits) - (1 << log2_states)
    entries = 32 - nbits << _SYMBOL_BITS | base >> (log2_states - 11) << _SYMBOL_BITS + 5
    for i, symbol in enumerate(all_groups(marginal.size, group)):
        entries |= symbol[number] << i * _SYMBOL_BITS // group
    return entries.astype(np.uint32)


def entry_nbits(entries: npt.NDArray[np.uint32]) -> IntArray:
    """The bits that entries read, in their shape."""
    return 32 - (entries >> np.uint32(_SYMBOL_BITS) & np.uint32(31)).astype(np.int64)


def entry_symbols(entries: npt.NDArray[np.uint32], group: int) -> list[npt.NDArray[np.uint32]]:
    """The symbols that entries have: `group` arrays of their shape, the first weight's first."""
    width = _SYMBOL_BITS // group
    return [entries >> np.uint32(i * width) & np.uint32((1 << width) - 1) for i in range(group)]


def build_table(marginal: npt.NDArray[np.uint16], log2_states: int, group: int) -> Table:
    """The encoder's counterpart of `decode_table`."""
    states = 1 << log2_states
    frequencies = group_frequencies(marginal, log2_states, group)
    number, x = _spread(marginal, log2_states, group)
    start = np.cumsum(frequencies) - frequencies
    next_x = np.empty(states, np.int64)
    next_x[start[number] + x - frequencies[number]] = np.arange(states) + states

    # A group of frequency f emits `most` bits from x = f << most on, and one bit less below.
    most = log2_states - _floor_log2(np.maximum(frequencies, 1))
    return Table(
        log2_states=log2_states,
        n_symbols=marginal.size,
        group=group,
        frequencies=frequencies,
        substitute=_substitutes(marginal, frequencies, group),
        delta_bits=(most << 16) - (frequencies << most),
        delta_state=start - frequencies,
        next_x=next_x,
    )


def build_tables(marginals: npt.NDArray[np.uint16], log2_states: int, group: int) -> Table:
    """The tables of several classes, marginals (n_classes, n_symbols), as one.

    Group i of class c is c * n_symbols^group + i; its next_x are as if the class were alone.
    """
    n_classes, n = marginals.shape
    tables = [build_table(marginal, log2_states, group) for marginal in marginals]
    first = np.repeat(np.arange(n_classes), n**group)

    def joined(field: str) -> IntArray:
        return np.concatenate([getattr(table, field) for table in tables])

    return Table(
        log2_states=log2_states,
        n_symbols=n,
        group=group,
        frequencies=joined("frequencies"),
        substitute=joined("substitute") + first * n**group,
        delta_bits=joined("delta_bits"),
        delta_state=joined("delta_state") + (first << log2_states),
        next_x=joined("next_x"),
    )


def decode_tables(
    marginals: npt.NDArray[np.uint16], log2_states: int, group: int
) -> npt.NDArray[np.uint32]:
    """`decode_table` of each class: marginals (n_classes, n_symbols) -> (n_classes, 2^P)."""
    return np.stack([decode_table(marginal, log2_states, group) for marginal in marginals])


def _weights(marginal: npt.NDArray[np.integer], groups: IntArray) -> IntArray:
    """Probability of groups (group, n) times 2^32, (n,): rounded down, but 0 only if it is 0."""
    product = marginal.astype(np.uint64)[groups].prod(axis=0)  # < 2^64
    rounded_down = product >> np.uint64(16 * len(groups) - _WEIGHT_BITS)
    weights: IntArray = np.maximum(rounded_down, product > 0).astype(np.int64)
    return weights


def _substitutes(marginal: npt.NDArray[np.uint16], frequencies: IntArray, group: int) -> IntArray:
    """What is coded for each group (n_symbols^group,).

    First a symbol of probability 0 becomes the nearest one above 0: these follow each other. Then
    the most frequent symbol of all replaces a group's least frequent ones, one after another, of
    equals the last, until the group has a state.
    """
    n, mode = marginal.size, marginal.argmax()
    used = np.flatnonzero(marginal)
    symbols = np.clip(all_groups(n, group), used[0], used[-1])
    digits = n ** np.arange(group)[::-1]
    for _ in range(group - 1):
        rare = np.flatnonzero(frequencies[digits @ symbols] == 0)
        of_rare = symbols[:, rare]
        share = np.where(of_rare == mode, MARGINAL_TOTAL, marginal[of_rare].astype(np.int64))
        symbols[group - 1 - share[::-1].argmin(axis=0), rare] = mode
    substitutes: IntArray = digits @ symbols
    return substitutes


def _spread(
    marginal: npt.NDArray[np.uint16], log2_states: int, group: int
) -> tuple[IntArray, IntArray]:
    """The group that each state decodes to, and the state's x among that group's: both (2^P,).

    The states of a group of frequency f are numbered x = f .. 2f - 1. Duda's tuned spread puts x at
    a position proportional to 1 / (p ln(1 + 1/x)), nearly (x + 1/2) / p. As p is the probability
    itself and not f / 2^P, positions make good much of what rounding f has lost.
    """
    frequencies = group_frequencies(marginal, log2_states, group)
    number = np.repeat(np.arange(frequencies.size), frequencies)
    first = np.cumsum(frequencies) - frequencies
    x = frequencies[number] + np.arange(number.size) - first[number]
    weights = _weights(marginal, all_groups(marginal.size, group)[:, number])
    key = (2 * x + 1 << 48) // (2 * weights)  # dividend < 2^61
    order = np.argsort(key, kind="stable")  # ties: lower group first
    return number[order], x[order]


def _apportion(weights: IntArray, total: int, cap: int) -> IntArray:
    """Shares of `total` in proportion to weights, each 1 .. cap, by Webster's divisor method.

    A share is its weight over a common divisor, rounded to nearest. The divisor is the smallest
    integer that does not exceed the total, or another that gives the same shares; units still left
    go to the shares next in line to be rounded up (ties: lower index).
    """
    # Scaled so that the next smaller divisor raises no share by more than one.
    weights = weights << 60 - int(weights.max()).bit_length()

    def shares(half_divisor: int) -> IntArray:
        share: IntArray = np.clip((weights // half_divisor + 1) >> 1, 1, cap)
        return share

    too_small, enough = 0, 1 << 60
    while enough - too_small > 1:
        middle = (too_small + enough) // 2
        excess = shares(middle).sum() - total
        if excess > 0:
            too_small = middle
        else:
            enough = middle
        if excess == 0:
            break
    share = shares(enough)
    in_line = np.where(share < cap, weights // (2 * share + 1), -1)
    share[np.argsort(-in_line, kind="stable")[: total - share.sum()]] += 1
    return share


def _floor_log2(x: IntArray) -> IntArray:
    """floor(log2(x)) of integers 1 .. 2^16 - 1."""
    return np.searchsorted(1 << np.arange(16), x, side="right") - 1
