"""The grid of scales: exact floats, nearest by ratio, zeros."""

from fractions import Fraction

import numpy as np

from codec.scale import LARGEST, ZERO, is_valid, nearest, to_scale

GRID = np.arange(-LARGEST, LARGEST + 1, dtype=np.int16)


def test_scales_are_the_nearest_floats():
    scale = to_scale(GRID)
    assert scale.dtype == np.float32
    for k, value in zip(GRID.tolist(), scale.tolist(), strict=True):
        # The neighbours' midpoints enclose 2^(k / 8): to the eighth power, in whole numbers.
        below, above = (
            (Fraction(value) + Fraction(float(np.nextafter(np.float32(value), np.float32(side)))))
            / 2
            for side in (0, np.inf)
        )
        assert below**8 < Fraction(2) ** k < above**8


def test_zero_is_zero():
    assert to_scale(np.array([ZERO, 0, 8], np.int16)).tolist() == [0, 1, 2]
    assert nearest(np.array([0, 1, 2.0])).tolist() == [ZERO, 0, 8]


def test_nearest_inverts_and_rounds_by_ratio():
    assert np.array_equal(nearest(to_scale(GRID)), GRID)
    x = np.exp2(np.random.default_rng(0).uniform(-90, 90, 1000))
    ratio = to_scale(nearest(x)) / x
    assert np.abs(np.log2(ratio)).max() < 1 / 16 + 1e-6


def test_what_is_off_the_grid_is_not_valid():
    assert is_valid(GRID) and is_valid(np.array([ZERO], np.int16))
    for k in (-LARGEST - 1, LARGEST + 1, ZERO + 1, -(2**15)):
        assert not is_valid(np.array([0, k], np.int16))
