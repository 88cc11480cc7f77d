"""Integers to what the coder codes, and back: pairs of symbols, raw low bits, and outliers.

q is cut into hi = q >> raw_bits and its low bits. hi is coded as a symbol, hi - min_symbol in 0 ..
n_symbols - 1, two neighbouring columns to a pair; the low bits of four, a quad, are one field, the
first column's lowest. Rows are filled up to whole quads with q = 0. What the coded pair does not
say, because hi is out of range or the pair too rare to have a state, is an outlier: its remainder
is hi less the coded hi.
"""

import numpy as np
import numpy.typing as npt

from codec.table import Table

IntArray = npt.NDArray[np.int64]

QUAD = 4  # columns that share a field of raw bits


def n_steps(cols: int) -> int:
    """Pairs that a row of so many columns is coded in."""
    return -(-cols // QUAD) * QUAD // 2


def to_pairs(
    q: npt.NDArray[np.integer],
    table: Table,
    raw_bits: int,
    min_symbol: int,
    classes: npt.NDArray[np.uint8],
) -> tuple[IntArray, npt.NDArray[np.uint16], IntArray, npt.NDArray[np.uint32]]:
    """q (rows, cols) -> pairs (steps, rows), raw bits (steps / 2, rows), and outliers.

    `table` is that of all classes, `classes` (rows,) the one of each row; a pair also says which.

    The outliers are how many each row has (rows,), and column | (remainder & 0xFFFF) << 16 of each
    of them (n,), by row, then column.
    """
    rows, cols = q.shape
    wanted = np.zeros((2 * n_steps(cols), rows), np.int32)  # q; later symbols, in range or not
    wanted[:cols] = q.T
    low = (wanted & ((1 << raw_bits) - 1)).astype(np.uint16)
    raw = low[0::QUAD]
    for i in range(1, QUAD):
        raw |= low[i::QUAD] << np.uint16(i * raw_bits)
    wanted >>= raw_bits
    wanted -= min_symbol

    coded = np.clip(wanted, 0, table.n_symbols - 1)
    first_pair = classes.astype(np.int64) * table.n_symbols**2  # of a row's class
    pairs: IntArray = table.substitute[coded[0::2] * table.n_symbols + coded[1::2] + first_pair]
    coded[0::2], coded[1::2] = np.divmod(pairs - first_pair, table.n_symbols)
    column, row = np.nonzero(wanted[:cols] != coded[:cols])
    order = np.lexsort((column, row))
    column, row = column[order], row[order]
    remainder = wanted[column, row] - coded[column, row]
    outliers = column.astype(np.uint32) | remainder.astype(np.uint32) << np.uint32(16)
    return pairs, raw, np.bincount(row, minlength=rows).astype(np.int64), outliers


def from_pairs(
    entries: npt.NDArray[np.uint32], raw: npt.NDArray[np.uint16], raw_bits: int, min_symbol: int
) -> npt.NDArray[np.int32]:
    """Decode entries (steps, rows), raw bits (steps / 2, rows) -> q less outliers."""
    q = np.empty((2 * len(entries), entries.shape[1]), np.int32)
    q[0::2] = entries >> 5 & 255
    q[1::2] = entries >> 13 & 255
    q += min_symbol
    q <<= raw_bits
    for i in range(QUAD):
        q[i::QUAD] += raw >> np.uint16(i * raw_bits) & np.uint16((1 << raw_bits) - 1)
    return q
