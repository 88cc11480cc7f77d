"""The keys and values of the positions read so far: f16, f32 for the exact mode, or integers.

Rounding to f16 turns differences of f32 rounding into differences of f16 rounding wherever a value
lies near a boundary: enough, through 30 layers, to move a logit by 0.01. An exact mode cannot have
that. Integers have a scale for each head and position, in 4 bits for each half of it. Keys take 8
bits wherever values take 4: a few of their channels are much larger than the rest, and in 4 bits
the rest would be lost.

One sequence alone has its positions in order. Of several at once each has blocks of BLOCK positions
wherever there was room, and a table of them (engine/blocks.py, shaders/shared/pages.wgsl).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.device import Device
from model.config import ModelConfig

BLOCK = 16  # positions; shaders/shared/pages.wgsl

# Bits of keys and of values, by the name of the kind.
KINDS = {"f32": (32, 32), "f16": (16, 16), "int8": (8, 8), "int4": (8, 4)}
_SCALES = {8: 1, 4: 2}  # of a head's position, by bits


def half_padded(config: ModelConfig) -> int:
    """Pairs (i, i + head_dim / 2) per position and head, rounded up to loads of 16 bytes."""
    return -(-(config.head_dim // 2) // 4) * 4


@dataclass(frozen=True)
class KVCache:
    """Per layer one buffer each for keys and values, of whole blocks: u32 (n_kv_heads, max_pos,
    words), and of integers f32 scales, (n_kv_heads, max_pos) or for the halves of heads
    (n_kv_heads, max_pos, 2); shaders/shared/cache.wgsl.
    """

    kind: str
    max_pos: int
    n_kv_heads: int
    half_padded: int
    keys: list[Any]
    values: list[Any]

    @classmethod
    def empty(cls, device: Device, config: ModelConfig, max_pos: int, kind: str) -> KVCache:
        sizes = [cls.buffer_bytes(config, max_pos, bits) for bits in KINDS[kind]]
        keys, values = (
            [device.empty(f"layers.{i}.{part}_cache", size) for i in range(config.n_layers)]
            for part, size in zip("kv", sizes, strict=True)
        )
        n_pos = _whole_blocks(max_pos)
        return cls(kind, n_pos, config.n_kv_heads, half_padded(config), keys, values)

    @staticmethod
    def buffer_bytes(config: ModelConfig, max_pos: int, bits: int) -> int:
        """Of a layer's keys or values, in so many bits."""
        words = _words(half_padded(config), bits) + _SCALES.get(bits, 0)
        return 4 * config.n_kv_heads * _whole_blocks(max_pos) * words

    @classmethod
    def size_bytes(cls, config: ModelConfig, max_pos: int, kind: str) -> int:
        """Of all layers."""
        sizes = (cls.buffer_bytes(config, max_pos, bits) for bits in KINDS[kind])
        return config.n_layers * sum(sizes)

    @property
    def n_blocks(self) -> int:
        return self.max_pos // BLOCK

    @property
    def overrides(self) -> dict[str, int]:
        """Of kernels that use it."""
        key_bits, value_bits = KINDS[self.kind]
        return dict(half_quads=self.half_padded // 4, key_bits=key_bits, value_bits=value_bits)

    def shapes(self, n_pos: int) -> dict[str, tuple[int, ...]]:
        """Of what `read` gives of `n_pos` positions."""
        return {name: (self.n_kv_heads, n_pos, *words) for name, _, _, words in self._parts()}

    def read(self, device: Device, n_pos: int) -> Iterator[tuple[str, npt.NDArray[np.uint32]]]:
        """The first `n_pos` positions, part by part."""
        for name, buffer, first, words in self._parts():
            shape = self.n_kv_heads, self.max_pos, *words
            whole = device.read(buffer, np.uint32, (first + math.prod(shape),))
            yield name, whole[first:].reshape(shape)[:, :n_pos]

    def write(self, device: Device, tensors: Mapping[str, npt.NDArray[np.uint32]]) -> None:
        """Put back what `read` gave, into a cache of any length that holds it."""
        for name, buffer, first, words in self._parts():
            for head, run in enumerate(tensors[name]):
                at = first + head * self.max_pos * math.prod(words)
                device.write(buffer, run, 4 * at)

    def _parts(self) -> Iterator[tuple[str, Any, int, tuple[int, ...]]]:
        """Name, buffer, first word there, and words of a head's position."""
        for i, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for part, buffer, bits in zip(("keys", "values"), pair, KINDS[self.kind], strict=True):
                words = _words(self.half_padded, bits)
                yield f"layers.{i}.{part}", buffer, 0, (words,)
                if n_scales := _SCALES.get(bits):
                    first = self.n_kv_heads * self.max_pos * words
                    yield f"layers.{i}.{part}_scale", buffer, first, (n_scales,)


def _words(half_padded: int, bits: int) -> int:
    """Of a head's elements at one position: vectors of four words."""
    return 4 * -(-(half_padded // 4) * bits // 16)


def _whole_blocks(max_pos: int) -> int:
    return -(-max_pos // BLOCK) * BLOCK
