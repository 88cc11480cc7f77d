"""The GPU: adapters, buffers, shader modules. Knows nothing of kernels, weights or models."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import wgpu
from wgpu.backends.wgpu_native import GPUShaderModule, _api
from wgpu.backends.wgpu_native.extras import set_instance_extras

from engine.errors import DeviceError, DeviceLostError, OutOfMemoryError
from engine.interrupt import uninterrupted

STORAGE = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC
UNIFORM = wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST
IMAGE_FORMAT = wgpu.TextureFormat.rgba32uint  # a chunk of 16 bytes
_IMAGE_WIDTH, _CHUNK_BYTES = 1024, 16  # shaders/shared/words_image.wgsl

# The adapter's own maximum is asked for: weights need large bindings, the matvec as much workgroup
# memory as there is.
_RAISED_LIMITS = (
    "max-buffer-size",
    "max-storage-buffer-binding-size",
    "max-compute-workgroup-storage-size",
    "max-compute-invocations-per-workgroup",
    "max-compute-workgroup-size-x",
    "max-compute-workgroup-size-y",
)
_MOST_BUFFERS = 14  # of a kernel; without that many there are no launches that do two things
_PREFERENCE = {"DiscreteGPU": 0, "IntegratedGPU": 1, "CPU": 3}  # anything else: 2

# Without it Vulkan's window system layer, which nothing here uses, complains on stderr.
os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
# OpenGL is left out: its compute limits are below what the kernels need. To be said before the
# first look for adapters.
set_instance_extras(backends=("Primary",))


def list_adapters() -> list[Any]:
    """Adapters that can run the engine: discrete ones first, then integrated, other, software."""
    adapters: list[Any] = wgpu.gpu.enumerate_adapters_sync()
    return sorted(adapters, key=lambda a: _PREFERENCE.get(a.info["adapter_type"], 2))


def adapter_name(adapter: Any) -> str:
    return f"{adapter.info['device']} ({adapter.info['backend_type']})"


def choose_adapter(wanted: str | None = None) -> Any:
    """The preferred adapter, or the one that `wanted` names by its number or part of its name."""
    adapters = list_adapters()
    if not adapters:
        raise DeviceError(
            "no GPU adapter found: the engine needs Vulkan, Metal or DX12; install the GPU's "
            "driver, or software Vulkan (Debian: apt-get install mesa-vulkan-drivers)"
        )
    if wanted is None:
        return adapters[0]
    names = [adapter_name(adapter) for adapter in adapters]
    if wanted.isdigit() and int(wanted) < len(adapters):
        return adapters[int(wanted)]
    for adapter, name in zip(adapters, names, strict=True):
        if wanted.lower() in name.lower():
            return adapter
    listed = "; ".join(f"{i}: {name}" for i, name in enumerate(names))
    raise DeviceError(f"no adapter matches {wanted!r}; there is {listed}")


class Device:
    """One opened adapter.

    `software` says that the adapter is a CPU: kernels then avoid workgroup memory.
    `allocated_bytes` counts every buffer made here and not destroyed.
    """

    @uninterrupted()
    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter
        self.name = adapter_name(adapter)
        self.software = adapter.info["adapter_type"] == "CPU"
        self.timestamps = "timestamp-query" in adapter.features
        # Whether a barrier for storage orders what the whole device sees: shaders/shared/last.wgsl.
        self.fences = adapter.info["backend_type"] == "Vulkan"
        # Of no use to a CPU, whose vectors would hold half as many.
        self.constants = not self.software  # compiled in, see engine/kernel.py; CPUs take longer
        self.int64 = "shader-int64" in adapter.features and not self.software
        self.allocated_bytes = 0
        limits = {name: adapter.limits[name] for name in _RAISED_LIMITS}
        buffers = "max-storage-buffers-per-shader-stage"  # 8 are WebGPU's default
        limits[buffers] = min(adapter.limits[buffers], _MOST_BUFFERS)
        self.fences &= limits[buffers] == _MOST_BUFFERS
        try:
            self.wgpu = adapter.request_device_sync(
                required_features=["timestamp-query"] * self.timestamps
                + ["shader-int64"] * self.int64,
                required_limits=limits,
            )
        except Exception as error:  # wgpu raises RuntimeError and GPUError alike
            raise DeviceError(f"{self.name}: cannot be opened: {error}") from error
        self.queue = self.wgpu.queue
        # A driver takes 50 to 100 ms for a kernel on an H100's host, and a model has a hundred.
        threads = min(8, max(2, os.cpu_count() or 1))
        self.compilers = ThreadPoolExecutor(threads, "compiler")
        # An offset of 4 GiB no longer fits the u32 bit positions of a row: 2^32 bits are 512 MiB.
        self.max_binding_bytes = min(
            limits["max-storage-buffer-binding-size"], limits["max-buffer-size"], 1 << 29
        )
        if self.software:  # chunks are in images
            rows = self.wgpu.limits["max-texture-dimension-2d"]
            self.max_binding_bytes = min(self.max_binding_bytes, rows * _IMAGE_WIDTH * _CHUNK_BYTES)
        self.workgroup_memory = limits["max-compute-workgroup-storage-size"]
        self.max_workgroup_lanes = limits["max-compute-invocations-per-workgroup"]

    @property
    def variants(self) -> tuple[str, ...]:
        """Of what kernels import, see `engine.kernel.shader_source`."""
        return ("image",) * self.software + ("wide",) * self.int64

    @classmethod
    def open(cls, wanted: str | None = None) -> Device:
        return cls(choose_adapter(wanted))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What wgpu raises inside, as DeviceLostError or OutOfMemoryError where it is one."""
        try:
            yield
        except (wgpu.GPUError, RuntimeError) as error:  # a mapping that fails raises the latter
            if "lost" in str(error):
                raise DeviceLostError(
                    f"{self.name}: the device was lost (its driver was reset, or it was unplugged);"
                    " open the model again"
                ) from error
            if isinstance(error, wgpu.GPUOutOfMemoryError):
                raise OutOfMemoryError(
                    f"{self.name}: out of memory beside the {self.allocated_bytes / 2**20:.0f} MiB "
                    "in use; close other programs, or use a smaller --context"
                ) from error
            raise

    def free_bytes(self) -> int | None:
        """Memory that is left, None where nobody tells: wgpu does not, a CPU's is the host's."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines() if self.software else []
        except OSError:  # not on Linux
            return None
        sizes = dict(line.split(":") for line in lines)
        return 1024 * int(sizes["MemAvailable"].split()[0]) if "MemAvailable" in sizes else None

    @uninterrupted()
    def empty(self, label: str, size_bytes: int, usage: int = STORAGE) -> Any:
        """A zeroed buffer."""
        size = max(16, -(-size_bytes // 16) * 16)
        # (What is bound as uniform stays within 64 KiB, which every adapter allows.)
        if size > self.max_binding_bytes and not usage & wgpu.BufferUsage.UNIFORM:
            raise DeviceError(
                f"{self.name}: {label} needs {size / 2**20:.0f} MiB in one buffer, the adapter "
                f"allows {self.max_binding_bytes / 2**20:.0f} MiB; use a smaller --context or "
                "another adapter"
            )
        create = self.wgpu.create_buffer
        return self._made(label, size, lambda: create(label=label, size=size, usage=usage))

    def _made(self, label: str, size_bytes: int, create: Callable[[], Any]) -> Any:
        try:
            made = create()
        except wgpu.GPUError as error:
            raise OutOfMemoryError(
                f"{self.name}: no room for {label} ({size_bytes / 2**20:.0f} MiB beside the "
                f"{self.allocated_bytes / 2**20:.0f} MiB already in use): {error}"
            ) from error
        self.allocated_bytes += size_bytes
        return made

    def destroy(self, buffer: Any) -> None:
        """Free a buffer's or a texture's memory once the GPU is done with it."""
        self.allocated_bytes -= size_bytes(buffer)
        buffer.destroy()

    def upload(
        self, label: str, array: np.ndarray, usage: int = STORAGE, padding_bytes: int = 0
    ) -> Any:
        """A buffer with the array's bytes, then zeros."""
        data = np.ascontiguousarray(array)
        buffer = self.empty(label, data.nbytes + padding_bytes, usage)
        if data.nbytes:
            self.write(buffer, data)
        return buffer

    @uninterrupted()
    def upload_chunks(self, label: str, words: np.ndarray, padding_bytes: int) -> Any:
        """What shaders/shared/words.wgsl reads: words, then zeros. A buffer, or a texture."""
        if not self.software:
            return self.upload(label, words, padding_bytes=padding_bytes)
        row_bytes = _IMAGE_WIDTH * _CHUNK_BYTES
        height = -(-(words.nbytes + padding_bytes) // row_bytes)
        size = _IMAGE_WIDTH, height, 1
        create = self.wgpu.create_texture
        usage = wgpu.TextureUsage.STORAGE_BINDING | wgpu.TextureUsage.COPY_DST
        texture = self._made(
            label,
            height * row_bytes,
            lambda: create(label=label, size=size, format=IMAGE_FORMAT, usage=usage),
        )
        data = np.zeros(height * row_bytes // 4, np.uint32)
        data[: words.size] = words
        layout = dict(bytes_per_row=row_bytes, rows_per_image=height)
        self.queue.write_texture(dict(texture=texture), data, layout, size)
        return texture

    def write(self, buffer: Any, array: np.ndarray, offset_bytes: int = 0) -> None:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        whole = data.size // 4 * 4  # copies are in units of four bytes
        if whole:
            self.queue.write_buffer(buffer, offset_bytes, data[:whole])
        if whole < data.size:
            last = np.zeros(4, np.uint8)
            last[: data.size - whole] = data[whole:]
            self.queue.write_buffer(buffer, offset_bytes + whole, last)

    @uninterrupted()
    def read(self, buffer: Any, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """The first elements of a buffer; waits for all that was submitted before."""
        count = int(np.prod(shape))
        size = -(-count * np.dtype(dtype).itemsize // 4) * 4
        data = self.queue.read_buffer(buffer, 0, size)
        return np.frombuffer(data, dtype, count).reshape(shape).copy()

    def submit(self, *commands: Any) -> int:
        """Queue command buffers; returns what `wait` takes."""
        handles = _api.new_array("WGPUCommandBuffer[]", [each._internal for each in commands])
        index: int = _api.libf.wgpuQueueSubmitForIndex(self.queue._internal, len(commands), handles)
        return index

    def wait(self, submission: int) -> None:
        """Until this is done, and not what was submitted after it."""
        index = _api.ffi.new("WGPUSubmissionIndex *", submission)
        _api.libf.wgpuDevicePoll(self.wgpu._internal, True, index)

    def shader_module(self, label: str, code: str) -> Any:
        """A module without run-time checks, where the backend library can make one.

        They cost 1.5 times on an H100, up to 5 times on llvmpipe. Nothing is lost: whatever could
        lead a shader astray is checked at load.
        """
        create = getattr(_api.libf, "wgpuDeviceCreateShaderModuleTrusted", None)
        if create is None:
            return self.wgpu.create_shader_module(label=label, code=code)
        ffi, lib = _api.ffi, _api.lib
        source = _api.new_struct_p("WGPUShaderSourceWGSL *", code=_api.to_c_string_view(code))
        source[0].chain.next = ffi.NULL
        source[0].chain.sType = lib.WGPUSType_ShaderSourceWGSL
        descriptor = _api.new_struct_p(
            "WGPUShaderModuleDescriptor *",
            nextInChain=ffi.cast("WGPUChainedStruct *", source),
            label=_api.to_c_string_view(label),
        )
        return GPUShaderModule(label, create(self.wgpu._internal, descriptor, 0), self.wgpu)


def size_bytes(resource: Any) -> int:
    """Of a buffer or of a texture."""
    if isinstance(resource, wgpu.GPUTexture):
        return resource.width * resource.height * _CHUNK_BYTES
    size: int = resource.size
    return size


_outcomes: dict[int, tuple[int, str]] = {}  # of mappings, by their numbers
_numbers = itertools.count(1)


@_api.ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")
def _note_outcome(status: int, message: Any, number: Any, _: Any) -> None:
    number = int(_api.ffi.cast("uintptr_t", number))
    _outcomes[number] = status, _api.from_c_string_view(message)


class Readback:
    """A small buffer through which the GPU hands results to the host, used again and again."""

    def __init__(self, device: Device, label: str, size_bytes: int) -> None:
        self._device, self._label = device, label
        usage = wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.MAP_READ
        self.buffer = device.empty(label, size_bytes, usage)
        self._submission = 0

    def submit(self, *commands: Any) -> None:
        """Queue command buffers of which one copies to `buffer`."""
        self._submission = self._device.submit(*commands)

    @uninterrupted()
    def read(self) -> np.ndarray:
        """uint32, once the GPU has done what was given to `submit`.

        wgpu's own mapping is waited for by a thread that may go on waiting until the whole queue is
        empty, and takes a quarter of a millisecond where it does not. Here the wait is over before
        the mapping begins, and all happens within the next poll, on this thread.

        A Ctrl-C within a mapping could leave a lock of wgpu's locked, or the buffer mapped. It
        comes afterwards: that long a wait for the GPU could not be interrupted anyway.
        """
        device, handle, size = self._device, self.buffer._internal, self.buffer.size
        ffi, lib, libf = _api.ffi, _api.lib, _api.libf
        device.wait(self._submission)
        number = next(_numbers)
        libf.wgpuBufferMapAsync(
            handle,
            lib.WGPUMapMode_Read,
            0,
            size,
            _api.new_struct(
                "WGPUBufferMapCallbackInfo",
                mode=lib.WGPUCallbackMode_AllowProcessEvents,
                callback=_note_outcome,
                userdata1=ffi.cast("void *", number),
            ),
        )
        while number not in _outcomes:  # (again only if another thread is about to note it)
            libf.wgpuDevicePoll(device.wgpu._internal, False, ffi.NULL)
        status, message = _outcomes.pop(number)
        if status != lib.WGPUMapAsyncStatus_Success:
            raise RuntimeError(f"could not map {self._label}: {message} ({status})")
        mapped = libf.wgpuBufferGetConstMappedRange(handle, 0, size)
        values = np.frombuffer(bytes(ffi.buffer(mapped, size)), np.uint32)
        libf.wgpuBufferUnmap(handle)
        return values
