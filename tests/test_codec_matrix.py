"""Coded matrices: what goes in comes out, from any entry, as the format says; damage is found."""

import json
from dataclasses import replace
from pathlib import Path

import codec_scalar
import numpy as np
import pytest
from golden.make_codec_words import golden_matrix, to_record
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import matrix
from codec.choice import MAX_INTEGER
from codec.matrix import (
    CodedMatrix,
    check,
    decode_matrix,
    dequantize,
    encode_matrix,
    entry_points,
    pack_side,
    unpack_side,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "codec_words.json").read_text())

KINDS = {
    "zeros": lambda rng, shape: np.zeros(shape),
    "one value": lambda rng, shape: np.full(shape, rng.integers(-300, 300)),
    "two values": lambda rng, shape: rng.choice([-7, 9], shape),
    "flat": lambda rng, shape: rng.integers(-40, 41, shape),
    "flat and wide": lambda rng, shape: rng.integers(-700, 701, shape),
    "peaked": lambda rng, shape: rng.geometric(0.97, shape) - 1,
    "bell": lambda rng, shape: np.rint(rng.normal(size=shape) * rng.uniform(0.3, 80)),
    "one side": lambda rng, shape: rng.poisson(6, shape) + 3,
    "heavy tails": lambda rng, shape: np.rint(rng.standard_cauchy(shape)).clip(-30000, 30000),
    "the extremes": lambda rng, shape: rng.choice([-MAX_INTEGER, 0, 1, MAX_INTEGER], shape),
    "one outlier": lambda rng, shape: np.eye(*shape) * (rng.integers(2) * 2 - 1) * 250_000,
}


