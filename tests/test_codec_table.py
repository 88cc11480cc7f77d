"""Product tables: apportionment, the spread, and the invariants that let a decoder run on them."""

import codec_scalar
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.table import (
    MARGINAL_TOTAL,
    MAX_SYMBOLS,
    all_groups,
    build_table,
    decode_table,
    entry_symbols,
    group_frequencies,
    has_states,
    quantize_marginal,
)

symbol_counts = st.lists(st.integers(0, 10**9), min_size=2, max_size=32).filter(any)
# Some have one symbol that is nearly all there is.
group_and_counts = st.sampled_from([2, 4]).flatmap(
    lambda group: st.tuples(
        st.just(group),
        st.lists(
            st.one_of(st.integers(0, 10**9), st.integers(0, 9), st.just(10**12)),
            min_size=2,
            max_size=MAX_SYMBOLS[group],
        ).filter(any),
    )
)
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


def numbers(entries, n_symbols, group):
    """The groups that decode entries stand for."""
    found = 0
    for symbols in entry_symbols(entries, group):
        found = found * n_symbols + symbols.astype(int)
    return found


@given(group_and_counts, log2_states)
@settings(deadline=None)
def test_frequencies_fill_the_table_under_the_cap(group_counts, p):
    group, counts = group_counts
    whole = quantize_marginal(np.array(counts))
    narrower = np.append(0, quantize_marginal(np.array([*counts[3:], 1, 1]))).astype(np.uint16)
    for marginal in (whole, narrower):
        frequencies = group_frequencies(marginal, p, group)
        assert frequencies.sum() == 2**p
        assert frequencies.max() <= 2 ** (p - 1)
        groups = all_groups(marginal.size, group)
        assert np.array_equal(frequencies > 0, has_states(marginal, groups, p))


@given(group_and_counts, log2_states)
@settings(deadline=None)
def test_only_rare_groups_of_uncommon_symbols_have_no_state(group_counts, p):
    group, counts = group_counts
    marginal = quantize_marginal(np.array(counts)).astype(int)
    groups = all_groups(marginal.size, group)
    kept = has_states(marginal, groups, p)
    assert kept.sum() <= 2 ** (p - 1)
    uncommon = (groups != marginal.argmax()).sum(axis=0)
    assert kept[uncommon <= 1].all()
    due = (marginal / MARGINAL_TOTAL)[groups].prod(axis=0) * 2**p  # to about 53 bits
    for least in 2.0 ** np.arange(-5, 3):
        wanted = (uncommon <= 1) | (due >= least * (1 - 1e-12))
        if np.array_equal(kept, wanted):
            break
        assert wanted.sum() > 2 ** (p - 1)
    else:
        raise AssertionError(kept)


@given(group_and_counts, log2_states)
@settings(deadline=None)
def test_groups_may_stand_for_those_in_other_orders(group_counts, p):
    group, counts = group_counts
    marginal = quantize_marginal(np.array(counts))
    groups = all_groups(marginal.size, group)
    rising = (np.diff(groups, axis=0) >= 0).all(axis=0)
    digits = marginal.size ** np.arange(group)
    sorted_numbers = digits @ np.sort(groups, axis=0)
    times = np.bincount(sorted_numbers, minlength=rising.size)[sorted_numbers][rising]
    expected = has_states(marginal, groups, p)[rising]
    assert np.array_equal(has_states(marginal, groups[:, rising], p, times), expected)


@given(group_and_counts, log2_states)
@settings(deadline=None)
def test_entries_of_a_group_lead_to_every_state_exactly_once(group_counts, p):
    """What makes the code decodable, and a decoder safe from any state and on any bits."""
    group, counts = group_counts
    marginal = quantize_marginal(np.array(counts))
    entries = decode_table(marginal, p, group).astype(int)
    nbits = 32 - (entries >> 16 & 31)
    base = (entries >> 21) << (p - 11)
    if p == 12:
        assert np.array_equal(base, entries >> 20 & 0xFFE)  # as a shader reads it
    assert nbits.min() >= 1
    assert max(symbols.max() for symbols in entry_symbols(entries, group)) < marginal.size
    number = numbers(entries, marginal.size, group)
    frequencies = group_frequencies(marginal, p, group)
    assert np.array_equal(np.bincount(number, minlength=frequencies.size), frequencies)
    order = np.lexsort((base, number))
    end = (base + 2**nbits)[order]
    start = np.where(np.diff(number[order], prepend=-1) != 0, 0, np.append(0, end[:-1]))
    assert np.array_equal(base[order], start)
    ends = end[np.diff(number[order], append=-1) != 0]
    assert np.array_equal(ends, np.full(len(set(number)), 2**p))


