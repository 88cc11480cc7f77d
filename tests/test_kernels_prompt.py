"""The kernels of passes of many tokens, each against its numpy twin. Bytes are compared with ==."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cache_layout import pack, unpack
from kernel_checks import (
    F32,
    HEADS,
    MATRICES,
    attention_error,
    check_quantized,
    coded,
    digit_activations,
    read_activations,
)
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from codec.classes import device_order
from codec.matrix import CodedMatrix, decode_matrix, encode_matrix
from engine.device import Device
from engine.kernel import Kernels
from engine.plan import Plan, run
from model import prompt, reference
from model.activations import Activations
from model.gpu_layout import far_outliers
from model.gpu_matmul import decoded_bytes, matmul
from model.gpu_matrix import GpuMatrix
from model.kv_cache import BLOCK, KINDS
from model.llama import rope_table

pytestmark = pytest.mark.gpu

FAR = [(65, 575, 4.0, 12), (60, 600, 150.0, 11)]  # as MATRICES: outliers that do not fit a byte


def steps_of(
    gpu: GpuMatrix, x: Activations, y: Any, bytes_: Any, tokens: int, **options: Any
) -> Plan:
    return Plan([step.of(tokens) for step in matmul(gpu, x, y, bytes_, **options)])


def matmul_activations(
    rng: np.random.Generator, device: Device, tokens: int, cols: int
) -> tuple[Activations, np.ndarray]:
    """Random digits on the device, and the float64 (tokens, cols) that they stand for."""
    given, x = digit_activations(rng, device, tokens, 1, cols)
    a = Activations.for_matmul(device, "x", tokens, cols)
    n_blocks = -(-cols // 32)
    device.write(a.digits, device.read(given.digits, np.int8, (tokens * n_blocks * 32,)))
    device.write(a.scale, device.read(given.scale, np.float32, (tokens * n_blocks * 2,)))
    return a, x


def as_integers(m: CodedMatrix, device: Device, bytes_: Any, gpu: GpuMatrix) -> np.ndarray:
    """What decode_tile has left in the buffer, (rows, cols), planes added up."""
    padded = -(-m.rows // 128) * 128
    planes = 2 if m.raw_bits > 2 else 1
    shape = (gpu.n_blocks, planes, 2, padded, 16)
    got = device.read(bytes_, np.int8, shape).astype(np.int64)
    w = got[:, 0] if planes == 1 else (got[:, 0] << m.raw_bits) + got[:, 1]
    w = w.transpose(2, 0, 1, 3).reshape(padded, -1)[: m.rows, : m.cols]
    return w[np.argsort(device_order(m.classes))]


@pytest.mark.parametrize("whole_rows", [True, False])
@pytest.mark.parametrize("matrix", MATRICES + FAR)
def test_matmul(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: Callable[..., None],
    matrix: tuple[int, int, float, int],
    whole_rows: bool,
) -> None:
    device, tokens = kernels.device, 70
    monkeypatch.setattr(device, "software", whole_rows)
    m = coded(rng, *matrix)
    gpu = GpuMatrix(kernels, "w", m)
    room = 128  # whole tiles
    a, x = matmul_activations(rng, device, room, m.cols)
    bytes_ = device.empty("bytes", decoded_bytes(gpu))
    y = device.upload("y", np.full((room, m.rows), np.nan, np.float32))
    run(device, steps_of(gpu, a, y, bytes_, tokens))
    q = decode_matrix(m)

    # Bytes are the integers themselves, less what is left to the product of those that may not fit.
    far = far_outliers(m)
    got_q, want_q = as_integers(m, device, bytes_, gpu), q.copy()
    row = np.repeat(np.arange(m.rows), np.diff(far[: m.rows + 1].astype(np.int64)))
    column, remainder = far[m.rows + 1 :] & 0xFFFF, far[m.rows + 1 :].view(np.int32) >> 16
    want_q[row, column] -= remainder << m.row_raw_bits[row].astype(np.int32)
    assert (got_q == want_q).all()

    # A block's dot is exact; it is scaled and added in f32, once for every plane; then outliers and
    # the row's scale. Of an outlier both parts count.
    got = device.read(y, np.float32, (room, m.rows))[:tokens]
    scale = m.scale.astype(np.float64)
    terms = np.abs(x) @ ((np.abs(q) + 2 * np.abs(q - got_q) + 255) * scale[:, None]).T
    roundings = 2 * 2 * gpu.n_blocks + int(m.outlier_counts.max()) + 4
    assert_close(got, x[:tokens] @ (q * scale[:, None]).T, roundings * F32 * terms[:tokens])


def test_some_outliers_are_far() -> None:
    every = [coded(np.random.default_rng(7), *matrix) for matrix in FAR]
    assert [m.raw_bits for m in every] == [2, 4]  # one plane of bytes, two
    for m in every:
        assert 0 < far_outliers(m).size - (m.rows + 1) < m.outliers.size


@pytest.mark.parametrize("limits", ["parts", "bytes"])
def test_matmul_piece_by_piece_equals_whole(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, limits: str
) -> None:
    """Of a matrix in several bindings, and of one decoded 128 rows at a time."""
    device = kernels.device
    monkeypatch.setattr(device, "software", False)
    monkeypatch.setattr("model.gpu_matmul._LARGE_PRODUCT_ROWS", 128)
    m = coded(rng, 400, 331, 3.0, 12)
    assert m.n_classes > 1
    a, _ = digit_activations(rng, device, 64, 1, m.cols)
    results, steps = [], []
    for small in (False, True):
        if small and limits == "parts":
            monkeypatch.setattr(device, "max_binding_bytes", 40_000)
        gpu = GpuMatrix(kernels, "w", m)
        n_bytes = decoded_bytes(gpu) // 4 if small and limits == "bytes" else decoded_bytes(gpu)
        monkeypatch.setattr(device, "max_binding_bytes", 1 << 27)
        bytes_, y = device.empty("bytes", n_bytes), device.empty("y", 4 * 64 * m.rows)
        plan = steps_of(gpu, a, y, bytes_, 64)
        run(device, plan)
        steps.append(len(plan.dispatches))
        results.append(device.read(y, np.float32, (64, m.rows)))
    assert steps[0] == 2 and steps[1] >= 6
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize(
    ("rows", "tokens", "splits", "few", "room", "launches"),
    [
        (60, 129, 1, False, 1, 2),
        (4096, 129, 1, False, 1, 2),
        (300, 33, 2, True, 1, 2),
        (60, 3, 3, True, 1, 2),
        (60, 65, 2, False, 1, 2),
        # Columns in pieces: of two blocks, two and one; and one after another.
        (4100, 129, 1, False, 1 / 2, 12),
        (60, 65, 2, False, 1 / 2, 6),
        (300, 3, 1, True, 1 / 5, 10),
    ],
)
def test_matmul_of_whole_numbers_is_exact(
    kernels: Kernels,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    tokens: int,
    splits: int,
    few: bool,
    room: float,
    launches: int,
) -> None:
    """With scales of 1 every sum is a whole number below 2^24, which f32 holds: all tile sizes, in
    splits that add up; `room` is the share of a matrix whose bytes there is room for.
    """
    device, cols = kernels.device, 150
    monkeypatch.setattr(device, "software", False)
    q = np.round(rng.laplace(size=(rows, cols)) * 9).astype(np.int32)
    q[::7, 3] = 1500  # beyond a byte
    m = encode_matrix(q, np.zeros(rows, np.int16), 11)
    gpu = GpuMatrix(kernels, "w", m)
    x = np.zeros((256, 160), np.int8)
    x[:tokens, :cols] = rng.integers(-127, 128, (tokens, cols))
    scale = np.ones((256, 5, 2), np.float32)
    a = Activations(device.upload("digits", x), device.upload("scale", scale))
    assert far_outliers(m).size > rows + 1
    whole = -(-tokens // (32 if few else 64)) * (32 if few else 64)  # in tiles
    bytes_ = device.empty("bytes", int(room * decoded_bytes(gpu)))
    y = device.upload("y", np.full((splits, whole, rows), np.nan, np.float32))
    plan = steps_of(gpu, a, y, bytes_, tokens, splits=splits, few=few)
    assert len(plan.dispatches) == launches
    run(device, plan)
    got = device.read(y, np.float32, (splits, whole, rows)).sum(axis=0)[:tokens]
    assert (got == x[:tokens, :cols].astype(np.int64) @ q.T).all()


@pytest.mark.parametrize(
    ("name", "n_splits", "paged", "window", "cache"),
    [
        ("attention_prompt", 1, False, 0, "f16"),
        ("attention_prompt", 3, True, 9, "int4"),
        ("attention_rows", 1, False, 9, "f16"),
        ("attention_rows", 1, True, 0, "int8"),
    ],
)
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), sorted({heads[:3] for heads in HEADS})
)
@pytest.mark.parametrize(("pos", "n_tokens"), [(0, 1), (3, 12), (47, 33)])
def test_cache_write_and_attention_prompt(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    pos: int,
    n_tokens: int,
    name: str,
    n_splits: int,
    paged: bool,
    window: int,
    cache: str,
) -> None:
    device, max_pos, theta = kernels.device, 96, 10000.0
    table = rng.permutation(max_pos // BLOCK).astype(np.uint32)
    # Where the positions are in the cache.
    place = np.arange(max_pos)
    if paged:
        place = (BLOCK * table.astype(np.int64)[:, None] + np.arange(BLOCK)).ravel()
    padded = -(-(head_dim // 2) // 4) * 4
    tiled = name == "attention_prompt"
    if prompt.attention_bytes(head_dim, tiled=tiled) > device.workgroup_memory:
        pytest.skip(f"{device.name} has too little workgroup memory for heads of {head_dim}")
    all_heads = n_heads + 2 * n_kv_heads
    room = 64
    shape, bits = (max_pos, n_kv_heads, head_dim), KINDS[cache]
    y = rng.normal(size=(room, all_heads * head_dim)).astype(np.float32)
    packed = [pack(rng.normal(size=shape).astype(np.float32), n) for n in bits]
    past = [unpack(words, shape, n)[0][place] for words, n in zip(packed, bits, strict=True)]
    keys, values = device.upload("k_cache", packed[0]), device.upload("v_cache", packed[1])
    heads = dict(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        max_pos=max_pos,
        blocks_per_table=0,
    )
    buffers = dict(
        state=device.upload("state", np.array([pos, n_tokens] + [0] * 10, np.uint32)),
        y=device.upload("y", y),
        rope=device.upload("rope", rope_table(max_pos, head_dim, theta)),
        k_cache=keys,
        v_cache=values,
        blocks=device.upload("blocks", table),
    )
    stride = 2 * padded + 2
    nothing = np.full((room, n_heads, n_splits, stride), np.nan, np.float32)
    partial = device.upload("partial", nothing)
    out = Activations.empty(device, "attn", room, 1, n_heads * head_dim)
    tokens_per_group = 32 // (n_heads // n_kv_heads)
    kept = dict(half_quads=padded // 4, key_bits=bits[0], value_bits=bits[1])
    overrides = {}
    if tiled:
        overrides["n_splits"] = n_splits
    n_blocks = -(-n_heads * head_dim // 32)
    dispatches = [
        kernels.get("cache_write", paged=paged, **kept).dispatch(
            [n_kv_heads, n_tokens + 3], heads, **buffers
        ),
        kernels.get(
            name,
            tokens_per_group=tokens_per_group,
            row_quads=16 * padded,
            paged=paged,
            window=window,
            **kept,
            **overrides,
        ).dispatch(
            [n_kv_heads, -(-n_tokens // tokens_per_group) + 1, n_splits],
            dict(scale=head_dim**-0.5, **heads),
            partial=partial,
            **buffers,
        ),
        kernels.get(
            "attention_combine", lanes=64, digits=1, n_splits=n_splits, half_quads=padded // 4
        ).dispatch(
            [-(-n_blocks * 8 // 64), n_tokens],
            dict(n_heads=n_heads, head_dim=head_dim, n_blocks=n_blocks),
            partial=partial,
            x_digits=out.digits,
            x_scale=out.scale,
        ),
    ]
    run(device, Plan(dispatches))

    qkv = y[:n_tokens].astype(np.float64).reshape(n_tokens, all_heads, head_dim)
    want_q, want_k, want_v = np.split(qkv, [n_heads, n_heads + n_kv_heads], axis=1)
    want_q, want_k = reference.rope(want_q, pos, theta), reference.rope(want_k, pos, theta)

    (got_k, step_k), (got_v, step_v) = (
        [part[place] for part in unpack(device.read(buffer, np.uint32, words.shape), shape, n)]
        for buffer, words, n in zip((keys, values), packed, bits, strict=True)
    )
    written = slice(pos, pos + n_tokens)
    # As of attention's cache: a rotation, the table's own rounding, then half an ulp of f16, or
    # half a step of integers.
    size, half_ulp = np.abs(y).max(), 2.0**-11 if cache == "f16" else 0.0
    for got, step, want in ((got_k, step_k, want_k), (got_v, step_v, want_v)):
        tolerance = half_ulp * np.abs(want) + step[written] / 2 + 2.0**-24 + 12 * F32 * size
        assert_close(got[written], want, tolerance)
    untouched = np.ones(max_pos, bool)
    untouched[written] = False
    assert (got_k[untouched] == past[0][untouched]).all()
    assert (got_v[untouched] == past[1][untouched]).all()

    want = reference.attention(
        want_q,
        got_k.astype(np.float64),
        got_v.astype(np.float64),
        pos,
        window=window or None,
    )
    n_pos = pos + n_tokens
    error = attention_error(size, want_q, got_k[:n_pos], got_v[:n_pos])
    parts = device.read(partial, np.float32, nothing.shape)
    assert np.isnan(parts[n_tokens:]).all()
    digits = read_activations(device, out, room, 1, n_heads * head_dim)
    check_quantized(assert_close, {key: v[:n_tokens] for key, v in digits.items()}, want, 1, error)
