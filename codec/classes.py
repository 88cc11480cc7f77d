"""Which rows share a marginal: rows of like spread go to one class, each class has a table.

Rows that a quantizer has given different rates have different distributions; one marginal for all
of them costs a tenth of a bit per weight. Classes consist of whole tiles of rows, so that a
workgroup, which works on a tile, needs one table.
"""

from collections.abc import Sequence
from typing import NamedTuple

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


class Range(NamedTuple):
    """Units [first, end), which are a class of the given kind."""

    first: int
    end: int
    kind: int


def class_bits(
    counts: FloatArray, rows: IntArray, symbol_bits: float, further_bits: FloatArray | None = None
) -> FloatArray:
    """What units i .. j - 1 of (units, symbols) counts and so many rows (units,) take as a class:
    (units, units + 1), infinite without i < j.

    These are bits, by entropy, of weights, of the marginal at `symbol_bits` a symbol, and of the
    rows' class numbers; and `further_bits` of each unit (units,).
    """
    n_units = len(counts)
    header_bits = symbol_bits * np.count_nonzero(counts.any(axis=0)) + _HEADER_BITS
    further = np.zeros(n_units) if further_bits is None else further_bits
    further_below = np.append(0, np.cumsum(further))
    weights_below = np.vstack([np.zeros(counts.shape[1]), np.cumsum(counts, axis=0)])
    rows_below = np.append(0, np.cumsum(rows))
    cost = np.full((n_units, n_units + 1), np.inf)
    for i in range(n_units):
        inside = weights_below[i + 1 :] - weights_below[i]
        inside_rows = rows_below[i + 1 :] - rows_below[i]
        bits = _n_log2_n(inside.sum(axis=1)) - _n_log2_n(inside).sum(axis=1)
        bits += inside_rows * np.log2(rows_below[-1] / inside_rows)
        cost[i, i + 1 :] = bits + header_bits + further_below[i + 1 :] - further_below[i]
    return cost


def split(kinds: Sequence[FloatArray], most: int) -> tuple[list[Range], float]:
    """Cut units into at most `most` classes, each of a kind: what these cost is `class_bits`, and a
    class of a kind only follows those of the same and of earlier ones.

    Returns the cheapest classes, and how many bits they save against one class: dynamic
    programming.
    """
    n_units = len(kinds[0])
    best = [cost[0] for cost in kinds]  # of units 0 .. j - 1 in so many classes, the last of a kind
    steps: list[list[tuple[IntArray, IntArray]]] = []  # first unit of the last class, kind before
    totals = [[float(b[-1]) for b in best]]
    for _ in range(1, min(most, n_units)):
        longer, step = [], []
        for kind, cost in enumerate(kinds):
            before = np.array(best[: kind + 1])  # (kinds, units + 1)
            total = before.min(axis=0)[:-1, None] + cost
            first = total.argmin(axis=0)
            step.append((first, before.argmin(axis=0)[first]))
            longer.append(total.min(axis=0))
        best = longer
        steps.append(step)
        totals.append([float(b[-1]) for b in best])
    n_more, kind = divmod(int(np.argmin(totals)), len(kinds))
    end, ranges = n_units, []
    for step in reversed(steps[:n_more]):
        first, kind_before = step[kind]
        ranges.append(Range(int(first[end]), end, kind))
        end, kind = int(first[end]), int(kind_before[end])
    return [Range(0, end, kind), *reversed(ranges)], min(totals[0]) - float(np.min(totals))


def _n_log2_n(n: FloatArray) -> FloatArray:
    product: FloatArray = n * np.log2(np.maximum(n, 1))
    return product
