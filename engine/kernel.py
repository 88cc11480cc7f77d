"""Kernels: a .wgsl file becomes a pipeline whose buffers and parameters are bound by name.

The WGSL is the single statement of a kernel's bindings, its `struct Params` and its overrides; this
module reads them there. A wrong or missing name is an error that lists what the shader declares.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import wgpu

from engine.device import IMAGE_FORMAT, UNIFORM, Device
from engine.interrupt import uninterrupted

_IMPORT = re.compile(r"^//#import (\w+)$", re.MULTILINE)
_BINDING = re.compile(r"@group\(0\) @binding\((\d+)\) var(?:<([\w, ]+)>)? (\w+):")
_PARAMS = re.compile(r"struct Params \{(.*?)\}", re.DOTALL)
_FIELD = re.compile(r"(\w+): (u32|i32|f32)")
_PARAM = re.compile(r"\bparams\.(\w+)")
_OVERRIDE = re.compile(r"^override (\w+): \w+;", re.MULTILINE)
_PARAMS_BINDING = "@group(0) @binding(0) var<uniform> params: Params;"
_KIND: dict[str, dict[str, Any]] = {
    "uniform": {"buffer": {"type": wgpu.BufferBindingType.uniform}},
    "storage, read": {"buffer": {"type": wgpu.BufferBindingType.read_only_storage}},
    "storage, read_write": {"buffer": {"type": wgpu.BufferBindingType.storage}},
    "": {
        "storage_texture": {"access": wgpu.StorageTextureAccess.read_only, "format": IMAGE_FORMAT}
    },
}
_PACK = {"u32": "I", "i32": "i", "f32": "f"}
_SUFFIX = {"u32": "u", "i32": "i", "f32": "f"}


@cache
def shader_source(name: str, variants: tuple[str, ...] = ()) -> str:
    """The text of shaders/NAME.wgsl, each `//#import X` line replaced by shaders/shared/X.wgsl, or
    by X_V.wgsl where there is one for one of the variants V.
    """
    folder = files("shaders")

    def shared(match: re.Match[str]) -> str:
        file = folder / "shared" / f"{match[1]}.wgsl"
        for variant in variants:
            if (folder / "shared" / f"{match[1]}_{variant}.wgsl").is_file():
                file = folder / "shared" / f"{match[1]}_{variant}.wgsl"
        if not file.is_file():
            raise FileNotFoundError(
                f"shaders/{name}.wgsl imports {match[1]}, but there is no {file}"
            )
        return file.read_text("utf-8")

    return _IMPORT.sub(shared, (folder / f"{name}.wgsl").read_text("utf-8"))


@dataclass(frozen=True)
class Dispatch:
    """One recorded launch: everything made beforehand, nothing to look up."""

    kernel: Kernel
    bind_group: Any
    workgroups: tuple[int, int, int]
    matrix: str  # label of the coded words that it reads, "" where there are none


class Kernel:
    """A shader with its overrides fixed, and those of its params that are `constants`.

    It is compiled from its first dispatch on, by a thread of its device: many are at once.
    """

    @uninterrupted()
    def __init__(
        self,
        device: Device,
        name: str,
        variants: tuple[str, ...] = (),
        constants: Mapping[str, int | float] | None = None,
        **overrides: int,
    ) -> None:
        code = shader_source(name, device.variants + variants)
        self.device = device
        self.name = name
        self.overrides = overrides
        self.variants = variants
        self._constants = dict(constants or {})
        self._of_constants: dict[tuple[tuple[str, int | float], ...], Kernel] = {}
        params = _PARAMS.search(code)
        self.params = _FIELD.findall(re.sub("//.*", "", params[1])) if params else []
        self._code = _with_constants(code, self._constants, self.params)
        self.bindings = {m[3]: (int(m[1]), m[2] or "") for m in _BINDING.finditer(self._code)}
        _same_names(f"{name}: overrides", overrides, _OVERRIDE.findall(self._code))
        self.layout = device.wgpu.create_bind_group_layout(
            label=name,
            entries=[
                {
                    "binding": i,
                    "visibility": wgpu.ShaderStage.COMPUTE,
                    **_KIND[kind],
                }
                for i, kind in self.bindings.values()
            ],
        )
        self._pipeline: Future[Any] | None = None

    def _compile(self) -> Any:
        device, name = self.device, self.name
        return device.wgpu.create_compute_pipeline(
            label=name,
            layout=device.wgpu.create_pipeline_layout(label=name, bind_group_layouts=[self.layout]),
            compute={
                "module": device.shader_module(name, self._code),
                "entry_point": "main",
                "constants": self.overrides,
            },
        )

    @property
    def pipeline(self) -> Any:
        """Of a kernel that has dispatches: waits until it is compiled, raises what is wrong."""
        assert self._pipeline is not None
        with uninterrupted():
            return self._pipeline.result()

    def wait(self) -> None:
        """Until all that is dispatched of it is compiled."""
        for kernel in (self, *self._of_constants.values()):
            if kernel._pipeline is not None:
                _ = kernel.pipeline

    @uninterrupted()
    def dispatch(
        self,
        workgroups: Sequence[int],
        params: Mapping[str, int | float] | None = None,
        constants: Mapping[str, int | float] | None = None,
        **buffers: Any,
    ) -> Dispatch:
        """Record a launch of workgroups (x, y, z); both mappings fill `struct Params` by name.

        A GPU has `constants` compiled in, for each set of them anew, so there must be few: what a
        launch reads first comes from far away, and all of the launch waits for it.
        A buffer may be given as (buffer, offset, size) in bytes; for an image a texture.
        """
        if constants and self.device.constants:
            key = tuple(constants.items())
            if key not in self._of_constants:
                kernel = Kernel(self.device, self.name, self.variants, constants, **self.overrides)
                self._of_constants[key] = kernel
            return self._of_constants[key].dispatch(workgroups, params, **buffers)
        params = {**self._constants, **(constants or {}), **(params or {})}
        _same_names(f"{self.name}: params", params, [field for field, _ in self.params])
        if "params" in self.bindings:
            buffers["params"] = self._pack(params)
        _same_names(f"{self.name}: buffers", buffers, self.bindings)
        group = self.device.wgpu.create_bind_group(
            label=self.name,
            layout=self.layout,
            entries=[
                {
                    "binding": self.bindings[key][0],
                    "resource": _resource(given),
                }
                for key, given in buffers.items()
            ],
        )
        if self._pipeline is None:
            self._pipeline = self.device.compilers.submit(self._compile)
        x, y, z = (*workgroups, 1, 1)[:3]
        matrix = buffers["words"].label if "words" in buffers else ""
        return Dispatch(self, group, (x, y, z), matrix)

    def _pack(self, params: Mapping[str, int | float]) -> Any:
        layout = "<" + "".join(_PACK[kind] for _, kind in self.params)
        data = struct.pack(layout, *(params[field] for field, _ in self.params))
        return self.device.upload(f"{self.name}.params", np.frombuffer(data, np.uint8), UNIFORM)


class Kernels:
    """The kernels of one device, each compiled once."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._made: dict[tuple[Any, ...], Kernel] = {}

    def get(self, name: str, *variants: str, **overrides: int) -> Kernel:
        """`variants`: of what the kernel imports, besides those that the device needs."""
        key = name, self.device.variants, variants, tuple(sorted(overrides.items()))
        if key not in self._made:
            self._made[key] = Kernel(self.device, name, variants, None, **overrides)
        return self._made[key]

    def wait(self) -> None:
        """Until all that have dispatches are compiled; raises what is wrong with one."""
        for kernel in self._made.values():
            kernel.wait()


def _with_constants(
    code: str, constants: Mapping[str, int | float], params: Sequence[tuple[str, str]]
) -> str:
    """The code with literals in the place of these params; if it has no others, they are bound no
    longer.
    """
    literals = {
        field: f"({constants[field]!r}{_SUFFIX[kind]})"
        for field, kind in params
        if field in constants
    }
    if literals and len(literals) == len(params):
        code = code.replace(_PARAMS_BINDING, "")
    return _PARAM.sub(lambda use: literals.get(use[1], use[0]), code)


def _resource(given: Any) -> Any:
    if isinstance(given, wgpu.GPUTexture):
        return given.create_view()
    given = given if isinstance(given, tuple) else (given, 0, given.size)
    return dict(zip(("buffer", "offset", "size"), given, strict=True))


def _same_names(
    what: str, given: Mapping[str, Any], declared: Sequence[str] | Mapping[str, Any]
) -> None:
    if set(given) != set(declared):
        raise TypeError(
            f"{what}: the shader declares {sorted(declared)}, given are {sorted(given)}"
        )
