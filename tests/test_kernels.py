"""Each kernel against its numpy twin, on sizes that are multiples of nothing. Integers are compared
with ==.

F32 is half an ulp of float32 relative to the value; an n-term sum in any order is off by at most n
* F32 * sum |terms|.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from codec.classes import device_order
from codec.lossless import LosslessMatrix, decode_lossless, encode_lossless
from codec.matrix import CodedMatrix, decode_matrix, dequantize, encode_matrix, entry_points
from codec.scale import ZERO
from engine.device import Device
from engine.kernel import Kernels
from engine.plan import Plan, run
from engine.sampler import Sampler, Sampling
from model import reference
from model.gpu_matrix import FLOAT, Activations, GpuMatrix, Then
from model.llama import MAX_TOKENS, rope_table
from model.rows import MATVEC_ROWS

pytestmark = pytest.mark.gpu

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
    return Activations(device.upload("digits", d), device.upload("scale", pair)), x[:, :cols]


def read_activations(
    device: Device, a: Activations, tokens: int, digits: int, cols: int
) -> dict[str, np.ndarray]:
    n_blocks = -(-cols // 32)
    d = device.read(a.digits, np.int8, (tokens, digits, n_blocks * 32))
    scale = device.read(a.scale, np.float32, (tokens, n_blocks, 2)).astype(np.float64)
    x = sum(d[:, i] / 254.0**i for i in range(digits)) * np.repeat(scale[..., 0], 32, axis=1)
    return {"x": x[:, :cols], "padding": x[:, cols:], "scale": scale[..., 0], "sum": scale[..., 1]}


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


def test_matrices_cover_every_kind_of_code() -> None:
    every = [coded(np.random.default_rng(7), *matrix) for matrix in MATRICES]
    assert {m.raw_bits for m in every} == {0, 1, 2, 3, 4}
    assert [m.n_classes for m in every] == [1, 2, 1, 2, 1, 1, 5, 3, 2, 1]
    assert [m.group for m in every] == [2, 2, 2, 2, 2, 2, 2, 4, 4, 4]
    assert min(m.outliers.size for m in every[-3:-1]) > 0


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("tokens", [1, MATVEC_ROWS])
@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("matrix", MATRICES)
def test_matvec(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    matrix: tuple[int, int, float, int],
    whole_rows: bool,
    tokens: int,
    digits: int,
) -> None:
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    m = coded(rng, *matrix)
    gpu = GpuMatrix(kernels, "w", m)
    a, x = digit_activations(rng, kernels.device, tokens, digits, m.cols)
    y = gpu.output("y", tokens)
    kernels.device.write(y.buffer, np.full(y.buffer.size // 4, np.nan, np.float32))
    run(kernels.device, Plan(gpu.matvec(a, y, tokens=tokens, digits=digits)))
    got = kernels.device.read(y.buffer, np.float32, (y.splits, tokens, m.rows)).sum(axis=0)

    w = dequantize(m).astype(np.float64)
    want = x @ w.T
    # Integer dots are exact. Each block adds its dot and the offset that symbols are counted from,
    # which may be as large as 128 * 2^raw_bits steps; then blocks, outliers and the scale: n_blocks
    # + 8 roundings of such terms.
    scale = m.scale.astype(np.float64)
    symbols = np.abs(decode_matrix(m)) - 2 * (m.min_symbol << m.raw_bits)
    terms = np.abs(x) @ (symbols * scale[:, None]).T
    assert_close(got, want, (gpu.n_blocks + 8) * F32 * terms)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_matvec_kernels_agree_bit_for_bit(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    """With one segment a row both add the same blocks in the same order."""
    m = coded(rng, 50, 30, spread, 12)
    a, _ = digit_activations(rng, kernels.device, 1, 1, m.cols)
    results = []
    for whole_rows in (True, False):
        monkeypatch.setattr(kernels.device, "software", whole_rows)
        gpu = GpuMatrix(kernels, "w", m)
        y = gpu.output("y", 1)
        run(kernels.device, Plan(gpu.matvec(a, y, tokens=1, digits=1)))
        results.append(kernels.device.read(y.buffer, np.float32, (m.rows,)))
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("matrix", [m for m in MATRICES if m[2] < 3])
def test_whole_numbers_come_out_exactly(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    matrix: tuple[int, int, float, int],
    whole_rows: bool,
) -> None:
    """With scales of 1 every sum is a whole number below 2^24, which f32 holds."""
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    q = decode_matrix(coded(rng, *matrix))
    m = encode_matrix(q, np.zeros(len(q), np.int16), matrix[3])
    gpu = GpuMatrix(kernels, "w", m)
    x = np.zeros((1, 1, 32 * gpu.n_blocks), np.int8)
    x[..., : m.cols] = rng.integers(-127, 128, m.cols)
    sums = x.reshape(-1, 32).sum(axis=1, dtype=np.float32)
    scale = np.stack([np.ones_like(sums), sums], axis=-1)
    device = kernels.device
    y = gpu.output("y", 1)
    a = Activations(device.upload("digits", x), device.upload("scale", scale))
    run(device, Plan(gpu.matvec(a, y, tokens=1, digits=1)))
    got = device.read(y.buffer, np.float32, (y.splits, m.rows)).sum(axis=0)
    assert (got == q @ x[0, 0, : m.cols].astype(np.int64)).all()

    tokens = rng.integers(0, m.rows, MAX_TOKENS)
    state = device.upload("state", np.array([0, MAX_TOKENS, 0, 0, *tokens], np.uint32))
    embedded = device.empty("x", 4 * MAX_TOKENS * m.cols)
    run(device, Plan(gpu.embed(state, embedded, tokens=MAX_TOKENS)))
    assert (device.read(embedded, np.float32, (MAX_TOKENS, m.cols)) == q[tokens]).all()


@pytest.mark.parametrize("tokens", [1, MAX_TOKENS])
def test_matvec_in_parts_equals_whole(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    m = coded(rng, 400, 331, 3.0, 12)
    assert m.n_classes > 1
    a, _ = digit_activations(rng, kernels.device, tokens, 1, m.cols)
    results, parts = [], []
    for limit in (kernels.device.max_binding_bytes, 60_000):
        monkeypatch.setattr(kernels.device, "max_binding_bytes", limit)
        gpu = GpuMatrix(kernels, "w", m, n_segments=3)
        monkeypatch.undo()
        parts.append(len(gpu.parts))
        y = gpu.output("y", tokens)
        run(kernels.device, Plan(gpu.matvec(a, y, tokens=tokens, digits=1)))
        results.append(kernels.device.read(y.buffer, np.float32, (y.splits, tokens, m.rows)))
    assert parts[0] == 1 and parts[1] > 2
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("matrix", MATRICES)
def test_entry_points(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    matrix: tuple[int, int, float, int],
) -> None:
    monkeypatch.setattr(kernels.device, "software", False)
    m = coded(rng, *matrix)
    gpu = GpuMatrix(kernels, "w", m)
    (part,) = gpu.parts
    got = kernels.device.read(part.entries, np.uint32, (gpu.n_segments, part.rows_padded))
    blocks = np.arange(gpu.n_segments) * gpu.n_blocks // gpu.n_segments
    want, _ = entry_points(m, (32 * blocks).tolist())
    assert (got[:, : m.rows] == want[:, device_order(m.classes)]).all()
    assert not got[:, m.rows :].any()


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("matrix", MATRICES)
def test_embed(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    matrix: tuple[int, int, float, int],
    whole_rows: bool,
) -> None:
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    m = coded(rng, *matrix)
    gpu = GpuMatrix(kernels, "w", m)
    tokens = rng.integers(0, m.rows, MAX_TOKENS)
    state = kernels.device.upload("state", np.array([0, MAX_TOKENS, 0, 0, *tokens], np.uint32))
    x = kernels.device.empty("x", 4 * MAX_TOKENS * m.cols)
    run(kernels.device, Plan(gpu.embed(state, x, tokens=MAX_TOKENS)))
    got = kernels.device.read(x, np.float32, (MAX_TOKENS, m.cols))
    want = reference.embed(dequantize(m), tokens)
    # One product; at an outlier two products of no more than 2^17 steps each, and their sum.
    scale = m.scale.astype(np.float64)[tokens, None]
    assert_close(
        got,
        want,
        F32 * np.abs(want) + F32 * np.where(np.abs(want) > 16 * scale, 4 * np.abs(want), 0),
    )


@pytest.mark.parametrize("whole_rows", [True, False])
def test_embed_in_parts_equals_whole(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, whole_rows: bool
) -> None:
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    m = coded(rng, 400, 331, 3.0, 11)
    tokens = rng.integers(0, m.rows, MAX_TOKENS)
    state = kernels.device.upload("state", np.array([0, MAX_TOKENS, 0, 0, *tokens], np.uint32))
    results, parts = [], []
    for limit in (kernels.device.max_binding_bytes, 60_000):
        monkeypatch.setattr(kernels.device, "max_binding_bytes", limit)
        gpu = GpuMatrix(kernels, "w", m)
        parts.append(len(gpu.parts))
        x = kernels.device.empty("x", 4 * MAX_TOKENS * m.cols)
        run(kernels.device, Plan(gpu.embed(state, x, tokens=MAX_TOKENS)))
        results.append(kernels.device.read(x, np.float32, (MAX_TOKENS, m.cols)))
    assert parts[0] == 1 and parts[1] > 2
    assert (results[0] == results[1]).all()


def lossless(
    rng: np.random.Generator, rows: int, cols: int, mantissa_bits: int, log2_states: int
) -> LosslessMatrix:
    """Rows of several sizes, zeros of both signs, subnormals, and weights far out on both sides,
    which are outliers.
    """
    of_row = 4.0 ** rng.integers(-1, 2, (rows, 1))
    w = (rng.laplace(size=(rows, cols)) * of_row).astype(np.float32)
    w *= rng.choice(np.array([0, -0.0, 1, 1, 1, 1], np.float32), w.shape)
    w[-1, cols // 2 :] *= np.float32(1e-39)
    w[rows // 2, :1], w[rows // 3, -1:] = 1e9, -1e-30
    kept = np.uint32(0xFFFFFFFF << 23 - mantissa_bits & 0xFFFFFFFF)
    return encode_lossless((w.view(np.uint32) & kept).view(np.float32), log2_states)


# (rows, cols, mantissa_bits, log2_states): sizes as above, fields of bytes and of other widths.
LOSSLESS_MATRICES = [
    (7, 33, 7, 11),
    (65, 575, 10, 12),
    (100, 70, 23, 11),
    (33, 1030, 7, 12),
    (1, 2, 0, 11),
    (40, 130, 17, 11),
    (200, 300, 7, 11),
]


def test_lossless_matrices_have_outliers(rng: np.random.Generator) -> None:
    counts = [lossless(rng, *matrix).exponents.outliers.size for matrix in LOSSLESS_MATRICES]
    assert min(np.array(counts)[[0, 1, 2, 3, 5, 6]]) > 0


def test_one_lossless_matrix_has_several_classes(rng: np.random.Generator) -> None:
    assert lossless(rng, *LOSSLESS_MATRICES[-1]).exponents.n_classes > 1


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("tokens", [1, MAX_TOKENS])
@pytest.mark.parametrize("matrix", LOSSLESS_MATRICES)
def test_matvec_float(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    matrix: tuple[int, int, int, int],
    whole_rows: bool,
    tokens: int,
) -> None:
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    m = lossless(rng, *matrix)
    gpu = GpuMatrix(kernels, "w", m)
    x = np.zeros((tokens, 32 * gpu.n_blocks), np.float32)
    x[:, : m.cols] = rng.normal(size=(tokens, m.cols))
    y = gpu.output("y", tokens)
    kernels.device.write(y.buffer, np.full(y.buffer.size // 4, np.nan, np.float32))
    a = Activations(kernels.device.upload("x", x), None)
    run(kernels.device, Plan(gpu.matvec(a, y, tokens=tokens, digits=FLOAT)))
    got = kernels.device.read(y.buffer, np.float32, (y.splits, tokens, m.rows)).sum(axis=0)

    w = decode_lossless(m).astype(np.float64)
    x64 = x[:, : m.cols].astype(np.float64)
    # A product and the sums that it goes through: four of its dot product, four of a group of 16
    # columns, then groups, outliers, segments, splits. An outlier's weight counts twice more, with
    # the exponent of the stream, which is one of the other weights' and at most 2^4.
    terms = np.abs(x64) @ np.abs(w).T
    longest = int(m.exponents.outlier_counts.max())
    as_coded = 2 * 2**4 * longest * np.abs(x64).max(axis=1, keepdims=True)
    roundings = 1 + 8 + 2 * gpu.n_blocks + 2 * longest + 3
    assert_close(got, x64 @ w.T, roundings * F32 * (terms + as_coded))


@pytest.mark.parametrize("tokens", [1, MAX_TOKENS])
def test_matvec_float_in_parts_equals_whole(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    m = lossless(rng, 400, 331, 7, 12)
    assert m.exponents.n_classes > 1
    x = np.zeros((tokens, 352), np.float32)
    x[:, :331] = rng.normal(size=(tokens, 331))
    a = Activations(kernels.device.upload("x", x), None)
    results, parts = [], []
    for limit in (kernels.device.max_binding_bytes, 40_000):  # 113 rows of fields
        monkeypatch.setattr(kernels.device, "max_binding_bytes", limit)
        gpu = GpuMatrix(kernels, "w", m, n_segments=3)
        monkeypatch.undo()
        parts.append([part.rows for part in gpu.parts])
        y = gpu.output("y", tokens)
        run(kernels.device, Plan(gpu.matvec(a, y, tokens=tokens, digits=FLOAT)))
        results.append(kernels.device.read(y.buffer, np.float32, (y.splits, tokens, m.rows)))
    assert parts == [[400], [96, 96, 96, 96, 16]]
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("matrix", LOSSLESS_MATRICES)
def test_embed_float_is_exact(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    matrix: tuple[int, int, int, int],
    whole_rows: bool,
) -> None:
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    m = lossless(rng, *matrix)
    gpu = GpuMatrix(kernels, "w", m)
    w = decode_lossless(m)
    for begin in range(0, m.rows, MAX_TOKENS):  # every row
        tokens = np.arange(begin, begin + MAX_TOKENS) % m.rows
        state = kernels.device.upload("state", np.array([0, MAX_TOKENS, 0, 0, *tokens], np.uint32))
        x = kernels.device.empty("x", 4 * MAX_TOKENS * m.cols)
        run(kernels.device, Plan(gpu.embed(state, x, tokens=MAX_TOKENS)))
        got = kernels.device.read(x, np.float32, (MAX_TOKENS, m.cols))
        assert (got == reference.embed(w, tokens)).all()


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("rows", [70, 1030])
def test_a_matvec_does_what_comes_then(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    rows: int,
    digits: int,
    gated: bool,
    whole_rows: bool,
) -> None:
    """On the very y that it leaves, the plain matvec's; twice, for its count begins anew."""
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    device, eps = kernels.device, 1e-5
    m = coded(rng, rows, 333, 2.5, 11)
    gpu = GpuMatrix(kernels, "w", m, n_segments=6)
    a, _ = digit_activations(rng, device, 1, digits, m.cols)
    y, plain = gpu.output("y", 1), gpu.output("plain", 1)
    run(device, Plan(gpu.matvec(a, plain, tokens=1, digits=digits)))
    dim = rows // 2 if gated else rows
    x0, weight = rng.normal(size=dim).astype(np.float32), rng.normal(1, 0.3, dim)
    x = device.upload("x", x0)
    then = Then(
        gated,
        dim,
        x,
        device.upload("weight", weight.astype(np.float32)),
        Activations.empty(device, "out", 1, digits, dim),
        device.empty("arrived", 4 * -(-dim // 32)),
    )
    plan = Plan(gpu.matvec(a, y, tokens=1, digits=digits, then=then))
    for times in (1, 2):
        run(device, plan)
        parts = device.read(y.buffer, np.float32, (y.splits, 1, rows))
        assert (parts == device.read(plain.buffer, np.float32, parts.shape)).all()
        got = read_activations(device, then.out, 1, digits, dim)
        sums = parts.astype(np.float64).sum(axis=0)
        rounding = 2 * F32 * np.abs(parts).sum(axis=0)
        if gated:  # as in test_swiglu
            want = reference.swiglu(sums)
            gate, up = np.abs(sums[:, :dim]), np.abs(sums[:, dim:])
            error = 1.1 * rounding[:, :dim] * up + rounding[:, dim:] * gate
            error += (3 + 2 * gate + 4) * F32 * np.abs(want)
        else:  # as in test_rms_norm
            sums = x0 + times * sums
            assert_close(
                device.read(x, np.float32, (1, dim)), sums, 4 * F32 * np.abs(sums) + 4 * rounding
            )
            squares = device.read(then.out.squares, np.float32, (-(-dim // 32),))
            factor = 1 / np.sqrt(squares.sum(dtype=np.float64) / dim + eps)
            got = {key: factor * value for key, value in got.items()}
            want = reference.rms_norm(sums, weight.astype(np.float32).astype(np.float64), eps)
            error = (dim / 2 + 16) * F32 * np.abs(want)
            error += 8 * (rounding + F32 * np.abs(x0)) / np.sqrt((sums**2).mean())
        check_quantized(assert_close, got, want, digits, error)


@pytest.mark.parametrize("whole_rows", [True, False])
def test_a_matvec_multiplies_by_a_norms_factor(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    whole_rows: bool,
) -> None:
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    device, eps = kernels.device, 0.3
    m = coded(rng, 70, 4900, 2.5, 11)  # more blocks than lanes look for squares
    gpu = GpuMatrix(kernels, "w", m)
    a, _ = digit_activations(rng, device, 1, 1, m.cols)
    squares = rng.uniform(0, 40, -(-m.cols // 32)).astype(np.float32)
    a = dataclasses.replace(a, squares=device.upload("squares", squares))
    y, plain = gpu.output("y", 1), gpu.output("plain", 1)
    run(device, Plan([*gpu.matvec(a, y, tokens=1, digits=1, eps=eps)]))
    run(device, Plan([*gpu.matvec(a, plain, tokens=1, digits=1)]))
    want = device.read(plain.buffer, np.float32, (y.splits, m.rows)).astype(np.float64)
    want *= 1 / np.sqrt(squares.sum(dtype=np.float64) / m.cols + eps)
    got = device.read(y.buffer, np.float32, (y.splits, m.rows))
    assert_close(got, want, (squares.size / 2 + 8) * F32 * np.abs(want))


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("dim", [40, 576, 1003])
@pytest.mark.parametrize("splits", [0, 3])
def test_rms_norm(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    dim: int,
    digits: int,
    splits: int,
) -> None:
    device, tokens, eps = kernels.device, 3, 1e-5
    x0 = rng.normal(size=(tokens, dim)).astype(np.float32)
    y = rng.normal(size=(max(1, splits), tokens, dim)).astype(np.float32)
    weight = rng.normal(1, 0.3, dim).astype(np.float32)
    x, out = device.upload("x", x0), Activations.empty(device, "xn", tokens, digits, dim)
    dispatch = kernels.get("rms_norm", lanes=64, digits=digits, dim=dim, splits=splits).dispatch(
        [1, tokens],
        dict(tokens=tokens, last=0, eps=eps),
        state=device.empty("state", 48),
        y=device.upload("y", y),
        weight=device.upload("weight", weight),
        x=x,
        x_digits=out.digits,
        x_scale=out.scale,
    )
    run(device, Plan([dispatch]))
    sums = x0.astype(np.float64) + y[:splits].astype(np.float64).sum(axis=0)
    terms = np.abs(x0) + np.abs(y[:splits]).sum(axis=0)
    assert_close(device.read(x, np.float32, x0.shape), sums, (splits + 1) * F32 * terms)
    want = reference.rms_norm(sums, weight.astype(np.float64), eps)
    # Inputs off by splits + 1 roundings, the mean of squares by dim of them (half of that after the
    # root), inverseSqrt by 2 ulp (WGSL) and three products.
    relative = (splits + 1 + dim / 2 + 4 + 3) * F32
    error = (
        relative * np.abs(want)
        + (splits + 1) * F32 * terms / np.sqrt((sums**2).mean(axis=1, keepdims=True)) * 2
    )
    check_quantized(
        assert_close, read_activations(device, out, tokens, digits, dim), want, digits, error
    )


def test_rms_norm_of_the_last_token_goes_to_row_0(
    kernels: Kernels, rng: np.random.Generator
) -> None:
    device, tokens, dim = kernels.device, 5, 70
    x0 = rng.normal(size=(tokens, dim)).astype(np.float32)
    weight = device.upload("weight", np.ones(dim, np.float32))

    def norm(n_tokens: int, last: int) -> np.ndarray:
        out = Activations.empty(device, "xn", tokens, 1, dim)
        dispatch = kernels.get("rms_norm", lanes=64, digits=1, dim=dim, splits=0).dispatch(
            [1, 1 if last else tokens],
            dict(tokens=tokens, last=last, eps=1e-5),
            state=device.upload("state", np.array([0, n_tokens] + [0] * 10, np.uint32)),
            y=device.empty("y", 4 * tokens * dim),
            weight=weight,
            x=device.upload("x", x0),
            x_digits=out.digits,
            x_scale=out.scale,
        )
        run(device, Plan([dispatch]))
        return read_activations(device, out, tokens, 1, dim)["x"]

    assert (norm(4, last=1)[0] == norm(5, last=0)[3]).all()


@pytest.mark.parametrize("digits", [1, 3])
def test_a_block_of_zeros_has_scale_zero(kernels: Kernels, digits: int) -> None:
    device, hidden = kernels.device, 40
    out = Activations.empty(device, "h", 1, digits, hidden)
    device.write(out.digits, np.full(64 * digits, 77, np.int8))
    dispatch = kernels.get("swiglu", lanes=64, digits=digits, splits=1).dispatch(
        [1, 1],
        dict(hidden_dim=hidden, n_blocks=2, tokens=1),
        y=device.empty("y", 8 * hidden),
        x_digits=out.digits,
        x_scale=out.scale,
    )
    run(device, Plan([dispatch]))
    got = read_activations(device, out, 1, digits, hidden)
    assert not any(values.any() for values in got.values())
    assert not device.read(out.digits, np.int8, (64 * digits,)).any()


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("hidden_dim", [70, 1536])
def test_swiglu(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    hidden_dim: int,
    digits: int,
) -> None:
    device, tokens, splits = kernels.device, 2, 2
    y = (rng.normal(size=(splits, tokens, 2 * hidden_dim)) * 4).astype(np.float32)
    out = Activations.empty(device, "h", tokens, digits, hidden_dim)
    n_blocks = -(-hidden_dim // 32)
    dispatch = kernels.get("swiglu", lanes=64, digits=digits, splits=splits).dispatch(
        [-(-n_blocks * 8 // 64), tokens],
        dict(hidden_dim=hidden_dim, n_blocks=n_blocks, tokens=tokens),
        y=device.upload("y", y),
        x_digits=out.digits,
        x_scale=out.scale,
    )
    run(device, Plan([dispatch]))
    sums = y.astype(np.float64).sum(axis=0)
    want = reference.swiglu(sums)
    # silu and the product grow by at most 1.1 |other| a unit of input error; exp is good to (3 + 2
    # |g|) ulp (WGSL).
    gate, up = np.abs(sums[:, :hidden_dim]), np.abs(sums[:, hidden_dim:])
    rounding = 2 * F32 * np.abs(y).sum(axis=0)
    error = 1.1 * rounding[:, :hidden_dim] * up + rounding[:, hidden_dim:] * gate
    error += np.abs(want) * (2 * (3 + 2 * gate) + 8) * F32
    check_quantized(
        assert_close, read_activations(device, out, tokens, digits, hidden_dim), want, digits, error
    )


@pytest.mark.parametrize(("biased", "normed"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(6, 2, 16), (3, 3, 70)])
def test_qkv_heads(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    biased: bool,
    normed: bool,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
) -> None:
    device, tokens, splits, eps = kernels.device, 3, 2, 1e-5
    rows = (n_heads + 2 * n_kv_heads) * head_dim
    y = rng.normal(size=(splits, tokens, rows)).astype(np.float32)
    bias = rng.normal(size=rows * biased).astype(np.float32)
    norms = rng.normal(1, 0.2, (2 * normed, head_dim)).astype(np.float32)
    out = device.empty("out", 4 * tokens * rows)
    dispatch = kernels.get(
        "qkv_heads", biased=biased, normed=normed, splits=splits, lanes=32
    ).dispatch(
        [n_heads + 2 * n_kv_heads, tokens],
        dict(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, tokens=tokens, eps=eps),
        y=device.upload("y", y),
        weights=device.upload("weights", np.concatenate([bias, norms.ravel()])),
        out=out,
    )
    run(device, Plan([dispatch]))
    got = device.read(out, np.float32, (tokens, rows // head_dim, head_dim))
    config = SimpleNamespace(
        n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, norm_eps=eps
    )
    sums = y.astype(np.float64).sum(axis=0)
    want = reference.qkv_heads(config, sums, bias if biased else None, [*norms.astype(np.float64)])
    # Two sums, of numbers below 8 in all; a mean of head_dim squares and three products, where a
    # head of length 1 a column is divided by about itself.
    tolerance = 3 * 8 * F32 + (head_dim + 8) * F32 * np.abs(want)
    assert_close(got, want, 2 * tolerance if normed else 3 * 8 * F32)


HEADS = [
    (6, 2, 16, False),
    (4, 4, 10, False),
    (9, 3, 64, True),
    (9, 3, 64, False),
    (2, 1, 128, True),
]


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim", "finish"), HEADS)
@pytest.mark.parametrize(("pos", "n_tokens"), [(0, 1), (3, 5), (254, 8), (700, 3)])
@pytest.mark.parametrize(
    ("n_splits", "lanes", "per_lane", "cache_f32", "window"),
    [
        (1, 16, 4, False, 0),
        (16, 64, 1, False, 0),
        (2, 24, 3, True, 0),
        (3, 24, 3, False, 100),
        (4, 64, 1, True, 4),
    ],
)
def test_rope_cache_and_attention(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    finish: bool,
    pos: int,
    n_tokens: int,
    n_splits: int,
    lanes: int,
    per_lane: int,
    cache_f32: bool,
    window: int,
) -> None:
    device, max_pos, theta, splits = kernels.device, 720, 10000.0, 2
    half, padded = head_dim // 2, -(-(head_dim // 2) // 4) * 4
    all_heads = n_heads + 2 * n_kv_heads
    tokens = MAX_TOKENS
    cache_type = np.float32 if cache_f32 else np.float16
    past = rng.normal(size=(2, max_pos, n_kv_heads, head_dim)).astype(cache_type)
    y = rng.normal(size=(splits, tokens, all_heads * head_dim)).astype(np.float32)

    packed = np.zeros((2, n_kv_heads, max_pos, padded, 2), cache_type)
    packed[:, :, :, :half, 0] = past[..., :half].transpose(0, 2, 1, 3)
    packed[:, :, :, :half, 1] = past[..., half:].transpose(0, 2, 1, 3)
    if cache_f32:
        packed = packed.swapaxes(-1, -2)
    state = device.upload("state", np.array([pos, n_tokens] + [0] * 10, np.uint32))
    keys, values = device.upload("k_cache", packed[0]), device.upload("v_cache", packed[1])
    partial = device.empty("partial", 4 * tokens * n_heads * n_splits * (2 * padded + 2))
    out = Activations.empty(device, "attn", tokens, 3, n_heads * head_dim)
    sizes = dict(n_heads=n_heads, head_dim=head_dim, half_padded=padded)
    n_blocks = -(-n_heads * head_dim // 32)
    finish &= lanes >= head_dim // 4
    dispatches = [
        kernels.get(
            "attention",
            key_bits=32 if cache_f32 else 16,
            value_bits=32 if cache_f32 else 16,
            splits=splits,
            window=window,
            lanes=lanes,
            per_lane=per_lane,
            n_splits=n_splits,
            finish=finish,
            digits=3,
            batched=False,
            paged=False,
        ).dispatch(
            [n_splits, n_heads, tokens],
            dict(
                n_kv_heads=n_kv_heads,
                max_pos=max_pos,
                tokens=tokens,
                blocks_per_table=0,
                scale=head_dim**-0.5,
                **sizes,
            ),
            state=state,
            pass_rows=state,
            blocks=state,
            y=device.upload("y", y),
            rope=device.upload("rope", rope_table(max_pos, head_dim, theta)),
            k_cache=keys,
            v_cache=values,
            partial=partial,
            arrived=device.empty("arrived", 4 * tokens * n_heads),
            x_digits=out.digits,
            x_scale=out.scale,
        ),
        kernels.get("attention_combine", lanes=64, digits=3, n_splits=n_splits).dispatch(
            [-(-n_blocks * 8 // 64), tokens],
            dict(n_blocks=n_blocks, **sizes),
            partial=partial,
            x_digits=out.digits,
            x_scale=out.scale,
        ),
    ]
    run(device, Plan(dispatches[:1] if finish else dispatches))

    qkv = y.astype(np.float64).sum(axis=0)[:n_tokens].reshape(n_tokens, all_heads, head_dim)
    want_q, want_k, want_v = np.split(qkv, [n_heads, n_heads + n_kv_heads], axis=1)
    want_q, want_k = reference.rope(want_q, pos, theta), reference.rope(want_k, pos, theta)
    written = slice(pos, pos + n_tokens)

    def unpack(buffer: Any) -> np.ndarray:
        pairs = device.read(buffer, cache_type, packed.shape[1:])
        pairs = pairs.swapaxes(-1, -2) if cache_f32 else pairs
        assert not pairs[:, :, half:].any()
        pairs = pairs[:, :, :half]
        return np.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1).transpose(1, 0, 2)

    got_k, got_v = unpack(keys), unpack(values)
    # A sum, a rotation (two products and a sum of numbers below 2 |y|), the table's own rounding;
    # then half an ulp of f16, 2^-11 of the value: the cast may round either way where f32 was off.
    size = np.abs(y).sum(axis=0).max()
    half_ulp = 0.0 if cache_f32 else 2.0**-11
    assert_close(got_k[written], want_k, half_ulp * np.abs(want_k) + 2.0**-24 + 12 * F32 * size)
    assert_close(got_v[written], want_v, half_ulp * np.abs(want_v) + 2.0**-24 + 12 * F32 * size)
    untouched = np.ones(max_pos, bool)
    untouched[written] = False
    assert (got_k[untouched] == past[0][untouched]).all() and (
        got_v[untouched] == past[1][untouched]
    ).all()

    # On the very keys and values that the kernel holds: what is left is f32 arithmetic. A query is
    # off by no more than a key before its cast, 12 F32 size. A score is a sum of head_dim products;
    # its error e changes a weight by a factor of 1 +- e, and so the mean by 2 e of the largest
    # value; sums over positions add n_pos roundings, exp its (3 + 2 |score|) ulp.
    cached = got_k.astype(np.float64), got_v.astype(np.float64)
    want = reference.attention(want_q, *cached, pos, window=window or None)
    n_pos = pos + n_tokens
    largest = np.abs(got_v[:n_pos]).max()
    score_per_query = np.abs(got_k[:n_pos]).max() * head_dim**0.5
    score = np.abs(want_q).max() * score_per_query
    error = 12 * size * score_per_query + (head_dim + 4) * score
    error = 2 * largest * F32 * (error + 2 * (3 + 2 * score) + 2 * n_pos + 64)
    got = read_activations(device, out, tokens, 3, n_heads * head_dim)
    check_quantized(assert_close, {key: v[:n_tokens] for key, v in got.items()}, want, 3, error)


def sampler_for(kernels: Kernels, logits: np.ndarray) -> tuple[Sampler, Any]:
    state = kernels.device.empty("state", 48)
    return Sampler(kernels, state, kernels.device.upload("logits", logits), logits.size), state


def draw(sampler: Sampler, state: Any, sampling: Sampling, pos: int, count: int = 1) -> list[int]:
    """`count` tokens after position `pos`, as many as fit the ring, from the same logits."""
    sampler.configure(sampling)
    sampler.device.write(state, np.array([pos, 1, 0, sampling.seed] + [0] * 8, np.uint32))
    run(sampler.device, *[sampler.plan] * count)
    return [int(token) for token in sampler.device.read(sampler.sampled, np.uint32, (count,))]


@pytest.mark.parametrize("vocab_size", [97, 5003])
def test_sampling_greedy_takes_the_lower_of_equal_logits(
    kernels: Kernels, rng: np.random.Generator, vocab_size: int
) -> None:
    logits = rng.normal(size=vocab_size).astype(np.float32)
    logits[[11, vocab_size - 3]] = 9.5
    sampler, state = sampler_for(kernels, logits)
    assert draw(sampler, state, Sampling(), pos=4, count=3) == [11] * 3
    assert list(sampler.device.read(state, np.uint32, (5,))) == [7, 1, 3, 0, 11]


FILTERS = [
    dict(temperature=1.0),
    dict(temperature=0.7, top_k=1),
    dict(temperature=1.3, top_k=40),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=1.1, top_k=50, top_p=0.8, min_p=0.02),
    dict(temperature=0.5, top_k=100_000, top_p=0.999),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_sampling_threshold_keeps_what_the_filters_keep(
    kernels: Kernels, rng: np.random.Generator, filters: dict[str, Any]
) -> None:
    logits = (rng.normal(size=5003) * 3).astype(np.float32)
    sampler, state = sampler_for(kernels, logits)
    sampling = Sampling(**filters)
    draw(sampler, state, sampling, pos=0)
    threshold = sampler.device.read(sampler.draws.threshold, np.float32, (1,))[0]
    assert set(np.flatnonzero(logits >= threshold)) == set(
        reference.sampling_support(logits, sampling)
    )


@pytest.mark.parametrize("filters", FILTERS)
def test_sampling_draws_what_its_twin_draws(
    kernels: Kernels, rng: np.random.Generator, filters: dict[str, Any]
) -> None:
    """The noise is a hash, so numpy draws the same tokens; a tie within f32 rounding is all that
    may differ.
    """
    logits = (rng.normal(size=5003) * 3).astype(np.float32)
    sampler, state = sampler_for(kernels, logits)
    sampling = Sampling(seed=20, **filters)
    for i, token in enumerate(draw(sampler, state, sampling, pos=30, count=32)):
        scores = reference.sampling_scores(logits, sampling, pos=31 + i)
        # logit / temperature and two logs, each good to 3 ulp of numbers below 64.
        assert scores[token] >= scores.max() - 16 * 64 * F32


def test_sampling_frequencies_are_the_softmax(kernels: Kernels) -> None:
    """Pearson's chi-square over 64 * 64 draws; with 15 degrees of freedom 37.7 is passed once in
    1000 times.
    """
    logits = np.linspace(0, 3, 16).astype(np.float32)
    sampler, state = sampler_for(kernels, logits)
    draws = [
        draw(sampler, state, Sampling(temperature=1.5, seed=seed), 0, 64) for seed in range(64)
    ]
    counts = np.bincount(np.ravel(draws), minlength=16)
    p = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    expected = counts.sum() * p
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


def test_sampling_repeats_with_its_seed_and_position(
    kernels: Kernels, rng: np.random.Generator
) -> None:
    sampler, state = sampler_for(kernels, rng.normal(size=1000).astype(np.float32))
    first = draw(sampler, state, Sampling(temperature=1.0, seed=1), 5, 32)
    assert draw(sampler, state, Sampling(temperature=1.0, seed=1), 5, 32) == first
    assert draw(sampler, state, Sampling(temperature=1.0, seed=2), 5, 32) != first
    assert draw(sampler, state, Sampling(temperature=1.0, seed=1), 6, 31) == first[1:]


def test_kernel_names_what_does_not_match(kernels: Kernels) -> None:
    with pytest.raises(
        TypeError, match=r"swiglu: overrides: the shader declares \['digits', 'lanes', 'splits'\]"
    ):
        kernels.get("swiglu", lanes=64)
    kernel = kernels.get("swiglu", lanes=64, digits=1, splits=1)
    with pytest.raises(TypeError, match=r"params.*hidden_dim"):
        kernel.dispatch([1], {"hidden": 1})
    with pytest.raises(TypeError, match=r"buffers.*x_digits"):
        kernel.dispatch(
            [1], dict(hidden_dim=1, n_blocks=1, tokens=1), y=kernels.device.empty("y", 16)
        )
