"""Streams: one by hand, bit packing, resuming, and the rate as constriction judges it."""

import constriction
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec import ans
from codec.choice import FAST_RAW_BITS, SLOW_BITS
from codec.groups import to_groups
from codec.matrix import encode_matrix
from codec.table import (
    build_table,
    build_tables,
    decode_tables,
    entry_symbols,
    quantize_marginal,
)

NONE = np.zeros(1, np.uint8)  # raw bits


def test_stream_by_hand():
    """Two quads in the table of `test_table_of_one_value_by_hand`, with one raw bit per weight.

    From the end, pair (0, 0): its lowest state, 0, so x = state + 2048 = 2048. Pair (0, 1): 2 bits
    of x, 00, and 512 is its first state, 1024. Pair (0, 0): x = 3072, one bit, 0, and 1536 is its
    state 512. Pair (1, 0): x = 2560, 00, and 640 is its state 1025 + 256.
    """
    marginal = np.array([65535, 1], np.uint16)
    pairs, raw = np.array([[2], [0], [1], [0]]), np.array([[0b0110], [0b1011]], np.uint16)
    one = np.ones(1, np.uint8)
    states, quads, lengths = ans.encode(build_table(marginal, 11, 2), pairs, raw, one)
    assert states.tolist() == [1281]
    assert quads.tolist() == [[0b0110_00_0, 0b1011_00]]
    assert lengths.tolist() == [[7, 6]]

    writer = ans.BitWriter()
    assert writer.append(quads, lengths).tolist() == [13]
    assert writer.words().tolist() == [0b0110_00_0_1011_00 << 19]

    tables, first = decode_tables(marginal[None], 11, 2), np.zeros(1, np.uint8)
    decoder = ans.Decoder(tables, 2, one, writer.words(), np.array([0]), states, first)
    visited, got_raw = decoder.run(4)
    assert visited.tolist() == [[1281], [512], [1024], [0]]
    assert np.array_equal(got_raw, raw)
    assert decoder.consumed.tolist() == [14]  # with the bit that the last pair would have


def test_stream_of_quads_by_hand():
    """Weights 0 0 0 0, 0 0 0 1, 0 0 0 0 in groups of four, all but a few being 0.

    Of 2^11 states (0, 0, 0, 0) has the first 1024, and the four groups with one 1 have 256 each and
    take turns, 0 0 0 1 first. From the end: state 0, x = 2048. Group 0 0 0 1: 3 bits, 000, and 256
    is its first state, 1024. Group 0 0 0 0: x = 3072, one bit, 0, and 1536 is its state 512.
    """
    marginal = np.array([65535, 1], np.uint16)
    groups, none = np.array([[0], [1], [0]]), np.zeros((3, 1), np.uint16)
    states, quads, lengths = ans.encode(build_table(marginal, 11, 4), groups, none, NONE)
    assert states.tolist() == [512]
    assert quads.tolist() == [[0, 0, 0]]
    assert lengths.tolist() == [[1, 3, 0]]
    writer = ans.BitWriter()
    assert writer.append(quads, lengths).tolist() == [4]
    tables, first = decode_tables(marginal[None], 11, 4), np.zeros(1, np.uint8)
    decoder = ans.Decoder(tables, 4, NONE, writer.words(), np.array([0]), states, first)
    visited, _ = decoder.run(3)
    assert visited.tolist() == [[512], [1024], [0]]


def test_streams_may_have_no_bits():
    """Rows of one quad in groups of four: all that they say is their first state."""
    marginal = np.array([60000, 5536], np.uint16)
    table, tables = build_table(marginal, 11, 4), decode_tables(marginal[None], 11, 4)
    groups = np.flatnonzero(table.frequencies)[None]
    streams = groups.size
    states, *fields = ans.encode(table, groups, np.zeros_like(groups, np.uint16), NONE)
    writer = ans.BitWriter()
    assert writer.append(*fields).tolist() == [0] * streams
    assert writer.words().size == 0
    starts, first = np.zeros(streams, np.int64), np.zeros(streams, np.uint8)
    decoder = ans.Decoder(tables, 4, NONE, writer.words(), starts, states, first)
    symbols = np.array(entry_symbols(tables[0][decoder.run(1)[0]], 4))
    assert np.array_equal(symbols[:, 0].T @ [8, 4, 2, 1], groups[0])


