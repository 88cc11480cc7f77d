"""The kernels of matrices without loss, each against its numpy twin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_checks import F32
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from codec.lossless import LosslessMatrix, decode_lossless, encode_lossless
from engine.kernel import Kernels
from engine.plan import Plan, run
from model import reference
from model.activations import FLOAT, Activations
from model.gpu_matrix import GpuMatrix
from model.llama import MAX_TOKENS

pytestmark = pytest.mark.gpu


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


# (rows, cols, mantissa_bits, log2_states): sizes as in MATRICES, fields of bytes and other widths.
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
