"""Coded matrices: what goes in comes out, from any entry, as the format says; damage is found."""

import json
from dataclasses import replace
from pathlib import Path

import codec_scalar
import numpy as np
import pytest
from golden.make_codec_words import golden_matrix, golden_sparse_matrix, to_record
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import matrix, side
from codec.choice import MAX_HIGH, MAX_INTEGER
from codec.matrix import (
    CodedMatrix,
    check,
    decode_matrix,
    dequantize,
    encode_matrix,
    entry_points,
    pack_side,
)
from codec.scale import ZERO
from codec.side import pack_outliers

GOLDEN = json.loads((Path(__file__).parent / "golden" / "codec_words.json").read_text())


def golden_id(record):
    return f"{record['group']}-{record['log2_states']}"


KINDS = {
    "zeros": lambda rng, shape: np.zeros(shape),
    "one value": lambda rng, shape: np.full(shape, rng.integers(-300, 300)),
    "two values": lambda rng, shape: rng.choice([-7, 9], shape),
    "ternary": lambda rng, shape: rng.choice([-1, 0, 1], shape, p=[0.08, 0.85, 0.07]),
    "pruned": lambda rng, shape: np.rint(rng.laplace(size=shape)) * (rng.random(shape) < 0.1),
    "very rare": lambda rng, shape: rng.random(shape) < 1e-3,
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
    return encode_matrix(gaussian(rows, cols, sigma), np.zeros(rows, np.int16), log2_states)


@given(matrices(), st.sampled_from([11, 12]), st.sampled_from([(2,), (4,), (2, 4)]))
@settings(deadline=None, max_examples=200)
def test_decoding_returns_what_was_encoded(q, log2_states, groups):
    """Groups of four can do it all, though not always well."""
    wide = np.abs(q).max() > MAX_HIGH
    groups = (2,) if wide else groups
    m = encode_matrix(q, np.zeros(len(q), np.int16), log2_states, groups=groups)
    check(m)
    assert m.group in groups
    assert m.min_symbol <= 0 < m.min_symbol + m.n_symbols
    assert np.array_equal(decode_matrix(m), q)


@given(
    st.sampled_from([1, 31, 32, 33, 64, 100, 330]),
    st.sampled_from([2, 35, 150]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([11, 12]),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=30)
def test_rows_of_any_spread_are_decoded(rows, cols, octaves, log2_states, seed):
    rng = np.random.default_rng(seed)
    spread = 3 * 2 ** (octaves * rng.normal(size=(rows, 1)))
    q = np.rint(rng.normal(size=(rows, cols)) * spread).astype(np.int32)
    scale_log2 = rng.integers(-800, 801, rows).astype(np.int16)
    scale_log2[rng.random(rows) < 0.1] = ZERO
    m = encode_matrix(q, scale_log2, log2_states)
    check(m)
    assert np.array_equal(decode_matrix(m), q)
    got = side.unpack(pack_side(m), rows, m.n_classes, log2_states)
    assert np.array_equal(got.scale_log2, scale_log2)
    assert np.array_equal(got.classes, m.classes)
    for row in (0, rows // 2, rows - 1):
        assert codec_scalar.decode_row(m, row)[0] == q[row].tolist()


@pytest.mark.parametrize("log2_states", [11, 12])
def test_rows_of_like_spread_share_a_class(log2_states):
    rng = np.random.default_rng(9)
    spread = np.repeat([1, 2, 4, 8], 64)
    rng.shuffle(spread)
    q = np.rint(rng.normal(size=(256, 500)) * spread[:, None]).astype(np.int32)
    m = encode_matrix(q, np.zeros(256, np.int16), log2_states)
    assert m.n_classes == 4
    assert np.array_equal(2**m.classes, spread)


@pytest.mark.parametrize(("rows", "cols"), [(32, 700), (300, 8)])
def test_few_or_like_rows_have_one_class(rows, cols):
    spread = 2.0 ** np.random.default_rng(9).normal(size=(32, 1)) if rows == 32 else 1
    q = np.rint(gaussian(rows, cols, 2.5) * spread).astype(np.int32)
    assert encode_matrix(q, np.zeros(rows, np.int16)).n_classes == 1


def test_classes_save_what_their_marginals_cost():
    """Rows an octave apart, or two, or three; one class would cost their joint entropy."""
    q = np.concatenate([gaussian(96, 600, sigma) for sigma in (1, 2, 4, 8)])
    p = np.unique(q, return_counts=True)[1] / q.size
    m = encode_matrix(q, np.zeros(384, np.int16))
    assert m.bits_per_weight < -(p @ np.log2(p)) - 0.15


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_scalar_decoder_agrees(kind, log2_states):
    q = KINDS[kind](np.random.default_rng(4), (3, 31)).astype(int)
    m = encode_matrix(q, np.zeros(3, np.int16), log2_states)
    for row in range(3):
        got, _, n_bits = codec_scalar.decode_row(m, row)
        assert got == q[row].tolist()
        assert n_bits == m.row_bits[row]


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize("segment", [4, 12, 32, 128])
@pytest.mark.parametrize("sigma", [0.3, 2.5, 25])  # groups of four, pairs without and with raw bits
def test_entry_points_are_where_the_scalar_decoder_passes(sigma, segment, log2_states):
    m = coded(5, 70, sigma, log2_states)
    entries, end_bits = entry_points(m, range(0, 70, segment))
    assert entries.dtype == np.uint32
    assert entries.shape == (-(-70 // segment), 5)
    assert m.group == (4 if sigma < 1 else 2)
    for row in range(5):
        trail = codec_scalar.decode_row(m, row)[1]
        passed = trail[:: segment // m.group]
        expected = [bit << log2_states | state for bit, state in passed]
        assert entries[:, row].tolist() == expected
    assert np.array_equal(end_bits, m.row_offsets[1:])


@pytest.mark.parametrize("sigma", [0.3, 2.5, 25])
def test_decoding_from_every_entry_gives_the_rest_of_the_row(sigma):
    q, segment = gaussian(33, 70, sigma), 8
    m = encode_matrix(q, np.zeros(33, np.int16))
    entries, _ = entry_points(m, range(0, 70, segment))
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
    whole = to_record(encode_matrix(q, np.zeros(33, np.int16)))
    monkeypatch.setattr(matrix, "_CHUNK_ROWS", 7)
    m = encode_matrix(q, np.zeros(33, np.int16))
    assert to_record(m) == whole
    assert np.array_equal(decode_matrix(m), q)
    monkeypatch.setattr(matrix, "_CHUNK_QUADS", 1)  # less than a row
    assert to_record(encode_matrix(q, np.zeros(33, np.int16))) == whole
    assert np.array_equal(entry_points(m, range(0, 70, 4))[1], m.row_offsets[1:])


@pytest.mark.parametrize("record", GOLDEN, ids=golden_id)
def test_golden_words(record):
    """If the format was to change: python tests/golden/make_codec_words.py"""
    q = np.array(record["q"])
    assert np.array_equal(q, golden_matrix() if record["group"] == 2 else golden_sparse_matrix())
    m = encode_matrix(q, np.zeros(40, np.int16), record["log2_states"])
    assert {"q": record["q"], **to_record(m)} == record
    assert m.n_classes == 2
    assert m.outliers.size >= 2


@pytest.mark.parametrize("record", GOLDEN, ids=golden_id)
def test_golden_words_are_read(record):
    m = CodedMatrix(
        rows=40,
        cols=37,
        log2_states=record["log2_states"],
        group=record["group"],
        raw_bits=record["raw_bits"],
        n_narrow=record["n_narrow"],
        narrow_raw_bits=record["narrow_raw_bits"],
        min_symbol=record["min_symbol"],
        marginals=np.array(record["marginals"], np.uint16),
        classes=np.array(record["classes"], np.uint8),
        words=np.frombuffer(bytes.fromhex(record["words"]), ">u4").astype(np.uint32),
        row_offsets=np.array(record["row_offsets"]),
        states=np.array(record["states"], np.uint16),
        scale_log2=np.zeros(40, np.int16),
        outlier_offsets=np.array(record["outlier_offsets"], np.uint32),
        outliers=np.array(record["outliers"], np.uint32),
    )
    assert decode_matrix(m).tolist() == record["q"]
    assert [codec_scalar.decode_row(m, row)[0] for row in range(m.rows)] == record["q"]


def test_dequantize_scales_each_row():
    q = gaussian(33, 70, 2.5)
    scale_log2 = np.arange(-60, -27, dtype=np.int16)
    scale_log2[7] = ZERO
    w = dequantize(encode_matrix(q, scale_log2))
    assert w.dtype == np.float32
    scale = np.float32(2 ** (scale_log2 / 8))
    scale[7] = 0
    # The exact product of a 5-bit integer and a 24-bit significand, rounded once.
    assert np.array_equal(w, np.float32(scale.astype(np.float64)[:, None] * q))


def test_outliers_are_sorted_and_counted():
    q = gaussian(33, 70, 2.5)
    places = [(0, 69), (5, 0), (5, 1), (5, 68), (32, 3)]
    for i, place in enumerate(places):
        q[place] = (-1) ** i * (1000 + i)
    m = encode_matrix(q, np.zeros(33, np.int16))
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
    m = encode_matrix(q, np.zeros(rows, np.int16))
    got = side.unpack(pack_side(m), rows, m.n_classes, m.log2_states)
    expected = (m.classes, m.row_bits, m.states, m.outlier_counts, m.scale_log2)
    assert all(map(np.array_equal, got, expected))


def test_stored_bits_count_every_array():
    m = coded()
    arrays = (m.words, m.marginals, pack_side(m), pack_outliers(m.outliers, m.cols))
    assert m.stored_bits == 8 * sum(a.nbytes for a in arrays)
    assert m.bits_per_weight == m.stored_bits / (33 * 70)
    assert m.payload_bits == m.row_bits.sum()


@pytest.mark.parametrize(
    "q, scale",
    [
        (np.zeros((0, 4), int), np.zeros(0, np.int16)),
        (np.zeros((4, 0), int), np.zeros(4, np.int16)),
        (np.zeros((1, 65536), int), np.zeros(1, np.int16)),
        (np.zeros((4, 4), int), np.zeros(3, np.int16)),
        (np.full((4, 4), MAX_INTEGER + 1), np.zeros(4, np.int16)),
        (np.full((4, 4), -MAX_INTEGER - 1), np.zeros(4, np.int16)),
        (np.zeros((4, 4), int), np.full(4, 801, np.int16)),
        (np.zeros((4, 4), int), np.full(4, -801, np.int16)),
    ],
)
def test_what_no_code_holds_is_refused(q, scale):
    with pytest.raises(ValueError, match="expected"):
        encode_matrix(q, scale)


@pytest.mark.parametrize("columns", [[4], [0, 6], [0, 0], [0, 8, 4], [0, 1000]])
def test_segments_are_whole_quads(columns):
    with pytest.raises(ValueError, match="rising multiples of 4"):
        entry_points(coded(), columns)


def change(array: np.ndarray, index: int | tuple[int, int], value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


DAMAGE = {
    "no rows": lambda m: {"rows": 0},
    "no columns": lambda m: {"cols": 0},
    "too many columns": lambda m: {"cols": 65536},
    "other columns": lambda m: {"cols": 7000},
    "other states": lambda m: {"log2_states": 13},
    "groups of three": lambda m: {"group": 3},
    "groups of no weights": lambda m: {"group": 0},
    "too many symbols for groups of four": lambda m: {"group": 4},
    "raw bits": lambda m: {"raw_bits": 5},
    "negative raw bits": lambda m: {"raw_bits": -1},
    "no more than the narrow class": lambda m: {"raw_bits": m.narrow_raw_bits},
    "more than beside narrow classes": lambda m: {"raw_bits": 3},
    "negative narrow raw bits": lambda m: {"narrow_raw_bits": -1},
    "narrow raw bits of no class": lambda m: {"n_narrow": 0},
    "all classes narrow": lambda m: {"n_narrow": m.n_classes},
    "fewer than no narrow classes": lambda m: {"n_narrow": -1},
    "symbols above 0": lambda m: {"min_symbol": 1},
    "symbols below 0": lambda m: {"min_symbol": -m.n_symbols},
    "one symbol": lambda m: {"marginals": m.marginals[:, :1]},
    "one symbol that occurs": lambda m: {"marginals": np.uint16([[65535, 0], [65535, 1]])},
    "marginal sum": lambda m: {"marginals": change(m.marginals, (1, 3), 9)},
    "no classes": lambda m: {"marginals": m.marginals[:0]},
    "a class more": lambda m: {"marginals": np.append(m.marginals, m.marginals[:1], axis=0)},
    "a class less": lambda m: {"marginals": m.marginals[:-1]},
    "five classes": lambda m: {"marginals": m.marginals[[0, 1, 1, 1, 1]]},
    "half a tile": lambda m: {"classes": change(m.classes, 5, 1 - m.classes[5])},
    "another class": lambda m: {"classes": change(m.classes, 5, 2)},
    "a class short": lambda m: {"classes": m.classes[1:]},
    "a word short": lambda m: {"words": m.words[:-1]},
    "a word more": lambda m: {"words": np.append(m.words, np.uint32(0))},
    "a row short": lambda m: {"row_offsets": m.row_offsets[:-1]},
    "a late start": lambda m: {"row_offsets": change(m.row_offsets, 0, 1)},
    "falling offsets": lambda m: {"row_offsets": change(m.row_offsets, 7, m.row_offsets[5])},
    "huge offset": lambda m: {"row_offsets": change(m.row_offsets, 7, 2**60)},
    "a state short": lambda m: {"states": m.states[:-1]},
    "huge state": lambda m: {"states": change(m.states, 2, 4096)},
    "a scale short": lambda m: {"scale_log2": m.scale_log2[1:]},
    "huge scale": lambda m: {"scale_log2": change(m.scale_log2, 2, 801)},
    "tiny scale": lambda m: {"scale_log2": change(m.scale_log2, 2, -801)},
    "outliers short": lambda m: {"outliers": m.outliers[1:]},
    "a late outlier": lambda m: {"outlier_offsets": change(m.outlier_offsets, 0, 1)},
    "outlier offsets": lambda m: {"outlier_offsets": change(m.outlier_offsets, 5, 60000)},
    "outlier column": lambda m: {"outliers": m.outliers | np.uint32(0xFFFF)},
    "outlier order": lambda m: {"outliers": m.outliers[::-1]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_parts_that_do_not_fit_are_found(damage):
    q = gaussian(70, 700, 12)
    q[::2] //= 12
    q[[0, 4, 4, 4], [0, 5, 6, 7]] = 2000
    m = encode_matrix(q, np.zeros(70, np.int16))
    assert (m.n_classes, m.n_narrow, m.narrow_raw_bits, m.raw_bits) == (2, 1, 0, 2)
    check(m)
    with pytest.raises(ValueError, match="expected"):
        check(replace(m, **DAMAGE[damage](m)))


def test_groups_of_four_are_checked_too():
    m = coded(sigma=0.3)
    assert m.group == 4
    check(m)
    for wrong in ({"raw_bits": 1}, {"group": 2}, {"row_offsets": m.row_offsets * 0}):
        with pytest.raises(ValueError, match="expected"):
            check(replace(m, **wrong))


@pytest.mark.parametrize("value", [0, 1])
def test_matrices_of_one_value_take_a_quarter_of_a_bit(value):
    m = encode_matrix(np.full((40, 401), value), np.zeros(40, np.int16))
    assert m.payload_bits == 40 * 100  # and no state bits for the last of 101 groups
    assert not m.outliers.size
    assert (decode_matrix(m) == value).all()


def test_rows_that_start_or_end_elsewhere_are_found():
    m = coded()
    with pytest.raises(ValueError, match="row 6 ends after"):
        decode_matrix(replace(m, row_offsets=change(m.row_offsets, 7, m.row_offsets[7] + 1)))
    with pytest.raises(ValueError, match="row 0 ends after"):
        decode_matrix(replace(m, states=m.states[::-1]))


def test_rows_with_a_wrong_bit_end_wrong():
    """Most do: a decoder that has lost its way may find back to it, which only a checksum shows."""
    m = coded(66, 700)
    middle = (m.row_offsets[0:-1:2] + m.row_offsets[1::2]) // 2  # of rows 0, 2, 4, ...
    words = m.words.copy()
    words[middle >> 5] ^= (1 << 31 - (middle & 31)).astype(np.uint32)
    damaged = replace(m, words=words)
    _, end_bits = entry_points(damaged, [0])
    wrong = np.flatnonzero(end_bits != m.row_offsets[1:])
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
