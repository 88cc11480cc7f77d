"""The side information of a matrix's rows as one stack of ANS words, coded with constriction.

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
