"""The kernels that decode matrices, each against its numpy twin, on sizes that are multiples of
nothing. Integers are compared with ==.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from kernel_checks import (
    DIGIT_UNIT,
    F32,
    MATRICES,
    check_quantized,
    coded,
    digit_activations,
    read_activations,
)
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from codec.classes import device_order
from codec.lossless import LosslessMatrix, decode_lossless, encode_lossless
from codec.matrix import CodedMatrix, decode_matrix, dequantize, encode_matrix, entry_points
from engine.kernel import Kernels
from engine.plan import Plan, run
from model import reference
from model.activations import FLOAT, Activations, Output, Residual, Then
from model.gpu_matrix import GpuMatrix
from model.llama import MAX_TOKENS
from model.rows import MATVEC_ROWS

pytestmark = pytest.mark.gpu


def test_matrices_cover_every_kind_of_code() -> None:
    every = [coded(np.random.default_rng(7), *matrix) for matrix in MATRICES]
    assert {m.raw_bits for m in every} == {0, 1, 2, 3, 4}
    narrow = [(m.narrow_raw_bits, m.raw_bits) for m in every if m.n_narrow]
    assert narrow == [(0, 2), (1, 2), (0, 1)]
    assert [m.n_classes for m in every] == [1, 2, 2, 2, 1, 1, 5, 3, 2, 1]
    assert [m.group for m in every] == [2, 2, 2, 2, 2, 2, 2, 4, 4, 4]
    assert min(m.outliers.size for m in every[-3:-1]) > 0


def product_error(m: CodedMatrix, x: np.ndarray, n_blocks: int) -> np.ndarray:
    """How far off products of m with x may be; why is said in test_matvec."""
    scale = m.scale.astype(np.float64)
    symbols = np.abs(decode_matrix(m)) - 2 * (m.min_symbol << m.raw_bits)
    error: np.ndarray = (n_blocks + 8) * F32 * (np.abs(x) @ (symbols * scale[:, None]).T)
    return error


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
    assert_close(got, want, product_error(m, x, gpu.n_blocks))


@pytest.mark.parametrize(
    ("log2_states", "n_segments", "memory", "copies"),
    [(11, 16, 1 << 15, 2), (11, 9, 1 << 15, 1), (12, 16, 1 << 15, 1), (11, 16, 19000, 1)],
)
def test_tables_stand_twice_where_they_leave_room_for_workgroups(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    log2_states: int,
    n_segments: int,
    memory: int,
    copies: int,
) -> None:
    monkeypatch.setattr(kernels.device, "software", False)
    monkeypatch.setattr(kernels.device, "workgroup_memory", memory)
    m = coded(rng, 70, 605, 2.5, log2_states)
    gpu = GpuMatrix(kernels, "w", m, n_segments=n_segments)
    a, x = digit_activations(rng, kernels.device, 1, 1, m.cols)
    y = gpu.output("y", 1)
    (dispatch,) = gpu.matvec(a, y, tokens=1, digits=1)
    assert dispatch.kernel.overrides["copies"] == copies
    run(kernels.device, Plan([dispatch]))
    got = kernels.device.read(y.buffer, np.float32, (1, m.rows))
    want = x @ dequantize(m).astype(np.float64).T
    assert_close(got, want, product_error(m, x, gpu.n_blocks))


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


@pytest.mark.parametrize("n_segments", [1, 11, 24])
def test_a_row_of_many_is_what_it_is_alone(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, n_segments: int
) -> None:
    """Bit for bit, however many sums are added up at once; and nothing else is written."""
    monkeypatch.setattr(kernels.device, "software", False)
    m, tokens = coded(rng, 50, 1030, 15.0, 12), 13
    gpu = GpuMatrix(kernels, "w", m, n_segments=n_segments)
    a, _ = digit_activations(rng, kernels.device, tokens, 1, m.cols)
    size = 32 * gpu.n_blocks
    digits = kernels.device.read(a.digits, np.int8, (tokens, size))
    scale = kernels.device.read(a.scale, np.float32, (tokens, gpu.n_blocks, 2))
    y = gpu.output("y", tokens + 1)
    kernels.device.write(y.buffer, np.full(y.buffer.size // 4, np.nan, np.float32))
    plan = Plan(gpu.matvec(a, y, tokens=tokens, digits=1))
    run(kernels.device, plan)
    got = kernels.device.read(y.buffer, np.float32, (y.splits * (tokens + 1) * m.rows,))
    assert np.isnan(got[y.splits * tokens * m.rows :]).all()
    together = got[: y.splits * tokens * m.rows].reshape(y.splits, tokens, m.rows)
    for t in (0, 7, 12):
        one = Activations.upload(kernels.device, "of one", digits[t], scale[t])
        run(kernels.device, Plan(gpu.matvec(one, y, tokens=1, digits=1)))
        alone = kernels.device.read(y.buffer, np.float32, (y.splits, m.rows))
        assert (together[:, t] == alone).all()


def test_activations_beyond_uniform_memory_give_the_same(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what each token's give, which a software adapter reads as uniform memory."""
    monkeypatch.setattr(kernels.device, "software", True)
    m, tokens, digits = coded(rng, 40, 1430, 0.6, 11), MATVEC_ROWS, 3
    gpu = GpuMatrix(kernels, "w", m)
    a, _ = digit_activations(rng, kernels.device, tokens, digits, m.cols)
    assert a.uniform(tokens * digits * gpu.n_blocks) is None
    y = gpu.output("y", tokens)

    def products(a: Activations, tokens: int) -> np.ndarray:
        run(kernels.device, Plan(gpu.matvec(a, y, tokens=tokens, digits=digits)))
        return kernels.device.read(y.buffer, np.float32, (tokens, m.rows))

    together = products(a, tokens)
    shape = tokens, digits, 32 * gpu.n_blocks
    of_each = kernels.device.read(a.digits, np.int8, shape)
    scale = kernels.device.read(a.scale, np.float32, (tokens, gpu.n_blocks, 2))
    for t in (0, tokens - 1):
        one = Activations.upload(kernels.device, "of one", of_each[t], scale[t])
        assert one.uniform(digits * gpu.n_blocks)
        assert (products(one, 1)[0] == together[t]).all()


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
    a = Activations.upload(device, "x", x, scale)
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
) -> None:
    """On the very y that it leaves, the plain matvec's; twice, for its count begins anew."""
    monkeypatch.setattr(kernels.device, "software", True)
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


