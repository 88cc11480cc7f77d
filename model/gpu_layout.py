"""Where the words of a coded matrix lie in GPU memory, rearranged in numpy before they are sent;
and into how many segments its rows are cut.

Both arrangements serve rows that are read side by side, a lane each: their 16-byte chunks
alternate, so that the lanes walk through memory together. No more rows lie together than one
binding may hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from codec import scale
from codec.choice import FAST_RAW_BITS
from codec.classes import TILE
from codec.lossless import LosslessMatrix
from codec.matrix import CodedMatrix, outlier_places

BLOCK = 32  # columns that share an activation scale; kernels work in whole blocks
CHUNK_BITS = 128  # what stream.wgsl reads at a time

_CHUNK_WORDS = CHUNK_BITS // 32

# Lanes that fill a large GPU (an H100 holds 200k of this kernel), and the longest segment, unless
# there are more than a workgroup's.
_LANES_WANTED = 1 << 17
_MAX_SEGMENT_BLOCKS = 8
_MIN_GROUP_SEGMENTS = 8  # fewer lanes are long about the table
_START_BLOCKS = 1.5  # of columns, that a workgroup could decode until it begins

Rows = npt.NDArray[np.int64]  # by their numbers, in the order in which they shall lie


def row_info(
    m: CodedMatrix, rows: Rows, bits: Rows, places: Rows, first_outlier: Rows
) -> npt.NDArray[np.uint32]:
    """struct Row of some rows (rows, 4): their streams start at `bits`, `places` is for `place`."""
    info = np.empty((rows.size, 4), np.uint32)
    info[:, 0] = bits
    classes = m.classes[rows].astype(np.int64)
    info[:, 1] = places | classes << 28 | (classes < m.n_narrow).astype(np.int64) << 31
    info[:, 2] = first_outlier
    info[:, 3] = m.scale_log2[rows].astype(np.int64) - scale.ZERO << 16 | m.outlier_counts[rows]
    return info


def ordered_outliers(
    m: CodedMatrix, order: Rows
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The outliers of all rows in this order, so that those of a tile lie together, and where each
    row's begin (rows,).
    """
    counts = m.outlier_counts[order].astype(np.int64)
    first = np.cumsum(counts) - counts
    moved = np.repeat(m.outlier_offsets[order].astype(np.int64) - first, counts)
    return m.outliers[moved + np.arange(moved.size)], first


def far_outliers(m: CodedMatrix) -> npt.NDArray[np.uint32]:
    """Where each row's far outliers begin in this array, (rows + 1,), and these.

    Far is an outlier that does not fit its byte with every symbol: shaders/shared/planes.wgsl.
    """
    remainder = m.outliers.view(np.int32) >> 16
    row, _ = outlier_places(m)
    room = 128 >> (m.row_raw_bits[row].astype(np.int32) if m.raw_bits <= FAST_RAW_BITS else 0)
    far = (m.min_symbol + remainder < -room) | (m.min_symbol + m.n_symbols - 1 + remainder >= room)
    before = np.append(0, np.cumsum(far))
    return np.append(m.rows + 1 + before[m.outlier_offsets], m.outliers[far]).astype(np.uint32)


