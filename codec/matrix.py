"""A matrix of integers as entropy-coded rows: what a weights file stores of it, and back.

W (rows, cols) ~= scale[r] * q[r, c], and each row of q is one tANS stream. Knows nothing of files
or the GPU. Functions that read a coded matrix raise ValueError if it is damaged.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codec import ans, side
from codec.choice import MAX_HIGH, MAX_RAW_BITS, choose_code
from codec.pairs import QUAD, from_pairs, n_steps, to_pairs
from codec.table import (
    MARGINAL_TOTAL,
    MAX_SYMBOLS,
    build_table,
    decode_table,
    quantize_marginal,
)

LOG2_STATES = (11, 12)
MAX_COLS = 2**16 - 1
_CHUNK_ROWS, _CHUNK_PAIRS = 1 << 12, 1 << 22  # coded at a time, in some 300 MB

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """q (rows, cols) in code, and a scale for each row."""

    rows: int
    cols: int  # 1 .. MAX_COLS
    log2_states: int  # P: 11 or 12
    raw_bits: int  # 0 .. MAX_RAW_BITS
    min_symbol: int  # min_symbol <= 0 < min_symbol + n_symbols
    marginal: npt.NDArray[np.uint16]  # (n_symbols,), each >= 1, sum MARGINAL_TOTAL
    words: npt.NDArray[np.uint32]  # all rows, the most significant bit of a word first
    row_offsets: IntArray  # (rows + 1,) row r is the bits [row_offsets[r], row_offsets[r + 1])
    states: npt.NDArray[np.uint16]  # (rows,) each row's first state; its last one is 0
    scale: npt.NDArray[np.float16]  # (rows,)
    outlier_offsets: npt.NDArray[np.uint32]  # (rows + 1,) into outliers
    outliers: npt.NDArray[np.uint32]  # column | (remainder & 0xFFFF) << 16, by row, then column

    @property
    def n_weights(self) -> int:
        return self.rows * self.cols

    @property
    def row_bits(self) -> IntArray:
        """Length of each row's stream (rows,)."""
        return self.row_offsets[1:] - self.row_offsets[:-1]

    @property
    def outlier_counts(self) -> IntArray:
        """Outliers in each row (rows,)."""
        offsets = self.outlier_offsets.astype(np.int64)
        return offsets[1:] - offsets[:-1]

    @property
    def payload_bits(self) -> int:
        """Bits of the streams alone."""
        return int(self.row_offsets[-1])

    @property
    def stored_bits(self) -> int:
        """Bits of all that a file holds for this matrix."""
        words = self.words.size + self.outliers.size + pack_side(self).size
        return 32 * words + 16 * (self.marginal.size + self.scale.size)

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / self.n_weights


def encode_matrix(
    q: npt.NDArray[np.integer],
    scale: npt.NDArray[np.floating],
    log2_states: int = 12,
    max_raw_bits: int = MAX_RAW_BITS,
) -> CodedMatrix:
    """Integers (rows, cols) and the rows' scale (rows,) -> the matrix in its cheapest code.

    Raises ValueError for what no code with at most `max_raw_bits` can hold: too many columns, or
    integers beyond MAX_HIGH << max_raw_bits.
    """
    rows, cols = q.shape
    if rows < 1 or not 1 <= cols <= MAX_COLS or scale.shape != (rows,):
        raise ValueError(
            f"q is {rows} x {cols} with {scale.size} scales:"
            f" expected 1 to {MAX_COLS} columns and a scale for each row"
        )
    lowest, highest = int(q.min()), int(q.max())
    largest = MAX_HIGH << max_raw_bits
    if max(-lowest, highest) > largest:
        raise ValueError(f"q is {lowest} to {highest}: expected at most {largest} either way")
    counts = np.zeros(highest - lowest + 1, np.int64)
    for chunk in _chunks(rows, cols):
        counts += np.bincount((q[chunk] - lowest).ravel(), minlength=counts.size)
    code = choose_code(counts, lowest, log2_states, max_raw_bits)
    symbol = (np.arange(counts.size) + lowest >> code.raw_bits) - code.min_symbol
    symbol_counts = np.zeros(code.n_symbols, np.int64)
    np.add.at(symbol_counts, np.clip(symbol, 0, code.n_symbols - 1), counts)
    marginal = quantize_marginal(symbol_counts)
    table = build_table(marginal, log2_states)

    writer = ans.BitWriter()
    states, row_ends, outlier_counts, outliers = [], [], [], []
    for chunk in _chunks(rows, cols):
        pairs, raw, n_outliers, chunk_outliers = to_pairs(
            q[chunk], table, code.raw_bits, code.min_symbol
        )
        first_states, fields, lengths = ans.encode(table, pairs, raw, code.raw_bits)
        states.append(first_states)
        row_ends.append(writer.append(fields, lengths))
        outlier_counts.append(n_outliers)
        outliers.append(chunk_outliers)
    return CodedMatrix(
        rows=rows,
        cols=cols,
        log2_states=log2_states,
        raw_bits=code.raw_bits,
        min_symbol=code.min_symbol,
        marginal=marginal,
        words=writer.words(),
        row_offsets=np.append(0, np.concatenate(row_ends)),
        states=np.concatenate(states),
        scale=scale.astype(np.float16),
        outlier_offsets=np.append(0, np.cumsum(np.concatenate(outlier_counts))).astype(np.uint32),
        outliers=np.concatenate(outliers),
    )


