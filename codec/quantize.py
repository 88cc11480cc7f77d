"""Floats to integers without calibration: a uniform grid per row, step = c * rms(row).

The constant c sets the rate of a whole model. It is found on histograms of the weights in units of
their row's rms, before any matrix is quantized. Of codes it knows only what they cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codec import choice, scale
from codec.classes import units
from codec.scale import ScaleLog2

_BINS = 512  # per rms, centred on its multiples: a weight of 0 is well inside its bin
_UNITS = 8  # of rows of like spread, told apart to predict what classes save
_REACH = 32  # rms; what is larger is counted as this large, and will be an outlier all the same
_CHUNK_WEIGHTS = 1 << 20
_SMALLEST_C, _LARGEST_C = 2.0**-7, 2.0**3


@dataclass(frozen=True, eq=False)
class Histogram:
    """A matrix's weights in units of their row's rms."""

    rows: int
    cols: int
    # How many weights of each unit of rows are below each edge of a bin (units, n_bins + 1).
    below: npt.NDArray[np.uint32]
    scale_bits: float  # what a row's step will take

    def integers(self, c: float) -> tuple[npt.NDArray[np.float64], int]:
        """How often `quantize` would yield lowest, lowest + 1, ..., -lowest in each unit of rows
        (units, n); and lowest.
        """
        largest = int(_REACH / c) + 1
        edges = (np.arange(-largest, largest + 2) - 0.5) * (c * _BINS) + (_REACH * _BINS + 0.5)
        places = np.arange(self.below.shape[1])
        edges[0], edges[-1] = 0, places[-1]
        below = np.array([np.interp(edges, places, of_unit) for of_unit in self.below])
        return np.diff(below), -largest


def histogram(w: npt.NDArray[np.float32]) -> Histogram:
    """Count w (rows, cols), once for all trials of c. Raises ValueError if it is not finite."""
    rows, cols = w.shape
    rms = _rms(w)
    bins_per_unit = _BINS / np.where(rms > 0, rms, np.inf)
    middle = _REACH * _BINS
    # In units of the rms rows differ by their tails, and with these by their mean size.
    order = np.argsort(np.abs(w).mean(axis=1) / np.where(rms > 0, rms, np.inf), kind="stable")
    of_units = np.split(order, np.cumsum(units(rows, _UNITS))[:-1])
    below = np.zeros((len(of_units), 2 * middle + 2), np.uint32)
    size = max(1, _CHUNK_WEIGHTS // cols)
    for of_unit, members in zip(below, of_units, strict=True):
        for start in range(0, members.size, size):
            chunk = members[start : start + size]
            x = w[chunk] * bins_per_unit[chunk, None]
            np.clip(x, -middle, middle, out=x)
            np.rint(x, out=x)
            places = x.astype(np.int64).ravel() + (middle + 1)
            of_unit += np.bincount(places, minlength=of_unit.size).astype(np.uint32)
    np.cumsum(below, axis=1, out=below)
    steps = scale.nearest(rms)[rms > 0]
    spread = float(steps.std()) if steps.size else 0.0
    return Histogram(rows, cols, below, _bell_bits(spread))


def predicted_bits(h: Histogram, c: float, log2_states: int = 12) -> float:
    """All stored bits of the matrix if it is quantized with steps of c * rms."""
    counts, lowest = h.integers(c)
    bits = choice.predicted_bits(counts, lowest, log2_states, units(h.rows, _UNITS))
    # A row further stores its step, its first state and its length, whose standard deviation is
    # about a bit per square root of its weights.
    row_bits = h.scale_bits + log2_states + _bell_bits(float(np.sqrt(h.cols)))
    return bits + h.rows * row_bits


def bisect_constant(
    histograms: Sequence[Histogram], bits_per_weight: float, log2_states: int = 12
) -> float:
    """The c at which these matrices together take the asked stored bits per weight, or just less.

    One c for all of them equalises what one more bit is worth in each. Raises ValueError if it
    would lie outside of 2^-7 .. 2^3 (from about 1 to 10 bits can be had).
    """
    n_weights = sum(h.rows * h.cols for h in histograms)
    too_small, too_large = low, high = np.log2(_SMALLEST_C), np.log2(_LARGEST_C)
    x = 2.1 - bits_per_weight  # log2 c; a Gaussian's entropy is 2.05 - log2 c
    while high - low > 1e-4:
        if not low < x < high:
            x = (low + high) / 2
        c: float = 2.0 ** float(x)
        bits = sum(predicted_bits(h, c, log2_states) for h in histograms) / n_weights
        excess = bits - bits_per_weight
        if abs(excess) < 5e-4:
            return c
        low, high = (x, high) if excess > 0 else (low, x)
        x += excess  # as c doubles, a weight takes nearly one bit less
    if low == too_small or high == too_large:
        raise ValueError(
            f"{bits_per_weight} bits per weight cannot be had: steps of {c:.3g} rms take {bits:.2f}"
        )
    return float(2.0**high)  # the rate jumps here, past the one that was asked for


def row_steps(w: npt.NDArray[np.float32], c: float) -> ScaleLog2:
    """Step of each row of w (rows, cols) -> (rows,), of the grid of `codec.scale` the nearest to
    c * rms; 0 for a row of zeros. Raises ValueError if w is not finite.
    """
    return scale.nearest(c * _rms(w))


def quantize(w: npt.NDArray[np.float32], steps: ScaleLog2) -> npt.NDArray[np.int32]:
    """round(w / step), ties to even: (rows, cols) and (rows,) -> (rows, cols). Step 0 gives 0."""
    step = scale.to_scale(steps)
    q = w / np.where(step > 0, step, np.inf).astype(np.float32)[:, None]
    np.rint(q, out=q)
    return q.astype(np.int32)


def _bell_bits(sigma: float) -> float:
    """Entropy of a rounded Gaussian of that standard deviation."""
    return float(np.log2(4.13 * np.sqrt(sigma * sigma + 1 / 12)))


def _rms(w: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        squares: npt.NDArray[np.float32] = np.einsum("rc,rc->r", w, w)
    if not np.isfinite(squares).all():
        row = int(np.argmax(~np.isfinite(squares)))
        raise ValueError(f"row {row} has weights that are not finite, or above 1e19")
    rms: npt.NDArray[np.float32] = np.sqrt(squares / np.float32(w.shape[1]))
    return rms
