"""The matvec by itself: shapes of well-known models, coded beside uncompressed, on one device.

Part of `python -m engine.bench` (--kernels). Every kernel runs over as many copies of its matrix as
the cache cannot hold, one after another in one compute pass with a barrier each, as in a token
step; medians over passes. The uncompressed kernels are tuned for each shape: the best of several
workgroup shapes is shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine import slots
from engine.device import Device
from engine.errors import DeviceError
from engine.kernel import Dispatch, Kernels
from engine.plan import Plan, gpu_seconds
from model.activations import Activations
from model.gpu_matrix import GpuMatrix
from weights.synthetic import matrix

# q|k|v, o, gate|up and down of the 8B, 1B and 135M shapes, and the latter's head.
SHAPES = [
    (28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096),
    (16384, 2048), (2048, 8192),
    (3072, 576), (576, 1536), (960, 576), (49152, 576),
]  # fmt: skip
_PLAIN_BITS = (16, 8, 4)
_PLAIN_SHAPES = ((32, 2), (32, 4), (32, 8), (64, 4), (128, 2))  # row_lanes, row_groups
_PASSES = 7
_PASS_SECONDS = 0.01
_WARM_UP_SECONDS = 0.5
# What a pass must go through so that nothing is left of it in the cache the next time (an H100's
# second level holds 50 MB).
_CACHE_BYTES = 150e6


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one shape, with one token or several."""

    kernel: str
    rows: int
    cols: int
    tokens: int
    bits_per_weight: float  # all that is read of the matrix
    shape: str  # how the work is cut up
    microseconds: float  # median
    slowest: float
    fastest: float
    gweights_per_second: float
    gb_per_second: float
    slots: float  # a weight, estimated: engine/slots.py


