"""Scales of rows on a grid of eighths of an octave: 2^(k / 8), or 0.

A quantizer is free to choose its steps, so neighbouring ones may well lie 9 % apart; and the k of a
matrix, being close together, cost a few bits each.
"""

import numpy as np
import numpy.typing as npt

# At most 2^100 either way: the product with any integer is a normal float32.
LARGEST = 800
ZERO = -1024  # stands for a scale of 0

ScaleLog2 = npt.NDArray[np.int16]

_OCTAVE = np.exp2(np.arange(8) / 8).astype(np.float32)


def to_scale(scale_log2: ScaleLog2) -> npt.NDArray[np.float32]:
    """2^(k / 8), rounded once to float32; the same on every machine."""
    k = scale_log2.astype(np.int32)
    scale: npt.NDArray[np.float32] = np.ldexp(_OCTAVE[k & 7], k >> 3)
    scale[k == ZERO] = 0
    return scale


def nearest(scale: npt.NDArray[np.floating]) -> ScaleLog2:
    """The k nearest to each scale, by ratio: 0, or 2^-100 to 2^100."""
    k = 8 * np.log2(np.where(scale > 0, scale, 1).astype(np.float64))
    return np.where(scale > 0, np.rint(k), ZERO).astype(np.int16)


def is_valid(scale_log2: ScaleLog2) -> bool:
    on_grid = (scale_log2 >= -LARGEST) & (scale_log2 <= LARGEST)
    return bool((on_grid | (scale_log2 == ZERO)).all())
