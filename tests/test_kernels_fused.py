"""Matvecs of one token that make their inputs themselves, or do what comes after them: against the
launches that they save, and the numpy twins of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from kernel_checks import (
    DIGIT_UNIT,
    F32,
    check_quantized,
    coded,
    digit_activations,
    product_error,
    read_activations,
)
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from codec.matrix import CodedMatrix, dequantize, encode_matrix
from engine.kernel import Kernels
from engine.plan import Plan, run
from model import reference
from model.activations import Activations, Output, Residual, Then
from model.gpu_matrix import GpuMatrix

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("dim", [40, 576, 1004])
@pytest.mark.parametrize("splits", [0, 3])
def test_a_norm_leaves_its_factor(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    dim: int,
    digits: int,
    splits: int,
) -> None:
    device, lanes = kernels.device, 64
    x0 = rng.normal(size=dim).astype(np.float32)
    y = rng.normal(size=(max(1, splits), dim)).astype(np.float32)
    weight = rng.normal(1, 0.3, dim).astype(np.float32)
    x, out = device.upload("x", x0), Activations.empty(device, "xn", 1, digits, dim)
    dispatch = kernels.get(
        "norm_shares", lanes=lanes, digits=digits, dim=dim, splits=splits
    ).dispatch(
        [-(-dim // (4 * lanes))],
        y=device.upload("y", y),
        weight=device.upload("weight", weight),
        x=x,
        x_digits=out.digits,
        x_scale=out.scale,
        squares=out.squares,
    )
    run(device, Plan([dispatch]))
    sums = x0.astype(np.float64) + y[:splits].astype(np.float64).sum(axis=0)
    rounding = splits * F32 * (np.abs(x0) + np.abs(y[:splits]).sum(axis=0))
    assert_close(device.read(x, np.float32, (dim,)), sums, rounding)
    n_blocks = -(-dim // 32)
    padded = np.zeros((n_blocks, 32))
    padded.ravel()[:dim] = sums
    # Of 32 squares each has one rounding of its own and up to 32 on the way, and twice x's.
    off = 34 * F32 * (padded**2).sum(axis=1) + 2.1 * (np.abs(sums) * rounding).max() * 32
    assert_close(device.read(out.squares, np.float32, (n_blocks,)), (padded**2).sum(axis=1), off)
    got = read_activations(device, out, 1, digits, dim)
    want = (sums * weight)[None]
    check_quantized(assert_close, got, want, digits, rounding * np.abs(weight) + F32 * np.abs(want))


@pytest.mark.parametrize("software", [True, False])
def test_a_matvec_multiplies_by_a_norms_factor(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    software: bool,
) -> None:
    monkeypatch.setattr(kernels.device, "software", software)
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
# small enough for no outliers, a row with hundreds of them.
MAKERS = [(70, 332, 6, 99), (33, 972, 24, 99), (65, 620, 20, 4), (45, 972, 24, 999)]


def maker(
    kernels: Kernels, rng: np.random.Generator, rows: int, cols: int, n_segments: int, most: int
) -> tuple[CodedMatrix, GpuMatrix]:
    q = np.round(rng.laplace(size=(rows, cols)) * 2.5).clip(-most, most).astype(np.int32)
    if most == 999:
        q[37, ::2] = rng.integers(500, most, cols // 2)
    m = encode_matrix(q, rng.integers(-60, -20, rows).astype(np.int16), 11)
    assert (m.outliers.size == 0) == (most == 4)
    assert (m.outlier_counts.max() > 400) == (most == 999)
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
    monkeypatch.setattr(kernels.device, "workgroup_memory", 20000)  # the table, but no more
    small = GpuMatrix(kernels, "w", m, n_segments=11)
    assert not small.whole_rows and not small.makes_input(1)