def decode_matrix(m: CodedMatrix) -> npt.NDArray[np.int32]:
    """q (rows, cols), exactly as it was encoded."""
    q = decode_streams(m)
    remainder = (m.outliers >> 16).astype(np.uint16).view(np.int16).astype(np.int32)
    q[outlier_places(m)] += remainder << m.raw_bits
    return q


def decode_streams(m: CodedMatrix) -> npt.NDArray[np.int32]:
    """q (rows, cols) without what outliers add to it."""
    check(m)
    table = decode_table(m.marginal, m.log2_states)
    q = np.empty((m.rows, m.cols), np.int32)
    for chunk in _chunks(m.rows, m.cols):
        decoder = _decoder(m, table, chunk)
        visited, raw = decoder.run(n_steps(m.cols))
        _check_ends(m, chunk, decoder)
        q[chunk] = from_pairs(table[visited], raw, m.raw_bits, m.min_symbol)[: m.cols].T
    return q


def outlier_places(m: CodedMatrix) -> tuple[IntArray, IntArray]:
    """Row and column of each outlier."""
    row = np.repeat(np.arange(m.rows, dtype=np.int64), m.outlier_counts)
    return row, (m.outliers & 0xFFFF).astype(np.int64)


def dequantize(m: CodedMatrix) -> npt.NDArray[np.float32]:
    """W (rows, cols) as the engine sees it: scale * q, rounded once to float32."""
    w = decode_matrix(m).astype(np.float32)
    w *= m.scale.astype(np.float32)[:, None]
    return w


