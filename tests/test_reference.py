"""The oracle's functions against other derivations of the same formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from model import reference

pytestmark = pytest.mark.filterwarnings("error")  # numpy's: overflow, 0 / 0, casts of NaN

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]

EPS32 = 2.0**-24  # half a unit in the last place of 1.0, float32
EPS64 = 2.0**-53


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_embed_looks_up_rows_in_the_order_asked() -> None:
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    assert reference.embed(table, np.array([4, 0, 4])).tolist() == [
        [12, 13, 14], [0, 1, 2], [12, 13, 14],
    ]  # fmt: skip


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    # By hand: mean of squares (9 + 16) / 2 = 12.5, with eps 3.5 the root is 4.
    x = np.array([3.0, 4.0])
    assert reference.rms_norm(x, np.array([1.0, 10.0]), 3.5).tolist() == [0.75, 10.0]


def test_rms_norm_is_per_token_and_stays_float32(
    rng: np.random.Generator, assert_close: AssertClose
) -> None:
    x = rng.normal(0, 100, (3, 577)).astype(np.float32)
    weight = rng.normal(1, 1, 577).astype(np.float32)
    got = reference.rms_norm(x, weight, 1e-5)
    want = [
        [float(v) * float(w) / math.sqrt(math.fsum(float(u) ** 2 for u in row) / 577 + 1e-5)
         for v, w in zip(row, weight, strict=True)]
        for row in x
    ]  # fmt: skip
    assert got.dtype == np.float32
    # 577 squares summed (pairwise: log2 n roundings, halved by the root), then four roundings.
    assert_close(got, want, 16 * EPS32 * np.abs(want))


def test_quantize_activations_rounds_half_to_even_and_pads() -> None:
    x = np.zeros((2, 35), np.float32)
    x[0, :6] = [127, -127, 0.5, 1.5, -2.5, 0.49]  # scale 1: the values are the quotients
    x[1, 33] = -254
    x_int, scale = reference.quantize_activations(x)
    assert x_int.dtype == np.int8 and x_int.shape == (2, 64)
    assert scale.dtype == np.float32 and scale.tolist() == [[1, 0], [0, 2]]
    assert x_int[0, :6].tolist() == [127, -127, 0, 2, -2, 0]
    assert x_int[1].tolist() == [0] * 33 + [-127] + [0] * 30


def test_quantize_activations_is_off_by_at_most_half_a_step(
    rng: np.random.Generator, assert_close: AssertClose
) -> None:
    x = (rng.normal(0, 1, (5, 97)) * 10.0 ** rng.integers(-30, 30, (5, 97))).astype(np.float32)
    x_int, scale = reference.quantize_activations(x)
    step = np.repeat(scale, 32, axis=-1)[:, :97].astype(np.float64)
    # Half a step, and the roundings of scale, quotient and product of values up to 127 steps.
    assert_close(reference.dequantize_activations(x_int, scale, 97), x, step * (0.5 + 400 * EPS32))
    assert np.abs(x_int).reshape(5, 4, 32).max(-1).tolist() == [[127] * 4] * 5


def test_quantize_activations_survives_scales_that_underflow() -> None:
    x = np.full(32, np.finfo(np.float32).smallest_subnormal)
    x_int, scale = reference.quantize_activations(x)
    assert scale.tolist() == [0] and not x_int.any()


def test_matvec_int8_is_matvec_of_what_the_integers_stand_for(
    rng: np.random.Generator, assert_close: AssertClose
) -> None:
    rows, cols = 13, 101
    w_int = rng.integers(-300, 300, (rows, cols)).astype(np.int16)  # beyond int8, as outliers are
    row_scale = rng.uniform(0.5, 2, rows).astype(np.float16)
    x_int, x_scale = reference.quantize_activations(rng.normal(0, 1, (3, cols)).astype(np.float32))

    w = w_int * row_scale.astype(np.float64)[:, None]
    x = reference.dequantize_activations(x_int, x_scale.astype(np.float64), cols)
    exact = reference.matvec(w, x)
    got64 = reference.matvec_int8(w_int, row_scale, x_int, x_scale.astype(np.float64))
    got32 = reference.matvec_int8(w_int, row_scale, x_int, x_scale)
    size = reference.matvec(np.abs(w), np.abs(x))  # sum |w x|
    assert got32.shape == (3, rows) and got32.dtype == np.float32
    # Inner sums are exact (below 2^24); 4 blocks: a product, a sum each, and the row's scale.
    assert_close(got32, exact, 6 * EPS32 * size)
    # The same in float64, and the 101 terms of `exact` itself.
    assert_close(got64, exact, 110 * EPS64 * size)


def test_matvec_int8_of_a_wide_row_is_exact_inside_a_block() -> None:
    # 32 * 127 * 2^20 needs more than float32's 24 bits; minus one shows whether any was lost.
    w_int = np.full((1, 32), 2**20, np.int32)
    w_int[0, 31] -= 1
    x_int = np.full(32, 127, np.int8)
    got = reference.matvec_int8(w_int, np.ones(1), x_int, np.ones(1))
    assert got.tolist() == [127 * (32 * 2**20 - 1)]


def test_rope_rotates_pairs_as_complex_numbers(
    rng: np.random.Generator, assert_close: AssertClose
) -> None:
    n, heads, head_dim, theta, pos = 3, 2, 10, 5000.0, 41
    x = rng.normal(0, 1, (n, heads, head_dim))
    got = reference.rope(x, pos, theta)
    for token in range(n):
        for i in range(head_dim // 2):
            turn = np.exp(1j * (pos + token) * theta ** (-2 * i / head_dim))
            pair = (x[token, :, i] + 1j * x[token, :, i + head_dim // 2]) * turn
            # Angles up to 43 rounded to 53 bits, then a handful of roundings.
            assert_close(got[token, :, i], pair.real, 100 * EPS64)
            assert_close(got[token, :, i + head_dim // 2], pair.imag, 100 * EPS64)


def test_rope_makes_scores_depend_on_distance_alone(
    rng: np.random.Generator, assert_close: AssertClose
) -> None:
    q, k = rng.normal(0, 1, (2, 1, 1, 64))
    scores = [
        np.vdot(reference.rope(q, pos + 17, 1e5), reference.rope(k, pos, 1e5))
        for pos in (0, 1, 1000, 8000)
    ]
    # |q| |k| is near 64; angles up to 8017 are exact to 8017 * 2^-53.
    assert_close(scores, np.full(4, scores[0]), 64 * 4 * 8017 * EPS64)


def test_cache_write_rounds_to_the_caches_type_and_touches_nothing_else() -> None:
    k_cache, v_cache = np.full((5, 1, 2), 9, np.float16), np.full((5, 1, 2), 9, np.float16)
    # 2049 lies between the neighbours 2048 and 2050 of float16 and goes to the even one.
    k = np.array([[[2049, 1]], [[1 / 3, -0.0]]], np.float32)
    reference.cache_write(k_cache, v_cache, k, k + 2, 2)
    assert k_cache.ravel().tolist() == [9] * 4 + [2048, 1, 1365 / 4096, 0] + [9] * 2
    assert v_cache.ravel().tolist() == [9] * 4 + [2052, 3, 1195 / 512, 2] + [9] * 2


def test_attention_equals_loops_over_heads_and_positions(
    rng: np.random.Generator, assert_close: AssertClose
) -> None:
    n, n_heads, n_kv_heads, head_dim, pos = 4, 6, 2, 10, 3
    q = rng.normal(0, 3, (n, n_heads, head_dim))
    k_cache, v_cache = rng.normal(0, 1, (2, pos + n + 2, n_kv_heads, head_dim))
    k_cache[pos + n :] = v_cache[pos + n :] = np.nan  # never written, must never be read
    got = reference.attention(q, k_cache, v_cache, pos)
    want = np.zeros((n, n_heads, head_dim))
    for token in range(n):
        for head in range(n_heads):
            shared = head // 3
            scores = [
                math.fsum(q[token, head] * k_cache[p, shared]) / math.sqrt(head_dim)
                for p in range(pos + token + 1)
            ]
            total = math.fsum(math.exp(score) for score in scores)
            for p, score in enumerate(scores):
                want[token, head] += math.exp(score) / total * v_cache[p, shared]
    # Scores below 30 with 10 terms each enter an exponential: relative error 30 * 10 * eps, and
    # a mean of values below 5 cannot magnify it.
    assert_close(got, want.reshape(n, -1), 5 * 30 * 20 * EPS64)


def test_attention_of_huge_scores_does_not_overflow() -> None:
    q = np.full((1, 1, 4), 1e6, np.float32)
    k_cache = np.array([[[1.0] * 4], [[2.0] * 4]], np.float32)
    v_cache = np.array([[[5.0] * 4], [[7.0] * 4]], np.float32)
    assert reference.attention(q, k_cache, v_cache, 1).tolist() == [[7, 7, 7, 7]]


def test_swiglu_equals_its_definition_from_end_to_end_of_the_range(
    assert_close: AssertClose,
) -> None:
    gate = np.array([-1e30, -100, -88.8, -3, -1e-20, 0, 1e-20, 3, 88.8, 1e30], np.float32)
    up = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 1], np.float32)
    gates = gate.astype(np.float64)
    want = gates / (1 + np.exp(np.minimum(-gates, 700))) * up  # e^700 still is a float64
    got = reference.swiglu(np.concatenate([gate, up]))
    assert got.dtype == np.float32
    # Six roundings; results below float32's normal range, of gates below -88, count as zero.
    assert_close(got, want, 6 * EPS32 * np.abs(want) + 2.0**-120)
