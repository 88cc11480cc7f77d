"""Instruction slots that a weight takes of a lane, estimated: what bounds a matvec where memory
does not. Loads, address arithmetic and checks of buffers' ends are counted, what comes before and
after the loop is not.

Of coded weights without raw bits it is what NVIDIA's compiler makes of shaders/shared/ (driver 580:
242 instructions for 32 columns), taken apart; raw bits add what ans.wgsl says, which has not been
counted in machine code. Of uncompressed weights it is matvec_plain.wgsl read likewise.
"""

from __future__ import annotations

_COLUMNS = 32  # of a round of the loop
_LOOKUP = 5  # address, load, bits that are left, shift of the window, base
_FOUR = 6.5  # four weights: where the second pair's bits begin, window moved on, symbols joined
_RAW_FOUR = 9  # their raw bits: taken, spread to bytes, merged
_REFILL = 36  # of the window: position, a chunk crossed into, words chosen and shifted
_ACTIVATIONS = 15  # of a token: three loads and their checks
_DOT = 14  # of a token: eight dot products of four, and their sum
_SCALED = 8  # of a token: as f32, times its scale; the loop

# Of f16, int8 and int4: 16 bytes of each of four rows at a time.
PLAIN = {16: 2.8, 8: 0.8, 4: 0.95}


def coded(raw_bits: int, group: int, tokens: int) -> float:
    """For a weight of so many raw bits, `group` of which are one symbol of the code."""
    planes = 1 if raw_bits <= 2 else 2
    slots = _LOOKUP * _COLUMNS / group + _FOUR * _COLUMNS / 4 + 2 * planes * _REFILL
    if raw_bits:
        slots += _RAW_FOUR * _COLUMNS / 4
    return (slots + tokens * (_ACTIVATIONS + planes * _DOT + _SCALED)) / _COLUMNS
