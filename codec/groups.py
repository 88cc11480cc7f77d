"""Integers to what the coder codes, and back: groups of symbols, raw low bits, and outliers.

q is cut into hi = q >> raw_bits and its low bits, as many as the row's class has. hi is coded as a
symbol, hi - min_symbol in 0 .. n_symbols - 1, two or four neighbouring columns to a group; the low
bits of four, a quad, are one field, the first column's lowest. Rows are filled up to whole quads
with q = 0. What the coded group does not say, because hi is out of range or the group too rare to
have a state, is an outlier: its remainder is hi less the coded hi.
"""

import numpy as np
import numpy.typing as npt

from codec.table import Table, entry_symbols

IntArray = npt.NDArray[np.int64]

QUAD = 4  # columns that share a field of raw bits


def n_steps(cols: int, group: int) -> int:
    """Groups that a row of so many columns is coded in."""
    return -(-cols // QUAD) * QUAD // group


def to_groups(
    q: npt.NDArray[np.integer],
    table: Table,
    raw_bits: npt.NDArray[np.uint8],
    min_symbol: int,
    classes: npt.NDArray[np.uint8],
) -> tuple[IntArray, npt.NDArray[np.uint16], IntArray, npt.NDArray[np.uint32]]:
    """q (rows, cols) -> groups (steps, rows), raw bits (quads, rows), and outliers.

    `table` is that of all classes, `classes` (rows,) the one of each row; a group also says which.
    `raw_bits` are those of each row (rows,).

    The outliers are how many each row has (rows,), and column | (remainder & 0xFFFF) << 16 of each
    of them (n,), by row, then column.
    """
    rows, cols = q.shape
    n, size = table.n_symbols, table.group
    wanted = np.zeros((size * n_steps(cols, size), rows), np.int32)
    wanted[:cols] = q.T  # later symbols, in range or not
    shift = raw_bits.astype(np.int32)
    low = (wanted & ((1 << shift) - 1)).astype(np.uint16)
    raw = low[0::QUAD]
    for i in range(1, QUAD):
        raw |= low[i::QUAD] << (i * raw_bits).astype(np.uint16)
    wanted >>= shift
    wanted -= min_symbol

    coded = np.clip(wanted, 0, n - 1)
    first_group = classes.astype(np.int64) * n**size  # of a row's class
    number = coded[0::size].astype(np.int64)
    for i in range(1, size):
        number *= n
        number += coded[i::size]
    number += first_group
    groups: IntArray = table.substitute[number]
    number = groups - first_group
    for i in range(size - 1, -1, -1):
        number, coded[i::size] = np.divmod(number, n)
    column, row = np.nonzero(wanted[:cols] != coded[:cols])
    order = np.lexsort((column, row))
    column, row = column[order], row[order]
    remainder = wanted[column, row] - coded[column, row]
    outliers = column.astype(np.uint32) | remainder.astype(np.uint32) << np.uint32(16)
    return groups, raw, np.bincount(row, minlength=rows).astype(np.int64), outliers


def from_groups(
    entries: npt.NDArray[np.uint32],
    group: int,
    raw: npt.NDArray[np.uint16],
    raw_bits: npt.NDArray[np.uint8],
    min_symbol: int,
) -> npt.NDArray[np.int32]:
    """Decode entries (steps, rows), raw bits (quads, rows), of each row so many a weight (rows,) ->
    q less outliers.
    """
    q = np.empty((group * len(entries), entries.shape[1]), np.int32)
    for i, symbols in enumerate(entry_symbols(entries, group)):
        q[i::group] = symbols
    q += min_symbol
    q <<= raw_bits.astype(np.int32)
    mask = ((1 << raw_bits) - 1).astype(np.uint16)
    for i in range(QUAD):
        q[i::QUAD] += raw >> (i * raw_bits).astype(np.uint16) & mask
    return q
