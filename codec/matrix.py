"""A matrix of integers as entropy-coded rows: what a weights file stores of it, and back.

W (rows, cols) ~= scale[r] * q[r, c], and each row of q is one tANS stream, in the table of its
class. Knows nothing of files or the GPU. Functions that read a coded matrix raise ValueError if it
is damaged.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from codec import ans, side
from codec.choice import CLIP, FAST_RAW_BITS, GROUPS, MAX_HIGH, MAX_RAW_BITS, Code, choose_code
from codec.classes import MAX_STATES, TILE, units
from codec.groups import QUAD, from_groups, n_steps, to_groups
from codec.scale import ScaleLog2, is_valid, to_scale
from codec.table import (
    MARGINAL_TOTAL,
    MAX_SYMBOLS,
    build_tables,
    decode_tables,
    entry_nbits,
    quantize_marginal,
)

LOG2_STATES = (11, 12)
MAX_COLS = 2**16 - 1
_CHUNK_ROWS, _CHUNK_QUADS = 1 << 12, 1 << 21  # coded at a time, in some 300 MB

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CodedMatrix:
    """q (rows, cols) in code, and a scale for each row."""

    rows: int
    cols: int  # 1 .. MAX_COLS
    log2_states: int  # P: 11 or 12
    group: int  # weights that are one symbol of the code: 2 or 4
    raw_bits: int  # 0 .. MAX_RAW_BITS; none in groups of 4
    # The first n_narrow classes, all others having raw_bits, have so many; without such classes it
    # is raw_bits. Fewer than raw_bits, which are then at most FAST_RAW_BITS.
    n_narrow: int
    narrow_raw_bits: int
    min_symbol: int  # min_symbol <= 0 < min_symbol + n_symbols
    marginals: npt.NDArray[np.uint16]  # (n_classes, n_symbols), each of sum MARGINAL_TOTAL
    classes: npt.NDArray[np.uint8]  # (rows,), each but the last of a multiple of TILE rows
    words: npt.NDArray[np.uint32]  # all rows, the most significant bit of a word first
    row_offsets: IntArray  # (rows + 1,) row r is the bits [row_offsets[r], row_offsets[r + 1])
    states: npt.NDArray[np.uint16]  # (rows,) each row's first state
    scale_log2: ScaleLog2  # (rows,) in eighths, see codec.scale
    outlier_offsets: npt.NDArray[np.uint32]  # (rows + 1,) into outliers
    outliers: npt.NDArray[np.uint32]  # column | (remainder & 0xFFFF) << 16, by row, then column

    @property
    def n_weights(self) -> int:
        return self.rows * self.cols

    @property
    def n_classes(self) -> int:
        return len(self.marginals)

    @property
    def n_symbols(self) -> int:
        return int(self.marginals.shape[1])

    @property
    def class_raw_bits(self) -> npt.NDArray[np.uint8]:
        """Of each class (n_classes,)."""
        bits = np.full(self.n_classes, self.raw_bits, np.uint8)
        bits[: self.n_narrow] = self.narrow_raw_bits
        return bits

    @property
    def row_raw_bits(self) -> npt.NDArray[np.uint8]:
        """Of each row (rows,)."""
        return self.class_raw_bits[self.classes]

    @property
    def scale(self) -> npt.NDArray[np.float32]:
        """Of each row (rows,)."""
        return to_scale(self.scale_log2)

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
        outliers = side.pack_outliers(self.outliers, self.cols)
        words = self.words.size + outliers.size + pack_side(self).size
        return 32 * words + 16 * self.marginals.size

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / self.n_weights


def encode_matrix(
    q: npt.NDArray[np.integer],
    scale_log2: ScaleLog2,
    log2_states: int = 12,
    max_raw_bits: int = MAX_RAW_BITS,
    groups: Collection[int] = GROUPS,
) -> CodedMatrix:
    """Integers (rows, cols) and the rows' scales (rows,) -> the matrix in its cheapest code, among
    those with symbols of as many weights as `groups` says.

    Raises ValueError for what no code with at most `max_raw_bits` can hold: too many columns,
    integers beyond MAX_HIGH << max_raw_bits (no bits are raw in groups of 4), or scales that are
    not on the grid of `codec.scale`.
    """
    rows, cols = q.shape
    if rows < 1 or not 1 <= cols <= MAX_COLS or scale_log2.shape != (rows,):
        raise ValueError(
            f"q is {rows} x {cols} with {scale_log2.size} scales:"
            f" expected 1 to {MAX_COLS} columns and a scale for each row"
        )
    if not is_valid(scale_log2):
        raise ValueError("scales beyond 2^100: expected less, or 0")
    max_raw_bits = max_raw_bits if 2 in groups else 0
    lowest, highest, limit = int(q.min()), int(q.max()), MAX_HIGH << max_raw_bits
    largest = max(-lowest, highest)
    if largest > limit:
        raise ValueError(f"q is {lowest} to {highest}: expected at most {limit} either way")
    order, counts = _by_spread(q)
    code = choose_code(counts, -CLIP, log2_states, max_raw_bits, largest, units(rows), groups)
    ends = np.append(0, np.cumsum(units(rows)))
    classes = np.empty(rows, np.uint8)
    for i, c in enumerate(code.classes):
        classes[order[ends[c.first_unit] : ends[c.end_unit]]] = i
    marginals = _marginals(code, counts)
    table = build_tables(marginals, log2_states, code.group)
    raw_bits = np.array([c.raw_bits for c in code.classes], np.uint8)

    writer = ans.BitWriter()
    states, row_ends, outlier_counts, outliers = [], [], [], []
    for chunk in _chunks(rows, cols):
        numbers, raw, n_outliers, chunk_outliers = to_groups(
            q[chunk], table, raw_bits[classes[chunk]], code.min_symbol, classes[chunk]
        )
        first_states, fields, lengths = ans.encode(table, numbers, raw, raw_bits[classes[chunk]])
        states.append(first_states)
        row_ends.append(writer.append(fields, lengths))
        outlier_counts.append(n_outliers)
        outliers.append(chunk_outliers)
    return CodedMatrix(
        rows=rows,
        cols=cols,
        log2_states=log2_states,
        group=code.group,
        raw_bits=code.raw_bits,
        n_narrow=int((raw_bits < code.raw_bits).sum()),
        narrow_raw_bits=int(raw_bits.min()),
        min_symbol=code.min_symbol,
        marginals=marginals,
        classes=classes,
        words=writer.words(),
        row_offsets=np.append(0, np.concatenate(row_ends)),
        states=np.concatenate(states),
        scale_log2=scale_log2.astype(np.int16),
        outlier_offsets=np.append(0, np.cumsum(np.concatenate(outlier_counts))).astype(np.uint32),
        outliers=np.concatenate(outliers),
    )


def decode_matrix(m: CodedMatrix) -> npt.NDArray[np.int32]:
    """q (rows, cols), exactly as it was encoded."""
    q = decode_streams(m)
    remainder = (m.outliers >> 16).astype(np.uint16).view(np.int16).astype(np.int32)
    row, column = outlier_places(m)
    q[row, column] += remainder << m.row_raw_bits[row].astype(np.int32)
    return q


def decode_streams(m: CodedMatrix) -> npt.NDArray[np.int32]:
    """q (rows, cols) without what outliers add to it."""
    check(m)
    tables = decode_tables(m.marginals, m.log2_states, m.group)
    q = np.empty((m.rows, m.cols), np.int32)
    for chunk in _chunks(m.rows, m.cols):
        decoder = _decoder(m, tables, chunk)
        visited, raw = decoder.run(n_steps(m.cols, m.group))
        entries = tables.ravel()[visited]
        _check_ends(m, chunk, decoder.consumed - entry_nbits(entries[-1]))
        raw_bits = m.class_raw_bits[m.classes[chunk]]
        q[chunk] = from_groups(entries, m.group, raw, raw_bits, m.min_symbol)[: m.cols].T
    return q


def outlier_places(m: CodedMatrix) -> tuple[IntArray, IntArray]:
    """Row and column of each outlier."""
    row = np.repeat(np.arange(m.rows, dtype=np.int64), m.outlier_counts)
    return row, (m.outliers & 0xFFFF).astype(np.int64)


def dequantize(m: CodedMatrix) -> npt.NDArray[np.float32]:
    """W (rows, cols) as the engine sees it: scale * q, rounded once to float32."""
    w = decode_matrix(m).astype(np.float32)
    w *= m.scale[:, None]
    return w


def entry_points(m: CodedMatrix, columns: Sequence[int]) -> tuple[npt.NDArray[np.uint32], IntArray]:
    """Where a decoder can enter each row at `columns`: 0, then rising multiples of QUAD.

    Returns (bit position from the row's start) << P | state, u32 (columns, rows); and the bit at
    which each row ends (rows,), which is row_offsets[1:] in a sound matrix.
    """
    rising = all(i < j < m.cols for i, j in pairwise(columns))
    if columns[0] != 0 or not rising or any(column % QUAD for column in columns):
        raise ValueError(f"columns {columns}: expected 0, then rising multiples of {QUAD}")
    check(m)
    tables = decode_tables(m.marginals, m.log2_states, m.group)
    steps = n_steps(m.cols, m.group)
    starts = [column // m.group for column in columns]
    entries = np.empty((len(starts), m.rows), np.uint32)
    end_bits = np.empty(m.rows, np.int64)
    for chunk in _chunks(m.rows, m.cols):
        decoder = _decoder(m, tables, chunk)
        for i, (start, end) in enumerate(pairwise([*starts, steps])):
            entries[i, chunk] = decoder.consumed << m.log2_states | decoder.states
            visited, _ = decoder.run(end - start)
        unread = entry_nbits(tables.ravel()[visited[-1]])
        end_bits[chunk] = m.row_offsets[:-1][chunk] + decoder.consumed - unread
    return entries, end_bits


def pack_side(m: CodedMatrix) -> npt.NDArray[np.uint32]:
    """What is stored of the rows beside their streams, as a file's words."""
    rows = side.Rows(m.classes, m.row_bits, m.states, m.outlier_counts, m.scale_log2)
    return side.pack(rows, m.n_classes, m.log2_states)


def check(m: CodedMatrix) -> None:
    """Raise ValueError unless the parts fit together, so that no decoder can leave its arrays.

    Damage within the words shows when they are decoded, if rows then end at other bits or states.
    That is likely but not sure, for a decoder can find back into a stream: files need checksums.
    """

    def require(fact: object, found: str, expected: str) -> None:
        if not fact:
            raise ValueError(f"{found}: expected {expected}")

    n_classes, n_symbols = m.marginals.shape
    shape_fits = m.rows >= 1 and 1 <= m.cols <= MAX_COLS
    require(shape_fits, f"{m.rows} x {m.cols}", f"1 to {MAX_COLS} columns, and rows")
    require(m.log2_states in LOG2_STATES, f"log2_states {m.log2_states}", f"one of {LOG2_STATES}")
    require(m.group in GROUPS, f"groups of {m.group}", f"one of {GROUPS}")
    most = MAX_RAW_BITS if m.group == 2 else 0
    require(0 <= m.raw_bits <= most, f"raw_bits {m.raw_bits}", f"0 to {most}")
    most = MAX_SYMBOLS[m.group]
    require(2 <= n_symbols <= most, f"{n_symbols} symbols", f"2 to {most}")
    require(-n_symbols < m.min_symbol <= 0, f"min_symbol {m.min_symbol}", f"> -{n_symbols}, <= 0")
    most = MAX_STATES >> m.log2_states
    require(1 <= n_classes <= most, f"{n_classes} classes", f"1 to {most}")
    most = n_classes - 1
    require(0 <= m.n_narrow <= most, f"{m.n_narrow} narrow classes", f"0 to {most}")
    found = f"{m.narrow_raw_bits} raw bits in narrow classes, {m.raw_bits} in others"
    if m.n_narrow:
        fewer = 0 <= m.narrow_raw_bits < m.raw_bits <= FAST_RAW_BITS
        require(fewer, found, f"fewer, and {FAST_RAW_BITS} at most")
    else:
        require(m.narrow_raw_bits == m.raw_bits, found, "as many, as there are no such classes")
    for marginal in m.marginals:
        total, used = marginal.sum(dtype=np.int64), np.flatnonzero(marginal)
        require(total == MARGINAL_TOTAL, f"marginal with sum {total}", f"{MARGINAL_TOTAL}")
        require(used.size >= 2, "a marginal of one symbol", "at least 2")
    per_row = (m.row_offsets[1:], m.outlier_offsets[1:], m.states, m.classes, m.scale_log2)
    sizes = tuple(values.size for values in per_row)
    require(sizes == (m.rows,) * len(per_row), f"parts of {sizes} rows", f"{m.rows}")
    class_rows = np.bincount(m.classes, minlength=n_classes)
    whole = class_rows.size == n_classes and class_rows.all() and not (class_rows[:-1] % TILE).any()
    require(whole, f"classes of {class_rows} rows", f"{n_classes} in multiples of {TILE}")
    require(is_valid(m.scale_log2), "a scale beyond 2^100", "less, or 0")
    state = m.states.max()
    require(state < 1 << m.log2_states, f"first state {state}", f"below 2^{m.log2_states}")

    steps = n_steps(m.cols, m.group)
    coded_bits = m.row_bits - steps * m.group * m.row_raw_bits.astype(np.int64)
    first, shortest, longest = m.row_offsets[0], coded_bits.min(), coded_bits.max()
    least, most = steps - 1, (steps - 1) * m.log2_states
    rows_fit = first == 0 and least <= shortest and longest <= most
    require(
        rows_fit,
        f"rows of {shortest} to {longest} bits beside raw ones",
        f"{least} to {most}, from bit 0 on",
    )
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
    size = max(1, min(_CHUNK_ROWS, _CHUNK_QUADS // n_steps(cols, QUAD)))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _by_spread(q: npt.NDArray[np.integer]) -> tuple[IntArray, IntArray]:
    """The rows in order of their mean |q|, and the counts of -CLIP .. CLIP (units, 2 CLIP + 1) in
    each unit of rows in this order, where CLIP stands for what is beyond.
    """
    rows, cols = q.shape
    spread = np.empty(rows, np.int64)
    for chunk in _chunks(rows, cols):
        spread[chunk] = np.minimum(np.abs(q[chunk]), CLIP).sum(axis=1)
    order = np.argsort(spread, kind="stable")
    counts = []
    for members in np.split(order, np.cumsum(units(rows))[:-1]):
        values = np.clip(q[members], -CLIP, CLIP)
        counts.append(np.bincount(values.ravel() + CLIP, minlength=2 * CLIP + 1))
    return order, np.array(counts)


def _marginals(code: Code, counts: IntArray) -> npt.NDArray[np.uint16]:
    """Of each class (n_classes, n_symbols), from counts (units, 2 CLIP + 1)."""
    marginals = np.zeros((len(code.classes), code.n_symbols), np.uint16)
    for marginal, c in zip(marginals, code.classes, strict=True):
        symbol_counts = np.zeros(c.high - c.low + 1, np.int64)
        high = np.arange(-CLIP, CLIP + 1) >> c.raw_bits
        of_class = counts[c.first_unit : c.end_unit].sum(axis=0)
        np.add.at(symbol_counts, np.clip(high, c.low, c.high) - c.low, of_class)
        begin = c.low - code.min_symbol
        marginal[begin : begin + symbol_counts.size] = quantize_marginal(symbol_counts)
    return marginals


def _decoder(m: CodedMatrix, tables: npt.NDArray[np.uint32], rows: slice) -> ans.Decoder:
    first_word = m.row_offsets[rows.start] // ans.WORD_BITS
    end_word = -(-m.row_offsets[rows.stop] // ans.WORD_BITS)
    starts = m.row_offsets[:-1][rows] - first_word * ans.WORD_BITS
    words = m.words[first_word:end_word]
    return ans.Decoder(
        tables, m.group, m.class_raw_bits, words, starts, m.states[rows], m.classes[rows]
    )


def _check_ends(m: CodedMatrix, rows: slice, found: IntArray) -> None:
    """`found` is how many bits each of the rows took."""
    expected = m.row_bits[rows]
    wrong = np.flatnonzero(found != expected)
    if wrong.size:
        r = wrong[0]
        raise ValueError(
            f"row {rows.start + r} ends after {found[r]} bits: expected {expected[r]} bits"
        )
