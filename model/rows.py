"""Rows: a Llama's passes over several sequences, a row each; one step per line, as in the paper.

A row is a token with a place of its own in a sequence of its own; neighbouring rows may also be
the next tokens of one sequence. Every weight is decoded once for all of them. What follows a
product is the same for all rows, but attention goes through each one's own blocks of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.kernel import Dispatch
from engine.plan import Plan
from model.activations import Activations, Output
from model.gpu_matmul import decoded_bytes, few_splits, matmul
from model.gpu_matrix import GpuMatrix
from model.kv_cache import BLOCK, half_padded

if TYPE_CHECKING:
    from model.llama import Llama

MOST_ROWS = 64
# Rows up to which a weight is multiplied where it is decoded; more go through bytes in memory, as
# prompts do. shaders/shared/sums.wgsl has no room for more.
MATVEC_ROWS = 16
_FEW_ROWS = 32  # for which products have smaller tiles
_BYTES = 64 << 20  # decoded at a time: more than for prompts, as few tokens leave a GPU idle
_ATTENTION_GROUPS = 2048  # workgroups that fill a large GPU
_TILE = 64  # positions that attention may look up past the last one


class _Product(NamedTuple):
    """Of a matrix with all rows: f32 (splits, tokens, rows), how many of either see `Rows`."""

    matrix: GpuMatrix
    buffer: Any


class Row(NamedTuple):
    """As shaders/shared/rows.wgsl has it, and its token."""

    token: int
    pos: int
    first: int  # row of the same sequence
    seed: int


class Rows:
    """What a `Llama` needs besides for passes of up to `most` rows: `plan(bucket(n))` is one of n,
    with the logits after each row.
    """

    def __init__(self, model: Llama, most: int, matvec_rows: int = MATVEC_ROWS) -> None:
        self._model = model
        self.config = c = model.config
        device = model.device
        prompt = model.prompt
        self.matvec_rows = min(matvec_rows, MATVEC_ROWS)
        # Without passes for prompts there are no products of many rows.
        self.most = most = min(most, MOST_ROWS if prompt else self.matvec_rows)
        self._blocks_per_table = -(-model.max_pos // BLOCK)
        n = most
        if prompt and most > self.matvec_rows:
            n = prompt.whole_tiles(most)
        d = model.digits
        layer = model.blocks[0]

        def activations(name: str, cols: int) -> Activations:
            if prompt:
                return Activations.for_matmul(device, f"batch.{name}", n, cols)
            return Activations.empty(device, f"batch.{name}", n, d, cols)

        def output(name: str, matrix: GpuMatrix) -> _Product:
            size = matrix.splits * min(n, self.matvec_rows)
            if n > self.matvec_rows:
                size = max(size, self._splits(matrix, n) * n)
            return _Product(matrix, device.empty(f"batch.{name}", 4 * size * matrix.rows))

        self.state = device.empty("batch.state", 4 * (4 + n))
        self.pass_rows = device.empty("batch.pass_rows", 16 * n)
        self.blocks = device.empty("batch.blocks", 4 * (most * self._blocks_per_table + _TILE))
        self.x = device.empty("batch.x", 4 * n * c.dim)
        self.xn = activations("xn", c.dim)
        self.qkv = output("qkv", layer.qkv_proj)
        self.qkv_heads: Any = None
        if c.qkv_bias or c.qk_norm:
            self.qkv_heads = device.empty("batch.qkv_heads", 4 * n * layer.qkv_proj.rows)
        # Few rows have many splits each.
        row_splits = max(
            b * self._attention_splits(b) for b in map(self.bucket, range(1, most + 1))
        )
        partial = row_splits * c.n_heads * (2 * half_padded(c) + 2)
        self.partial = device.empty("batch.attn.partial", 4 * partial)
        self.arrived = device.empty("batch.arrived", 4 * n * c.n_heads)
        self.attn = activations("attn", c.q_dim)
        self.o = output("o", layer.o_proj)
        self.gate_up = output("gate_up", layer.gate_up_proj)
        self.h = activations("h", c.hidden_dim)
        self.down = output("down", layer.down_proj)
        self.logits = output("logits", model.lm_head)
        self._bytes = prompt and prompt.bytes
        if prompt and n > self.matvec_rows:
            decoded = min(_BYTES, max(map(decoded_bytes, layer.matrices)))
            if decoded > prompt.bytes.size:
                self._bytes = device.empty("batch.bytes", decoded)
        self._plans: dict[int, Plan] = {}

    def write_rows(self, rows: Sequence[Row]) -> None:
        """The next pass reads these."""
        tokens = [row.token for row in rows]
        device = self._model.device
        device.write(self.state, np.array([0, len(rows), 0, 0, *tokens], np.uint32))
        values = [(row.pos, row.seed, row.first, 0) for row in rows]
        device.write(self.pass_rows, np.array(values, np.uint32))

    def write_blocks(self, tables: Sequence[Sequence[int]]) -> None:
        """Each row's positions are in these blocks of the cache."""
        values = np.zeros((len(tables), self._blocks_per_table), np.uint32)
        for row, table in zip(values, tables, strict=True):
            row[: len(table)] = table
        self._model.device.write(self.blocks, values)

    def bucket(self, n: int) -> int:
        """Rows of the recorded pass that n of them take: the next power of two."""
        return min(1 << (n - 1).bit_length(), self.most)

    def plan(self, bucket: int) -> Plan:
        if bucket not in self._plans:
            self._plans[bucket] = Plan(self._step(bucket))
        return self._plans[bucket]

    def _step(self, n: int) -> Iterator[Dispatch]:
        m, do = self._model, self._model.operations
        room = self._tokens(n)
        normed: dict[str, Any] = dict(state=self.state, x=self.x, out=self.xn, room=room)
        attended: dict[str, Any] = dict(
            partial=self.partial, out=self.attn, n_splits=self._attention_splits(n)
        )
        before = Output(self.down.buffer, 0)
        yield from m.embed_tokens.embed(self.state, self.x, tokens=n)
        for i, layer in enumerate(m.blocks):
            yield do.rms_norm(n, before, layer.input_layernorm, **normed)
            before = self._output(self.down, n)
            yield from self._multiply(layer.qkv_proj, self.xn, self.qkv, n)
            qkv = self._output(self.qkv, n)
            if self.qkv_heads is not None:
                yield do.qkv_heads(n, qkv, layer.qkv_added, out=self.qkv_heads, room=room)
                qkv = Output(self.qkv_heads, 1)
            yield do.attention(
                n,
                i,
                qkv,
                state=self.state,
                arrived=self.arrived,
                room=room,
                pass_rows=self.pass_rows,
                blocks=self.blocks,
                blocks_per_table=self._blocks_per_table,
                **attended,
            )
            if not m.finishes_heads:
                yield do.attention_combine(n, **attended)
            yield from self._multiply(layer.o_proj, self.attn, self.o, n)

            o = self._output(self.o, n)
            yield do.rms_norm(n, o, layer.post_attention_layernorm, **normed)
            yield from self._multiply(layer.gate_up_proj, self.xn, self.gate_up, n)
            yield do.swiglu(n, self._output(self.gate_up, n), out=self.h, room=room)
            yield from self._multiply(layer.down_proj, self.h, self.down, n)
        yield do.rms_norm(n, before, m.norm, **normed)
        yield from self._multiply(m.lm_head, self.xn, self.logits, n)

    def _output(self, y: _Product, n: int) -> Output:
        return Output(y.buffer, self._splits(y.matrix, n))

    def _multiply(
        self, matrix: GpuMatrix, x: Activations, y: _Product, n: int
    ) -> Iterator[Dispatch]:
        m = self._model
        if n <= self.matvec_rows:
            yield from matrix.matvec(x, self._output(y, n), tokens=n, digits=m.digits)
        else:
            splits, few = self._splits(matrix, n), n <= _FEW_ROWS
            for step in matmul(matrix, x, y.buffer, self._bytes, splits=splits, few=few):
                yield step.of(n)

    def _splits(self, matrix: GpuMatrix, n: int) -> int:
        """Of a product of n rows; what reads it adds them up, but nothing does of the head's."""
        if n <= self.matvec_rows:
            return matrix.splits
        return 1 if matrix is self._model.lm_head else few_splits(matrix)

    def _tokens(self, n: int) -> int:
        """That a split of such a product has room for."""
        if n <= self.matvec_rows:
            return n
        tile = _FEW_ROWS if n <= _FEW_ROWS else 2 * _FEW_ROWS
        return -(-n // tile) * tile

    def _attention_splits(self, n: int) -> int:
        """Of positions. Up to matvec_rows as of one sequence alone, so that sums round alike."""
        cut = self._model.attention_cut
        if n <= self.matvec_rows:
            return cut.n_splits
        return min(cut.n_splits, -(-_ATTENTION_GROUPS // (n * cut.groups)))
