"""Product tables: apportionment, the spread, and the invariants that let a decoder run on them."""

import codec_scalar
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec.table import (
    MARGINAL_TOTAL,
    build_table,
    decode_table,
    has_states,
    pair_frequencies,
    quantize_marginal,
)

symbol_counts = st.lists(st.integers(0, 10**9), min_size=2, max_size=32).filter(any)
log2_states = st.sampled_from([11, 12])


@given(symbol_counts)
def test_marginal_has_every_symbol_and_the_exact_total(counts):
    marginal = quantize_marginal(np.array(counts))
    assert marginal.dtype == np.uint16
    assert marginal.sum(dtype=np.int64) == MARGINAL_TOTAL
    assert marginal.min() >= 1


@given(symbol_counts)
def test_marginal_is_each_symbols_share_where_none_is_lifted_to_one(counts):
    counts = np.array(counts) + sum(counts) // 2**15 + 1  # every share is above 1/2 of a unit
    exact = counts / counts.sum() * MARGINAL_TOTAL
    # Webster's shares are exact * (1 + e) to nearest, e small enough for the total to come out.
    assert np.abs(quantize_marginal(counts) - exact).max() < 1 + 32 * exact.max() / MARGINAL_TOTAL


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([5, 0], [65535, 1]),
        ([0, 5], [1, 65535]),
        ([1, 1, 1], [21846, 21845, 21845]),  # ties: the lower index first
        ([3, 1], [49152, 16384]),
        ([2**40, 1, 0], [65534, 1, 1]),
    ],
)
def test_marginal_of_small_examples(counts, expected):
    assert quantize_marginal(np.array(counts)).tolist() == expected


@given(symbol_counts, log2_states)
def test_pair_frequencies_fill_the_table_under_the_cap(counts, p):
    marginal = quantize_marginal(np.array(counts))
    frequencies = pair_frequencies(marginal, p)
    assert frequencies.sum() == 2**p
    assert frequencies.max() <= 2 ** (p - 1)
    assert np.array_equal(frequencies > 0, has_states(marginal, p))


@given(symbol_counts, log2_states)
def test_only_rare_pairs_without_the_commonest_symbol_have_no_state(counts, p):
    marginal = quantize_marginal(np.array(counts)).astype(int)
    kept = has_states(marginal, p).reshape(marginal.size, marginal.size)
    mode = marginal.argmax()
    assert kept[mode].all() and kept[:, mode].all()
    due = np.outer(marginal, marginal) / MARGINAL_TOTAL**2 * 2**p  # exact: powers of two
    others = np.arange(marginal.size) != mode
    assert np.array_equal(kept[np.ix_(others, others)], due[np.ix_(others, others)] >= 1 / 32)


@given(symbol_counts, log2_states)
def test_entries_of_a_pair_lead_to_every_state_exactly_once(counts, p):
    """What makes the code decodable, and a decoder safe from any state and on any bits."""
    marginal = quantize_marginal(np.array(counts))
    entries = decode_table(marginal, p).astype(int)
    nbits, symbol0, symbol1 = entries & 31, entries >> 5 & 255, entries >> 13 & 255
    base = (entries >> 21) << (p - 11)
    if p == 12:
        assert np.array_equal(base, entries >> 20 & 0xFFE)  # as a shader reads it
    assert nbits.min() >= 1
    assert max(symbol0.max(), symbol1.max()) < marginal.size
    pair = symbol0 * marginal.size + symbol1
    assert np.array_equal(
        np.bincount(pair, minlength=marginal.size**2), pair_frequencies(marginal, p)
    )
    order = np.lexsort((base, pair))
    end = (base + 2**nbits)[order]
    start = np.where(np.diff(pair[order], prepend=-1) != 0, 0, np.append(0, end[:-1]))
    assert np.array_equal(base[order], start)
    assert np.array_equal(end[np.diff(pair[order], append=-1) != 0], np.full(len(set(pair)), 2**p))


@given(symbol_counts, log2_states)
def test_encoder_inverts_the_decode_table(counts, p):
    marginal = quantize_marginal(np.array(counts))
    table, entries = build_table(marginal, p), decode_table(marginal, p).astype(int)
    nbits, base = entries & 31, (entries >> 21) << (p - 11)
    pair = (entries >> 5 & 255) * marginal.size + (entries >> 13 & 255)
    for bits in (np.zeros_like(nbits), (1 << nbits) - 1):
        x = base + bits + 2**p
        n = x + table.delta_bits[pair] >> 16
        assert np.array_equal(n, nbits)
        assert np.array_equal(x & (1 << n) - 1, bits)
        state = table.next_x[(x >> n) + table.delta_state[pair]] - 2**p
        assert np.array_equal(state, np.arange(2**p))


@given(symbol_counts, log2_states)
def test_rare_pairs_are_stood_for_by_pairs_with_states(counts, p):
    marginal = quantize_marginal(np.array(counts))
    table = build_table(marginal, p)
    assert (table.frequencies[table.substitute] > 0).all()
    kept = np.flatnonzero(table.frequencies)
    assert np.array_equal(table.substitute[kept], kept)
    own = np.array(np.divmod(np.arange(marginal.size**2), marginal.size))
    stands = np.array(np.divmod(table.substitute, marginal.size))
    assert (own == stands).any(axis=0).all()  # at most one of the two weights becomes an outlier


@pytest.mark.parametrize("p", [11, 12])
@pytest.mark.parametrize(
    "counts",
    [[1, 0], [1] * 32, [1, 5, 20, 60, 21, 5, 1], [2**i for i in range(20)], [1000, 1, 1, 1]],
)
def test_table_equals_the_scalar_one(counts, p):
    marginal = quantize_marginal(np.array(counts))
    entries = decode_table(marginal, p).tolist()
    fields = [(e >> 5 & 255, e >> 13 & 255, e & 31, (e >> 21) << (p - 11)) for e in entries]
    assert fields == codec_scalar.state_table(tuple(marginal.tolist()), p)


def test_table_of_one_value_by_hand():
    """Weights that are nearly all symbol 0: pair (0, 0) is capped at half of the 2^11 states."""
    marginal = np.array([65535, 1], np.uint16)
    assert pair_frequencies(marginal, 11).tolist() == [1024, 512, 512, 0]
    entries = decode_table(marginal, 11).tolist()
    # (0, 0) is so likely that it has the first 1024 states: x = 1024 + state, 1 bit, base 2 state.
    assert entries[:3] == [1, 1 | 2 << 21, 1 | 4 << 21]
    assert entries[1023] == 1 | 2046 << 21
    # (0, 1) and (1, 0) are alike and take turns: x = 512, 513, ..., 2 bits, base 4 (x - 512).
    assert entries[1024:1026] == [2 | 1 << 13, 2 | 1 << 5]
    assert entries[1026:1028] == [2 | 1 << 13 | 4 << 21, 2 | 1 << 5 | 4 << 21]
    assert entries[2047] == 2 | 1 << 5 | 2044 << 21
    # (1, 1) has no state; (1, 0) stands for it.
    assert build_table(marginal, 11).substitute.tolist() == [0, 1, 2, 2]