def entry_points(
    m: CodedMatrix, segment: int
) -> tuple[npt.NDArray[np.uint32], IntArray, npt.NDArray[np.uint16]]:
    """Where a decoder can enter each row at columns 0, segment, 2 * segment, ... (whole quads).

    Returns (bit position from the row's start) << P | state, u32 (n_segments, rows); the bit at
    which each row ends (rows,), which is row_offsets[1:] in a sound matrix; and its last state.
    """
    if segment < 1 or segment % QUAD:
        raise ValueError(f"a segment is {segment} columns: expected a positive multiple of {QUAD}")
    check(m)
    table = decode_table(m.marginal, m.log2_states)
    starts = range(0, n_steps(m.cols), segment // 2)
    entries = np.empty((len(starts), m.rows), np.uint32)
    end_bits, end_states = np.empty(m.rows, np.int64), np.empty(m.rows, np.uint16)
    for chunk in _chunks(m.rows, m.cols):
        decoder = _decoder(m, table, chunk)
        for i, start in enumerate(starts):
            entries[i, chunk] = decoder.consumed << m.log2_states | decoder.states
            decoder.run(min(segment // 2, n_steps(m.cols) - start))
        end_bits[chunk] = m.row_offsets[:-1][chunk] + decoder.consumed
        end_states[chunk] = decoder.states
    return entries, end_bits, end_states


def pack_side(m: CodedMatrix) -> npt.NDArray[np.uint32]:
    """The rows' lengths, first states and numbers of outliers as a file's words."""
    return side.pack(m.row_bits, m.states, m.outlier_counts, m.log2_states)


def unpack_side(
    words: npt.NDArray[np.uint32], rows: int, log2_states: int
) -> tuple[IntArray, npt.NDArray[np.uint16], IntArray]:
    """The inverse of `pack_side`: row_bits, states and outlier_counts, each (rows,)."""
    return side.unpack(words, rows, log2_states)


def check(m: CodedMatrix) -> None:
    """Raise ValueError unless the parts fit together, so that no decoder can leave its arrays.

    Damage within the words shows when they are decoded, if rows then end at other bits or states.
    That is likely but not sure, for a decoder can find back into a stream: files need checksums.
    """

    def require(fact: object, found: str, expected: str) -> None:
        if not fact:
            raise ValueError(f"{found}: expected {expected}")

    n_symbols, total = m.marginal.size, m.marginal.sum(dtype=np.int64)
    shape_fits = m.rows >= 1 and 1 <= m.cols <= MAX_COLS
    require(shape_fits, f"{m.rows} x {m.cols}", f"1 to {MAX_COLS} columns, and rows")
    require(m.log2_states in LOG2_STATES, f"log2_states {m.log2_states}", f"one of {LOG2_STATES}")
    require(0 <= m.raw_bits <= MAX_RAW_BITS, f"raw_bits {m.raw_bits}", f"0 to {MAX_RAW_BITS}")
    require(2 <= n_symbols <= MAX_SYMBOLS, f"{n_symbols} symbols", f"2 to {MAX_SYMBOLS}")
    require(-n_symbols < m.min_symbol <= 0, f"min_symbol {m.min_symbol}", f"> -{n_symbols}, <= 0")
    require(total == MARGINAL_TOTAL, f"marginal with sum {total}", f"{MARGINAL_TOTAL}")
    require(m.marginal.min() >= 1, "a symbol of probability 0", "at least 1")
    sizes = (m.row_offsets.size - 1, m.outlier_offsets.size - 1, m.states.size, m.scale.size)
    require(sizes == (m.rows,) * 4, f"parts of {sizes} rows", f"{m.rows}")
    require(np.isfinite(m.scale).all(), "a scale that is not finite", "numbers")
    state = m.states.max()
    require(state < 1 << m.log2_states, f"first state {state}", f"below 2^{m.log2_states}")

    first, shortest, longest = m.row_offsets[0], m.row_bits.min(), m.row_bits.max()
    least = n_steps(m.cols) * (2 * m.raw_bits + 1)
    most = n_steps(m.cols) * (2 * m.raw_bits + m.log2_states)
    rows_fit = first == 0 and least <= shortest and longest <= most
    require(rows_fit, f"rows of {shortest} to {longest} bits", f"{least} to {most}, from bit 0 on")
    n_words = -(-m.payload_bits // ans.WORD_BITS)
    require(m.words.size == n_words, f"{m.words.size} words", f"{n_words}")

    first, last = m.outlier_offsets[0], m.outlier_offsets[-1]
    offsets_fit = first == 0 and m.outlier_counts.min() >= 0 and last == m.outliers.size
    require(offsets_fit, f"outliers {first} to {last}", f"0 to {m.outliers.size}, rising")
    row, column = outlier_places(m)
    require((column < m.cols).all(), f"an outlier beyond column {m.cols - 1}", "none")
    rising = np.diff(row * m.cols + column) > 0
    require(rising.all(), "outliers out of order", "rising rows and columns")


def _chunks(rows: int, cols: int) -> Iterator[slice]:
    """The rows that are coded at a time."""
    size = max(1, min(_CHUNK_ROWS, _CHUNK_PAIRS // n_steps(cols)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _decoder(m: CodedMatrix, table: npt.NDArray[np.uint32], rows: slice) -> ans.Decoder:
    first_word = m.row_offsets[rows.start] // ans.WORD_BITS
    end_word = -(-m.row_offsets[rows.stop] // ans.WORD_BITS)
    starts = m.row_offsets[:-1][rows] - first_word * ans.WORD_BITS
    return ans.Decoder(table, m.raw_bits, m.words[first_word:end_word], starts, m.states[rows])


def _check_ends(m: CodedMatrix, rows: slice, decoder: ans.Decoder) -> None:
    expected, found = m.row_bits[rows], decoder.consumed
    wrong = np.flatnonzero((found != expected) | (decoder.states != 0))
    if wrong.size:
        r = wrong[0]
        raise ValueError(
            f"row {rows.start + r} ends after {found[r]} bits in state {decoder.states[r]}:"
            f" expected {expected[r]} bits and state 0"
        )
