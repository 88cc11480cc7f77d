"""The keys and values of the positions read so far: f16, or f32 for the exact mode.

One sequence alone has its positions in order. Of several at once each has blocks of BLOCK positions
wherever there was room, and a table of them (engine/blocks.py, shaders/shared/pages.wgsl).

Rounding to f16 turns differences of f32 rounding into differences of f16 rounding wherever a value
lies near a boundary: enough, through 30 layers, to move a logit by 0.01. An exact mode cannot have
that.
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


def half_padded(config: ModelConfig) -> int:
    """Pairs (i, i + head_dim / 2) per position and head, rounded up to loads of 16 bytes."""
    return -(-(config.head_dim // 2) // 4) * 4


@dataclass(frozen=True)
class KVCache:
    """Per layer one buffer each for keys and values: u32 (n_kv_heads, max_pos, 2 if f32 else 1,
    half_padded), of whole blocks.
    """

    max_pos: int
    f32: bool
    keys: list[Any]
    values: list[Any]
    shape: tuple[int, ...]  # of any of them
    pos_axis: int = 1

    @classmethod
    def empty(cls, device: Device, config: ModelConfig, max_pos: int, f32: bool) -> KVCache:
        shape = cls._shape(config, max_pos, f32)
        size = cls.buffer_bytes(config, max_pos, f32)
        names = [f"layers.{i}" for i in range(config.n_layers)]
        return cls(
            shape[1],
            f32,
            [device.empty(f"{name}.k_cache", size) for name in names],
            [device.empty(f"{name}.v_cache", size) for name in names],
            shape,
        )

    @staticmethod
    def _shape(config: ModelConfig, max_pos: int, f32: bool) -> tuple[int, ...]:
        return config.n_kv_heads, -(-max_pos // BLOCK) * BLOCK, 2 if f32 else 1, half_padded(config)

    @classmethod
    def buffer_bytes(cls, config: ModelConfig, max_pos: int, f32: bool) -> int:
        """Of each layer's keys, and of its values."""
        return 4 * math.prod(cls._shape(config, max_pos, f32))

    @property
    def _buffers(self) -> Iterator[tuple[str, Any]]:
        for i, pair in enumerate(zip(self.keys, self.values, strict=True)):
            yield from zip((f"layers.{i}.keys", f"layers.{i}.values"), pair, strict=True)

    @property
    def n_blocks(self) -> int:
        return self.max_pos // BLOCK

    def shapes(self, n_pos: int) -> dict[str, tuple[int, ...]]:
        """Of what `read` gives: a buffer's, with `n_pos` positions."""
        shape = *self.shape[: self.pos_axis], n_pos, *self.shape[self.pos_axis + 1 :]
        return {name: shape for name, _ in self._buffers}

    def read(self, device: Device, n_pos: int) -> Iterator[tuple[str, npt.NDArray[np.uint32]]]:
        """The first `n_pos` positions, buffer by buffer."""
        first = (*[slice(None)] * self.pos_axis, slice(n_pos))
        for name, buffer in self._buffers:
            yield name, device.read(buffer, np.uint32, self.shape)[first]

    def write(self, device: Device, tensors: Mapping[str, npt.NDArray[np.uint32]]) -> None:
        """Put back what `read` gave, into a cache of any length that holds it."""
        n_outer = math.prod(self.shape[: self.pos_axis])
        stride = 4 * math.prod(self.shape[self.pos_axis :])
        for name, buffer in self._buffers:
            for i, run in enumerate(tensors[name].reshape(n_outer, -1)):
                device.write(buffer, run, i * stride)
