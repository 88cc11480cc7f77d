"""What is stored of a matrix beside its streams, as stacks of ANS words, coded with constriction:
one of the rows, one of the outliers.

Integers follow a bell with heavy tails, p(k) ~ (1 + ((k - center) / width)^2)^-2, one for each
class of rows: a Gaussian would need exp, which machines round differently, and a reader must
rebuild the very same model; +, * and / are exact everywhere.
"""

from typing import Any, NamedTuple

import constriction
import numpy as np
import numpy.typing as npt

from codec import scale
from codec.classes import TILE
from codec.scale import ScaleLog2

IntArray = npt.NDArray[np.int64]

_Coder = constriction.stream.stack.AnsCoder
_Categorical = constriction.stream.model.Categorical
_Uniform = constriction.stream.model.Uniform

_MAX_BINS = 1 << 12
_WIDTHS = np.exp2(np.arange(-8, 12))  # of a bell, in bins
# An integer 0 .. 2^32 - 1 is low + (bin << shift) + rest; bins follow the bell, rest is uniform.
# Before the integers stand low (upper half, lower half), shift and number of bins - 2, each uniform
# below these; before those of a class the bell's center, below the number of bins, and the index of
# its width.
_MAX_DIGITS = 16  # binary ones, of an outlier's upper half
_HEADER = (1 << 16, 1 << 16, 21, _MAX_BINS - 1)


class Rows(NamedTuple):
    """What is stored of each row beside its stream: arrays (rows,)."""

    classes: npt.NDArray[np.uint8]
    lengths: IntArray  # of the streams, in bits
    states: npt.NDArray[np.uint16]  # first ones
    outlier_counts: IntArray
    scale_log2: ScaleLog2


