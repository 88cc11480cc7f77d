"""Matrices without loss: what goes in comes out bit for bit, at its price; damage is found."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import fields, lossless
from codec.lossless import (
    LosslessMatrix,
    check_lossless,
    decode_lossless,
    encode_lossless,
    exponent_tables,
)
from codec.matrix import encode_matrix, outlier_places
from codec.table import decode_tables

FIELDS = np.arange(255, dtype=np.uint32)  # of finite numbers


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def gaussian(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return (rng.normal(size=shape) * 0.03).astype(np.float32)


def truncated(w: np.ndarray, mantissa_bits: int) -> np.ndarray:
    return floats(w.view(np.uint32) & np.uint32(0xFFFFFFFF << 23 - mantissa_bits & 0xFFFFFFFF))


def any_bits(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Every exponent, subnormals and both zeros included, is as likely as any other."""
    bits = rng.integers(0, 2**23, shape) | rng.choice(FIELDS, shape).astype(np.int64) << 23
    return floats(bits | rng.integers(0, 2, shape) << 31)


def pruned(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return gaussian(rng, shape) * (rng.random(shape) < 0.3)


KINDS = {
    "bfloat16": lambda rng, shape: truncated(gaussian(rng, shape), 7),
    "float16": lambda rng, shape: (gaussian(rng, shape) * 1e-3).astype(np.float16),  # subnormals
    "float32": gaussian,
    "any bits": any_bits,
    "pruned": pruned,
    "zeros": lambda rng, shape: np.zeros(shape),
    "zeros of both signs": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "one value": lambda rng, shape: np.full(shape, rng.normal()),
    "the extremes": lambda rng, shape: rng.choice(
        floats(np.array([0x7F7FFFFF, 0xFF7FFFFF, 1, 0x80000001, 0x00800000, 0, 1 << 31])), shape
    ),
    "powers of two": lambda rng, shape: 2.0 ** rng.integers(-149, 128, shape),
    "one far out": lambda rng, shape: gaussian(rng, shape) + 1e30 * np.eye(*shape, k=shape[1] // 2),
}


@st.composite
def matrices(draw):
    """W (rows, cols) with rows and cols around 1, 4 and 32."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from([1, 2, 31, 33])), draw(st.sampled_from([1, 2, 3, 5, 32, 33, 70]))
    return KINDS[draw(st.sampled_from(list(KINDS)))](rng, shape).astype(np.float32)


def assert_same_bits(got, want):
    assert got.dtype == want.dtype == np.float32 and got.shape == want.shape
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))


@given(matrices(), st.sampled_from([11, 12]))
@settings(deadline=None)
def test_decoding_returns_the_same_bits(w, log2_states):
    m = encode_lossless(w, log2_states)
    check_lossless(m)
    assert_same_bits(decode_lossless(m), w)


def test_every_exponent_with_every_sign_comes_back():
    bits = np.concatenate([FIELDS << 23, FIELDS << 23 | 1 << 31, FIELDS << 23 | 0x2AAAAA])
    w = floats(bits).reshape(3, 255)
    assert_same_bits(decode_lossless(encode_lossless(w)), w)


def test_rows_may_be_taken_from_anywhere():
    """A view with gaps between its rows and columns."""
    w = gaussian(np.random.default_rng(1), (20, 60))
    assert_same_bits(decode_lossless(encode_lossless(w[::3, ::2])), w[::3, ::2].copy())


def test_chunks_of_rows_do_not_show(monkeypatch):
    w = gaussian(np.random.default_rng(1), (33, 70))
    whole = encode_lossless(w)
    monkeypatch.setattr(lossless, "_CHUNK_WEIGHTS", 500)
    assert np.array_equal(encode_lossless(w).mantissas, whole.mantissas)
    assert_same_bits(decode_lossless(whole), w)


@pytest.mark.parametrize("mantissa_bits", [0, 1, 7, 10, 22, 23])
def test_fields_are_as_wide_as_the_weights_need(mantissa_bits):
    w = truncated(gaussian(np.random.default_rng(2), (33, 70)), mantissa_bits)
    assert encode_lossless(w).mantissa_bits == mantissa_bits


@pytest.mark.parametrize(("log2_states", "excess"), [(11, 0.031), (12, 0.025)])
def test_a_weight_costs_its_exponents_entropy_and_its_field(log2_states, excess):
    """And a row's side information and the outliers; seen were 0.028 and 0.022 bits for all."""
    w = truncated(gaussian(np.random.default_rng(3), (400, 1500)), 7)
    exponents = np.unique(w.view(np.uint32) >> 23 & 255, return_counts=True)[1] / w.size
    entropy = -(exponents * np.log2(exponents)).sum()
    m = encode_lossless(w, log2_states)
    assert 0 < m.bits_per_weight - (entropy + 8) < excess


def test_zeros_cost_no_more_than_their_share():
    """They are a symbol like any exponent and not outliers, though their exponent is far off."""
    m = encode_lossless(pruned(np.random.default_rng(4), (60, 500)))
    assert m.exponents.outliers.size < 30
    assert m.bits_per_weight < 24 + 2.2


def test_one_weight_far_out_is_an_outlier():
    rng = np.random.default_rng(5)
    w = gaussian(rng, (60, 500))
    plain = encode_lossless(w)
    w[7, 9] = 1e30
    m = encode_lossless(w)
    assert m.anchor == plain.anchor
    outliers = dict(
        zip(zip(*outlier_places(m.exponents), strict=True), m.exponents.outliers >> 24, strict=True)
    )
    assert outliers[7, 9] == np.float32(1e30).view(np.uint32) >> 23


def test_exponent_table_is_the_decode_table_in_other_words():
    w = pruned(np.random.default_rng(6), (60, 500))
    m = encode_lossless(w, 11)
    symbols = decode_tables(m.exponents.marginals, 11, 2)
    exponents = exponent_tables(m)
    assert np.array_equal(exponents >> 16, symbols >> 16)
    for shift in (0, 8):
        q = (symbols >> shift & 255).astype(int) + m.exponents.min_symbol
        want = np.where(q == 0, 0, m.anchor + (q > 0) - q)
        assert np.array_equal(exponents >> shift & 255, want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    w = np.zeros((3, 5), np.float32)
    w[1, 2] = value
    with pytest.raises(ValueError, match="not a finite number"):
        encode_lossless(w)


@given(st.integers(1, 32), st.integers(1, 70), st.integers(0, 2**32))
@settings(deadline=None)
def test_fields_of_any_width(width, cols, seed):
    values = np.random.default_rng(seed).integers(0, 2**width, (3, cols), np.uint32)
    words = fields.pack(values, width)
    assert words.shape == (3, fields.row_words(cols, width))
    assert np.array_equal(fields.unpack(words, width, cols), values)
    bits = "".join(f"{word:032b}" for word in words[1])
    assert [int(bits[i * width : (i + 1) * width], 2) for i in range(cols)] == values[1].tolist()


def sound() -> LosslessMatrix:
    w = truncated(gaussian(np.random.default_rng(8), (33, 70)), 7)
    w[3, 4], w[5, 6] = 1e30, 1e-30
    return encode_lossless(w)


def with_exponents(m: LosslessMatrix, **changes: object) -> LosslessMatrix:
    return replace(m, exponents=replace(m.exponents, **changes))


DAMAGE = {
    "anchor": lambda m: replace(m, anchor=255),
    "mantissa_bits": lambda m: replace(m, mantissa_bits=24),
    "mantissas": lambda m: replace(m, mantissas=m.mantissas[:-1]),
    "groups of 4": lambda m: replace(
        m, exponents=encode_matrix(np.zeros((33, 70), int), np.zeros(33, np.int16))
    ),
    "raw bits": lambda m: replace(
        m, exponents=encode_matrix(np.arange(33 * 70).reshape(33, 70), np.zeros(33, np.int16))
    ),
    "symbols": lambda m: replace(m, anchor=3),
    "not a finite": lambda m: with_exponents(m, outliers=m.exponents.outliers | 255 << 24),
    "expected": lambda m: with_exponents(m, rows=32),  # what codec.matrix.check finds
}


@pytest.mark.parametrize("what", DAMAGE)
def test_parts_that_do_not_fit_are_named(what):
    check_lossless(sound())
    with pytest.raises(ValueError, match=what):
        check_lossless(DAMAGE[what](sound()))


def test_an_outlier_that_contradicts_the_stream_is_found():
    m = sound()
    damaged = with_exponents(m, outliers=m.exponents.outliers ^ (1 << 16))
    check_lossless(damaged)
    with pytest.raises(ValueError, match="another exponent than the stream"):
        decode_lossless(damaged)
