"""The keys and values of the positions read so far: f16, or f32 for the exact mode.

Rounding to f16 turns differences of f32 rounding into differences of f16 rounding wherever a value
lies near a boundary: enough, through 30 layers, to move a logit by 0.01. An exact mode cannot have
that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.device import Device
from model.config import ModelConfig


def half_padded(config: ModelConfig) -> int:
    """Pairs (i, i + head_dim / 2) per position and head, rounded up to loads of 16 bytes."""
    return -(-(config.head_dim // 2) // 4) * 4


@dataclass(frozen=True)
class KVCache:
    """Per layer one buffer each for keys and values: u32 (n_kv_heads, max_pos, 2 if f32 else 1,
    half_padded).
    """

    max_pos: int
    f32: bool
    keys: list[Any]
    values: list[Any]

    @classmethod
    def empty(cls, device: Device, config: ModelConfig, max_pos: int, f32: bool) -> KVCache:
        size = (8 if f32 else 4) * config.n_kv_heads * max_pos * half_padded(config)
        names = [f"layers.{i}" for i in range(config.n_layers)]
        return cls(
            max_pos,
            f32,
            [device.empty(f"{name}.k_cache", size) for name in names],
            [device.empty(f"{name}.v_cache", size) for name in names],
        )
