"""The coded matrix's format as the slowest possible decoder: plain integers, one bit at a time.

Written from the format's text and sharing no code with `codec`, so that the two check each other.
"""

from fractions import Fraction
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import product
from math import prod


def weights(marginal, log2_states, group):
    """Of the kept groups, tuples of symbols: probability times 2^32, if not 0 at least 1.

    Groups with a symbol of probability 0 are never kept.
    """
    mode = marginal.index(max(marginal))
    due, exempt, weight = {}, set(), {}
    for symbols in product(range(len(marginal)), repeat=group):
        w = prod(marginal[symbol] for symbol in symbols)
        if w:
            due[symbols] = Fraction(w, 2 ** (16 * group)) * 2**log2_states
            weight[symbols] = max(1, w >> 16 * (group - 2))
            if symbols.count(mode) >= group - 1:
                exempt.add(symbols)
    least, kept = Fraction(1, 32), range(2**log2_states)
    while len(kept) > 2 ** (log2_states - 1):
        kept = [symbols for symbols in due if symbols in exempt or due[symbols] >= least]
        least *= 2
    return {symbols: weight[symbols] for symbols in kept}


def frequencies(weight, log2_states):
    """Webster: a kept group has one state; each further one goes to the largest w / (2 f + 1)."""
    states = 2**log2_states
    f = dict.fromkeys(weight, 1)
    queue = [(-Fraction(w, 3), symbols) for symbols, w in weight.items()]
    heapify(queue)
    for _ in range(states - len(f)):
        _, symbols = heappop(queue)
        f[symbols] += 1
        if f[symbols] < states // 2:
            heappush(queue, (-Fraction(weight[symbols], 2 * f[symbols] + 1), symbols))
    return f


@cache
def state_table(marginal, log2_states, group):
    """(symbols, nbits, base) of each state."""
    weight = weights(marginal, log2_states, group)
    f = frequencies(weight, log2_states)
    occurrences = [(symbols, x) for symbols in f for x in range(f[symbols], 2 * f[symbols])]
    occurrences.sort(key=lambda o: ((2 * o[1] + 1) * 2**48 // (2 * weight[o[0]]), o[0]))
    table = []
    for symbols, x in occurrences:
        nbits = log2_states - (x.bit_length() - 1)
        table.append((symbols, nbits, x * 2**nbits - 2**log2_states))
    return table


def decode_row(m, row):
    """A row of a CodedMatrix -> its integers; (bits read, state) before each group, bits in all."""
    table = state_table(tuple(m.marginals[m.classes[row]].tolist()), m.log2_states, m.group)
    words = m.words.tolist()
    position, state = int(m.row_offsets[row]), int(m.states[row])

    def read(n):
        nonlocal position
        value = 0
        for _ in range(n):
            value = value * 2 + (words[position >> 5] >> (31 - (position & 31))) % 2
            position += 1
        return value

    narrow = m.classes[row] < m.n_narrow
    raw_bits = m.narrow_raw_bits if narrow else m.raw_bits
    start, trail, q = position, [], []
    for column in range(0, m.cols + -m.cols % 4, m.group):
        trail.append((position - start, state))
        if column % 4 == 0:
            raw = read(4 * raw_bits)
        symbols, nbits, base = table[state]
        if column + m.group < m.cols + -m.cols % 4:
            state = base + read(nbits)
        for symbol in symbols:
            q.append((symbol + m.min_symbol) * 2**raw_bits + raw % 2**raw_bits)
            raw >>= raw_bits
    for outlier in m.outliers[m.outlier_offsets[row] : m.outlier_offsets[row + 1]].tolist():
        remainder = outlier >> 16
        q[outlier & 0xFFFF] += (remainder - 2**16 * (remainder >> 15)) * 2**raw_bits
    return q[: m.cols], trail, position - start
