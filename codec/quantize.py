"""One constant for a whole model: the steps of all rows are c times what they are for c = 1.

c sets the rate. It is found on histograms of the weights in units of those steps, before any matrix
is quantized. Without calibration a row's step for c = 1 is its root mean square, and weights are
rounded to the nearest; codec/whiten.py does better. Of codes this module knows only what they cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codec.choice import choose_code

_BINS = 512  # per spread, centred on its multiples: a weight of 0 is well inside its bin
_REACH = 32  # spreads; what is larger is counted as this large, and will be an outlier all the same
_CHUNK_WEIGHTS = 1 << 20
_SMALLEST_C, _LARGEST_C = 2.0**-7, 2.0**3  # in units of the spread


@dataclass(frozen=True, eq=False)
class Histogram:
    """A matrix's weights in units of their row's step for c = 1."""

    rows: int
    cols: int
    spread: float  # root mean square of the weights in these units; bins and reach count it
    below: npt.NDArray[np.float64]  # (n_bins + 1,) how many are below each edge of a bin

    def integers(self, c: float) -> tuple[npt.NDArray[np.float64], int]:
        """How often rounding would yield lowest, lowest + 1, ..., -lowest; and lowest."""
        c = c / self.spread
        largest = int(_REACH / c) + 1
        edges = (np.arange(-largest, largest + 2) - 0.5) * (c * _BINS) + (_REACH * _BINS + 0.5)
        edges[0], edges[-1] = 0, self.below.size - 1
        below = np.interp(edges, np.arange(self.below.size), self.below)
        return below[1:] - below[:-1], -largest


def histogram(w: npt.NDArray[np.float32], units: npt.NDArray[np.floating]) -> Histogram:
    """Count w (rows, cols) in `units` (rows,), once for all trials of c."""
    rows, cols = w.shape
    units = np.where(units > 0, units, np.inf)
    spread = float(np.sqrt(np.mean((root_mean_squares(w) / units) ** 2))) or 1.0
    bins_per_unit = (_BINS / (units * spread)).astype(np.float32)
    middle = _REACH * _BINS
    counts = np.zeros(2 * middle + 1, np.int64)
    size = max(1, _CHUNK_WEIGHTS // cols)
    for start in range(0, rows, size):
        chunk = slice(start, start + size)
        x = w[chunk] * bins_per_unit[chunk, None]
        np.clip(x, -middle, middle, out=x)
        np.rint(x, out=x)
        counts += np.bincount(x.astype(np.int64).ravel() + middle, minlength=counts.size)
    return Histogram(rows, cols, spread, np.append(0.0, np.cumsum(counts)))


def predicted_bits(h: Histogram, c: float, log2_states: int = 12) -> float:
    """All stored bits of the matrix if it is rounded to multiples of c times the units."""
    counts, lowest = h.integers(c)
    code = choose_code(counts, lowest, log2_states)
    # A row further stores its scale, its first state and its length, whose standard deviation is
    # about a bit per square root of its weights (entropy log2(4.13 sigma)).
    row_bits = 16 + log2_states + float(np.log2(4.13 * np.sqrt(h.cols)))
    return code.bits + h.rows * row_bits + 16 * code.n_symbols


def bisect_constant(
    histograms: Sequence[Histogram], bits_per_weight: float, log2_states: int = 12
) -> float:
    """The c at which these matrices together take the asked stored bits per weight, or just less.

    One c for all of them equalises what one more bit is worth in each. Raises ValueError if steps
    would be outside of 2^-7 .. 2^3 root mean squares (from about 1 to 10 bits can be had).
    """
    n_weights = sum(h.rows * h.cols for h in histograms)
    spread = sum(h.rows * h.cols * np.log2(h.spread) for h in histograms) / n_weights
    too_small, too_large = low, high = np.log2((_SMALLEST_C, _LARGEST_C)) + spread
    x = 2.1 - bits_per_weight + spread  # log2 c; a Gaussian's entropy is 2.05 - log2 c
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
            f"{bits_per_weight:.3g} bits per weight cannot be had; the nearest is {bits:.2f}"
        )
    return float(2.0**high)  # the rate jumps here, past the one that was asked for


def row_steps(units: npt.NDArray[np.floating], c: float) -> npt.NDArray[np.float16]:
    """c * units, (rows,), as they are stored. Raises ValueError if one is too large for float16."""
    with np.errstate(over="ignore"):
        steps = (c * units).astype(np.float16)
    if not np.isfinite(steps).all():
        row = int(np.argmax(~np.isfinite(steps)))
        raise ValueError(f"the weights of row {row} are too large for a step in float16")
    return steps


def quantize(w: npt.NDArray[np.float32], steps: npt.NDArray[np.float16]) -> npt.NDArray[np.int32]:
    """round(w / step), ties to even: (rows, cols) and (rows,) -> (rows, cols). Step 0 gives 0."""
    q = w / np.where(steps > 0, steps, np.inf).astype(np.float32)[:, None]
    np.rint(q, out=q)
    return q.astype(np.int32)


def root_mean_squares(w: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(rows, cols) -> (rows,). Raises ValueError if w is not finite."""
    with np.errstate(over="ignore"):
        squares: npt.NDArray[np.float32] = np.einsum("rc,rc->r", w, w)
    if not np.isfinite(squares).all():
        row = int(np.argmax(~np.isfinite(squares)))
        raise ValueError(f"row {row} has weights that are not finite numbers")
    rms: npt.NDArray[np.float32] = np.sqrt(squares / np.float32(w.shape[1]))
    return rms
