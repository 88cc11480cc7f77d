"""Whitened steps: the factor, the steps, and the sweep against the published loop, row by row."""

import numpy as np
import pytest

from codec.whiten import (
    DAMPING_OF_EACH,
    DAMPING_OF_MEAN,
    PRICE,
    inverse_factor,
    quantize_whitened,
    unit_steps,
)

EPS32, EPS64 = 2.0**-24, 2.0**-53


def inputs(n, cols, seed=1):
    """Inputs (n, cols) that go together, some much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, cols // 3)) @ rng.normal(size=(cols // 3, cols))
    return (mixed + rng.normal(size=(n, cols))) * rng.uniform(0.2, 5, cols)


def hessian(cols, seed=1):
    x = inputs(2 * cols, cols, seed)
    return x.T @ x / len(x)


def weights(rows, cols, seed=2):
    """With tails, so that some integers are beyond those that have a price of their own."""
    return np.random.default_rng(seed).laplace(size=(rows, cols)).astype(np.float32)


def loss(error, h):
    """sum of e^T H e over the rows e of (rows, cols)."""
    return np.einsum("rc,cd,rd->", error, h, error)


def entropy(q):
    share = np.unique(q, return_counts=True)[1] / q.size
    return -(share @ np.log2(share))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cols", [1, 2, 67])
def test_factor_is_of_the_damped_inverse(cols, dtype, assert_close):
    h = hessian(cols + 2)[:cols, :cols].astype(dtype)
    before = h.copy()
    u = inverse_factor(h)
    assert u.dtype == np.float64
    assert np.array_equal(u, np.triu(u)) and (np.diag(u) > 0).all()
    assert np.array_equal(h, before)
    squares = np.diag(h.astype(np.float64))
    added = DAMPING_OF_EACH * squares + DAMPING_OF_MEAN * np.mean(squares)
    damped = h.astype(np.float64) + np.diag(added)
    # Two backward stable steps: cols roundings, times a condition number that damping bounds.
    tolerance = 8 * cols * EPS64 * np.linalg.cond(damped)
    assert_close(u.T @ u @ damped, np.eye(cols), tolerance)


def test_inputs_that_were_never_seen_are_independent(assert_close):
    assert np.array_equal(inverse_factor(np.zeros((5, 5))), np.eye(5))
    h = hessian(12)
    h[[3, 8]] = h[:, [3, 8]] = 0
    u = inverse_factor(h)
    assert np.isfinite(u).all()
    off_diagonal = u - np.diag(np.diag(u))
    assert not off_diagonal[[3, 8]].any() and not off_diagonal[:, [3, 8]].any()
    assert_close(u[3, 3] ** -2, DAMPING_OF_MEAN * np.trace(h) / 12, 4 * EPS64 * np.trace(h))


def test_unit_steps_are_the_mean_of_the_diagonal_over_the_gradient():
    u = np.diag([1.0, 2.0, 4.0]) + np.diag([7.0, 7.0], 1)
    steps = unit_steps(np.diag(u), np.float32([0.5, 1.0, 4.0]))
    assert steps.dtype == np.float64
    assert np.allclose(steps, [4, 2, 0.5], rtol=1e-15)


def test_unit_steps_have_a_largest():
    gradient = np.array([1.0, 1.0, 1e-5, 0.0])  # root mean square: sqrt(1 / 2)
    steps = unit_steps(np.ones(3), gradient)
    assert np.allclose(steps, [1, 1, np.sqrt(2) / 0.03, np.sqrt(2) / 0.03], rtol=1e-9)


def test_outputs_that_never_mattered_have_no_step():
    assert unit_steps(np.full(3, 2.0), np.zeros(4)).tolist() == [0, 0, 0, 0]


def excess(q, w, u, steps):
    """By how much each integer of q (rows, cols) costs more than the best one in its place, and
    how far from it that is.

    GPTQ as published, one row and one column at a time in float64, with the price of bits: the
    error of column j, in units of U_jj, moves along row j of U to the columns after it. The errors
    are those of q, so that a choice between equals does not change what follows.
    """
    rows, cols = w.shape
    plain = np.abs(np.rint(w / steps[:, None]))
    counts = 0.25 + np.array([np.sum(np.minimum(plain, 64) == size) for size in range(65)])
    counts[1:] /= 2  # plus and minus
    bits = np.log2(w.size) - np.log2(counts)
    mean = np.exp(np.mean(np.log(np.diag(u))))
    costs_more, far = np.zeros(w.shape), np.zeros(w.shape)
    for r in range(rows):
        left = w[r].astype(np.float64)
        for j in range(cols):
            x = left[j] / steps[r]
            near = int(np.rint(abs(x)))
            cost = {
                size: (x - np.copysign(size, x)) ** 2 * (mean / u[j, j]) ** 2
                + PRICE * bits[min(size, 64)]
                for size in (near, max(near - 1, 0), 0)
            }
            best = min(cost, key=cost.__getitem__)
            chosen = abs(int(q[r, j]))
            costs_more[r, j] = cost.get(chosen, np.inf) - cost[best]
            costs_more[r, j] /= (mean / u[j, j]) ** 2
            far[r, j] = abs(chosen - best)
            assert x * q[r, j] >= 0
            left[j:] -= (left[j] - steps[r] * q[r, j]) / u[j, j] * u[j, j:]
    return costs_more, far


@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 1), (3, 2), (2, 64), (5, 65), (3, 131), (7, 200)],  # blocks of 64 columns, and rests
)
@pytest.mark.parametrize("step", [0.01, 0.4, 1.5])
def test_sweep_is_the_published_loop(rows, cols, step):
    h = hessian(cols + 2)[:cols, :cols]
    u = inverse_factor(h)
    w = weights(rows, cols)
    steps = (step * np.random.default_rng(3).uniform(0.5, 2, rows)).astype(np.float32)
    before = w.copy()
    q = quantize_whitened(w, u, steps)
    assert np.array_equal(w, before)
    assert q.dtype == np.int32 and q.shape == (rows, cols)
    costs_more, far = excess(q, w.astype(np.float64), u, steps.astype(np.float64))
    # x is a float32 sum of up to cols terms that are about as large as the row's largest; being off
    # by d changes what two integers cost by 2 d for each step that is between them.
    off = 2 * cols * EPS32 * (1 + np.abs(w / steps[:, None]).max(axis=1, keepdims=True))
    assert (costs_more <= 2 * off * far).all()
    assert np.mean(far > 0) < 0.01


def test_even_inputs_without_a_price_are_rounded(monkeypatch):
    monkeypatch.setattr("codec.whiten.PRICE", 0)
    w = weights(9, 130)
    steps = np.random.default_rng(3).uniform(0.01, 2, 9).astype(np.float32)
    u = inverse_factor(np.diag(np.random.default_rng(4).uniform(0.1, 10, 130)))
    assert np.array_equal(quantize_whitened(w, u, steps), np.rint(w / steps[:, None]))


def test_price_takes_only_what_is_near():
    w = weights(60, 130)
    steps = np.full(60, 0.8, np.float32)
    plain = np.rint(w / steps[:, None])
    q = quantize_whitened(w, np.eye(130), steps)
    taken = np.abs(plain) - np.abs(q)
    assert set(np.unique(taken)) <= {0, 1, *np.unique(np.abs(plain[q == 0]))}
    assert (plain * q >= 0).all()
    assert 0.01 < np.mean(taken > 0) < 0.3
    assert entropy(q) < entropy(plain)


def test_weights_of_an_input_that_never_comes_are_zero_from_afar():
    h = np.eye(60)
    h[7, 7] = 0
    w = weights(300, 60)
    steps = np.full(300, 1.5, np.float32)
    u = inverse_factor(h)
    q = quantize_whitened(w, u, steps)
    # Errors weigh about 1.1 / 0.1 = 11 times less there, and at this step a 0 has 1.6 bits less
    # than a 1: 0.1 * 11 * 1.6 steps^2 less, which (x - 1)^2 does not make up for below x = 1.38.
    assert not q[:, 7][np.abs(w[:, 7]) < 1.5 * 1.3].any()
    assert (q[:, 6][w[:, 6] > 1.5 * 1.1] > 0).all()


@pytest.mark.parametrize("step", [0.1, 0.5, 1.5])
def test_correlated_inputs_lose_less_at_no_more_entropy(step):
    cols = 150
    h = hessian(cols)
    w = weights(80, cols)
    q = quantize_whitened(w, inverse_factor(h), np.full(80, step, np.float32))
    # Plain rounding with the steps at which its integers have the same entropy.
    low, high = step / 2, step * 4
    while high / low > 1 + 1e-6:
        plain_step = np.sqrt(low * high)
        more = entropy(np.rint(w / plain_step)) > entropy(q)
        low, high = (plain_step, high) if more else (low, plain_step)
    plain = low * np.rint(w / low)
    assert entropy(plain) >= entropy(q)
    assert loss(step * q - w, h) < 0.5 * loss(plain - w, h)


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_pruning_takes_what_costs_least(sparsity):
    cols = 150  # blocks of 64, 64 and 22 columns
    h = hessian(cols)
    w = weights(80, cols)
    q = quantize_whitened(w, inverse_factor(h), np.full(80, 0.05, np.float32), sparsity)
    for begin in (0, 64, 128):
        # At these steps, next to no weight but a pruned one is zero.
        assert 0 <= np.mean(q[:, begin : begin + 64] == 0) - sparsity < 0.03
    smallest = np.where(np.abs(w) <= np.quantile(np.abs(w), sparsity), 0, w)
    assert loss(0.05 * q - w, h) < 0.5 * loss(smallest - w, h)


def test_rows_without_step_are_zero():
    w = weights(4, 70)
    steps = np.array([0.5, 0, 0.25, 0], np.float32)
    u = inverse_factor(hessian(70))
    q = quantize_whitened(w, u, steps)
    assert not q[[1, 3]].any() and q[0].any() and q[2].any()


def test_all_zeros_stay_zeros():
    u = inverse_factor(hessian(70))
    assert not quantize_whitened(np.zeros((3, 70), np.float32), u, np.ones(3, np.float32)).any()


def test_parts_of_rows_are_quantized_as_the_whole():
    u, w = inverse_factor(hessian(130)), weights(97, 130)
    steps = np.random.default_rng(3).uniform(0.3, 2, 97).astype(np.float32)
    seen = []

    def backwards(work, parts):
        seen.extend(parts)
        return [work(part) for part in reversed(parts)][::-1]

    whole = quantize_whitened(w, u, steps)
    found = quantize_whitened(w, u, steps, 0.0, 5, backwards)
    assert len(seen) == 5
    # Products of other shapes may be rounded otherwise, and few weights are at a boundary.
    assert np.mean(found != whole) < 1e-3
    pruned = quantize_whitened(w, u, steps, 0.5, 5, backwards)
    assert 0.5 <= np.mean(pruned == 0) < 0.8