def bench_kernels(
    device: Device,
    shapes: Sequence[tuple[int, int]],
    bits: float,
    tokens: Sequence[int] = (1,),
    segments: Sequence[int] = (),
    plain: bool = True,
) -> Iterator[KernelRow]:
    """Rows for each shape: the coded matvec at `bits` stored per weight, then the plain ones.

    `segments`: numbers of segments of a row to try beside the one that is used.
    DeviceError without timestamps.
    """
    if not device.timestamps:
        raise DeviceError(f"{device.name}: has no timestamps to measure kernels with")
    kernels = Kernels(device)
    for rows, cols in shapes:
        m = matrix(rows, cols, bits)
        copies = max(2, -(-int(_CACHE_BYTES) * 8 // int(rows * cols * bits)))
        if device.software:
            copies = 2
        for n_segments in (None, *segments):
            gpus = [GpuMatrix(kernels, f"w{i}", m, n_segments=n_segments) for i in range(copies)]
            for n in tokens:
                x, y = _activations(device, n, cols), gpus[0].output("y", n)
                dispatches = [d for gpu in gpus for d in gpu.matvec(x, y, tokens=n, digits=1)]
                first = gpus[0]
                cut = f"{first.splits} x {first.segments_per_group} segments"
                of_weight = slots.coded(m.raw_bits, m.group, n)
                yield _row(
                    "matvec", first.read_bytes, cut, rows, cols, n, of_weight, device, dispatches
                )
            for gpu in gpus:
                gpu.destroy()
        if plain:
            for plain_bits in _PLAIN_BITS:
                best = min(_plain_rows(kernels, plain_bits, rows, cols), key=_time, default=None)
                if best:
                    yield best


def _time(row: KernelRow) -> float:
    return row.microseconds


def _plain_rows(kernels: Kernels, bits: int, rows: int, cols: int) -> Iterator[KernelRow]:
    device = kernels.device
    size = rows * cols * bits // 8
    if size > device.max_binding_bytes or cols % 32:
        return
    rng = np.random.default_rng(0)
    chunk = rng.integers(0, 1 << 32, min(size, 1 << 22) // 4, np.uint32)
    if bits == 16:
        chunk = rng.normal(size=chunk.size * 2).astype(np.float16).view(np.uint32)
    words = np.resize(chunk, size // 4)
    copies = 2 if device.software else max(2, -(-int(_CACHE_BYTES) // size))
    buffers = [device.upload(f"plain{i}", words) for i in range(copies)]
    scale = device.upload("scale", np.ones(rows, np.float32))
    y = device.empty("y", 4 * rows)
    a = _activations(device, 1, cols)
    x = a.digits
    if bits == 16:
        x = device.upload("x", rng.normal(size=cols).astype(np.float32))
    for row_lanes, row_groups in _PLAIN_SHAPES:
        if rows % (4 * row_groups):
            continue
        kernel = kernels.get(
            "matvec_plain",
            bits=bits,
            row_lanes=row_lanes,
            row_groups=row_groups,
            partials=row_lanes * row_groups,
        )
        dispatches = [
            kernel.dispatch(
                [rows // (4 * row_groups)],
                dict(rows=rows, cols=cols),
                w=w,
                x=x,
                x_scale=a.scale,
                scale=scale,
                y=y,
            )
            for w in buffers
        ]
        cut = f"{row_lanes} lanes a row, {row_groups} x 4 rows"
        name = {16: "f16", 8: "int8", 4: "int4"}[bits]
        yield _row(name, size + 4 * rows, cut, rows, cols, 1, slots.PLAIN[bits], device, dispatches)
    for buffer in buffers:
        device.destroy(buffer)


def _activations(device: Device, tokens: int, cols: int) -> Activations:
    rng = np.random.default_rng(0)
    n_blocks = -(-cols // 32)
    digits = rng.integers(-127, 128, (tokens, n_blocks * 32)).astype(np.int8)
    scale = rng.uniform(0.1, 1, (tokens, n_blocks)).astype(np.float32)
    sums = scale * digits.reshape(tokens, n_blocks, 32).sum(axis=2, dtype=np.float32)
    pairs = np.stack([scale, sums], axis=-1)
    return Activations.upload(device, "x", digits, pairs)


def _row(
    kernel: str,
    read_bytes: int,
    cut: str,
    rows: int,
    cols: int,
    tokens: int,
    of_weight: float,
    device: Device,
    dispatches: list[Dispatch],
) -> KernelRow:
    median, slowest, fastest = time_dispatches(device, dispatches)
    return KernelRow(
        kernel,
        rows,
        cols,
        tokens,
        8 * read_bytes / (rows * cols),
        cut,
        median * 1e6,
        slowest * 1e6,
        fastest * 1e6,
        rows * cols / median / 1e9,
        read_bytes / median / 1e9,
        of_weight,
    )


def time_dispatches(device: Device, dispatches: list[Dispatch]) -> tuple[float, float, float]:
    """Seconds a dispatch takes, launch and barrier included: median, most and least."""
    plan = Plan(dispatches)

    def seconds(plans: Sequence[Plan]) -> float:
        taken = gpu_seconds(device, *plans)
        assert taken is not None  # the caller made sure of timestamps
        return taken / (len(plans) * len(dispatches))

    if device.software:
        times = [seconds([plan]) for _ in range(_PASSES)]
        return statistics.median(times), max(times), min(times)
    start, repeats = time.perf_counter(), 1
    while time.perf_counter() - start < _WARM_UP_SECONDS:
        taken = seconds([plan] * repeats) * len(dispatches)
        repeats = max(1, min(1000, int(_PASS_SECONDS / taken)))
    times = [seconds([plan] * repeats) for _ in range(_PASSES)]
    return statistics.median(times), max(times), min(times)


def markdown(rows: Sequence[KernelRow]) -> str:
    """A table, in the order of the rows; `memory` is the share of the run's best rate, `slots` are
    instructions of a lane a weight, estimated.
    """
    best = max(row.gb_per_second for row in rows)
    lines = [
        "| kernel | shape | tokens | bit/weight | cut into | µs | slowest to fastest "
        "| Gweight/s | GB/s | memory | slots |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.kernel} | {row.rows} x {row.cols} | {row.tokens} | {row.bits_per_weight:.2f} "
            f"| {row.shape} | {row.microseconds:.1f} | {row.slowest:.1f} to {row.fastest:.1f} "
            f"| {row.gweights_per_second:.4g} | {row.gb_per_second:.4g} "
            f"| {100 * row.gb_per_second / best:.0f} % | {row.slots:.1f} |"
        )
    return "\n".join(lines)
