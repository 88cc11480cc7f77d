"""The quantizer: its grid, its histogram, and the rate it aims at."""

import re

import numpy as np
import pytest

from codec.matrix import encode_matrix
from codec.quantize import (
    bisect_constant,
    histogram,
    predicted_bits,
    quantize,
    root_mean_squares,
    row_steps,
)
from codec.scale import ZERO, to_scale


def weights(rows, cols, seed=7):
    """Rows of very different size, some heavy-tailed, one of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(rows, cols)) * rng.uniform(0.001, 2, (rows, 1))
    w[1::3] *= rng.laplace(size=(len(w[1::3]), cols))
    w[rows // 2] = 0
    return w.astype(np.float32)


def measured(w):
    return histogram(w, root_mean_squares(w))


def test_steps_are_c_times_rms_on_the_grid():
    w = np.array([[3, -4, 0, 0], [0, 0, 0, 0], [1e-3, 1e-3, -1e-3, 1e-3]], np.float32)
    steps = row_steps(root_mean_squares(w), 0.5)
    assert steps.dtype == np.int16
    # 8 log2 of 1.25 and 0.0005
    assert steps.tolist() == [3, ZERO, -88]


def test_rounding_is_to_nearest_ties_to_even():
    w = np.array([[0.25, 0.75, 1.25, -0.75, 0.7, -9.9]], np.float32)
    q = quantize(w, np.array([-8], np.int16))
    assert q.dtype == np.int32
    assert q.tolist() == [[0, 2, 2, -2, 1, -20]]


def test_rows_without_step_are_zero():
    w = np.array([[0, 0], [1e-30, -1e-30]], np.float32)  # the second's squares are 0 in float32
    assert quantize(w, row_steps(root_mean_squares(w), 0.3)).tolist() == [[0, 0], [0, 0]]


def test_error_is_at_most_half_a_step():
    w = weights(33, 70)
    steps = row_steps(root_mean_squares(w), 0.2)
    error = np.abs(quantize(w, steps) * to_scale(steps).astype(np.float64)[:, None] - w)
    # The float32 quotient is off by 2^-24 of itself, and |q| < 2^7.
    assert (error <= to_scale(steps).astype(np.float64)[:, None] * (0.5 + 2.0**-17)).all()


@pytest.mark.parametrize("c", [2.0, 0.5, 0.1, 0.01])
def test_histogram_tells_the_integers(c):
    w = weights(200, 501)
    w[3, 4] = 400 * w[3].std()  # far beyond the histogram
    of_groups, lowest = measured(w).integers(c)
    counts = of_groups.sum(axis=0)
    assert counts.sum() == pytest.approx(w.size)
    q = quantize(w, row_steps(root_mean_squares(w), c))
    expected = np.bincount(np.clip(q, lowest, -lowest).ravel() - lowest, minlength=counts.size)
    # Bins across an edge put some weights next door.
    moved = np.abs(np.cumsum(counts - expected))
    assert moved.max() < 0.01 * w.size
    assert counts[-lowest] >= 501  # zeros are zeros


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_histogram_counts_in_the_units_of_the_rows(size):
    """Whatever the units are, c times them are the steps; zero weights fit in any."""
    rng = np.random.default_rng(9)
    w = (weights(70, 301) * size).astype(np.float32)
    units = (size * rng.uniform(0.2, 3, 70)).astype(np.float32)
    units[[3, 40]] = 0  # all weights of such rows are zeros, whatever they are
    of_groups, lowest = histogram(w, units).integers(0.3)
    counts = of_groups.sum(axis=0)
    q = w / (0.3 * np.where(units > 0, units, np.inf))[:, None]
    expected = np.bincount(np.rint(q).astype(int).ravel() - lowest, minlength=counts.size)
    # A bin is a 512th of the weights' spread: of those in a bin with an edge, half are next door.
    assert np.abs(np.cumsum(counts - expected)).max() < 0.01 * w.size
    assert counts.sum() == pytest.approx(w.size)


def test_histogram_takes_every_row(monkeypatch):
    w = weights(33, 70)
    whole = measured(w)
    monkeypatch.setattr("codec.quantize._CHUNK_WEIGHTS", 500)
    assert np.array_equal(measured(w).below, whole.below)
    assert whole.below[:, -1].tolist() == [32 * 70, 70]


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize("bits", [0.35, 0.6, 0.9, 1.2, 2, 3.25, 4.5, 6, 8])
def test_constant_meets_the_asked_rate(bits, log2_states):
    model = [weights(300, 600, 1), weights(200, 1001, 2), weights(700, 300, 3)]
    c = bisect_constant([measured(w) for w in model], bits, log2_states)
    stored = 0
    for w in model:
        steps = row_steps(root_mean_squares(w), c)
        stored += encode_matrix(quantize(w, steps), steps, log2_states).stored_bits
    # Where rows differ as much as these, tables of their own save a little more than is predicted.
    assert -0.025 < stored / sum(w.size for w in model) - bits < 0.012


@pytest.mark.parametrize("bits", [1.2, 1.5])
def test_constant_stays_below_a_rate_that_is_jumped_over(bits):
    """Weights of three values are coded in less than 1 bit or, with smaller steps, in 1.6."""
    w = np.random.default_rng(8).choice(np.float32([-1, 0, 1]), (50, 400))
    h = measured(w)
    c = bisect_constant([h], bits)
    assert predicted_bits(h, c) / w.size < bits + 5e-4
    assert predicted_bits(h, 0.99 * c) / w.size > bits


def test_prediction_falls_with_c():
    h = measured(weights(100, 300))
    bits = [predicted_bits(h, c) for c in (0.01, 0.03, 0.1, 0.3, 1, 3)]
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("bits", [0.1, 15, float("nan")])
def test_rates_out_of_reach_are_refused(bits):
    with pytest.raises(ValueError, match="cannot be had"):
        bisect_constant([measured(weights(30, 100))], bits)


@pytest.mark.parametrize("saved", [0, 0.25])
@pytest.mark.parametrize("bits", [0.1, 15])
def test_nearest_rate_can_be_had(bits, saved):
    model = [measured(weights(30, 100))]
    with pytest.raises(ValueError, match="cannot be had") as refusal:
        bisect_constant(model, bits, saved=saved)
    nearest = float(re.findall(r"nearest is ([\d.]+)", str(refusal.value))[0])
    c = bisect_constant(model, nearest, saved=saved)
    assert abs(predicted_bits(model[0], c) / 3000 - saved - nearest) < 0.012


def test_what_the_quantizer_saves_goes_into_finer_steps():
    model = [measured(weights(100, 300))]
    assert bisect_constant(model, 3, saved=0.5) == bisect_constant(model, 3.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_weights_that_are_not_finite_are_refused(value):
    w = weights(33, 70)
    w[20, 3] = value
    with pytest.raises(ValueError, match="row 20 has weights that are not finite"):
        root_mean_squares(w)
    with pytest.raises(ValueError, match="row 20 has weights that are not finite"):
        histogram(w, np.ones(33))