@given(st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=40), min_size=1, max_size=6))
def test_bits_are_packed_in_order(batches):
    rng = np.random.default_rng(0)
    writer, text, ends = ans.BitWriter(), "", []
    for batch in batches:
        lengths = np.array([batch, batch[::-1]], np.uint64)
        fields = rng.integers(0, 1 << 63, lengths.shape, np.uint64) >> (np.uint64(64) - lengths)
        for row in range(2):
            for field, length in zip(fields[row], lengths[row], strict=True):
                text += f"{field:0{length}b}"[:length]  # of no bits, too
            ends.append(len(text))
        assert writer.append(fields, lengths).tolist() == ends[-2:]
    assert writer.n_bits == len(text)
    words = "".join(f"{word:032b}" for word in writer.words())
    assert words == text.ljust(-(-len(text) // 32) * 32, "0")


@pytest.mark.parametrize("group", [2, 4])
def test_decoder_resumes_where_it_stopped(group):
    rng = np.random.default_rng(1)
    counts = np.array([[5, 20, 50, 20, 5], [50, 20, 5, 3, 1]])
    marginals = np.array([quantize_marginal(c) for c in counts])
    table = build_tables(marginals, 12, group)
    classes = np.arange(7) % 2
    n, of_rows = 5**group, classes.astype(np.uint8)
    raw_bits = np.array([1, 2] if group == 2 else [0, 0], np.uint8)  # of the classes
    first, second = (n * c + np.flatnonzero(table.frequencies[n * c :][:n]) for c in (0, 1))
    groups = np.where(classes, rng.choice(second, (30, 7)), rng.choice(first, (30, 7)))
    raw = rng.integers(0, 16 ** raw_bits[classes].astype(int), (30 * group // 4, 7), np.uint16)
    states, *streams = ans.encode(table, groups, raw, raw_bits[classes])
    writer = ans.BitWriter()
    starts = np.append(0, writer.append(*streams)[:-1])
    tables, words = decode_tables(marginals, 12, group), writer.words()
    whole = ans.Decoder(tables, group, raw_bits, words, starts, states, of_rows).run(30)
    symbols = np.array(entry_symbols(tables.ravel()[whole[0]], group), np.int64)
    digits = 5 ** np.arange(group)[::-1]
    assert np.array_equal(np.tensordot(digits, symbols, 1) + n * classes, groups)
    assert np.array_equal(whole[1], raw)
    decoder = ans.Decoder(tables, group, raw_bits, words, starts, states, of_rows)
    parts = [decoder.run(n) for n in (2, 0, 18, 10)]
    for i in range(2):
        assert np.array_equal(np.concatenate([part[i] for part in parts]), whole[i])


def draw(kind, shape):
    rng = np.random.default_rng(2)
    return {
        "gauss": rng.normal(size=shape),
        "laplace": rng.laplace(size=shape) / 2**0.5,
        "heavy": rng.standard_t(3, size=shape) / 3**0.5,
    }[kind]


@pytest.mark.parametrize("p", [11, 12])
@pytest.mark.parametrize("kind", ["gauss", "laplace", "heavy"])
@pytest.mark.parametrize("step", [5.0, 3.0, 1.0, 0.5, 0.2, 0.05])
def test_rate_is_within_one_percent_of_constriction(kind, step, p):
    """Against its near-optimal coder on the same groups, frequencies and raw bits.

    Ours counts its rows' first states. It may be shorter: the spread knows more of the
    probabilities than the frequencies do.
    """
    q = np.rint(draw(kind, (40, 3001)) / step).astype(np.int32)
    m = encode_matrix(q, np.zeros(40, np.int16), p)
    assert m.n_classes == 1
    assert m.group == (4 if step > 2 else 2)
    table = build_tables(m.marginals, p, m.group)
    groups, *_ = to_groups(q, table, m.row_raw_bits, m.min_symbol, m.classes)
    kept = np.flatnonzero(table.frequencies)
    index = np.cumsum(table.frequencies > 0) - 1
    model = constriction.stream.model.Categorical(table.frequencies[kept] / 2.0**p, perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(index[groups.ravel()].astype(np.int32), model)
    judged = coder.num_bits() + groups.size * m.group * m.raw_bits
    assert 0.99 * judged < m.payload_bits + p * m.rows < 1.01 * judged


@pytest.mark.parametrize("step", [1.0, 0.5, 0.2, 0.05])
def test_rate_of_a_gaussian_is_near_its_entropy(step):
    """Streams, first states and outliers with 2^12 states: within 0.035 bit/weight.

    Of these, first states are 0.004, and at the highest rate three columns of padding 0.006. Up to
    SLOW_BITS more is what a code may cost that stays at FAST_RAW_BITS.
    """
    q = np.rint(draw("gauss", (40, 3001)) / step).astype(np.int32)
    m = encode_matrix(q, np.zeros(40, np.int16), 12)
    p = np.unique(q, return_counts=True)[1] / q.size
    bits = (m.payload_bits + 12 * m.rows + 32 * m.outliers.size) / q.size
    speed = SLOW_BITS if m.raw_bits == FAST_RAW_BITS else 0
    assert 0 < bits + p @ np.log2(p) < 0.035 + speed
