"""What an engine takes on a device: as planned, as allocated, and where there is too little."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_engine import ADAPTERS, CONTEXT, open_device
from small_engine import files as files
from small_engine import open_engine as open_engine
from wgpu import GPUError

from engine.errors import DeviceError
from engine.generate import Engine
from engine.memory import Wanted
from engine.sampler import Sampling
from weights.store import WeightsFile
from weights.synthetic import SHAPES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("exact", [False, True])
def test_memory(
    files: dict[str, WeightsFile], open_engine: Callable[..., Engine], adapter: str, exact: bool
) -> None:
    engine = open_engine(adapter, "awkward", exact=exact)
    c, memory = engine.config, engine.memory()
    # Heads of 10 are padded to 16: a load of 16 bytes takes 4 elements of each half.
    assert memory.cache_bytes == 2 * c.n_layers * CONTEXT * c.n_kv_heads * 16 * (4 if exact else 2)
    assert memory.weights_bytes > sum(
        files["awkward"].matrix(name).words.nbytes for name in files["awkward"].matrix_names
    )
    assert memory.scratch_bytes > 0
    parts = memory.weights_bytes + memory.cache_bytes + memory.scratch_bytes
    assert memory.total_bytes == parts == engine.device.allocated_bytes
    before = engine.device.allocated_bytes
    engine.logits([1, 2, 3])
    list(engine.generate([1, 2, 3], 30, Sampling(temperature=1.0)))
    assert engine.device.allocated_bytes == before  # everything was made at load


def test_buffers_above_the_binding_limit_are_split_by_rows(
    files: dict[str, WeightsFile], open_engine: Callable[..., Engine]
) -> None:
    weights, ids = files["awkward tied"], [0, 300, 31, 7, 299, 150, 151, 256, 64]
    whole = open_engine("software", "awkward tied").logits(ids)
    device = open_device("software")
    device.max_binding_bytes = 1 << 14
    engine = Engine(weights, device, exact=True, context=64)
    assert len(engine._model.embed_tokens.parts) > 1
    assert np.array_equal(engine.logits(ids), whole)
    with pytest.raises(
        DeviceError, match=r"a cache of 640 positions .*use --context 128 or less"
    ) as e:
        Engine(weights, device, exact=True, context=640)
    assert "\n" not in str(e.value)
    Engine(weights, device, exact=True, context=128)


def test_a_device_without_room_is_told_what_fits(
    files: dict[str, WeightsFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is allocated where the free memory is known, otherwise when it runs out."""
    weights, device = files["plain"], open_device("software")
    plan = Wanted(weights, device, 640, exact=True).memory()
    fewer = Wanted(weights, device, 144, exact=True).memory()
    per_position = (plan.total_bytes - fewer.total_bytes) // 496
    monkeypatch.setattr(device, "free_bytes", lambda: plan.total_bytes - 96 * per_position)
    with pytest.raises(DeviceError, match=r"takes about .* MB: weights .*use --context 544 or "):
        Engine(weights, device, exact=True, context=640)
    assert device.allocated_bytes == 0
    Engine(weights, device, exact=True, context=544)
    monkeypatch.setattr(device, "free_bytes", lambda: 1000)
    with pytest.raises(DeviceError, match="a smaller model, fewer bits, or another adapter"):
        Engine(weights, device, exact=True, context=540)

    device = open_device("gpu")
    assert device.free_bytes() is None
    whole = Engine(weights, open_device("gpu"), exact=True, context=640).memory()
    create, limit = device.wgpu.create_buffer, whole.total_bytes - whole.cache_bytes // 2

    def scarce(**options: Any) -> Any:
        if device.allocated_bytes + options["size"] > limit:
            raise GPUError("out of memory")
        return create(**options)

    monkeypatch.setattr(device.wgpu, "create_buffer", scarce)
    with pytest.raises(DeviceError, match=r"use --context \d+ or less") as e:
        Engine(weights, device, exact=True, context=640)
    fits = int(re.search(r"--context (\d+)", str(e.value))[1])
    assert 0 < fits < 640


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("exact", [False, True])
def test_the_plan_is_near_what_is_allocated(
    files: dict[str, WeightsFile], open_engine: Callable[..., Engine], adapter: str, exact: bool
) -> None:
    engine = open_engine(adapter, "awkward", exact=exact)
    wanted = Wanted(files["awkward"], engine.device, CONTEXT, exact)
    plan, found = wanted.memory(), engine.memory()
    assert plan.cache_bytes == found.cache_bytes
    # Of so small a model.
    assert plan.scratch_bytes == pytest.approx(found.scratch_bytes, rel=0.35)
    assert plan.total_bytes == pytest.approx(found.total_bytes, rel=0.25)


@pytest.mark.parametrize("name", SHAPES)
def test_what_decoding_needs_besides(name: str) -> None:
    """On a GPU at most 100 MiB beside weights and cache, up to 8 G parameters."""
    config, gpu = SHAPES[name], SimpleNamespace(software=False, workgroup_memory=1 << 15)
    weights = SimpleNamespace(config=config, matrix_names=(), stored_bits=int, lossless=False)
    plan = Wanted(weights, gpu, 4096).memory()  # type: ignore[arg-type]
    assert plan.scratch_bytes <= 100 << 20
