"""Whitened steps: integers for weights whose errors later columns make up for.

To second order the loss of y = W x grows by sum_i g_i^2 e_i^T H e_i: e_i is the error of row i of
W, H = E[x x^T], g_i the root mean square of the loss's gradient at y_i. With H^-1 = U^T U, U upper
triangular, a sweep over the columns that moves each one's error on to those after it leaves
sum_ij (g_i e_ij / U_jj)^2, every e_ij within half a step (GPTQ, Frantar et al. 2022). Under an
entropy coder such a sum is least, at a given rate, when its terms are equal: step_ij = c U_jj / g_i
(WaterSIC, Lifar et al. 2026), and with one c for all matrices the last bit is worth the same in
each. Here a step has no column part: where inputs were equalised before (weights/equalize.py), U
has an even diagonal, and elsewhere the sweep does what it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

# What is added to H: of each input's own mean square, as inputs are as uncertain as a text of 10^4
# tokens leaves them, and of the mean of all, for those that were hardly seen.
DAMPING_OF_EACH, DAMPING_OF_MEAN = 0.3, 0.02
# What a bit is worth, in steps^2; uniform noise of step^2 / 12 falls by a quarter for a bit, that
# is by step^2 / 8. Less near zero, where rounding down costs more than that says.
PRICE = 0.1

_BLOCK = 64  # columns that are swept one by one before the rest is brought up to date
_LARGEST = 64  # integers beyond cost as much as this one
_LEAST_GRADIENT = 0.03  # of the matrix's root mean square: no text shows all that outputs are for

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
Spread = Callable[[Callable[[slice], Integers], Sequence[slice]], Iterable[Integers]]  # a map()


def inverse_factor(hessian: npt.NDArray[np.floating]) -> Floats:
    """U (cols, cols), upper triangular, with U^T U = (H + damping)^-1.

    Inputs that were never seen, zeros in H, are as good as independent small ones.
    """
    return _inverse(_factor(hessian))


def inverse_factor_diagonal(hessian: npt.NDArray[np.floating]) -> Floats:
    """The diagonal of `inverse_factor` alone (cols,), for a quarter of the work."""
    diagonal: Floats = 1 / np.diag(_factor(hessian))
    return diagonal


def unit_steps(diagonal: Floats, gradient: npt.NDArray[np.floating]) -> Floats:
    """Steps of the rows for c = 1: the diagonal of U (cols,), gradients (rows,) -> (rows,).

    All are 0, which makes zeros of the weights, where no output ever mattered.
    """
    g = gradient.astype(np.float64)
    least = _LEAST_GRADIENT * np.sqrt(np.mean(g * g))
    if least == 0:
        return np.zeros(len(g))
    units: Floats = np.exp(np.mean(np.log(diagonal))) / np.maximum(g, least)
    return units


def quantize_whitened(
    w: Array,
    u: Floats,
    steps: Array,
    sparsity: float = 0.0,
    n_parts: int = 1,
    spread: Spread = map,
) -> Integers:
    """w (rows, cols), U, steps (rows,) -> integers (rows, cols); a step of 0 gives zeros.

    Each weight takes, of the nearest integer, the next towards zero and zero, the one of least
    error^2 + PRICE * bits; what bits an integer costs is taken from plain rounding. Before that a
    share `sparsity` of the weights, those whose loss adds least, becomes zero: chosen among _BLOCK
    columns when the sweep comes to them (SparseGPT, Frantar & Alistarh 2023). Rows do not depend on
    each other: `spread` works on `n_parts` of them, the same whoever does.
    """
    divisors = np.where(steps > 0, steps, np.inf).astype(np.float32)
    z: Array = np.divide(w.T, divisors, order="C")
    diagonal = np.diag(u)
    passed_on = (u / diagonal[:, None]).astype(np.float32)
    # An error's weight in the loss, whose mean (of logarithms) is 1.
    weight = ((np.exp(np.mean(np.log(diagonal))) / diagonal) ** 2).astype(np.float32)
    prices = PRICE * _bits(z)[:, None] / weight  # (integers, cols)

    def work(rows: slice) -> Integers:
        return _sweep(z[:, rows], passed_on, weight, prices, sparsity)

    ends = [len(w) * i // n_parts for i in range(n_parts + 1)]
    q = list(spread(work, list(map(slice, ends, ends[1:]))))
    return np.ascontiguousarray(np.concatenate(q, axis=1).T)


def _factor(hessian: npt.NDArray[np.floating]) -> Floats:
    """R, upper triangular, with R R^T = H + damping."""
    h = hessian.astype(np.float64)
    diagonal = np.diag(h)
    mean = np.mean(diagonal)
    h[np.diag_indices_from(h)] += (
        DAMPING_OF_EACH * diagonal + DAMPING_OF_MEAN * mean if mean > 0 else 1.0
    )
    # Cholesky's factorisation from the last row upwards.
    return np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1].astype(np.float64)


def _inverse(r: Floats) -> Floats:
    """Of an upper triangular matrix, by halves: a sixth of what np.linalg.inv does."""
    n = len(r)
    if n <= _BLOCK:
        return np.linalg.inv(r).astype(np.float64)
    half = n // 2
    u = np.zeros((n, n))
    u[:half, :half] = _inverse(r[:half, :half])
    u[half:, half:] = _inverse(r[half:, half:])
    u[:half, half:] = -(u[:half, :half] @ r[:half, half:]) @ u[half:, half:]
    return u


def _bits(z: Array) -> Array:
    """-log2 of how probable 0, 1, ..., _LARGEST in size are, with their sign, by rounding z."""
    size = np.minimum(np.abs(z), _LARGEST)
    counts = np.bincount(np.rint(size).astype(np.int64).ravel(), minlength=_LARGEST + 1) + 0.25
    counts[1:] /= 2
    bits: Array = (np.log2(z.size) - np.log2(counts)).astype(np.float32)
    return bits


def _sweep(z: Array, passed_on: Array, weight: Array, prices: Array, sparsity: float) -> Integers:
    """z (cols, rows), used up -> integers (cols, rows)."""
    cols, rows = z.shape
    q = np.empty((cols, rows), np.int32)
    for begin in range(0, cols, _BLOCK):
        end = min(begin + _BLOCK, cols)
        errors = np.empty((end - begin, rows), np.float32)
        pruned = None
        if sparsity > 0:
            loss = z[begin:end] ** 2 * weight[begin:end, None]
            pruned = loss <= np.quantile(loss, sparsity)
        for j in range(begin, end):
            chosen = _round(z[j], prices[:, j])
            if pruned is not None:
                chosen[pruned[j - begin]] = 0
            q[j] = chosen
            error = np.subtract(z[j], chosen, out=errors[j - begin])
            if j + 1 < end:
                z[j + 1 : end] -= passed_on[j, j + 1 : end, None] * error
        if end < cols:
            z[end:] -= passed_on[begin:end, end:].T @ errors
    return q


def _round(x: Array, prices: Array) -> Array:
    """The integers of least (x - q)^2 + price of |q|."""
    size = np.abs(x)
    near = np.rint(size)
    i = np.minimum(near, _LARGEST).astype(np.intp)
    lower = np.maximum(i - 1, 0)
    below = near - 1
    # (size - below)^2 - (size - near)^2 = 2 (size - near) + 1
    saved = prices[i] - prices[lower]
    best = np.where((saved > 2 * (size - near) + 1) & (i > 0), below, near)
    best_price = np.where(best < near, prices[lower], prices[i])
    best[size * size + prices[0] < (size - best) ** 2 + best_price] = 0
    return np.copysign(best, x)