def padded_rows(rows: int) -> int:
    """Rows in whole tiles."""
    return -(-rows // TILE) * TILE


def wanted_segments(rows: int, n_blocks: int, most: int) -> int:
    """Into how many segments a row is cut, of which a workgroup takes up to `most`; maybe more than
    it has blocks.
    """
    rows = padded_rows(rows)
    least = _MIN_GROUP_SEGMENTS
    while n_blocks % least and least < most:
        least += 1
    least = min(max(least, -(-n_blocks // _MAX_SEGMENT_BLOCKS)), most)
    wanted = max(-(-_LANES_WANTED // rows), least)
    # A workgroup waits for its longest segment, so alike ones are worth more lanes, or fewer; and
    # of these full workgroups.
    alike = [
        n
        for n in range(least, n_blocks + 1)
        if n_blocks % n == 0 and n % -(-n // most) == 0 and 2 * wanted <= 3 * n <= 4.5 * wanted
    ]
    alike = [n for n in alike if n % most == 0] or alike

    def blocks(n: int) -> float:
        """Time of n segments, in that of a block of columns for all the lanes wanted."""
        return max(1, n * rows / _LANES_WANTED) * (n_blocks // n + _START_BLOCKS)

    return min(alike, key=blocks, default=wanted)


def row_ranges(
    m: CodedMatrix, floats: LosslessMatrix | None, binding_bytes: int
) -> Iterator[tuple[int, int]]:
    """Row ranges, in whole tiles, whose words fit one binding."""
    most = m.rows
    if floats:
        tile_bytes = TILE * row_chunks(floats) * CHUNK_BITS // 8
        most = TILE * max(1, binding_bytes // tile_bytes)
    # Interleaving fills rows up to the longest beside them: at most one longest row a group.
    room = 8 * (binding_bytes - guard_bytes(m)) - CHUNK_BITS
    ends = np.arange(m.rows + 1) * (m.row_bits.max() + 2 * CHUNK_BITS)
    begin = 0
    while begin < m.rows:
        end = int(np.searchsorted(ends, ends[begin] + room, side="right")) - 1
        end = min(end, begin + most)
        if end < m.rows:
            end = begin + max(TILE, (end - begin) // TILE * TILE)
        end = min(end, m.rows)
        yield begin, end
        begin = end


def guard_bytes(m: CodedMatrix) -> int:
    """Zeros after the last row: no row reads further, whatever its bits say.

    The kernels decode whole blocks of 32 columns, at most log2_states / group + raw_bits bits each,
    and fetch up to 48 bytes ahead.
    """
    cols = -(-m.cols // BLOCK) * BLOCK
    bits = (m.log2_states + m.group * m.raw_bits) * cols // m.group
    return TILE * (bits // 8 + 64)


def interleaved_streams(
    m: CodedMatrix, rows: Rows
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The words of some rows, the chunks of every TILE rows alternating, and where each starts.

    A row keeps its offset within the first chunk; its next chunk is TILE chunks further on.
    """
    first = m.row_offsets[rows] // CHUNK_BITS
    counts = -(-m.row_offsets[rows + 1] // CHUNK_BITS) - first
    groups = np.zeros((-(-rows.size // TILE), TILE), np.int64)
    groups.ravel()[: rows.size] = counts
    widths = groups.max(axis=1)
    group_starts = TILE * (np.cumsum(widths) - widths)
    row = np.arange(rows.size)
    starts = group_starts[row // TILE] + row % TILE

    base = first.min()
    words = m.words[_CHUNK_WORDS * base : _CHUNK_WORDS * (first + counts).max()]
    words = np.append(words, np.zeros(-words.size % _CHUNK_WORDS, np.uint32))
    chunk_row = np.repeat(row, counts)
    step = np.arange(chunk_row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.zeros((TILE * int(widths.sum()), _CHUNK_WORDS), np.uint32)
    source = words.reshape(-1, _CHUNK_WORDS)
    out[starts[chunk_row] + TILE * step] = source[first[chunk_row] - base + step]
    return out.ravel(), starts * CHUNK_BITS + m.row_offsets[rows] % CHUNK_BITS


def row_chunks(m: LosslessMatrix) -> int:
    """Chunks that the fields of a row take, in whole blocks of columns."""
    return -(-(-(-m.cols // BLOCK) * m.field_bits) // _CHUNK_WORDS)


def tiled_fields(m: LosslessMatrix, rows: Rows) -> npt.NDArray[np.uint32]:
    """Some rows' fields of sign and mantissa: (tiles, row_chunks, TILE, words of a chunk)."""
    words = np.zeros((padded_rows(rows.size), row_chunks(m) * _CHUNK_WORDS), np.uint32)
    words[: rows.size, : m.row_words] = m.mantissas.reshape(m.rows, m.row_words)[rows]
    return words.reshape(-1, TILE, row_chunks(m), _CHUNK_WORDS).swapaxes(1, 2)