def test_a_matvec_multiplies_by_a_norms_factor(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
) -> None:
    monkeypatch.setattr(kernels.device, "software", True)
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


# (rows, cols, n_segments, largest weight): parts of blocks, two splits of 15 and 16 blocks, weights
# small enough for no outliers.
MAKERS = [(70, 332, 6, 99), (33, 972, 24, 99), (65, 620, 20, 4)]


def maker(
    kernels: Kernels, rng: np.random.Generator, rows: int, cols: int, n_segments: int, most: int
) -> tuple[CodedMatrix, GpuMatrix]:
    q = np.round(rng.laplace(size=(rows, cols)) * 2.5).clip(-most, most).astype(np.int32)
    m = encode_matrix(q, rng.integers(-60, -20, rows).astype(np.int16), 11)
    assert (m.outliers.size == 0) == (most == 4)
    gpu = GpuMatrix(kernels, "w", m, n_segments=n_segments)
    assert gpu.splits == -(-n_segments // 16)
    return m, gpu


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("matrix", MAKERS)
def test_a_matvec_makes_its_input_of_gate_and_up(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    matrix: tuple[int, int, int, int],
    digits: int,
) -> None:
    """As if swiglu had left it in memory: but for outliers, which other lanes add, bit for bit."""
    monkeypatch.setattr(kernels.device, "software", False)
    device, gate_splits = kernels.device, 2
    rows, cols, _, most = matrix
    m, gpu = maker(kernels, rng, *matrix)
    assert gpu.makes_input(digits)
    values = (rng.normal(size=(gate_splits, 1, 2 * cols)) * 4).astype(np.float32)
    gate_up = Output(device.upload("gate_up", values), gate_splits)
    h = Activations.empty(device, "h", 1, digits, cols)
    swiglu = kernels.get("swiglu", lanes=64, digits=digits, splits=gate_splits).dispatch(
        [-(-gpu.n_blocks * 8 // 64), 1],
        dict(hidden_dim=cols, n_blocks=gpu.n_blocks, tokens=1),
        y=gate_up.buffer,
        x_digits=h.digits,
        x_scale=h.scale,
    )
    run(device, Plan([swiglu]))
    found = []
    for given in (h, gate_up):
        y = gpu.output("y", 1)
        run(device, Plan(gpu.matvec(given, y, tokens=1, digits=digits)))
        found.append(device.read(y.buffer, np.float32, (y.splits, rows)))
    if most == 4:
        assert (found[0] == found[1]).all()
    want = read_activations(device, h, 1, digits, cols)["x"]
    error = product_error(m, want, gpu.n_blocks)
    for parts in found:
        got = parts.sum(axis=0, dtype=np.float64)
        assert_close(got[None], want @ dequantize(m).T, error)


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("added_splits", [0, 3])
@pytest.mark.parametrize("matrix", MAKERS)
def test_a_matvec_makes_its_input_of_a_residual(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    matrix: tuple[int, int, int, int],
    added_splits: int,
    digits: int,
) -> None:
    monkeypatch.setattr(kernels.device, "software", False)
    device, eps = kernels.device, 1e-5
    rows, cols, _, _ = matrix
    m, gpu = maker(kernels, rng, *matrix)
    assert gpu.makes_input(digits, all_columns=True)
    x = rng.normal(size=cols).astype(np.float32)
    added = rng.normal(size=(3, cols)).astype(np.float32)
    weight = rng.normal(1, 0.3, cols).astype(np.float32)
    x_out = device.empty("x_out", 4 * cols)
    residual = Residual(
        device.upload("x", x),
        Output(device.upload("added", added), added_splits),
        device.upload("weight", weight),
        x_out,
    )
    y = gpu.output("y", 1)
    run(device, Plan(gpu.matvec(residual, y, tokens=1, digits=digits, eps=eps)))
    sums = x + added[:added_splits].sum(axis=0, dtype=np.float64)
    terms = np.abs(x) + np.abs(added[:added_splits]).sum(axis=0)
    assert_close(device.read(x_out, np.float32, (cols,)), sums, added_splits * F32 * terms)

    w = dequantize(m).astype(np.float64)
    normed = reference.rms_norm(sums, weight.astype(np.float64), eps)
    got = device.read(y.buffer, np.float32, (y.splits, rows)).sum(axis=0, dtype=np.float64)
    # What digits leave of a column, as in check_quantized; before them three roundings of the sum,
    # one of its product with the weight; the factor's, as in test_rms_norm; the product's.
    blocks = np.zeros((gpu.n_blocks, 32))
    blocks.ravel()[:cols] = np.abs(normed)
    unit = blocks.max(axis=1) / 127 * (DIGIT_UNIT[digits] + 4 * 127 * F32)
    off = np.repeat(unit, 32)[:cols] + 4 * F32 * terms / np.sqrt((sums**2).mean())
    off += (cols / 2 + 8) * F32 * np.abs(normed)
    error = product_error(m, np.abs(normed) + off, gpu.n_blocks) + np.abs(w) @ off
    assert_close(got, w @ normed, error)


def test_a_matvec_makes_its_input_only_where_lanes_are_enough(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.device, "software", False)
    m = coded(rng, 33, 1036, 2.5, 11)
    few, enough = (GpuMatrix(kernels, "w", m, n_segments=n) for n in (8, 11))
    assert enough.makes_input(1) and not few.makes_input(1)  # 33 blocks are 264 quads
    halves = GpuMatrix(kernels, "w", m, n_segments=17)  # of 16 segments, so 256 lanes
    assert halves.makes_input(1) and not halves.makes_input(1, all_columns=True)
    assert not GpuMatrix(kernels, "w", coded(rng, 33, 1034, 2.5, 11)).makes_input(1)
    monkeypatch.setattr(kernels.device, "workgroup_memory", 1 << 14)
    assert not enough.makes_input(1)
