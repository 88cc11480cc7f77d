"""A float32 matrix without loss: exponents in entropy code, sign and mantissa bits as they are.

The exponent fields of a matrix lie close together, so they become small integers q, counted down
from an anchor: 1 is the anchor itself, 2 the field below it, and so on; -1, -2, ... are the fields
above it. 0 is field 0: zeros, of which pruned matrices have many, and subnormals. The q are a
`CodedMatrix` of pairs, without raw bits. Beside it, sign and as many leading mantissa bits as any
weight uses have a field of fixed width each: 1 + 7 for weights that are bfloat16, 1 + 10 for
float16.

Exponents of language models have 2.6 bits of entropy: Zhang et al., "70 % Size, 100 % Accuracy",
arXiv:2504.11651 (DFloat11). Functions that read a matrix raise ValueError if it is damaged.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from codec import fields
from codec.matrix import (
    CodedMatrix,
    check,
    decode_streams,
    dequantize,
    encode_matrix,
    outlier_places,
)
from codec.table import MAX_SYMBOLS, decode_tables, entry_symbols

MANTISSA_BITS = 23  # of a float32
MAX_EXPONENT = 254  # field of a finite number
_MANTISSA = np.uint32((1 << MANTISSA_BITS) - 1)
_SIGN = np.uint32(1 << 31)
_CHUNK_WEIGHTS = 1 << 20

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int16]
Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class LosslessMatrix:
    """W (rows, cols), finite float32 values, bit for bit."""

    # q (rows, cols), with scales of 1. Its outliers are not remainders but exponent fields: column
    # | field of the coded q << 16 | field of the weight << 24. So whoever corrects a weight need
    # not decode it.
    exponents: CodedMatrix
    anchor: int  # exponent field of q = 1, 1 .. MAX_EXPONENT
    mantissa_bits: int  # 0 .. MANTISSA_BITS
    mantissas: Words  # (rows * row_words,), in each row `field_bits` bits for each weight

    @property
    def rows(self) -> int:
        return self.exponents.rows

    @property
    def cols(self) -> int:
        return self.exponents.cols

    @property
    def n_weights(self) -> int:
        return self.rows * self.cols

    @property
    def field_bits(self) -> int:
        """Sign and mantissa of a weight."""
        return 1 + self.mantissa_bits

    @property
    def row_words(self) -> int:
        return fields.row_words(self.cols, self.field_bits)

    @property
    def stored_bits(self) -> int:
        """Bits of all that a file holds for this matrix."""
        return self.exponents.stored_bits + 32 * self.mantissas.size

    @property
    def bits_per_weight(self) -> float:
        return self.stored_bits / self.n_weights


AnyMatrix = CodedMatrix | LosslessMatrix


def encode_lossless(w: FloatArray, log2_states: int = 12) -> LosslessMatrix:
    """W (rows, cols) -> the same in code. ValueError: NaN, infinity, or too many columns."""
    rows, cols = w.shape
    exponents = exponent_fields(w)
    counts = np.zeros(256, np.int64)
    for chunk in _chunks(w):  # bincount makes a copy of eight bytes per weight
        counts += np.bincount(exponents[chunk].ravel(), minlength=256)
    if counts[MAX_EXPONENT + 1 :].any():
        raise ValueError("a weight is not a finite number")
    anchor = _anchor(counts)
    q = _to_counted(anchor)[exponents]
    del exponents
    coded = encode_matrix(q, np.zeros(rows, np.int16), log2_states, 0, groups=(2,))
    wanted = q[outlier_places(coded)]
    remainder = (coded.outliers >> 16).astype(np.int16)
    field = _from_counted(anchor)[np.stack([wanted - remainder, wanted]) + 255]
    outliers = coded.outliers & 0xFFFF | field[0] << 16 | field[1] << 24
    coded = replace(coded, outliers=outliers)
    del q

    bits = np.ascontiguousarray(w).view(np.uint32)
    used = int(np.bitwise_or.reduce(bits, axis=None) & _MANTISSA)
    unused = (used & -used).bit_length() - 1 if used else MANTISSA_BITS
    width = 1 + MANTISSA_BITS - unused
    packed = np.empty((rows, fields.row_words(cols, width)), np.uint32)
    for chunk in _chunks(w):
        left_aligned = bits[chunk] & _SIGN | (bits[chunk] & _MANTISSA) << np.uint32(8)
        packed[chunk] = fields.pack(left_aligned >> np.uint32(32 - width), width)
    return LosslessMatrix(coded, anchor, width - 1, packed.ravel())


def decode_lossless(m: LosslessMatrix) -> FloatArray:
    """W (rows, cols), bit for bit as it was encoded."""
    check_lossless(m)
    q = decode_streams(m.exponents)
    w = q.view(np.uint32)  # in its place
    field = _from_counted(m.anchor)
    for chunk in _chunks(w):
        w[chunk] = field[q[chunk] + 255]
    places = outlier_places(m.exponents)
    wrong = w[places] != m.exponents.outliers >> 16 & 255
    if wrong.any():
        row, column = (int(axis[wrong][0]) for axis in places)
        raise ValueError(f"the outlier at ({row}, {column}) names another exponent than the stream")
    w[places] = m.exponents.outliers >> 24
    w <<= MANTISSA_BITS
    words = m.mantissas.reshape(m.rows, m.row_words)
    for chunk in _chunks(w):
        left_aligned = fields.unpack(words[chunk], m.field_bits, m.cols)
        left_aligned <<= np.uint32(32 - m.field_bits)
        w[chunk] |= left_aligned & _SIGN | left_aligned >> np.uint32(8) & _MANTISSA
    return w.view(np.float32)


def to_floats(m: AnyMatrix) -> FloatArray:
    """W (rows, cols) as the engine sees it, whichever way it is coded."""
    return decode_lossless(m) if isinstance(m, LosslessMatrix) else dequantize(m)


def check_lossless(m: LosslessMatrix) -> None:
    """Raise ValueError unless the parts fit together, as `codec.matrix.check` does."""
    check(m.exponents)
    if not 1 <= m.anchor <= MAX_EXPONENT:
        raise ValueError(f"anchor {m.anchor}: expected 1 to {MAX_EXPONENT}")
    if not 0 <= m.mantissa_bits <= MANTISSA_BITS:
        raise ValueError(f"mantissa_bits {m.mantissa_bits}: expected 0 to {MANTISSA_BITS}")
    if m.mantissas.size != m.rows * m.row_words:
        raise ValueError(f"mantissas of {m.mantissas.size} words: expected {m.rows * m.row_words}")
    if m.exponents.group != 2:
        raise ValueError(f"exponents in groups of {m.exponents.group}: expected pairs")
    if m.exponents.raw_bits:
        raise ValueError(f"exponents with {m.exponents.raw_bits} raw bits: expected none")
    first, last = m.exponents.min_symbol, m.exponents.min_symbol + m.exponents.n_symbols - 1
    if first < m.anchor - MAX_EXPONENT or last > m.anchor:
        raise ValueError(f"symbols {first} to {last} from {m.anchor}: expected exponent fields")
    if (m.exponents.outliers >> 24 > MAX_EXPONENT).any():
        raise ValueError("an outlier that is not a finite number: expected none")


def exponent_fields(w: FloatArray) -> IntArray:
    """The exponent field of each weight, 0 .. 255, in the shape of w."""
    found = np.empty(w.shape, np.int16)
    np.right_shift(w.view(np.uint32), np.uint32(MANTISSA_BITS), out=found, casting="unsafe")
    found &= 255
    return found


def exponent_tables(m: LosslessMatrix) -> Words:
    """`decode_tables` (n_classes, 2^P) with exponent fields in the place of symbols."""
    table = decode_tables(m.exponents.marginals, m.exponents.log2_states, 2)
    hi = np.arange(m.exponents.n_symbols) + m.exponents.min_symbol
    field = _from_counted(m.anchor)[hi + 255]
    first, second = (field[symbols] for symbols in entry_symbols(table, 2))
    table &= np.uint32(0xFFFF0000)
    table |= first | second << np.uint32(8)
    return table


def _anchor(counts: npt.NDArray[np.integer]) -> int:
    """Top of the neighbouring fields that have most weights, as many as there may be symbols."""
    n_fields = MAX_SYMBOLS[2] - 1  # the last one is for field 0
    within = np.cumsum(counts[1 : MAX_EXPONENT + 1])
    within[n_fields:] -= within[:-n_fields].copy()
    return 1 + int(within.argmax())


def _to_counted(anchor: int) -> IntArray:
    """q of each exponent field (256,)."""
    field = np.arange(256)
    q = np.where(field > anchor, anchor - field, anchor + 1 - field)
    return np.where(field > 0, q, 0).astype(np.int16)


def _from_counted(anchor: int) -> Words:
    """The exponent field of q = -255 .. 255 (511,); 0 for what cannot be."""
    q = np.arange(-255, 256)
    field = np.where(q > 0, anchor + 1 - q, anchor - q)
    return np.where((q != 0) & (field > 0), field, 0).astype(np.uint32)


def _chunks(w: npt.NDArray[np.generic]) -> Iterator[slice]:
    """The rows that are worked on at a time."""
    rows, cols = w.shape
    size = max(1, _CHUNK_WEIGHTS // cols)
    return (slice(start, start + size) for start in range(0, rows, size))
