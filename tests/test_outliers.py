"""Rows with hundreds and thousands of outliers: in the code, and on adapters whose loops may end
early (llvmpipe ends a lane's after some 65000 rounds in all, whatever they are nested in).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from codec.lossless import decode_lossless, encode_lossless
from codec.matrix import CodedMatrix, decode_matrix, dequantize, encode_matrix
from engine.device import Device
from engine.kernel import Kernels
from engine.plan import Plan, run
from model.activations import FLOAT, Activations
from model.gpu_matrix import GpuMatrix, agree
from model.llama import MAX_TOKENS

F32 = 2.0**-24

COUNTS = {3: 300, 17: 4000, 39: 9000}  # outliers of some rows, of 40 rows and 9001 columns


def integers(rng: np.random.Generator) -> np.ndarray:
    """Small ones, but for so many in some rows that they would all have to be raw bits."""
    q = rng.integers(-1, 2, (40, 9001)).astype(np.int32)
    for row, count in COUNTS.items():
        places = rng.choice(q.shape[1], count, replace=False)
        q[row, places] = rng.integers(600, 1000, count) * rng.choice([-1, 1], count)
    return q


@pytest.fixture(scope="module")
def matrix() -> CodedMatrix:
    return encode_matrix(integers(np.random.default_rng(1)), np.full(40, -48, np.int16), 11)


def test_rows_of_outliers_come_back(matrix: CodedMatrix) -> None:
    assert np.array_equal(decode_matrix(matrix), integers(np.random.default_rng(1)))
    counts = matrix.outlier_counts
    assert all(counts[row] >= 0.99 * count for row, count in COUNTS.items())


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(Device.open())


@pytest.mark.gpu
@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("tokens, digits", [(1, 1), (MAX_TOKENS, 1), (MAX_TOKENS, 3)])
def test_no_outlier_is_lost(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    matrix: CodedMatrix,
    whole_rows: bool,
    tokens: int,
    digits: int,
) -> None:
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    device, rng = kernels.device, np.random.default_rng(2)
    gpu = GpuMatrix(kernels, "w", matrix)
    # All activations are positive, as are their scales: what one outlier adds is never small.
    d = np.zeros((tokens, digits, 32 * gpu.n_blocks), np.int8)
    d[:, 0, : matrix.cols] = rng.integers(64, 128, (tokens, matrix.cols))
    scale = np.ones((tokens, gpu.n_blocks), np.float32)
    sums = d[:, 0].reshape(tokens, -1, 32).sum(axis=2, dtype=np.float32)
    pair = np.stack([scale, sums], axis=-1)
    a = Activations.upload(device, "x", d, pair)
    y = gpu.output("y", tokens)
    run(device, Plan(gpu.matvec(a, y, tokens=tokens, digits=digits)))
    got = device.read(y.buffer, np.float32, (y.splits, tokens, matrix.rows)).sum(axis=0)

    x = d[:, 0, : matrix.cols].astype(np.float64)
    w = dequantize(matrix).astype(np.float64)
    # Dots of blocks are exact; sums of blocks and outliers round each time they grow.
    roundings = gpu.n_blocks + matrix.outlier_counts + 8
    tolerance = roundings * F32 * (np.abs(x) @ (np.abs(w) + 2 * matrix.scale[:, None]).T)
    lost = 64 * 600 * matrix.scale.astype(np.float64)  # the least that an outlier adds
    assert (tolerance < np.where(matrix.outlier_counts > 0, 2000 * lost, np.inf)).all()
    assert_close(got, x @ w.T, tolerance)


@pytest.mark.gpu
def test_lanes_share_a_tiles_outliers_where_a_gpu_is_not_full(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few sizes, as many as there is room for."""
    monkeypatch.setattr(kernels.device, "software", False)
    monkeypatch.setattr(kernels.device, "workgroup_memory", 48 << 10)

    def shared(n_outliers: int, tokens: int = 1, **options: int) -> int:
        q = np.tile(np.int32([-1, 0, 1]), (64, 200))
        q[33, :n_outliers] = 700  # of the second tile
        m = encode_matrix(q, np.full(64, -48, np.int16), 11)
        assert m.outliers.size == n_outliers
        gpu = GpuMatrix(kernels, "w", m, **options)
        x = Activations.empty(kernels.device, "x", tokens, 1, m.cols)
        (dispatch,) = gpu.matvec(x, gpu.output("y", tokens), tokens=tokens, digits=1)
        return int(dispatch.kernel.overrides.get("shared_outliers", 0))

    assert [shared(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 1024]
    assert shared(257, tokens=2) == 0
    assert shared(257, n_segments=1) == 256  # 16 a lane would be 512
    assert shared(600, n_segments=16) == 1024
    monkeypatch.setattr(kernels.device, "workgroup_memory", 20 << 10)  # 1 KiB of it left
    assert shared(600, n_segments=16) == 256
    monkeypatch.setattr("model.gpu_matrix._FULL_LANES", 64)
    assert shared(600) == 0


@pytest.mark.gpu
def test_matrices_of_a_shape_agree_on_kernels(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.device, "software", False)
    q = np.tile(np.int32([-1, 0, 1]), (3, 64, 200))
    q[1, 33, :300] = 700
    matrices = [
        GpuMatrix(kernels, f"w{i}", encode_matrix(each, np.full(64, -48, np.int16), 11 + i // 2))
        for i, each in enumerate(q)
    ]
    assert [matrix.shared_outliers for matrix in matrices] == [0, 1024, 0]
    agree(matrices)
    assert [matrix.shared_outliers for matrix in matrices] == [1024, 1024, 0]  # another table
    x = Activations.empty(kernels.device, "x", 1, 1, 600)
    launches = [next(m.matvec(x, m.output("y", 1), tokens=1, digits=1)) for m in matrices]
    assert launches[0].kernel is launches[1].kernel is not launches[2].kernel


@pytest.mark.gpu
@pytest.mark.parametrize("whole_rows", [True, False])
def test_no_float_is_lost(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    whole_rows: bool,
) -> None:
    """Without loss outliers are exponents that a row's symbols do not reach."""
    monkeypatch.setattr(kernels.device, "software", whole_rows)
    rng = np.random.default_rng(3)
    w = rng.choice([1.0, 1.5, -1.25], (40, 9001)).astype(np.float32)
    w[17] *= np.float32(2.0**-60) * np.exp2(-rng.integers(0, 60, 9001)).astype(np.float32)
    m = encode_lossless(w, 11)
    assert np.array_equal(decode_lossless(m), w)
    assert m.exponents.outlier_counts[17] > 3000
    gpu = GpuMatrix(kernels, "w", m)
    x = np.zeros((MAX_TOKENS, 32 * gpu.n_blocks), np.float32)
    x[:, : m.cols] = rng.uniform(0.5, 1, (MAX_TOKENS, m.cols))
    y = gpu.output("y", MAX_TOKENS)
    a = Activations(kernels.device.upload("x", x), None)
    run(kernels.device, Plan(gpu.matvec(a, y, tokens=MAX_TOKENS, digits=FLOAT)))
    got = kernels.device.read(y.buffer, np.float32, (y.splits, MAX_TOKENS, m.rows)).sum(axis=0)
    x64, w64 = x[:, : m.cols].astype(np.float64), w.astype(np.float64)
    # An outlier counts twice more, with the weight that its stream stands for: here up to 2.
    roundings = 2 * gpu.n_blocks + 2 * m.exponents.outlier_counts + 12
    terms = np.abs(x64) @ np.abs(w64).T + 4 * m.exponents.outlier_counts
    assert_close(got, x64 @ w64.T, roundings * F32 * terms)
