"""The side information of a matrix's rows as one stack of ANS words, coded with constriction.

That is each row's stream length, first state and number of outliers. Integers follow a bell with
heavy tails, p(k) ~ (1 + ((k - center) / width)^2)^-2: a Gaussian would need exp, which machines
round differently, and a reader must rebuild the very same model; +, * and / are exact everywhere.
"""

from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_Coder = constriction.stream.stack.AnsCoder
_Categorical = constriction.stream.model.Categorical
_Uniform = constriction.stream.model.Uniform

_MAX_BINS = 1 << 12
_WIDTHS = np.exp2(np.arange(-8, 12))  # of a bell, in bins
# An integer 0 .. 2^32 - 1 is low + (bin << shift) + rest; bins follow the bell, rest is uniform.
# Before the integers stand low (upper half, lower half), shift, number of bins - 1, center and
# index of the width, each uniform below:
_HEADER = (1 << 16, 1 << 16, 21, _MAX_BINS, _MAX_BINS, len(_WIDTHS))


def pack(
    lengths: IntArray, states: npt.NDArray[np.uint16], outlier_counts: IntArray, log2_states: int
) -> npt.NDArray[np.uint32]:
    """Bits, first state and number of outliers of each row, three arrays (rows,), as words."""
    coder = _Coder()  # a stack: what is pushed last comes out first
    coder.encode_reverse(states.astype(np.int32), _Uniform(1 << log2_states))
    _push(coder, outlier_counts)
    _push(coder, lengths)
    words: npt.NDArray[np.uint32] = coder.get_compressed()
    return words


def unpack(
    words: npt.NDArray[np.uint32], rows: int, log2_states: int
) -> tuple[IntArray, npt.NDArray[np.uint16], IntArray]:
    """The inverse of `pack`: lengths, states and outlier counts, each (rows,).

    Raises ValueError if the words do not hold exactly these. Other damage may pass as wrong
    numbers, which `codec.matrix.check` and decoding then find.
    """
    try:
        coder = _Coder(words)
    except ValueError as error:
        raise ValueError(f"side information: {error}") from error
    lengths = _pop(coder, rows)
    outlier_counts = _pop(coder, rows)
    states = coder.decode(_Uniform(1 << log2_states), rows).astype(np.uint16)
    if not coder.is_empty():
        raise ValueError(f"side information: its {words.size} words do not end after {rows} rows")
    return lengths, states, outlier_counts


def _push(coder: Any, values: IntArray) -> None:
    low = int(values.min())
    shift = max(0, int(values.max() - low).bit_length() - _MAX_BINS.bit_length() + 1)
    bins, rest = np.divmod(values - low, 1 << shift)
    n_bins = max(2, int(bins.max()) + 1)
    center = int(np.median(bins))
    counts = np.bincount(bins, minlength=n_bins)
    bells = [_bell(n_bins, center, width) for width in _WIDTHS]
    width = int(np.argmin([-counts @ np.log2(bell / bell.sum()) for bell in bells]))
    if shift:
        coder.encode_reverse(rest.astype(np.int32), _Uniform(1 << shift))
    coder.encode_reverse(bins.astype(np.int32), _Categorical(bells[width], perfect=False))
    header = (low >> 16, low & 0xFFFF, shift, n_bins - 1, center, width)
    for value, size in zip(reversed(header), reversed(_HEADER), strict=True):
        coder.encode_reverse(value, _Uniform(size))


def _pop(coder: Any, rows: int) -> IntArray:
    high, low, shift, last_bin, center, width = (coder.decode(_Uniform(size)) for size in _HEADER)
    bell = _Categorical(_bell(last_bin + 1, center, _WIDTHS[width]), perfect=False)
    values: IntArray = coder.decode(bell, rows).astype(np.int64) << shift
    if shift:
        values += coder.decode(_Uniform(1 << shift), rows)
    values += high << 16 | low
    return values


def _bell(n_bins: int, center: int, width: float) -> npt.NDArray[np.float64]:
    distance = (np.arange(n_bins) - center) / width
    near: npt.NDArray[np.float64] = 1 / (1 + distance * distance)
    return near * near