@st.composite
def matrices(draw):
    """q (rows, cols) with rows, cols around 1, 2, 4 and 32."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (
        draw(st.sampled_from([1, 2, 31, 33, 70])),
        draw(st.sampled_from([1, 2, 3, 4, 5, 33, 70])),
    )
    return KINDS[draw(st.sampled_from(list(KINDS)))](rng, shape).astype(np.int32)


def gaussian(rows: int, cols: int, sigma: float) -> np.ndarray:
    rng = np.random.default_rng(3)
    return np.rint(rng.normal(size=(rows, cols)) * sigma).astype(np.int32)


def coded(rows: int = 33, cols: int = 70, sigma: float = 2.5, log2_states: int = 12) -> CodedMatrix:
    return encode_matrix(gaussian(rows, cols, sigma), np.ones(rows), log2_states)


@given(matrices(), st.sampled_from([11, 12]))
@settings(deadline=None)
def test_decoding_returns_what_was_encoded(q, log2_states):
    m = encode_matrix(q, np.ones(len(q)), log2_states)
    check(m)
    assert m.min_symbol <= 0 < m.min_symbol + m.marginal.size
    assert np.array_equal(decode_matrix(m), q)


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_scalar_decoder_agrees(kind, log2_states):
    q = KINDS[kind](np.random.default_rng(4), (3, 31)).astype(int)
    m = encode_matrix(q, np.ones(3), log2_states)
    for row in range(3):
        got, trail = codec_scalar.decode_row(m, row)
        assert got == q[row].tolist()
        assert trail[-1] == (m.row_bits[row], 0)


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize("segment", [4, 12, 32, 128])
@pytest.mark.parametrize("sigma", [2.5, 25])  # without and with raw bits
def test_entry_points_are_where_the_scalar_decoder_passes(sigma, segment, log2_states):
    m = coded(5, 70, sigma, log2_states)
    entries, end_bits, end_states = entry_points(m, segment)
    assert entries.dtype == np.uint32
    assert entries.shape == (-(-70 // segment), 5)
    for row in range(5):
        trail = codec_scalar.decode_row(m, row)[1]
        expected = [bit << log2_states | state for bit, state in trail[0 : 70 // 2 : segment // 2]]
        assert entries[:, row].tolist() == expected
    assert np.array_equal(end_bits, m.row_offsets[1:])
    assert not end_states.any()


@pytest.mark.parametrize("sigma", [2.5, 25])
def test_decoding_from_every_entry_gives_the_rest_of_the_row(sigma):
    q, segment = gaussian(33, 70, sigma), 8
    m = encode_matrix(q, np.ones(33))
    entries, *_ = entry_points(m, segment)
    no_outliers = replace(m, outliers=m.outliers[:0], outlier_offsets=m.outlier_offsets * 0)
    q = decode_matrix(no_outliers)
    for i, entry in enumerate(entries):
        # As if every row began there: bits before its entry belong to the row before.
        starts = m.row_offsets[:-1] + (entry >> 12)
        for row in (0, 17, 32):
            rest = replace(
                no_outliers,
                cols=70 - i * segment,
                row_offsets=np.append(starts[row], m.row_offsets[row + 1]),
                states=(entry[row : row + 1] & 4095).astype(np.uint16),
            )
            assert codec_scalar.decode_row(rest, 0)[0] == q[row, i * segment :].tolist()


def test_chunks_of_rows_do_not_show(monkeypatch):
    q = gaussian(33, 70, 25)
    q[20, 5] = -9000
    whole = to_record(encode_matrix(q, np.ones(33)))
    monkeypatch.setattr(matrix, "_CHUNK_ROWS", 7)
    m = encode_matrix(q, np.ones(33))
    assert to_record(m) == whole
    assert np.array_equal(decode_matrix(m), q)
    monkeypatch.setattr(matrix, "_CHUNK_PAIRS", 1)  # less than a row
    assert to_record(encode_matrix(q, np.ones(33))) == whole
    assert np.array_equal(entry_points(m, 4)[1], m.row_offsets[1:])


@pytest.mark.parametrize("record", GOLDEN["codes"], ids=lambda record: record["log2_states"])
def test_golden_words(record):
    """If the format was to change: python tests/golden/make_codec_words.py"""
    q = np.array(GOLDEN["q"])
    assert np.array_equal(q, golden_matrix())
    m = encode_matrix(q, np.ones(5), record["log2_states"])
    assert to_record(m) == record
    assert m.outliers.size >= 2


@pytest.mark.parametrize("record", GOLDEN["codes"], ids=lambda record: record["log2_states"])
def test_golden_words_are_read(record):
    m = CodedMatrix(
        rows=5,
        cols=37,
        log2_states=record["log2_states"],
        raw_bits=record["raw_bits"],
        min_symbol=record["min_symbol"],
        marginal=np.array(record["marginal"], np.uint16),
        words=np.frombuffer(bytes.fromhex(record["words"]), ">u4").astype(np.uint32),
        row_offsets=np.array(record["row_offsets"]),
        states=np.array(record["states"], np.uint16),
        scale=np.ones(5, np.float16),
        outlier_offsets=np.array(record["outlier_offsets"], np.uint32),
        outliers=np.array(record["outliers"], np.uint32),
    )
    assert decode_matrix(m).tolist() == GOLDEN["q"]
    assert [codec_scalar.decode_row(m, row)[0] for row in range(5)] == GOLDEN["q"]


def test_dequantize_scales_each_row():
    q = gaussian(33, 70, 2.5)
    scale = np.linspace(0.01, 3, 33).astype(np.float16)
    w = dequantize(encode_matrix(q, scale))
    assert w.dtype == np.float32
    # Exact: a 5-bit integer times an 11-bit significand fits float32's 24 bits.
    assert np.array_equal(w, scale.astype(np.float64)[:, None] * q)


def test_outliers_are_sorted_and_counted():
    q = gaussian(33, 70, 2.5)
    places = [(0, 69), (5, 0), (5, 1), (5, 68), (32, 3)]
    for i, place in enumerate(places):
        q[place] = (-1) ** i * (1000 + i)
    m = encode_matrix(q, np.ones(33))
    row, column = matrix.outlier_places(m)
    got = list(zip(row.tolist(), column.tolist(), strict=True))
    assert got == sorted(got)
    assert set(places) <= set(got)
    assert m.outlier_counts.sum() == m.outliers.size
    assert np.array_equal(decode_matrix(m), q)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_side_information_round_trip(rows):
    q = gaussian(rows, 70, 2.5)
    q[rows // 2, ::3] = 3000
    m = encode_matrix(q, np.ones(rows))
    row_bits, states, outlier_counts = unpack_side(pack_side(m), rows, m.log2_states)
    assert np.array_equal(row_bits, m.row_bits)
    assert np.array_equal(states, m.states)
    assert np.array_equal(outlier_counts, m.outlier_counts)


def test_stored_bits_count_every_array():
    m = coded()
    arrays = (m.words, m.marginal, m.scale, pack_side(m), m.outliers)
    assert m.stored_bits == 8 * sum(a.nbytes for a in arrays)
    assert m.bits_per_weight == m.stored_bits / (33 * 70)
    assert m.payload_bits == m.row_bits.sum()


@pytest.mark.parametrize(
    "q, scale",
    [
        (np.zeros((0, 4), int), np.ones(0)),
        (np.zeros((4, 0), int), np.ones(4)),
        (np.zeros((1, 65536), int), np.ones(1)),
        (np.zeros((4, 4), int), np.ones(3)),
        (np.full((4, 4), MAX_INTEGER + 1), np.ones(4)),
        (np.full((4, 4), -MAX_INTEGER - 1), np.ones(4)),
    ],
)
def test_what_no_code_holds_is_refused(q, scale):
    with pytest.raises(ValueError, match="expected"):
        encode_matrix(q, scale)


@pytest.mark.parametrize("segment", [-4, 0, 2, 6, 7])
def test_segments_are_whole_quads(segment):
    with pytest.raises(ValueError, match="multiple of 4"):
        entry_points(coded(), segment)


def change(array: np.ndarray, index: int, value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


DAMAGE = {
    "no rows": lambda m: {"rows": 0},
    "no columns": lambda m: {"cols": 0},
    "too many columns": lambda m: {"cols": 65536},
    "other columns": lambda m: {"cols": 700},
    "other states": lambda m: {"log2_states": 13},
    "raw bits": lambda m: {"raw_bits": 5},
    "negative raw bits": lambda m: {"raw_bits": -1},
    "symbols above 0": lambda m: {"min_symbol": 1},
    "symbols below 0": lambda m: {"min_symbol": -m.marginal.size},
    "one symbol": lambda m: {"marginal": m.marginal[:1]},
    "marginal sum": lambda m: {"marginal": change(m.marginal, 3, m.marginal[3] + 1)},
    "marginal of 0": lambda m: {"marginal": np.append(m.marginal, np.uint16(0))},
    "a word short": lambda m: {"words": m.words[:-1]},
    "a word more": lambda m: {"words": np.append(m.words, np.uint32(0))},
    "a row short": lambda m: {"row_offsets": m.row_offsets[:-1]},
    "a late start": lambda m: {"row_offsets": change(m.row_offsets, 0, 1)},
    "falling offsets": lambda m: {"row_offsets": change(m.row_offsets, 7, m.row_offsets[5])},
    "huge offset": lambda m: {"row_offsets": change(m.row_offsets, 7, 2**60)},
    "a state short": lambda m: {"states": m.states[:-1]},
    "huge state": lambda m: {"states": change(m.states, 2, 4096)},
    "a scale short": lambda m: {"scale": m.scale[1:]},
    "scale not finite": lambda m: {"scale": change(m.scale, 2, np.inf)},
    "outliers short": lambda m: {"outliers": m.outliers[1:]},
    "a late outlier": lambda m: {"outlier_offsets": change(m.outlier_offsets, 0, 1)},
    "outlier offsets": lambda m: {"outlier_offsets": change(m.outlier_offsets, 5, 60000)},
    "outlier column": lambda m: {"outliers": m.outliers | np.uint32(0xFFFF)},
    "outlier order": lambda m: {"outliers": m.outliers[::-1]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_parts_that_do_not_fit_are_found(damage):
    q = gaussian(33, 70, 2.5)
    q[[0, 4, 4, 4], [0, 5, 6, 7]] = 2000
    m = encode_matrix(q, np.ones(33))
    check(m)
    with pytest.raises(ValueError, match="expected"):
        check(replace(m, **DAMAGE[damage](m)))


def test_rows_that_start_or_end_elsewhere_are_found():
    m = coded()
    with pytest.raises(ValueError, match="row 6 ends after"):
        decode_matrix(replace(m, row_offsets=change(m.row_offsets, 7, m.row_offsets[7] + 1)))
    with pytest.raises(ValueError, match="row 0 ends after"):
        decode_matrix(replace(m, states=m.states[::-1]))


def test_rows_that_end_in_another_state_are_found():
    """The last bit of a row is the lowest of its last state."""
    m = coded()
    for row in (0, 17, 32):
        last = int(m.row_offsets[row + 1]) - 1
        word = m.words[last >> 5] ^ np.uint32(1 << 31 - (last & 31))
        with pytest.raises(ValueError, match=f"row {row} ends after .* bits in state 1:"):
            decode_matrix(replace(m, words=change(m.words, last >> 5, word)))


def test_rows_with_a_wrong_bit_end_wrong():
    """Most do: a decoder that has lost its way may find back to it, which only a checksum shows."""
    m = coded(66, 700)
    middle = (m.row_offsets[0:-1:2] + m.row_offsets[1::2]) // 2  # of rows 0, 2, 4, ...
    words = m.words.copy()
    words[middle >> 5] ^= (1 << 31 - (middle & 31)).astype(np.uint32)
    damaged = replace(m, words=words)
    _, end_bits, end_states = entry_points(damaged, 700)
    wrong = np.flatnonzero((end_bits != m.row_offsets[1:]) | (end_states != 0))
    assert len(wrong) > 20
    assert not (wrong % 2).any()  # no row disturbs another
    with pytest.raises(ValueError, match=f"^row {wrong[0]} ends after"):
        decode_matrix(damaged)


@given(st.data())
@settings(deadline=None)
def test_any_words_are_decoded_or_refused(data):
    """Never an IndexError, whatever the streams hold."""
    m = coded(5, 33, data.draw(st.sampled_from([0.4, 2.5, 300])))
    words = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4))
    damaged = m.words.copy()
    damaged[-4:] = words
    try:
        assert decode_matrix(replace(m, words=damaged)).shape == (5, 33)
    except ValueError:
        pass
