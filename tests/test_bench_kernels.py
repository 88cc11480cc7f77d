"""What the benchmarks measure is computed: uncompressed matvecs, and every launch of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine import bench_kernels, profile, slots
from engine.device import Device
from engine.errors import DeviceError
from engine.generate import Engine
from engine.kernel import Kernels
from engine.plan import Plan, run
from model.config import ModelConfig
from weights.store import WeightsFile
from weights.synthetic import write_synthetic

pytestmark = pytest.mark.gpu

F32 = 2.0**-24


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("row_lanes", "row_groups"), [(32, 2), (128, 1)])
def test_plain_matvec(
    assert_close: Callable[..., None], bits: int, row_lanes: int, row_groups: int
) -> None:
    device, rows, cols = Device.open(), 24, 352
    rng = np.random.default_rng(1)
    digits = rng.integers(-127, 128, cols).astype(np.int8)
    block_scale = rng.uniform(0.1, 1, cols // 32).astype(np.float32)
    x = digits * np.repeat(block_scale, 32)
    scale = rng.uniform(0.1, 1, rows).astype(np.float32)
    if bits == 16:
        w = rng.normal(size=(rows, cols)).astype(np.float16)
        words, activations = w.view(np.uint32), x.astype(np.float32)
    elif bits == 8:
        w = rng.integers(-128, 128, (rows, cols)).astype(np.int8)
        words, activations = w.view(np.uint32), digits
    else:  # columns 0..15 of a block in the low halves of its bytes, 16..31 in the high ones
        w = rng.integers(-8, 8, (rows, cols)).astype(np.int8)
        halves = (w + 8).astype(np.uint8).reshape(rows, -1, 2, 16)
        words = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1).view(np.uint32)
        activations = digits
    pairs = np.stack([block_scale, x.reshape(-1, 32).sum(axis=1)], axis=-1).astype(np.float32)
    y = device.empty("y", 4 * rows)
    kernel = Kernels(device).get(
        "matvec_plain",
        bits=bits,
        row_lanes=row_lanes,
        row_groups=row_groups,
        partials=row_lanes * row_groups,
    )
    dispatch = kernel.dispatch(
        [rows // (4 * row_groups)],
        dict(rows=rows, cols=cols),
        w=device.upload("w", words),
        x=device.upload("x", activations),
        x_scale=device.upload("x_scale", pairs),
        scale=device.upload("scale", scale),
        y=y,
    )
    run(device, Plan([dispatch]))
    want = scale * (w.astype(np.float64) @ x)
    # Sums of cols products in some order; int4 adds and takes away 8 a column.
    terms = scale * ((np.abs(w.astype(np.float64)) + 16) @ np.abs(x))
    assert_close(device.read(y, np.float32, (rows,)), want, cols * F32 * terms)


def test_every_kernel_of_a_shape_gets_a_row() -> None:
    rows = list(bench_kernels.bench_kernels(Device.open(), [(64, 96)], 3.0, (1, 8), (1,)))
    assert [(row.kernel, row.tokens) for row in rows] == [
        ("matvec", 1), ("matvec", 8), ("matvec", 1), ("matvec", 8),
        ("f16", 1), ("int8", 1), ("int4", 1),
    ]  # fmt: skip
    assert all(0 < row.fastest <= row.microseconds <= row.slowest for row in rows)
    table = bench_kernels.markdown(rows)
    assert table.count("\n") == len(rows) + 1 and "100 %" in table
    assert [row.slots for row in rows[4:]] == [2.8, 0.8, 0.95]
    assert f"| {rows[0].slots:.1f} |" in table.splitlines()[2]


def test_slots_of_a_coded_weight() -> None:
    assert 32 * slots.coded(0, 2, 1) == 241  # 242 in the machine code
    assert slots.coded(0, 4, 1) < slots.coded(0, 2, 1) < slots.coded(2, 2, 1) < slots.coded(3, 2, 1)
    assert slots.coded(2, 2, 8) < 2 * slots.coded(2, 2, 1)  # a weight is decoded once


def test_profile_counts_every_launch(tmp_path: Path, tiny_config: ModelConfig) -> None:
    write_synthetic(tiny_config, tmp_path / "tiny.safetensors", 4)
    engine = Engine(WeightsFile.open(tmp_path / "tiny.safetensors"), Device.open(), context=40)
    rows = profile.profile(engine)
    assert rows[-1].kernel == "step"
    assert {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} < {row.matrix for row in rows}
    assert sum(row.launches for row in rows[:-1]) == rows[-1].launches - 1  # but sample_token
    assert rows[-1].microseconds_per_token > 0
    assert engine.logits([1, 2]).shape == (2, tiny_config.vocab_size)  # it works as before
    engine.device.timestamps = False
    with pytest.raises(DeviceError, match="has no timestamps"):
        profile.profile(engine)
