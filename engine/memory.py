"""What a model takes on a device: beforehand about, afterwards to the byte; and what would fit."""

from __future__ import annotations

from dataclasses import dataclass

from engine.device import Device
from engine.errors import DeviceError
from model import prompt
from model.kv_cache import BLOCK, KINDS, KVCache
from model.llama import MAX_TOKENS
from weights import layout
from weights.store import WeightsFile


@dataclass(frozen=True)
class Memory:
    """Bytes on the device."""

    weights_bytes: int
    cache_bytes: int
    scratch_bytes: int

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.weights_bytes + other.weights_bytes,
            self.cache_bytes + other.cache_bytes,
            self.scratch_bytes + other.scratch_bytes,
        )

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.scratch_bytes

    def __str__(self) -> str:
        sizes = self.total_bytes, self.weights_bytes, self.cache_bytes, self.scratch_bytes
        total, weights, cache, scratch = (f"{size / 1e6:,.1f}" for size in sizes)
        return f"{total} MB: weights {weights}, cache {cache}, scratch {scratch}"


def planned(
    weights: WeightsFile,
    device: Device,
    context: int,
    exact: bool,
    cache: str = "f16",
    cache_positions: int = 0,
) -> Memory:
    """About what an engine will take: the cache to the byte, the rest to some 15 %.

    `cache`: its kind, but for exact activations; `cache_positions`: if it has room for more than
    one context.
    """
    c = weights.config
    stored = sum(map(weights.stored_bits, weights.matrix_names)) // 8
    rows = [matrix.rows for matrix in layout.matrices(c)]
    # Each matrix has tables; rows start at whole chunks of 16 bytes, and beside them lie a
    # description of each and where it may be entered.
    tables = len(rows) * (1 << 16 if device.software else 1 << 13)
    on_device = stored * 21 // 20 + 48 * sum(rows) + tables
    activations = 4 * MAX_TOKENS * (c.vocab_size + 4 * (c.dim + c.hidden_dim + c.q_dim))
    rope = 4 * context * c.head_dim * (2 if c.unrotated_layers else 1)
    prompts = 0
    if not (exact or weights.lossless):
        prompts = prompt.scratch_bytes(c, context, software=device.software)
    positions = max(context, cache_positions)
    cache_bytes = KVCache.size_bytes(c, positions, cache_kind(exact, cache))
    return Memory(on_device, cache_bytes, activations + rope + prompts)


def check_room(
    weights: WeightsFile,
    device: Device,
    context: int,
    exact: bool,
    cache: str = "f16",
    cache_positions: int = 0,
) -> None:
    """DeviceError, before anything is allocated, where it is known that it will not fit."""
    positions, bits = max(context, cache_positions), KINDS[cache_kind(exact, cache)][0]
    buffer = KVCache.buffer_bytes(weights.config, positions, bits)
    if buffer > device.max_binding_bytes:
        block = KVCache.buffer_bytes(weights.config, BLOCK, bits)
        raise DeviceError(
            f"{device.name}: a cache of {positions} positions needs buffers of "
            f"{buffer / 2**20:.0f} MiB, the adapter allows "
            f"{device.max_binding_bytes / 2**20:.0f} MiB; "
            f"{_advice(BLOCK * (device.max_binding_bytes // block))}"
        )
    free = device.free_bytes()
    plan = planned(weights, device, context, exact, cache, positions)
    if free is not None and plan.total_bytes > free:
        raise no_room(weights, device, context, exact, free, cache, positions)


def no_room(
    weights: WeightsFile,
    device: Device,
    context: int,
    exact: bool,
    room_bytes: int,
    cache: str = "f16",
    cache_positions: int = 0,
) -> DeviceError:
    """What to say where the device has room for `room_bytes` only."""
    c = weights.config
    plan = planned(weights, device, context, exact, cache, cache_positions)
    per_position = KVCache.size_bytes(c, BLOCK, cache_kind(exact, cache)) // BLOCK + 4 * c.head_dim
    fixed = planned(weights, device, context, exact, cache).total_bytes - context * per_position
    fits = min(context - 1, max(0, room_bytes - fixed) // per_position // BLOCK * BLOCK)
    return DeviceError(
        f"{device.name}: no room for {weights.path} with a context of {context}: it takes about "
        f"{plan}; there are {room_bytes / 1e6:,.1f} MB; {_advice(fits)}"
    )


def cache_kind(exact: bool, cache: str) -> str:
    """Exact activations keep theirs in f32."""
    return "f32" if exact else cache


def _advice(fits: int) -> str:
    if fits < 1:
        return "use a smaller model, fewer bits, or another adapter"
    return f"use --context {fits} or less, or another adapter"
