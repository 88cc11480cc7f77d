"""What a model takes on a device: beforehand about, afterwards to the byte; and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.device import Device
from engine.errors import DeviceError
from model import prompt
from model.activations import UNIFORM_BYTES
from model.kv_cache import BLOCK, KINDS, KVCache
from model.llama import MAX_TOKENS
from model.operations import AttentionCut
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


@dataclass(frozen=True)
class Wanted:
    """An engine that may be made. `cache`: the kind of it, but for exact activations;
    `cache_positions`: for how many it has room, if for more than one context.
    """

    weights: WeightsFile
    device: Device
    context: int
    exact: bool = False
    cache: str = "f16"
    cache_positions: int = 0

    @property
    def cache_kind(self) -> str:
        """Exact activations keep theirs in f32."""
        return "f32" if self.exact else self.cache

    @property
    def positions(self) -> int:
        return max(self.context, self.cache_positions)

    def memory(self) -> Memory:
        """About what it will take: the cache to the byte, the rest to some 15 %."""
        c, weights, software = self.weights.config, self.weights, self.device.software
        stored = sum(map(weights.stored_bits, weights.matrix_names)) // 8
        rows = [matrix.rows for matrix in layout.matrices(c)]
        # Each matrix has tables; rows start at whole chunks of 16 bytes, in images of whole rows if
        # it is for a CPU, and beside them lie a description of each and where it may be entered.
        tables = len(rows) * ((1 << 16) + (1 << 13) if software else 1 << 13)
        on_device = stored * 21 // 20 + 48 * sum(rows) + tables
        widths = c.vocab_size + 4 * (c.dim + c.hidden_dim + c.q_dim)
        partial = c.n_heads * AttentionCut.of(c, self.device).n_splits * (c.head_dim + 2)
        scratch = 4 * MAX_TOKENS * (widths + partial)
        scratch += 4 * self.context * c.head_dim * (2 if c.unrotated_layers else 1)  # RoPE
        scratch += 16 * c.vocab_size  # where each token's row of the embedding is
        if not (self.exact or weights.lossless):
            scratch += prompt.scratch_bytes(c, self.context, software=software)
        if software:  # xn, attn and h can be read as uniform memory
            scratch += 3 * UNIFORM_BYTES
        cache = KVCache.size_bytes(c, self.positions, self.cache_kind)
        return Memory(on_device, cache, scratch)

    def check_room(self) -> None:
        """DeviceError, before anything is allocated, where it is known that it will not fit."""
        c, device, bits = self.weights.config, self.device, KINDS[self.cache_kind][0]
        buffer = KVCache.buffer_bytes(c, self.positions, bits)
        if buffer > device.max_binding_bytes:
            block = KVCache.buffer_bytes(c, BLOCK, bits)
            raise DeviceError(
                f"{device.name}: a cache of {self.positions} positions needs buffers of "
                f"{buffer / 2**20:.0f} MiB, the adapter allows "
                f"{device.max_binding_bytes / 2**20:.0f} MiB; "
                f"{_advice(BLOCK * (device.max_binding_bytes // block))}"
            )
        free = device.free_bytes()
        if free is not None and self.memory().total_bytes > free:
            raise self.no_room(free)

    def no_room(self, room_bytes: int) -> DeviceError:
        """What to say where the device has room for `room_bytes` only."""
        c, context = self.weights.config, self.context
        per_position = KVCache.size_bytes(c, BLOCK, self.cache_kind) // BLOCK + 4 * c.head_dim
        alone = replace(self, cache_positions=0).memory().total_bytes
        fixed = alone - context * per_position
        fits = min(context - 1, max(0, room_bytes - fixed) // per_position // BLOCK * BLOCK)
        return DeviceError(
            f"{self.device.name}: no room for {self.weights.path} with a context of {context}: it "
            f"takes about {self.memory()}; there are {room_bytes / 1e6:,.1f} MB; {_advice(fits)}"
        )


def _advice(fits: int) -> str:
    if fits < 1:
        return "use a smaller model, fewer bits, or another adapter"
    return f"use --context {fits} or less, or another adapter"
