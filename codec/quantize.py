"""One constant for a whole model: the steps of all rows are c times what they are for c = 1.

c sets the rate. It is found on histograms of the weights in units of those steps, before any matrix
is quantized. Without calibration a row's step for c = 1 is its root mean square, and weights are
rounded to the nearest; codec/whiten.py does better. Of codes this module knows only what they cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codec import choice, classes, scale
from codec.scale import ScaleLog2

_BINS = 512  # per spread, centred on its multiples: a weight of 0 is well inside its bin
_GROUPS = 12  # of rows of like size, told apart to predict what classes save
_REACH = 32  # spreads; what is larger is counted as this large, and will be an outlier all the same
_LARGEST = 1 << 20  # integer that is worth counting to: far beyond what the code is for
_CHUNK_WEIGHTS = 1 << 20
_SMALLEST_C, _LARGEST_C = 2.0**-7, 2.0**6  # in units of the spread; at the end nearly all is zero


@dataclass(frozen=True, eq=False)
class Histogram:
    """A matrix's weights in units of their row's step for c = 1."""

    rows: int
    cols: int
    spread: float  # root mean square of the weights in these units; bins and reach count it
    # How many weights of each group of rows are below each edge of a bin (groups, n_bins + 1).
    below: npt.NDArray[np.uint32]
    scale_bits: float  # what a row's step will take

    def integers(self, c: float) -> tuple[npt.NDArray[np.float64], int]:
        """How often rounding would yield lowest, lowest + 1, ..., -lowest in each group of rows
        (groups, n); and lowest. ValueError: they would be too large, which happens where the errors
        of this matrix are taken to matter incomparably more than those of others.
        """
        c = c / self.spread
        if c * _LARGEST < _REACH:
            raise ValueError(
                "some weights matter so much more than all others that they would become integers "
                "above a million; the source model looks damaged"
            )
        largest = int(_REACH / c) + 1
        edges = (np.arange(-largest, largest + 2) - 0.5) * (c * _BINS) + (_REACH * _BINS + 0.5)
        places = np.arange(self.below.shape[1])
        edges[0], edges[-1] = 0, places[-1]
        below = np.array([np.interp(edges, places, of_group) for of_group in self.below])
        return np.diff(below), -largest


def histogram(w: npt.NDArray[np.float32], units: npt.NDArray[np.floating]) -> Histogram:
    """Count w (rows, cols) in `units` (rows,), once for all trials of c."""
    rows, cols = w.shape
    divisor = np.where(units > 0, units, np.inf)
    spread = float(np.sqrt(np.mean((root_mean_squares(w) / divisor) ** 2))) or 1.0
    bins_per_unit = (_BINS / (divisor * spread)).astype(np.float32)
    middle = _REACH * _BINS
    size = max(1, _CHUNK_WEIGHTS // cols)
    means = [np.abs(w[i : i + size]).mean(axis=1) for i in range(0, rows, size)]
    order = np.argsort(np.concatenate(means) / divisor, kind="stable")
    groups = np.split(order, np.cumsum(classes.units(rows, _GROUPS))[:-1])
    below = np.zeros((len(groups), 2 * middle + 2), np.uint32)
    for of_group, members in zip(below, groups, strict=True):
        for start in range(0, members.size, size):
            chunk = members[start : start + size]
            x = w[chunk] * bins_per_unit[chunk, None]
            np.clip(x, -middle, middle, out=x)
            np.rint(x, out=x)
            places = x.astype(np.int64).ravel() + (middle + 1)
            of_group += np.bincount(places, minlength=of_group.size).astype(np.uint32)
    np.cumsum(below, axis=1, out=below)
    steps = scale.nearest(units)[units > 0]
    deviation = float(steps.std()) if steps.size else 0.0
    return Histogram(rows, cols, spread, below, _bell_bits(deviation))


def predicted_bits(h: Histogram, c: float, log2_states: int = 12) -> float:
    """All stored bits of the matrix if it is rounded to multiples of c times the units."""
    counts, lowest = h.integers(c)
    bits = choice.predicted_bits(counts, lowest, log2_states, classes.units(h.rows, _GROUPS))
    # A row further stores its step, its first state and its length, whose standard deviation is
    # about a bit per square root of its weights.
    row_bits = h.scale_bits + log2_states + _bell_bits(float(np.sqrt(h.cols)))
    return bits + h.rows * row_bits


def bisect_constant(
    histograms: Sequence[Histogram],
    bits_per_weight: float,
    log2_states: int = 12,
    saved: float = 0.0,
    near: float | None = None,
) -> float:
    """The c at which these matrices together take the asked stored bits per weight, or just less,
    if their quantizer takes `saved` bits a weight less than rounding does. The search begins `near`
    some c, which makes it shorter.

    One c for all of them equalises what one more bit is worth in each. Raises ValueError if steps
    would be outside of 2^-7 .. 2^6 root mean squares: up to about 10 bits can be had, and down to a
    quarter of a bit and what is stored of the rows.
    """
    wanted = bits_per_weight + saved
    n_weights = sum(h.rows * h.cols for h in histograms)
    spread = sum(h.rows * h.cols * np.log2(h.spread) for h in histograms) / n_weights
    too_small, too_large = low, high = np.log2((_SMALLEST_C, _LARGEST_C)) + spread
    # log2 c; a Gaussian's entropy is 2.05 - log2 c
    x = 2.1 - wanted + spread if near is None else np.log2(near)
    while high - low > 1e-4:
        if not low < x < high:
            x = (low + high) / 2
        c: float = 2.0 ** float(x)
        bits = sum(predicted_bits(h, c, log2_states) for h in histograms) / n_weights
        excess = bits - wanted
        if abs(excess) < 5e-4:
            return c
        low, high = (x, high) if excess > 0 else (low, x)
        x += excess  # as c doubles, a weight takes nearly one bit less
    if low == too_small or high == too_large:
        # Rounded so that it can be asked for.
        nearest = (np.ceil if high == too_large else np.floor)(100 * (bits - saved)) / 100
        raise ValueError(
            f"{bits_per_weight:.3g} bits per weight cannot be had; the nearest is {nearest:.2f}"
        )
    return float(2.0**high)  # the rate jumps here, past the one that was asked for


def row_steps(units: npt.NDArray[np.floating], c: float) -> ScaleLog2:
    """The nearest to c * units (rows,) on the grid of `codec.scale`; 0 for a unit of 0."""
    return scale.nearest(c * units)


def quantize(w: npt.NDArray[np.float32], steps: ScaleLog2) -> npt.NDArray[np.int32]:
    """round(w / step), ties to even: (rows, cols) and (rows,) -> (rows, cols). Step 0 gives 0."""
    step = scale.to_scale(steps)
    divisor = np.where(step > 0, step, np.inf).astype(np.float32)[:, None]
    q = np.empty(w.shape, np.int32)
    size = max(1, _CHUNK_WEIGHTS // w.shape[1])
    for i in range(0, len(w), size):
        rows = slice(i, i + size)
        q[rows] = np.rint(w[rows] / divisor[rows])
    return q


def _bell_bits(sigma: float) -> float:
    """Entropy of a rounded Gaussian of that standard deviation."""
    return float(np.log2(4.13 * np.sqrt(sigma * sigma + 1 / 12)))


def root_mean_squares(w: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(rows, cols) -> (rows,). Raises ValueError if w is not finite."""
    with np.errstate(over="ignore"):
        squares: npt.NDArray[np.float32] = np.einsum("rc,rc->r", w, w)
    if not np.isfinite(squares).all():
        row = int(np.argmax(~np.isfinite(squares)))
        raise ValueError(f"row {row} has weights that are not finite, or above 1e19")
    rms: npt.NDArray[np.float32] = np.sqrt(squares / np.float32(w.shape[1]))
    return rms
