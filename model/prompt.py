"""Prompts: a Llama's passes of many tokens, one step per line, in the order of the paper.

A matrix is decoded once for all tokens of the pass, to bytes in a buffer that all matrices use in
turn, and multiplied with them there (gpu_matmul.py). Keys and values go into the cache first,
then queries meet them tile by tile. Norms and activations are the kernels of short passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.interrupt import uninterrupted
from engine.kernel import Dispatch
from engine.plan import Plan
from model.activations import UNIFORM_BLOCKS, Activations, Output, Step, uniform_tokens
from model.config import ModelConfig
from model.gpu_matmul import decoded_bytes, matmul
from model.gpu_matrix import GpuMatrix
from model.kv_cache import BLOCK, half_padded
from weights import layout

if TYPE_CHECKING:
    from model.llama import Layer, Llama

# Tokens of one pass. A software adapter needs a second for its, and Ctrl-C waits for it.
MAX_CHUNK, SOFTWARE_CHUNK = 512, 64
# Fewer tokens are faster in short passes: measured on an H100 for 135 M parameters, and for 8 G,
# where a workgroup's 64 tokens should all be there.
_MIN_CHUNK, _LARGE_MIN_CHUNK, _LARGE_MODEL = 17, 49, 1 << 29

_ROWS = 32  # pairs of token and head in a workgroup: shaders/attention_prompt.wgsl
_MAX_HALF = 64  # of half_padded, there
_WEIGHT_BYTES = 6144  # of weights and maxima, there
_GROUPS_WANTED = 512  # workgroups of attention, for some of them on every multiprocessor
_MAX_SPLITS = 4  # of a prompt's positions
# What is decoded at a time, at most; and what gate_up's product may take, or else it is decoded for
# each half of a pass's tokens in turn. So an 8B model takes 100 MiB beside weights and cache.
_BYTES = _GATE_UP_BYTES = 32 << 20
_PART = 100  # launches that are submitted at once


def attention_bytes(head_dim: int, *, tiled: bool) -> int:
    """Workgroup memory of attention_prompt, or else of attention_rows."""
    rows = (
        2 * _ROWS * 4 * (-(-head_dim // 8) * 8)
    )  # queries, and a tile of keys or the values so far
    return rows + _WEIGHT_BYTES if tiled else rows


def chunk_tokens(max_pos: int, *, software: bool) -> int:
    """The most tokens of one pass: no more tiles of 64 or 128 than there are positions for."""
    return min(SOFTWARE_CHUNK if software else MAX_CHUNK, -(-max_pos // 128) * 128)


def turn_tokens(c: ModelConfig, tokens: int) -> int:
    """Of so many those that gate_up is multiplied with at once."""
    whole = 4 * tokens * 2 * c.hidden_dim <= _GATE_UP_BYTES
    return tokens if whole else -(-tokens // 128) * 64


def scratch_bytes(c: ModelConfig, max_pos: int, *, software: bool) -> int:
    """About what a `Prompt` allocates, if there is one."""
    tokens = chunk_tokens(max_pos, software=software)
    qkv = c.q_dim + 2 * c.kv_dim
    gate_up = 2 * c.hidden_dim * turn_tokens(c, tokens) // tokens
    floats = c.dim + max(qkv, c.dim, gate_up) + qkv * (c.qkv_bias or c.qk_norm)
    digits = max(c.dim, c.q_dim) + c.hidden_dim
    token_bytes = 4 * floats + digits * 5 // 4  # with their scales
    matrices = [m for m in layout.matrices(c) if m.in_block]
    decoded = min(_BYTES, max(m.rows * m.cols for m in matrices))
    far_outliers = 4 * sum(m.rows for m in matrices)
    partial = 4 * tokens * c.n_heads * (c.head_dim + 2) * (1 if software else _MAX_SPLITS)
    windows = 2 * UNIFORM_BLOCKS * 40  # at the end of activations
    return tokens * token_bytes + max(decoded, partial) + windows + far_outliers


class Prompt:
    """What a `Llama` needs besides to read `min_tokens` to `max_tokens` a pass, int8 activations.

    Fewer are faster in short passes. `layers(n)` runs all blocks for n tokens; then either
    `last_head` gives the last one's logits, in row 0 of the model's, or `norms(n)` what the head
    reads of each. With `paged` the tokens are of one sequence of several, whose cache lies where
    `write_blocks` says.
    """

    def __init__(self, model: Llama) -> None:
        self._model = model
        self.config = c = model.config
        self.kernels = model.kernels
        device = model.device
        # Where workgroup memory is too small for tiles, a GPU takes the software adapter's kernel:
        # it is slow there, but what is saved on the products is more.
        room = device.workgroup_memory
        self._tiled = not device.software and half_padded(c) <= _MAX_HALF
        self._tiled &= attention_bytes(c.head_dim, tiled=True) <= room
        self.min_tokens = _MIN_CHUNK if c.n_params < _LARGE_MODEL else _LARGE_MIN_CHUNK
        if device.software:
            self.min_tokens = 9
        self._round = 8 if device.software else 64  # plans are made for multiples of so many tokens
        self.max_tokens = n = chunk_tokens(model.max_pos, software=device.software)
        self._attention_tokens = _ROWS // (c.n_heads // c.n_kv_heads)
        groups = c.n_kv_heads * -(-n // self._attention_tokens)
        self._splits = min(_MAX_SPLITS, -(-_GROUPS_WANTED // groups)) if self._tiled else 1
        matrices: list[GpuMatrix] = [m for layer in model.blocks for m in layer.matrices]
        self.state = device.empty("prompt.state", 4 * (4 + n))
        self.x = device.empty("prompt.x", 4 * n * c.dim)
        # Attention writes where qkv_proj has read.
        self.xn = self.attn = Activations.for_matmul(device, "prompt.xn", n, max(c.dim, c.q_dim))
        # Of every product in turn: what comes next has used it up before the next one writes.
        self._turn_tokens = turn_tokens(c, n)
        rows = max(n * max(c.dim, c.q_dim + 2 * c.kv_dim), self._turn_tokens * 2 * c.hidden_dim)
        self.y = device.empty("prompt.y", 4 * rows)
        self.qkv_heads = None
        if c.qkv_bias or c.qk_norm:
            self.qkv_heads = device.empty("prompt.qkv_heads", 4 * n * (c.q_dim + 2 * c.kv_dim))
        self.h = Activations.for_matmul(device, "prompt.h", n, c.hidden_dim)
        # Weights, and between products the shares of attention's splits.
        shares = 4 * n * c.n_heads * self._splits * (2 * half_padded(c) + 2)
        decoded = min(_BYTES, max(map(decoded_bytes, matrices)))
        self.bytes = self.partial = device.empty("prompt.bytes", max(decoded, shares))
        self.blocks = device.empty("prompt.blocks", 4 * -(-model.max_pos // BLOCK))
        self._layer_steps: dict[bool, list[Step]] = {False: list(self._layers(paged=False))}
        self._plans: dict[tuple[int, bool], list[Plan]] = {}
        self.last_head = Plan(self._last_head())
        self._norm = self._rms_norm(Output(self.y, 1), model.norm, self.xn)

    @staticmethod
    def fits(model: Llama) -> bool:
        """Whether the adapter can run these kernels for such a model."""
        c, device = model.config, model.device
        matrices = [m for layer in model.blocks for m in layer.matrices]
        if (
            c.n_heads // c.n_kv_heads > _ROWS
            or attention_bytes(c.head_dim, tiled=False) > device.workgroup_memory
        ):
            return False
        if device.software:
            return all(uniform_tokens(m.n_blocks) for m in matrices)
        return not any(m.whole_rows for m in matrices)

    def whole_tiles(self, tokens: int) -> int:
        return -(-tokens // self._round) * self._round

    def write_state(self, pos: int, tokens: Sequence[int]) -> None:
        """The next pass reads `tokens` (at most max_tokens) at positions pos, pos + 1, ..."""
        state = np.zeros(4 + self.max_tokens, np.uint32)
        state[:2] = pos, len(tokens)
        state[4 : 4 + len(tokens)] = tokens
        self._model.device.write(self.state, state)

    def write_blocks(self, blocks: Sequence[int]) -> None:
        """The next paged pass has its positions in these blocks of the cache."""
        self._model.device.write(self.blocks, np.array(blocks, np.uint32))

    def layers(self, tokens: int, *, paged: bool = False) -> list[Plan]:
        """In parts: the device may begin with one while the next are being encoded."""
        tokens = self.whole_tiles(tokens)
        if (tokens, paged) not in self._plans:
            if paged not in self._layer_steps:
                self._layer_steps[paged] = list(self._layers(paged))
            steps = [s for s in self._layer_steps[paged] if s.first_token < tokens]
            dispatches = [step.of(tokens) for step in steps]
            parts = [dispatches[i : i + _PART] for i in range(0, len(dispatches), _PART)]
            self._plans[tokens, paged] = [Plan(part) for part in parts]
        return self._plans[tokens, paged]

    def norms(self, tokens: int) -> Plan:
        return Plan([self._norm.of(tokens)])

    @uninterrupted()
    def copy_normed(self, first: int, tokens: int) -> None:
        """Puts what `norms` gave for tokens first, first + 1, ... where the model's head reads."""
        device, n_blocks = self._model.device, -(-self.config.dim // 32)
        encoder = device.wgpu.create_command_encoder()
        pairs = (
            (self.xn.digits, self._model.xn.digits, 32),
            (self.xn.scale, self._model.xn.scale, 8),
        )
        for ours, theirs, block_bytes in pairs:
            size = n_blocks * block_bytes
            encoder.copy_buffer_to_buffer(ours, first * size, theirs, 0, tokens * size)
        device.submit(encoder.finish())

    def _layers(self, paged: bool) -> Iterator[Step]:
        m, do, room = self._model, self._model.operations, self.max_tokens
        product, before = Output(self.y, 1), Output(self.y, 0)
        for dispatch in m.embed_tokens.embed(self.state, self.x, tokens=1):
            yield Step(dispatch, 1)
        for i, layer in enumerate(m.blocks):
            keys, values = m.cache.keys[i], m.cache.values[i]
            yield self._rms_norm(before, layer.input_layernorm, self.xn)
            before = product
            yield from matmul(layer.qkv_proj, self.xn, self.y, self.bytes)
            qkv = self.y
            if self.qkv_heads is not None:
                qkv = self.qkv_heads
                yield Step(do.qkv_heads(1, product, layer.qkv_added, out=qkv, room=room), 1)
            yield self._cache_write(i, qkv, keys, values, paged)
            yield self._attention(i, qkv, keys, values, paged)
            splits = dict(partial=self.partial, n_splits=self._splits)
            yield Step(do.attention_combine(1, out=self.attn, **splits), 1)
            yield from matmul(layer.o_proj, self.attn, self.y, self.bytes)

            yield self._rms_norm(product, layer.post_attention_layernorm, self.xn)
            yield from self._gate_up(layer)
            yield from matmul(layer.down_proj, self.h, self.y, self.bytes)

    def _gate_up(self, layer: Layer) -> Iterator[Step]:
        c, n, swiglu = self.config, self._turn_tokens, self._model.operations.swiglu
        if n == self.max_tokens:
            yield from matmul(layer.gate_up_proj, self.xn, self.y, self.bytes)
            yield Step(swiglu(1, Output(self.y, 1), out=self.h, room=n), 1)
            return
        for first in range(0, self.max_tokens, n):
            xn, h = self.xn.window(first, n, c.dim), self.h.window(first, n, c.hidden_dim)
            for step in matmul(layer.gate_up_proj, xn, self.y, self.bytes):
                yield step.window(first, n)
            yield Step(swiglu(1, Output(self.y, 1), out=h, room=n), 1, first, n)

    def _last_head(self) -> Iterator[Dispatch]:
        m = self._model
        yield self._rms_norm(Output(self.y, 1), m.norm, m.xn, last=True).of(1)
        yield from m.lm_head.matvec(m.xn, m.logits, tokens=1, digits=1)

    def _rms_norm(self, y: Output, weight: Any, out: Activations, last: bool = False) -> Step:
        norm = self._model.operations.rms_norm(
            1, y, weight, state=self.state, x=self.x, out=out, room=self.max_tokens, last=last
        )
        return Step(norm, 1)

    @property
    def _heads(self) -> dict[str, int]:
        c = self.config
        return dict(
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            max_pos=self._model.cache.max_pos,
            blocks_per_table=0,  # there is one
        )

    def _cache_write(self, layer: int, qkv: Any, keys: Any, values: Any, paged: bool) -> Step:
        c = self.config
        kernel = self.kernels.get("cache_write", paged=paged, **self._model.cache.overrides)
        return Step(
            kernel.dispatch(
                [c.n_kv_heads, 1],
                self._heads,
                state=self.state,
                y=qkv,
                rope=self._model.turns(layer),
                k_cache=keys,
                v_cache=values,
                blocks=self.blocks,
            ),
            1,
        )

    def _attention(self, layer: int, qkv: Any, keys: Any, values: Any, paged: bool) -> Step:
        c = self.config
        overrides = dict(
            tokens_per_group=self._attention_tokens,
            row_quads=half_padded(c) // 2 * _ROWS,
            window=c.window(layer) or 0,
            paged=paged,
            **self._model.cache.overrides,
        )
        if self._tiled:
            overrides["n_splits"] = self._splits
        kernel = self.kernels.get(
            "attention_prompt" if self._tiled else "attention_rows", **overrides
        )
        return Step(
            kernel.dispatch(
                [c.n_kv_heads, 1, self._splits],
                dict(scale=c.score_scale, **self._heads),
                state=self.state,
                y=qkv,
                rope=self._model.turns(layer),
                k_cache=keys,
                v_cache=values,
                blocks=self.blocks,
                partial=self.partial,
            ),
            self._attention_tokens,
        )
