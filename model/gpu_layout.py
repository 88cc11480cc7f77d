"""Where the words of a coded matrix lie in GPU memory: rearranged in numpy, before they are sent.

Both arrangements serve rows that are read side by side, a lane each: their 16-byte chunks
alternate, so that the lanes walk through memory together.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from codec.lossless import LosslessMatrix
from codec.matrix import CodedMatrix

BLOCK = 32  # columns that share an activation scale; kernels work in whole blocks
TILE = 32  # rows of a workgroup
CHUNK_BITS = 128  # what stream_wide reads at a time

_CHUNK_WORDS = CHUNK_BITS // 32


def padded_rows(rows: int) -> int:
    """Rows in whole tiles."""
    return -(-rows // TILE) * TILE


def interleaved_streams(
    m: CodedMatrix, begin: int, end: int, lanes: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The rows' streams with the chunks of every `lanes` rows alternating, and where each starts.

    A row keeps its offset within the first chunk; its next chunk is `lanes` chunks further on.
    """
    rows = end - begin
    first = m.row_offsets[begin:end] // CHUNK_BITS
    counts = -(-m.row_offsets[begin + 1 : end + 1] // CHUNK_BITS) - first
    groups = np.zeros((-(-rows // lanes), lanes), np.int64)
    groups.ravel()[:rows] = counts
    widths = groups.max(axis=1)
    group_starts = lanes * (np.cumsum(widths) - widths)
    row = np.arange(rows)
    starts = group_starts[row // lanes] + row % lanes

    base = _CHUNK_WORDS * first[0]
    words = np.zeros(-(-(m.words.size - base) // _CHUNK_WORDS) * _CHUNK_WORDS, np.uint32)
    words[: m.words.size - base] = m.words[base:]
    chunk_row = np.repeat(row, counts)
    step = np.arange(chunk_row.size) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.zeros((lanes * int(widths.sum()), _CHUNK_WORDS), np.uint32)
    source = words.reshape(-1, _CHUNK_WORDS)
    out[starts[chunk_row] + lanes * step] = source[first[chunk_row] - first[0] + step]
    return out.ravel(), starts * CHUNK_BITS + m.row_offsets[begin:end] % CHUNK_BITS


def row_chunks(m: LosslessMatrix) -> int:
    """Chunks that the fields of a row take, in whole blocks of columns."""
    return -(-(-(-m.cols // BLOCK) * m.field_bits) // _CHUNK_WORDS)


def tiled_fields(m: LosslessMatrix, begin: int, end: int) -> npt.NDArray[np.uint32]:
    """The rows' fields of sign and mantissa: (tiles, row_chunks, TILE, words of a chunk)."""
    rows = end - begin
    words = np.zeros((padded_rows(rows), row_chunks(m) * _CHUNK_WORDS), np.uint32)
    words[:rows, : m.row_words] = m.mantissas.reshape(m.rows, m.row_words)[begin:end]
    return words.reshape(-1, TILE, row_chunks(m), _CHUNK_WORDS).swapaxes(1, 2)