def pack(rows: Rows, n_classes: int, log2_states: int) -> npt.NDArray[np.uint32]:
    """All classes but the last have multiples of TILE rows, none has no rows."""
    of_class = [np.flatnonzero(rows.classes == c) for c in range(n_classes)]
    coder = _Coder()  # a stack: what is pushed last comes out first
    coder.encode_reverse(rows.states.astype(np.int32), _Uniform(1 << log2_states))
    _push(coder, rows.scale_log2.astype(np.int64) - scale.ZERO, of_class)
    _push(coder, rows.outlier_counts, of_class)
    _push(coder, rows.lengths, of_class)
    if n_classes > 1:
        sizes = np.array([members.size for members in of_class])
        shares = _Categorical(sizes.astype(np.float64), perfect=False)
        coder.encode_reverse(rows.classes.astype(np.int32), shares)
        tiles = _Uniform(-(-rows.classes.size // TILE) + 1)
        coder.encode_reverse((sizes[:-1] // TILE).astype(np.int32), tiles)
    words: npt.NDArray[np.uint32] = coder.get_compressed()
    return words


def unpack(words: npt.NDArray[np.uint32], rows: int, n_classes: int, log2_states: int) -> Rows:
    """The inverse of `pack`.

    Raises ValueError if the words do not hold exactly these. Other damage may pass as wrong
    numbers, which `codec.matrix.check` and decoding then find.
    """
    try:
        coder = _Coder(words)
    except ValueError as error:
        raise ValueError(f"side information: {error}") from error
    classes = np.zeros(rows, np.uint8)
    if n_classes > 1:
        tiles = coder.decode(_Uniform(-(-rows // TILE) + 1), n_classes - 1).astype(np.int64)
        sizes = np.append(TILE * tiles, rows - TILE * tiles.sum())
        if sizes.min() < 1:
            raise ValueError(f"side information: classes of {sizes} rows, expected some in each")
        shares = _Categorical(sizes.astype(np.float64), perfect=False)
        classes = coder.decode(shares, rows).astype(np.uint8)
    of_class = [np.flatnonzero(classes == c) for c in range(n_classes)]
    lengths = _pop(coder, of_class)
    outlier_counts = _pop(coder, of_class)
    scale_log2 = _pop(coder, of_class) + scale.ZERO
    states = coder.decode(_Uniform(1 << log2_states), rows).astype(np.uint16)
    if not coder.is_empty():
        raise ValueError(f"side information: its {words.size} words do not end after {rows} rows")
    if scale_log2.max() > scale.LARGEST:
        raise ValueError(f"side information: a scale of 2^({scale_log2.max()} / 8)")
    return Rows(classes, lengths, states, outlier_counts, scale_log2.astype(np.int16))


def pack_outliers(outliers: npt.NDArray[np.uint32], cols: int) -> npt.NDArray[np.uint32]:
    """Columns, below `cols`, + upper halves * 2^16, in any order -> words, none for none.

    An upper half, taken as a two's complement, is coded as the number of its digits, their first
    one being sure, and sign.
    """
    if not outliers.size:
        return outliers
    half = (outliers >> 16).astype(np.uint16).view(np.int16).astype(np.int64)
    size = np.abs(half)
    digits = _digits(size)
    coder = _Coder()
    for n in range(_MAX_DIGITS, 1, -1):
        rest = size[digits == n] - (1 << n - 1)
        coder.encode_reverse(rest.astype(np.int32), _Uniform(1 << n - 1))
    coder.encode_reverse((half < 0).astype(np.int32), _Uniform(2))
    _push(coder, digits, [np.arange(half.size)])
    coder.encode_reverse((outliers & 0xFFFF).astype(np.int32), _Uniform(max(2, cols)))
    words: npt.NDArray[np.uint32] = coder.get_compressed()
    return words


def unpack_outliers(words: npt.NDArray[np.uint32], n: int, cols: int) -> npt.NDArray[np.uint32]:
    """The inverse of `pack_outliers` of n outliers. ValueError: the words do not hold these."""
    if n == 0:
        if words.size:
            raise ValueError(f"outliers: {words.size} words for none of them")
        return words
    try:
        coder = _Coder(words)
    except ValueError as error:
        raise ValueError(f"outliers: {error}") from error
    column = coder.decode(_Uniform(max(2, cols)), n).astype(np.uint32)
    digits = _pop(coder, [np.arange(n)])
    if digits.max() > _MAX_DIGITS:
        raise ValueError(f"outliers: one of {digits.max()} digits, expected {_MAX_DIGITS} at most")
    negative = coder.decode(_Uniform(2), n).astype(bool)
    half = (digits > 0).astype(np.int64)
    for d in range(2, _MAX_DIGITS + 1):
        members = np.flatnonzero(digits == d)
        rest = coder.decode(_Uniform(1 << d - 1), members.size).astype(np.int64)
        half[members] = rest + (1 << d - 1)
    if not coder.is_empty():
        raise ValueError(f"outliers: their {words.size} words do not end after {n} of them")
    half[negative] *= -1
    outliers: npt.NDArray[np.uint32] = column | (half & 0xFFFF).astype(np.uint32) << np.uint32(16)
    return outliers


def _digits(size: IntArray) -> IntArray:
    """How many binary ones a number has, none if it is 0."""
    return np.frexp(size)[1].astype(np.int64)


def _push(coder: Any, values: IntArray, of_class: list[IntArray]) -> None:
    low = int(values.min())
    shift = max(0, int(values.max() - low).bit_length() - _MAX_BINS.bit_length() + 1)
    bins, rest = np.divmod(values - low, 1 << shift)
    n_bins = max(2, int(bins.max()) + 1)
    for members in reversed(of_class):
        center = int(np.median(bins[members]))
        counts = np.bincount(bins[members], minlength=n_bins)
        bells = [_bell(n_bins, center, width) for width in _WIDTHS]
        width = int(np.argmin([-counts @ np.log2(bell / bell.sum()) for bell in bells]))
        if shift:
            coder.encode_reverse(rest[members].astype(np.int32), _Uniform(1 << shift))
        bell = _Categorical(bells[width], perfect=False)
        coder.encode_reverse(bins[members].astype(np.int32), bell)
        coder.encode_reverse(width, _Uniform(len(_WIDTHS)))
        coder.encode_reverse(center, _Uniform(n_bins))
    header = (low >> 16, low & 0xFFFF, shift, n_bins - 2)
    for value, size in zip(reversed(header), reversed(_HEADER), strict=True):
        coder.encode_reverse(value, _Uniform(size))


def _pop(coder: Any, of_class: list[IntArray]) -> IntArray:
    high, low, shift, more_bins = (coder.decode(_Uniform(size)) for size in _HEADER)
    n_bins = more_bins + 2
    values = np.empty(sum(members.size for members in of_class), np.int64)
    for members in of_class:
        center = coder.decode(_Uniform(n_bins))
        width = _WIDTHS[coder.decode(_Uniform(len(_WIDTHS)))]
        bell = _Categorical(_bell(n_bins, center, width), perfect=False)
        of_members = coder.decode(bell, members.size).astype(np.int64) << shift
        if shift:
            of_members += coder.decode(_Uniform(1 << shift), members.size)
        values[members] = of_members
    values += high << 16 | low
    return values


def _bell(n_bins: int, center: int, width: float) -> npt.NDArray[np.float64]:
    distance = (np.arange(n_bins) - center) / width
    near: npt.NDArray[np.float64] = 1 / (1 + distance * distance)
    return near * near
