"""The kernels that decode integers, each against its numpy twin, on sizes that are multiples of
nothing. Integers are compared with ==. Those of matrices without loss are in test_kernels_float.py,
matvecs that also do what comes before or after them in test_kernels_fused.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_checks import F32, MATRICES, coded, digit_activations, product_error
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from codec.classes import device_order
from codec.matrix import decode_matrix, dequantize, encode_matrix, entry_points
from engine.kernel import Kernels
from engine.plan import Plan, run
from model import reference
from model.activations import Activations
from model.gpu_layout import BLOCK, wanted_segments
from model.gpu_matrix import GpuMatrix
from model.gpu_workgroup import Workgroup
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
    assert_close(got, x @ w.T, product_error(m, x, gpu.n_blocks))


@pytest.mark.parametrize(
    ("log2_states", "n_segments", "memory", "twice"),
    [
        (11, 16, 1 << 15, True),
        (11, 9, 1 << 15, False),
        (12, 16, 1 << 15, False),
        (11, 16, 19000, False),
    ],
)
def test_tables_stand_twice_where_they_leave_room_for_workgroups(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    log2_states: int,
    n_segments: int,
    memory: int,
    twice: bool,
) -> None:
    monkeypatch.setattr(kernels.device, "software", False)
    monkeypatch.setattr(kernels.device, "workgroup_memory", memory)
    m = coded(rng, 70, 605, 2.5, log2_states)
    gpu = GpuMatrix(kernels, "w", m, n_segments=n_segments)
    a, x = digit_activations(rng, kernels.device, 1, 1, m.cols)
    y = gpu.output("y", 1)
    (dispatch,) = gpu.matvec(a, y, tokens=1, digits=1)
    assert ("twice" in dispatch.kernel.variants) == twice
    run(kernels.device, Plan([dispatch]))
    got = kernels.device.read(y.buffer, np.float32, (1, m.rows))
    want = x @ dequantize(m).astype(np.float64).T
    assert_close(got, want, product_error(m, x, gpu.n_blocks))


def test_tables_stand_twice_where_one_workgroup_has_room_either_way() -> None:
    group = Workgroup(48 << 10, n_states=2048, lanes=512)
    of_tokens = {n: group.table_variants(4 * 512 * group.sums_at_once(n)) for n in (4, 8, 16)}
    assert of_tokens == {4: ["twice"], 8: [], 16: ["twice"]}


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_matvec_kernels_agree_bit_for_bit(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    """With one segment a row both add the same blocks in the same order."""
    m = coded(rng, 50, 30, spread, 12)
    monkeypatch.setattr(kernels.device, "software", False)  # where no kernel has them uniform
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


@pytest.mark.parametrize(
    ("rows", "cols", "segments"),
    [
        (28672, 4096, 16),  # of 8 blocks, enough lanes
        (4096, 4096, 32),
        (4096, 14336, 32),
        (3072, 2048, 32),  # 43 would fill the GPU, but some would have twice as many blocks
        (3072, 8192, 64),
        (49152, 576, 9),  # no fewer than 8
        (960, 576, 137),  # of 18 blocks: one each
        (896, 4864, 147),  # 152 = 8 x 19 blocks have no alike segments that fill workgroups
        (4096, 11008, 32),
    ],
)
def test_segments_of_a_row_are_alike_where_they_can_be(rows: int, cols: int, segments: int) -> None:
    assert wanted_segments(rows, -(-cols // BLOCK), 16) == segments
