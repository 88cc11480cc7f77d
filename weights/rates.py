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

_TRIALS = 2  # of a constant, before all is quantized with it
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
            c = bisect_constant(in_group, wanted, log2_states)
            saved = 0.0
            for _ in range(_TRIALS):
                more = -saved
                saved = _saved(quantizer, [matrices[i] for i in members], in_group, c, log2_states)
                more += saved  # as c falls by half, a weight takes a bit more
                c = bisect_constant(in_group, wanted, log2_states, saved, near=c / 2**more)
        except ValueError as error:
            raise WeightsError(f"{group}: {error}; ask for other bits") from None
        constants |= {matrices[i].name: c for i in members}
    return constants


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
