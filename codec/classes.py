"""Which rows share a marginal: rows of like spread go to one class, each class has a table.

Rows that a quantizer has given different rates have different distributions; one marginal for all
of them costs a tenth of a bit per weight. Classes consist of whole tiles of rows, so that a
workgroup, which works on a tile, needs one table.
"""

import numpy as np
import numpy.typing as npt

TILE = 32  # rows; every class but the last has a multiple of it
MAX_STATES = 1 << 14  # of all classes' tables: 64 KiB, which any adapter binds as a uniform buffer

MAX_UNITS = 64  # that a matrix is cut into before they are joined to classes
# A class further costs the centers and widths of three distributions in the side information.
_HEADER_BITS = 64

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def device_order(classes: npt.NDArray[np.uint8]) -> IntArray:
    """Rows sorted by class, in their own order within each: every tile is of one class."""
    return np.argsort(classes, kind="stable")


def units(rows: int, most: int = MAX_UNITS) -> IntArray:
    """Rows of each unit (units,): whole tiles, that are kept together when classes are chosen."""
    unit = TILE * -(-rows // (TILE * most))
    return np.diff(np.append(np.arange(0, rows, unit), rows))


def split(
    counts: FloatArray, rows: IntArray, most: int, symbol_bits: float
) -> tuple[list[tuple[int, int]], float]:
    """Cut units (units, symbols) of so many rows (units,) into at most `most` classes.

    Returns the classes as ranges of units, and how many bits they save against one class. They have
    the fewest bits, by entropy, of weights, of marginals at `symbol_bits` a symbol, and of the
    rows' class numbers: dynamic programming.
    """
    n_units = len(counts)
    class_bits = symbol_bits * np.count_nonzero(counts.any(axis=0)) + _HEADER_BITS
    weights_below = np.vstack([np.zeros(counts.shape[1]), np.cumsum(counts, axis=0)])
    rows_below = np.append(0, np.cumsum(rows))
    cost = np.full((n_units, n_units + 1), np.inf)  # of units i .. j - 1 as one class
    for i in range(n_units):
        inside = weights_below[i + 1 :] - weights_below[i]
        inside_rows = rows_below[i + 1 :] - rows_below[i]
        bits = _n_log2_n(inside.sum(axis=1)) - _n_log2_n(inside).sum(axis=1)
        bits += inside_rows * np.log2(rows_below[-1] / inside_rows)
        cost[i, i + 1 :] = bits + class_bits

    best = cost[0]  # of units 0 .. j - 1 in so many classes
    starts: list[IntArray] = []  # of the last class
    totals = [best[-1]]
    for _ in range(1, min(most, n_units)):
        longer = best[:-1, None] + cost
        starts.append(longer.argmin(axis=0))
        best = longer.min(axis=0)
        totals.append(best[-1])
    end, ranges = n_units, []
    for start in reversed(starts[: int(np.argmin(totals))]):
        ranges.append((int(start[end]), end))
        end = int(start[end])
    return [(0, end), *reversed(ranges)], float(totals[0] - min(totals))


def _n_log2_n(n: FloatArray) -> FloatArray:
    product: FloatArray = n * np.log2(np.maximum(n, 1))
    return product
