"""The coded matrix's format as the slowest possible decoder: plain integers, one bit at a time.

Written from the format's text and sharing no code with `codec`, so that the two check each other.
"""

from fractions import Fraction
from functools import cache
from heapq import heapify, heappop, heappush


def frequencies(marginal, log2_states):
    """Webster: a kept pair has one state; each further one goes to the largest w / (2 f + 1).

    Pairs with a symbol of probability 0 are never kept.
    """
    n, states = len(marginal), 2**log2_states
    mode = marginal.index(max(marginal))
    weight = {}
    for i in range(n):
        for j in range(n):
            w = marginal[i] * marginal[j]
            if (w and (mode in (i, j))) or Fraction(w, 2**32) * states >= Fraction(1, 32):
                weight[i * n + j] = w
    f = dict.fromkeys(weight, 1)
    queue = [(-Fraction(w, 3), pair) for pair, w in weight.items()]
    heapify(queue)
    for _ in range(states - len(f)):
        _, pair = heappop(queue)
        f[pair] += 1
        if f[pair] < states // 2:
            heappush(queue, (-Fraction(weight[pair], 2 * f[pair] + 1), pair))
    return f, weight


@cache
def state_table(marginal, log2_states):
    """(symbol0, symbol1, nbits, base) of each state."""
    f, weight = frequencies(marginal, log2_states)
    occurrences = [(pair, x) for pair in f for x in range(f[pair], 2 * f[pair])]
    occurrences.sort(key=lambda o: ((2 * o[1] + 1) * 2**48 // (2 * weight[o[0]]), o[0]))
    table = []
    for pair, x in occurrences:
        nbits = log2_states - (x.bit_length() - 1)
        table.append((*divmod(pair, len(marginal)), nbits, x * 2**nbits - 2**log2_states))
    return table


def decode_row(m, row):
    """A row of a CodedMatrix -> its integers; (bits read, state) before each pair, bits in all."""
    table = state_table(tuple(m.marginals[m.classes[row]].tolist()), m.log2_states)
    words = m.words.tolist()
    position, state = int(m.row_offsets[row]), int(m.states[row])

    def read(n):
        nonlocal position
        value = 0
        for _ in range(n):
            value = value * 2 + (words[position >> 5] >> (31 - (position & 31))) % 2
            position += 1
        return value

    start, trail, q = position, [], []
    for pair in range((m.cols + 3) // 4 * 2):
        trail.append((position - start, state))
        if pair % 2 == 0:
            raw = read(4 * m.raw_bits)
        symbol0, symbol1, nbits, base = table[state]
        if pair < (m.cols + 3) // 4 * 2 - 1:
            state = base + read(nbits)
        for symbol in (symbol0, symbol1):
            q.append((symbol + m.min_symbol) * 2**m.raw_bits + raw % 2**m.raw_bits)
            raw >>= m.raw_bits
    for outlier in m.outliers[m.outlier_offsets[row] : m.outlier_offsets[row + 1]].tolist():
        remainder = outlier >> 16
        q[outlier & 0xFFFF] += (remainder - 2**16 * (remainder >> 15)) * 2**m.raw_bits
    return q[: m.cols], trail, position - start
