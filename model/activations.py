"""What passes from launch to launch: a product's inputs and outputs, and what comes right after it;
and launches of passes of many tokens, which fit any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from engine.device import STORAGE, UNIFORM, Device
from engine.kernel import Dispatch
from model.gpu_layout import BLOCK

FLOAT = 4  # bytes of an activation, for which there are n_digits otherwise
UNIFORM_BLOCKS = 2048  # of 32 columns, all tokens together: what a kernel has in uniform memory
UNIFORM_BYTES = UNIFORM_BLOCKS * (BLOCK + 8)  # of digits and of scales


@dataclass(frozen=True)
class Activations:
    """What a matvec reads: vectors of 32 * n_blocks columns as int8 digits, and their scales.

    For matrices without loss n_digits is FLOAT, the digits are f32 (tokens, 32 * n_blocks), and
    scales have no meaning.
    """

    digits: Any  # int8 (tokens, n_digits, 32 * n_blocks)
    scale: Any  # f32 (tokens, n_blocks, 2): scale, sum of the block
    tokens: int = 0  # that matmul reads
    squares: Any = None  # f32 (n_blocks,), then zeros: shaders/shared/norm_factor.wgsl

    @classmethod
    def empty(
        cls, device: Device, label: str, tokens: int, n_digits: int, cols: int
    ) -> Activations:
        n_blocks = -(-cols // BLOCK)
        digits = np.zeros(tokens * n_digits * n_blocks * BLOCK, np.int8)
        scale = np.zeros(tokens * n_blocks * 2, np.float32)
        squares = device.empty(f"{label}.squares", n_blocks * 4)
        return replace(cls.upload(device, label, digits, scale), squares=squares)

    @classmethod
    def upload(cls, device: Device, label: str, digits: np.ndarray, scale: np.ndarray) -> Self:
        """In software adapters' memory as much as can be read as uniform memory."""
        usage = STORAGE | UNIFORM if device.software else STORAGE
        blocks = UNIFORM_BLOCKS if device.software else 0
        return cls(
            device.upload(f"{label}.digits", digits, usage, max(0, blocks * BLOCK - digits.nbytes)),
            device.upload(f"{label}.scale", scale, usage, max(0, blocks * 8 - scale.nbytes)),
        )

    def uniform(self, blocks: int) -> Activations | None:
        """The first blocks in uniform memory, if they can be read there."""
        if blocks > UNIFORM_BLOCKS or self.digits.usage & UNIFORM != UNIFORM:
            return None
        digits = self.digits, 0, UNIFORM_BLOCKS * BLOCK
        return replace(self, digits=digits, scale=(self.scale, 0, UNIFORM_BLOCKS * 8))

    @classmethod
    def for_matmul(cls, device: Device, label: str, tokens: int, cols: int) -> Activations:
        """One digit; readable as uniform memory, in full windows wherever one begins."""
        n_blocks = -(-cols // BLOCK)
        blocks = tokens * n_blocks + UNIFORM_BLOCKS
        return cls(
            device.empty(f"{label}.digits", blocks * BLOCK, STORAGE | UNIFORM),
            device.empty(f"{label}.scale", blocks * 8, STORAGE | UNIFORM),
            tokens,
        )

    def window(self, first: int, tokens: int, cols: int) -> Activations:
        """Of so many tokens' activations those from `first` on, a multiple of 32, for launches."""
        n_blocks = -(-cols // BLOCK)
        begin, count = first * n_blocks, tokens * n_blocks
        return Activations(
            (self.digits, begin * BLOCK, count * BLOCK), (self.scale, begin * 8, count * 8), tokens
        )


@dataclass(frozen=True)
class Output:
    """What a matvec writes, f32 (splits, tokens, rows): the consumer adds the splits up."""

    buffer: Any
    splits: int


@dataclass(frozen=True)
class Residual:
    """What a matvec of one token may read instead of activations: it multiplies the norm of x + y
    with `weight`, y being what a product has left, and stores x + y in another buffer than x.
    """

    x: Any  # f32 (dim,)
    added: Output  # y
    weight: Any  # f32 (dim,)
    out: Any  # f32 (dim,)


@dataclass(frozen=True)
class Step:
    """A launch of a pass of many tokens. Its workgroups along y each take `tokens_per_group`, from
    `first_token` on and at most `max_tokens` in all; 0: their number has nothing to do with tokens.
    """

    dispatch: Dispatch
    tokens_per_group: int = 0
    first_token: int = 0
    max_tokens: int | None = None

    def of(self, tokens: int) -> Dispatch:
        """The launch when the pass has so many tokens; possibly of no workgroup."""
        if not self.tokens_per_group:
            return self.dispatch
        tokens = max(0, tokens - self.first_token)
        tokens = tokens if self.max_tokens is None else min(tokens, self.max_tokens)
        x, _, z = self.dispatch.workgroups
        return replace(self.dispatch, workgroups=(x, -(-tokens // self.tokens_per_group), z))

    def window(self, first_token: int, max_tokens: int) -> Step:
        """The launch when it has been made for a window of the pass's tokens."""
        return replace(self, first_token=first_token, max_tokens=max_tokens)


def uniform_tokens(n_blocks: int) -> int:
    """Tokens whose activations matmul_rows may hold at once, 0 if too few: windows begin at
    multiples of 256 bytes, of digits and of scales.
    """
    for tokens in (64, 32, 16, 8):
        if tokens * n_blocks <= UNIFORM_BLOCKS and tokens * n_blocks % 32 == 0:
            return tokens
    return 0


@dataclass(frozen=True)
class Then:
    """What the workgroups of a matvec of one token do with its output: SwiGLU if it is `gated`,
    else the residual x += y and the norm of x with `weight`, whose factor is left to the matvec
    that reads `out`.
    """

    gated: bool
    dim: int  # of x, or hidden_dim
    x: Any  # f32 (dim,)
    weight: Any  # f32 (dim,)
    out: Activations
    arrived: Any  # u32, 0: one for each block of 32 columns