@given(group_and_counts, log2_states)
@settings(deadline=None)
def test_encoder_inverts_the_decode_table(group_counts, p):
    group, counts = group_counts
    marginal = quantize_marginal(np.array(counts))
    table = build_table(marginal, p, group)
    entries = decode_table(marginal, p, group).astype(int)
    nbits, base = 32 - (entries >> 16 & 31), (entries >> 21) << (p - 11)
    number = numbers(entries, marginal.size, group)
    for bits in (np.zeros_like(nbits), (1 << nbits) - 1):
        x = base + bits + 2**p
        n = x + table.delta_bits[number] >> 16
        assert np.array_equal(n, nbits)
        assert np.array_equal(x & (1 << n) - 1, bits)
        state = table.next_x[(x >> n) + table.delta_state[number]] - 2**p
        assert np.array_equal(state, np.arange(2**p))


@given(group_and_counts, log2_states)
@settings(deadline=None)
def test_rare_groups_are_stood_for_by_groups_with_states(group_counts, p):
    group, counts = group_counts
    marginal = quantize_marginal(np.array(counts))
    table = build_table(marginal, p, group)
    assert (table.frequencies[table.substitute] > 0).all()
    kept = np.flatnonzero(table.frequencies)
    assert np.array_equal(table.substitute[kept], kept)
    own = all_groups(marginal.size, group)
    stands = own[:, table.substitute]
    # At least one weight is as it was; what replaces others is the most frequent symbol, and there
    # would be no state with one symbol less replaced.
    assert (own == stands).any(axis=0).all()
    replaced = own != stands
    assert (stands[replaced] == marginal.argmax()).all()
    digits = marginal.size ** np.arange(group)[::-1]
    share = np.where(own == marginal.argmax(), MARGINAL_TOTAL, marginal.astype(int)[own])
    assert (
        np.where(replaced, share, 0).max(axis=0) <= np.where(replaced, 2**17, share).min(axis=0)
    ).all()
    last = np.where(replaced, share, -1).argmax(axis=0)
    rare = np.flatnonzero(replaced.any(axis=0))
    before = stands[:, rare]
    before[last[rare], np.arange(rare.size)] = own[last[rare], rare]
    assert not table.frequencies[digits @ before].any()


@pytest.mark.parametrize("p", [11, 12])
@pytest.mark.parametrize("group", [2, 4])
def test_symbols_of_probability_0_are_stood_for_by_their_neighbour(group, p):
    marginal = np.array([0, 16384, 49152, 0, 0], np.uint16)
    table = build_table(marginal, p, group)
    groups = all_groups(5, group)
    assert np.array_equal(groups[:, table.substitute], np.clip(groups, 1, 2))


@pytest.mark.parametrize("p", [11, 12])
@pytest.mark.parametrize(
    "group, counts",
    [
        (2, [1, 0]),
        (2, [1] * 32),
        (2, [1, 5, 20, 60, 21, 5, 1]),
        (2, [2**i for i in range(20)]),
        (2, [1000, 1, 1, 1]),
        (4, [1, 0]),
        (4, [1] * 16),
        (4, [1] * 6),
        (4, [1, 5, 20, 60, 21, 5, 1]),
        (4, [2**i for i in range(16)]),
        (4, [3, 1000, 9]),
    ],
)
def test_table_equals_the_scalar_one(group, counts, p):
    marginal = quantize_marginal(np.array(counts))
    width, fields = 16 // group, []
    for e in decode_table(marginal, p, group).tolist():
        symbols = tuple(e >> width * i & 2**width - 1 for i in range(group))
        fields.append((symbols, 32 - (e >> 16 & 31), (e >> 21) << (p - 11)))
    assert fields == codec_scalar.state_table(tuple(marginal.tolist()), p, group)


def test_table_of_one_value_by_hand():
    """Weights that are nearly all symbol 0: pair (0, 0) is capped at half of the 2^11 states."""
    marginal = np.array([65535, 1], np.uint16)
    assert group_frequencies(marginal, 11, 2).tolist() == [1024, 512, 512, 0]
    entries = decode_table(marginal, 11, 2).tolist()
    # (0, 0) is so likely that it has the first 1024 states: x = 1024 + state, 1 bit, base 2 state.
    assert entries[:3] == [31 << 16, 31 << 16 | 2 << 21, 31 << 16 | 4 << 21]
    assert entries[1023] == 31 << 16 | 2046 << 21
    # (0, 1) and (1, 0) are alike and take turns: x = 512, 513, ..., 2 bits, base 4 (x - 512).
    assert entries[1024:1026] == [30 << 16 | 1 << 8, 30 << 16 | 1]
    assert entries[1026:1028] == [30 << 16 | 1 << 8 | 4 << 21, 30 << 16 | 1 | 4 << 21]
    assert entries[2047] == 30 << 16 | 1 | 2044 << 21
    # (1, 1) has no state; (1, 0) stands for it.
    assert build_table(marginal, 11, 2).substitute.tolist() == [0, 1, 2, 2]
