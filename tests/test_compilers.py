"""Kernels are compiled by threads: each once, several at a time, and what is wrong comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wgpu
from tiny_model import CONFIG, random_source

from engine import Engine
from engine.device import Device
from engine.kernel import Kernels
from engine.plan import Plan, run
from weights.convert import CalibrationText, convert
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu


@pytest.fixture
def device() -> Device:
    return Device.open()


def watch(
    monkeypatch: pytest.MonkeyPatch, device: Device, compiling: Callable[[str], object]
) -> list[str]:
    """The kernels that are compiled; `compiling` is called as each begins to be."""
    create, names = device.wgpu.create_compute_pipeline, []

    def watched(**options: Any) -> Any:
        names.append(options["label"])
        compiling(options["label"])
        return create(**options)

    monkeypatch.setattr(device.wgpu, "create_compute_pipeline", watched)
    return names


def swiglu(kernels: Kernels, n_groups: int = 1, lanes: int = 64) -> Any:
    device = kernels.device
    return kernels.get("swiglu", lanes=lanes, digits=1, splits=1).dispatch(
        [n_groups],
        dict(hidden_dim=32, n_blocks=1, tokens=1),
        **{name: device.empty(name, 1024) for name in ("y", "x_digits", "x_scale")},
    )


def test_several_at_a_time_and_each_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)  # it breaks where one waits for the other
    names = watch(monkeypatch, device, lambda name: both.wait())
    kernels = Kernels(device)
    plan = Plan([swiglu(kernels, 1), swiglu(kernels, 2), swiglu(kernels, 1, lanes=32)])
    run(device, plan, plan)
    kernels.wait()
    assert names == ["swiglu"] * 2


def test_what_has_no_dispatch_is_not_compiled(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = watch(monkeypatch, device, lambda name: None)
    kernels = Kernels(device)
    kernels.get("swiglu", lanes=64, digits=1, splits=1)
    kernels.wait()
    assert names == []


def test_an_engine_is_not_open_before_all_are_compiled(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So an error of a driver is one of opening, and says of which kernel."""

    module = device.shader_module

    def spoiled(label: str, code: str) -> Any:
        return module(label, code.replace("fn main", "fn maim") if label == "attention" else code)

    path = tmp_path / "tiny.safetensors"
    convert(random_source(CONFIG), path, 6, text=CalibrationText(0), progress=False)
    monkeypatch.setattr(device, "shader_module", spoiled)
    with pytest.raises(wgpu.GPUError, match="attention"):
        Engine(WeightsFile.open(path), device)
