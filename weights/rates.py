"""How coarse the grids are: one constant for all matrices whose errors can be compared.

It follows from histograms, which know plain rounding; samples of what the quantizer really does say
how much less that takes.
"""

from __future__ import annotations

import numpy as np

from codec.quantize import Histogram, bisect_constant, predicted_bits
from engine.errors import WeightsError
from weights import layout
from weights.bits import MAX_BITS, MIN_BITS
from weights.parallel import in_processes, matrix_bytes
from weights.quantizers import Quantizer, code

# Of an embedding and a head whose errors' worth is not known. For the default model at 5 bits,
# uncalibrated, 6 here cost a twentieth of the divergence that the blocks cost.
LEAST_EMBED_BITS = 6.0

_TRIALS = 6  # of a constant at most, before all is quantized with it
_NEAR = 0.02  # bits a weight by which a trial may be wrong before the last correction
_FAR = 0.1  # by which the last one may be
_FINEST = 9.0  # bits that rounding may take: no more can be told of finer steps
_PROBES = 4  # matrices of a kind that are quantized then,
_PROBE_ROWS = 2048  # and about how many rows of one


def check_rates(bits: float, embed_bits: float | None) -> None:
    """WeightsError for rates that are not on offer."""
    for name, rate in (("bits", bits), ("embed-bits", embed_bits)):
        if rate is not None and not MIN_BITS <= rate <= MAX_BITS:
            raise WeightsError(
                f"{name} is {rate:g}, expected {MIN_BITS:g} to {MAX_BITS:g} bits per weight"
            )


def find_constants(
    quantizer: Quantizer,
    matrices: list[layout.Matrix],
    histograms: list[Histogram],
    bits: float,
    embed_bits: float | None,
    log2_states: int,
) -> dict[str, float]:
    """The step constant c of each matrix, by name; for the rates see weights/convert.py."""
    groups: dict[str, list[int]] = {}
    for i, matrix in enumerate(matrices):
        common = matrix.in_block or (embed_bits is None and quantizer.weighs(matrix))
        groups.setdefault("the model" if common else matrix.name, []).append(i)
    constants: dict[str, float] = {}
    for group, members in groups.items():
        in_group = [histograms[i] for i in members]
        wanted = bits if group == "the model" else embed_bits or max(bits, LEAST_EMBED_BITS)
        try:
            c = _constant(quantizer, [matrices[i] for i in members], in_group, wanted, log2_states)
        except ValueError as error:
            raise WeightsError(f"{group}: {error}; ask for other bits") from None
        constants |= {matrices[i].name: c for i in members}
    return constants


def _constant(
    quantizer: Quantizer,
    matrices: list[layout.Matrix],
    histograms: list[Histogram],
    wanted: float,
    log2_states: int,
) -> float:
    """Of matrices that together take `wanted` bits a weight; ValueError if they cannot."""
    c = bisect_constant(histograms, wanted, log2_states)
    expected = 0.0  # that the quantizer saves
    known: list[tuple[float, float]] = []  # log2 c, what it saves there
    for _ in range(_TRIALS):
        saved = _saved(quantizer, matrices, histograms, c, log2_states)
        known.append((float(np.log2(c)), saved))
        missed = saved - expected
        near = len(known) > 1 and abs(missed) < _NEAR
        # Where a part of the weights is zero anyway, smaller steps save that part of a bit more.
        slope = 0.0
        if len(known) > 1 and not near:
            (x0, saved0), (x1, saved1) = known[-2:]
            slope = float(np.clip((saved0 - saved1) / (x1 - x0), 0, 0.95)) if x1 != x0 else 0.0
        more = missed / (1 - slope)  # as c falls by half, rounding takes a bit more
        expected = min(saved + slope * more, max(saved, _FINEST - wanted))
        c = bisect_constant(histograms, wanted, log2_states, expected, near=c / 2**more)
        if near:
            return c
    if abs(missed) > _FAR:
        raise ValueError(
            f"{wanted:.3g} bits per weight cannot be had; the nearest is {wanted - missed:.2f}"
        )
    return c


def _saved(
    quantizer: Quantizer,
    matrices: list[layout.Matrix],
    histograms: list[Histogram],
    c: float,
    log2_states: int,
) -> float:
    """By how many bits a weight the quantizer stays below what rounding would take, by samples."""
    kinds: dict[str, list[int]] = {}
    for i, matrix in enumerate(matrices):
        kinds.setdefault(matrix.name.rpartition(".")[2], []).append(i)
    # In the middle of as many stretches of blocks: the first block is like no other.
    probes: list[int] = []
    for members in kinds.values():
        stretch = -(-len(members) // _PROBES)
        probes += members[stretch // 2 :: stretch] or members

    def every(i: int) -> int:
        return max(1, matrices[i].rows // _PROBE_ROWS)

    def taken(i: int) -> float:
        return code(quantizer, matrices[i], c, log2_states, every(i))[1].bits_per_weight

    def size(i: int) -> int:
        return matrix_bytes(matrices[i].rows // every(i), matrices[i].cols)

    bits = dict(zip(probes, in_processes(taken, probes, size=size), strict=True))
    saved, n_weights = 0.0, 0
    for members in kinds.values():
        by_probe = [
            predicted_bits(histograms[i], c, log2_states) / (matrices[i].rows * matrices[i].cols)
            - bits[i]
            for i in members
            if i in bits
        ]
        of_kind = sum(matrices[i].rows * matrices[i].cols for i in members)
        saved += of_kind * float(np.mean(by_probe))
        n_weights += of_kind
    return saved / n_weights
