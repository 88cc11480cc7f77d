"""The choice of a code: what it predicts, what it prefers, and that every histogram gets one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import choice
from codec.choice import CLIP, MAX_HIGH, MAX_INTEGER, MAX_RAW_BITS, choose_code
from codec.matrix import decode_matrix, encode_matrix
from codec.table import MAX_SYMBOLS


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=90).filter(any),
    st.integers(-100, 20),
    st.sampled_from([11, 12]),
)
@settings(deadline=None)
def test_every_histogram_has_a_code(counts, lowest, log2_states):
    code = choose_code(np.array(counts), lowest, log2_states)
    assert 0 <= code.raw_bits <= (MAX_RAW_BITS if code.group == 2 else 0)
    assert 2 <= code.n_symbols <= MAX_SYMBOLS[code.group]
    assert code.min_symbol <= 0 < code.min_symbol + code.n_symbols
    p = np.array(counts)[np.array(counts) > 0] / sum(counts)
    assert code.bits > -sum(counts) * (p @ np.log2(p)) * (1 - 1e-12)


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize("kind", ["normal", "laplace", "gumbel"])
@pytest.mark.parametrize("sigma", [0.7, 2, 9, 70])
def test_prediction_is_what_the_encoder_needs(sigma, kind, log2_states):
    rng = np.random.default_rng(5)
    q = np.rint(getattr(rng, kind)(size=(60, 3000)) * sigma).astype(np.int32)
    code = choose_code(np.bincount(q.ravel() - q.min()), int(q.min()), log2_states)
    m = encode_matrix(q, np.zeros(60, np.int16), log2_states)
    assert (m.group, m.raw_bits, m.min_symbol, m.n_symbols) == code[:4]
    assert m.payload_bits + 32 * m.outliers.size == pytest.approx(code.bits, rel=0.002)
    # Those out of range are counted; rare groups are expected: five standard deviations.
    assert abs(m.outliers.size - code.outliers) < 5 * np.sqrt(code.outliers + 1)


def uneven(cols=1500):
    """q (160, cols): rows of zeros and ones beside rows too wide for 32 symbols."""
    sigma = np.repeat([0.4, 0.6, 0.8, 12.0, 18.0], 32)[:, None]
    return np.rint(np.random.default_rng(8).normal(size=(160, cols)) * sigma).astype(np.int32)


@pytest.mark.parametrize("log2_states", [11, 12])
def test_narrow_rows_have_fewer_raw_bits(log2_states, monkeypatch):
    q = uneven()
    counts = np.array([np.bincount(rows.ravel() + CLIP, minlength=2 * CLIP + 1) for rows in q])
    code = choose_code(counts, -CLIP, log2_states, rows=np.ones(160, np.int64))
    m = encode_matrix(q, np.zeros(160, np.int16), log2_states)
    assert [c.raw_bits for c in code.classes] == m.class_raw_bits.tolist()
    assert m.row_raw_bits.tolist() == [0] * 96 + [2] * 64
    assert m.payload_bits + 32 * m.outliers.size == pytest.approx(code.bits, rel=0.004)
    assert np.array_equal(decode_matrix(m), q)
    monkeypatch.setattr(choice, "_MIXED_BITS", 9.0)
    alike = encode_matrix(q, np.zeros(160, np.int16), log2_states)
    assert alike.n_narrow == 0
    assert m.stored_bits < alike.stored_bits - 0.3 * q.size


def test_outliers_too_large_for_narrow_rows_forbid_them():
    q = uneven(70)
    q[0, 0] = 2 * MAX_HIGH
    m = encode_matrix(q, np.zeros(160, np.int16), 11)
    assert m.row_raw_bits.min() > 0
    assert np.array_equal(decode_matrix(m), q)


SPARSE = {
    "normal": lambda rng, shape, zeros: rng.normal(size=shape) * (1 - zeros),
    "laplace": lambda rng, shape, zeros: rng.laplace(size=shape) * (1 - zeros) / 2,
    "pruned": lambda rng, shape, zeros: rng.laplace(size=shape) * (rng.random(shape) > zeros),
}


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize("zeros", [0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("kind", SPARSE)
def test_groups_are_what_takes_fewest_bits(kind, zeros, log2_states):
    """Within what predictions of such codes are off: where a group is capped at half of the states,
    the coder lingers in low states, from which others take fewer bits than is predicted.
    """
    q = np.rint(SPARSE[kind](np.random.default_rng(6), (64, 3000), zeros)).astype(np.int32)
    counts = np.bincount(q.ravel() - q.min())
    bits = {}
    for group in (2, 4):
        m = encode_matrix(q, np.zeros(64, np.int16), log2_states, groups=(group,))
        assert m.group == group
        bits[group] = m.payload_bits + 32 * m.outliers.size
    code = choose_code(counts, int(q.min()), log2_states)
    assert bits[code.group] < 1.005 * min(bits.values())
    assert 0.999 * bits[code.group] < code.bits < 1.026 * bits[code.group]


def test_few_bits_make_groups_of_four():
    rates = [0.2, 0.35, 0.6, 1, 3]
    chosen = []
    for rate in rates:
        q = np.arange(-40, 41)
        chosen.append(choose_code(np.exp(-np.abs(q) / rate) * 1e6, -40, 11).group)
    assert chosen == [4, 4, 2, 2, 2]


def gaussian_counts(sigma):
    q = np.arange(-round(8 * sigma), round(8 * sigma) + 1)
    return np.exp(-0.5 * (q / sigma) ** 2) * 1e6, int(q[0])


def test_raw_bits_grow_with_the_range():
    chosen = [choose_code(*gaussian_counts(sigma), 12).raw_bits for sigma in (1, 2, 6, 12, 24, 60)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0, MAX_RAW_BITS)


def test_far_weights_become_outliers():
    counts, lowest = gaussian_counts(2)
    counts = np.append(counts, np.zeros(1000))
    near = choose_code(counts, lowest, 12)
    counts[-1] = 3
    far = choose_code(counts, lowest, 12)
    assert far[:4] == near[:4]
    assert 3 * 32 < far.bits - near.bits < 3 * 64


def test_one_sided_weights_keep_zero_in_range():
    assert choose_code(np.array([5]), 3, 12)[:4] == (4, 0, 0, 4)
    assert choose_code(np.array([5]), -3, 12)[:4] == (4, 0, -3, 4)
    assert choose_code(np.array([5]), 0, 12)[:4] == (4, 0, 0, 2)


@pytest.mark.parametrize("max_raw_bits", [0, 1, 4])
def test_raw_bits_stay_within_their_limit(max_raw_bits):
    assert choose_code(*gaussian_counts(60), 12, max_raw_bits).raw_bits == max_raw_bits
    largest = MAX_HIGH << max_raw_bits
    assert choose_code(np.array([1]), -largest, 12, max_raw_bits).n_symbols
    m = encode_matrix(np.array([[-largest, largest]]), np.zeros(1, np.int16), 12, max_raw_bits)
    assert decode_matrix(m).tolist() == [[-largest, largest]]
    with pytest.raises(ValueError, match=f"at most {largest}"):
        encode_matrix(np.array([[largest + 1]]), np.zeros(1, np.int16), 12, max_raw_bits)


@pytest.mark.parametrize("q", [-MAX_INTEGER, MAX_INTEGER])
def test_the_largest_integer_has_a_code(q):
    assert choose_code(np.array([1]), q, 12).raw_bits == MAX_RAW_BITS
