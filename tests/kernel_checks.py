"""What tests of kernels share: matrices and activations, and how far off results may be.

F32 is half an ulp of float32 relative to the value; an n-term sum in any order is off by at most n
* F32 * sum |terms|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from codec.matrix import CodedMatrix, decode_matrix, encode_matrix
from codec.scale import ZERO
from engine.device import Device
from engine.kernel import Kernels
from engine.plan import Plan, run
from model.activations import Activations
from model.operations import AttentionCut

F32 = 2.0**-24
DIGIT_UNIT = {1: 0.5, 3: 0.5 / 254**2}  # rounding of the last digit, in units of the block's scale


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(Device.open())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def coded(
    rng: np.random.Generator, rows: int, cols: int, spread: float, log2_states: int
) -> CodedMatrix:
    """Rows of several classes, with tails heavy enough for outliers; a larger spread gets more raw
    bits.
    """
    of_row = spread * 2 ** rng.normal(size=(rows, 1))
    q = np.round(rng.laplace(size=(rows, cols)) * of_row).astype(np.int32)
    scale_log2 = rng.integers(-60, -20, rows).astype(np.int16)
    scale_log2[rows // 2] = ZERO
    return encode_matrix(q, scale_log2, log2_states)


def digit_activations(
    rng: np.random.Generator, device: Device, tokens: int, digits: int, cols: int
) -> tuple[Activations, np.ndarray]:
    """Random digits on the device, and the float64 (tokens, cols) that they stand for."""
    n_blocks = -(-cols // 32)
    d = np.zeros((tokens, digits, n_blocks * 32), np.int8)
    d[..., :cols] = rng.integers(-127, 128, size=(tokens, digits, cols))
    scale = rng.uniform(0.1, 1, (tokens, n_blocks)).astype(np.float32)
    x = sum(d[:, i] / 254.0**i for i in range(digits)) * np.repeat(scale, 32, axis=1)
    sums = x.reshape(tokens, n_blocks, 32).sum(axis=2)
    pair = np.stack([scale, sums.astype(np.float32)], axis=-1)
    return Activations.upload(device, "x", d, pair), x[:, :cols]


def read_activations(
    device: Device, a: Activations, tokens: int, digits: int, cols: int
) -> dict[str, np.ndarray]:
    n_blocks = -(-cols // 32)
    d = device.read(a.digits, np.int8, (tokens, digits, n_blocks * 32))
    scale = device.read(a.scale, np.float32, (tokens, n_blocks, 2)).astype(np.float64)
    x = sum(d[:, i] / 254.0**i for i in range(digits)) * np.repeat(scale[..., 0], 32, axis=1)
    return {"x": x[:, :cols], "padding": x[:, cols:], "scale": scale[..., 0], "sum": scale[..., 1]}


def product_error(m: CodedMatrix, x: np.ndarray, n_blocks: int) -> np.ndarray:
    """How far off products of m with x may be, in float32.

    Integer dots are exact. Each block adds its dot and the offset that symbols are counted from,
    which may be as large as 128 * 2^raw_bits steps; then blocks, outliers and the scale: n_blocks +
    8 roundings of such terms.
    """
    scale = m.scale.astype(np.float64)
    symbols = np.abs(decode_matrix(m)) - 2 * (m.min_symbol << m.raw_bits)
    error: np.ndarray = (n_blocks + 8) * F32 * (np.abs(x) @ (symbols * scale[:, None]).T)
    return error


def check_quantized(
    assert_close: Callable[..., None],
    got: dict[str, np.ndarray],
    want: np.ndarray,
    digits: int,
    error: Any,
) -> None:
    """Digits on the device against the float64 values they should stand for, themselves known to
    `error`.
    """
    tokens, cols = want.shape
    n_blocks = -(-cols // 32)
    padded = np.zeros((tokens, n_blocks * 32))
    padded[:, :cols] = want
    blocks = padded.reshape(tokens, n_blocks, 32)
    scale = np.abs(blocks).max(axis=2) / 127
    # The division by the scale and the digits' remainders round in f32 at up to 127 scales.
    tolerance = scale * (DIGIT_UNIT[digits] + 4 * 127 * F32)
    assert_close(got["x"], want, np.repeat(tolerance, 32, axis=1)[:, :cols] + error)
    assert not got["padding"].any()
    x = np.zeros_like(padded)
    x[:, :cols] = got["x"]
    assert_close(
        got["sum"], x.reshape(tokens, n_blocks, 32).sum(axis=2), 64 * F32 * 127 * 32 * scale
    )


# (rows, cols, spread, log2_states): rows below, at and beside the tile; columns odd and beside the
# blocks; the spreads lead to 0 to 4 raw bits, or to groups of four weights.
MATRICES = [
    (7, 33, 1.0, 11),
    (65, 575, 2.5, 12),
    (100, 70, 6.0, 11),
    (33, 1030, 15.0, 12),
    (1, 2, 25.0, 11),
    (40, 130, 90.0, 12),
    (300, 333, 0.6, 11),
    (65, 575, 0.13, 12),
    (33, 1030, 0.1, 11),
    (1, 3, 0.0, 11),
]

HEADS = [
    (6, 2, 16, False),
    (4, 4, 10, False),
    (9, 3, 64, True),
    (9, 3, 64, False),
    (2, 1, 128, True),
]


def attention_cut(
    heads_per_kv: int, head_dim: int, lanes: int, per_lane: int, finish: bool
) -> dict[str, Any]:
    """Overrides of `attention`, or without lanes of `attention_group`."""
    if lanes:
        return dict(lanes=lanes, per_lane=per_lane, finish=finish and lanes >= head_dim // 4)
    return dict(AttentionCut.grouped(heads_per_kv, 1, -(-head_dim // 8)).overrides, finish=finish)


def attend(
    kernels: Kernels,
    rows: int,
    out: Activations,
    *,
    overrides: dict[str, Any],
    params: dict[str, Any],
    rows_to_combine: int,
    partial: Any,
    buffers: dict[str, Any],
) -> None:
    """Run `attention` for so many rows, to three digits, and what joins its splits if need be."""
    n_heads, n_splits = params["n_heads"], overrides["n_splits"]
    n_blocks = -(-n_heads * params["head_dim"] // 32)
    sizes = {key: params[key] for key in ("n_heads", "head_dim")}
    written = dict(x_digits=out.digits, x_scale=out.scale)
    name, groups = "attention", n_heads
    if "heads" in overrides:
        n_kv_heads = params["n_kv_heads"]
        cut = AttentionCut.grouped(n_heads // n_kv_heads, n_kv_heads, overrides["half_quads"])
        name, groups = cut.kernel, cut.groups
    attention = kernels.get(name, digits=3, **overrides).dispatch(
        [n_splits, groups, rows],
        dict(tokens=rows, scale=params["head_dim"] ** -0.5, **params),
        partial=partial,
        arrived=kernels.device.empty("arrived", 4 * rows * n_heads),
        **buffers,
        **written,
    )
    combine = kernels.get(
        "attention_combine",
        lanes=64,
        digits=3,
        n_splits=n_splits,
        half_quads=overrides["half_quads"],
    ).dispatch(
        [-(-n_blocks * 8 // 64), rows_to_combine],
        dict(n_blocks=n_blocks, **sizes),
        partial=partial,
        **written,
    )
    run(kernels.device, Plan([attention] if overrides["finish"] else [attention, combine]))


def attention_error(
    size: float, queries: npt.NDArray[Any], keys: npt.NDArray[Any], values: npt.NDArray[Any]
) -> float:
    """How far off attention may be on the very keys and values that the kernel holds, of shape
    (n_pos, heads, head_dim): what is left is f32 arithmetic.

    A query is off by no more than a key before its cast, 12 F32 size. A score is a sum of head_dim
    products; its error e changes a weight by a factor of 1 +- e, and so the mean by 2 e of the
    largest value; sums over positions add n_pos roundings, exp its (3 + 2 |score|) ulp.
    """
    n_pos, head_dim = len(keys), keys.shape[-1]
    largest = np.abs(values).max()
    score_per_query = np.abs(keys).max() * head_dim**0.5
    score = np.abs(queries).max() * score_per_query
    error = 12 * size * score_per_query + (head_dim + 4) * score
    return float(2 * largest * F32 * (error + 2 * (3 + 2 * score) + 2 * n_pos + 64))
