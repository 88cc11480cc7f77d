"""Coded matrices in GPU memory: from the file's layout to the one that an adapter reads fastest.

The streams of rows that are decoded side by side, a lane each, are interleaved. On a GPU entry points
are added at load, where lanes may enter: every `segment_blocks` * 32 columns of every row, found by
one pass over the matrix; on a software adapter a lane takes whole rows. Both are the adapter's
business and not the format's. Rows lie sorted by class, so that a tile, which a workgroup decodes,
needs one table; their results go to where they belong.

Matrices without loss have kernels of their own (`*_float`), as their symbols stand for exponents
and their activations are f32; streams, entry points and lanes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from codec import classes
from codec.classes import TILE
from codec.lossless import AnyMatrix, LosslessMatrix, exponent_tables
from codec.matrix import CodedMatrix
from codec.table import decode_tables
from engine.device import STORAGE, UNIFORM, Device
from engine.kernel import Dispatch, Kernels
from engine.plan import Plan, run
from model.gpu_layout import (
    BLOCK,
    CHUNK_BITS,
    interleaved_streams,
    padded_rows,
    row_chunks,
    row_info,
    tiled_fields,
)

FLOAT = 4  # bytes of an activation, for which there are n_digits otherwise
_MAX_TABLE = 4096  # states of one table

# Lanes that fill a large GPU (an H100 holds 270k, and half of them hide its latency), and the
# longest segment: longer ones no longer leave all of a subgroup's streams in the L1 cache.
_LANES_WANTED = 1 << 16
_MAX_SEGMENT_BLOCKS = 4
_MAX_GROUP_LANES = 512  # so that tables, one a workgroup, leave a multiprocessor all its lanes

_SOFTWARE_LANES = 8  # of a workgroup of matvec_rows
_ROWS_PER_LANE = 4  # of matvec_rows


@dataclass(frozen=True)
class Activations:
    """What a matvec reads: vectors of 32 * n_blocks columns as int8 digits, and their scales.

    For matrices without loss n_digits is FLOAT, the digits are f32 (tokens, 32 * n_blocks), and
    scales have no meaning.
    """

    digits: Any  # int8 (tokens, n_digits, 32 * n_blocks)
    scale: Any  # f32 (tokens, n_blocks, 2): scale, sum of the block

    @classmethod
    def empty(
        cls, device: Device, label: str, tokens: int, n_digits: int, cols: int
    ) -> Activations:
        n_blocks = -(-cols // BLOCK)
        return cls(
            device.empty(f"{label}.digits", tokens * n_digits * n_blocks * BLOCK),
            device.empty(f"{label}.scale", tokens * n_blocks * 8),
        )


@dataclass(frozen=True)
class Output:
    """What a matvec writes, f32 (splits, tokens, rows): the consumer adds the splits up."""

    buffer: Any
    splits: int


@dataclass(frozen=True)
class _Part:
    """Rows [row_begin, row_begin + rows), sorted by class: as many as one binding may hold."""

    row_begin: int
    rows: int
    words: Any
    row_info: Any  # (rows_padded,) of struct Row, sorted by class
    entries: Any  # u32 (n_segments, rows_padded)
    mantissas: Any | None  # of floats: (rows_padded / TILE, row_chunks, TILE) of 16 bytes

    @property
    def rows_padded(self) -> int:
        return padded_rows(self.rows)

    @property
    def buffers(self) -> dict[str, Any]:
        """By the names that they have in the kernels."""
        found = {"words": self.words, "row_info": self.row_info, "entries": self.entries}
        return found if self.mantissas is None else {**found, "mantissas": self.mantissas}


class GpuMatrix:
    """One coded matrix on one device."""

    def __init__(
        self,
        kernels: Kernels,
        name: str,
        matrix: AnyMatrix,
        *,
        one_split: bool = False,
    ) -> None:
        """`one_split`: the matvec's output must not be left in parts."""
        device = kernels.device
        self.kernels = kernels
        self.name = name
        floats = matrix if isinstance(matrix, LosslessMatrix) else None
        m = matrix.exponents if isinstance(matrix, LosslessMatrix) else matrix
        self.rows, self.cols = m.rows, m.cols
        self.n_blocks = -(-m.cols // BLOCK)
        self.n_states = 1 << m.log2_states
        self.floats = floats is not None
        self._group = m.group
        self._raw_bits = m.raw_bits
        # What a decoded symbol means: overrides and params of the kernels that use it.
        self._overrides: dict[str, int] = dict(wide_symbols=self.floats)
        self._params = dict(offset=m.min_symbol << m.raw_bits)
        tables = decode_tables(m.marginals, m.log2_states, m.group)
        if floats:
            self._overrides |= dict(field_bits=floats.field_bits)
            self._params = dict(row_chunks=row_chunks(floats))
            tables = exponent_tables(floats)

        # For either number of states, so that all of a model's matrices agree.
        table_bytes = 4 * _MAX_TABLE + 4 * _MAX_GROUP_LANES
        self.whole_rows = device.software or table_bytes > device.workgroup_memory
        max_segments = min(_MAX_GROUP_LANES, device.max_workgroup_lanes) // TILE
        self.segment_blocks = self.n_blocks
        if not self.whole_rows:
            wanted = max(1, self.n_blocks * m.rows // _LANES_WANTED)
            self.segment_blocks = min(wanted, _MAX_SEGMENT_BLOCKS)
            if one_split:
                self.segment_blocks = max(self.segment_blocks, -(-self.n_blocks // max_segments))
        self.n_segments = -(-self.n_blocks // self.segment_blocks)
        self.splits = -(-self.n_segments // max_segments)
        self.segments_per_group = -(-self.n_segments // self.splits)

        if self.whole_rows:  # as much as matvec_rows declares
            tables = np.append(tables, np.zeros(classes.MAX_STATES - tables.size, np.uint32))
        self.table = device.upload(f"{name}.table", tables, STORAGE | UNIFORM)
        self.outliers = device.upload(f"{name}.outliers", m.outliers)
        self.interleave = _SOFTWARE_LANES if self.whole_rows else TILE
        self._order = classes.device_order(m.classes)
        self._by_number = np.empty((m.rows, 4), np.uint32)  # struct Row, in the matrix's order
        self.parts = [self._upload(m, floats, *ends) for ends in self._row_ranges(m, floats)]

    def _row_ranges(
        self, m: CodedMatrix, floats: LosslessMatrix | None
    ) -> Iterator[tuple[int, int]]:
        """Row ranges, in whole tiles, whose words fit one binding."""
        most = m.rows
        if floats:
            tile_bytes = TILE * row_chunks(floats) * CHUNK_BITS // 8
            most = TILE * max(1, self.kernels.device.max_binding_bytes // tile_bytes)
        # Interleaving fills rows up to the longest beside them: at most one longest row a group.
        room = 8 * (self.kernels.device.max_binding_bytes - self._guard_bytes(m)) - CHUNK_BITS
        ends = np.arange(m.rows + 1) * (m.row_bits.max() + 2 * CHUNK_BITS)
        begin = 0
        while begin < m.rows:
            end = int(np.searchsorted(ends, ends[begin] + room, side="right")) - 1
            end = min(end, begin + most)
            if end < m.rows:
                end = begin + max(TILE, (end - begin) // TILE * TILE)
            end = min(end, m.rows)
            yield begin, end
            begin = end

    def _guard_bytes(self, m: CodedMatrix) -> int:
        """Zeros after the last row: no row reads further, whatever its bits say.

        The kernels decode whole blocks of 32 columns, at most log2_states / group + raw_bits bits
        each, and fetch up to 32 bytes ahead.
        """
        cols = -(-m.cols // BLOCK) * BLOCK
        bits = (m.log2_states + m.group * m.raw_bits) * cols // m.group
        return self.interleave * (bits // 8 + 64)

    def _upload(self, m: CodedMatrix, floats: LosslessMatrix | None, begin: int, end: int) -> _Part:
        device, rows, padded = self.kernels.device, end - begin, padded_rows(end - begin)
        numbers = self._order[begin:end]
        words, bits = interleaved_streams(m, numbers, self.interleave)
        self._by_number[numbers] = row_info(m, numbers, bits, np.arange(begin, end))
        info = np.zeros((padded, 4), np.uint32)
        info[:rows] = row_info(m, numbers, bits, numbers)
        entries = np.zeros((self.n_segments, padded), np.uint32)
        entries[0, :rows] = m.states[numbers]
        label = f"{self.name}[{begin}:{end}]"
        part = _Part(
            begin,
            rows,
            device.upload(f"{label}.words", words, padding_bytes=self._guard_bytes(m)),
            device.upload(f"{label}.row_info", info),
            device.upload(f"{label}.entries", entries),
            device.upload(f"{label}.mantissas", tiled_fields(floats, numbers)) if floats else None,
        )
        if self.n_segments > 1:
            kernel = self.kernels.get("entry_points", **self._stream, wide_symbols=self.floats)
            dispatch = kernel.dispatch(
                [-(-rows // TILE)],
                dict(
                    rows=rows,
                    rows_padded=padded,
                    n_segments=self.n_segments,
                    segment_blocks=self.segment_blocks,
                ),
                words=part.words,
                row_info=part.row_info,
                table=self.table,
                entries=part.entries,
            )
            run(device, Plan([dispatch]))
        return part

    @property
    def _stream(self) -> dict[str, int]:
        """Overrides that say how streams are coded and laid out."""
        return dict(
            n_states=self.n_states,
            group_size=self._group,
            raw_bits=self._raw_bits,
            interleave=self.interleave,
        )

    @property
    def read_bytes(self) -> int:
        """Bytes that one matvec reads of the matrix."""
        buffers = [buffer for part in self.parts for buffer in part.buffers.values()]
        return sum(buffer.size for buffer in [*buffers, self.table, self.outliers])

    def output(self, label: str, tokens: int) -> Output:
        size = 4 * self.splits * tokens * self.rows
        return Output(self.kernels.device.empty(label, size), self.splits)

    def matvec(self, x: Activations, y: Output, *, tokens: int, digits: int) -> Iterator[Dispatch]:
        """y[split, t] = the split's share of W x[t]."""
        overrides = dict(tokens=tokens, **self._stream, **self._overrides)
        if self.floats:
            name, activations = "matvec_float", dict(x=x.digits)
        else:
            name, activations = "matvec", dict(x_digits=x.digits, x_scale=x.scale)
            overrides["digits"] = digits
        if self.whole_rows:
            kernel = self.kernels.get(f"{name}_rows", **overrides)
            tile, segments = _SOFTWARE_LANES * _ROWS_PER_LANE, {}
        else:
            group = self.segments_per_group
            overrides |= dict(segments_per_group=group, partials=TILE * group)
            kernel = self.kernels.get(name, **overrides)
            tile = TILE
            segments = dict(n_segments=self.n_segments, segment_blocks=self.segment_blocks)
        for part in self.parts:
            if not self.whole_rows:
                segments["rows_padded"] = part.rows_padded
            yield kernel.dispatch(
                [-(-part.rows // tile), self.splits],
                dict(
                    rows=part.rows,
                    y_rows=self.rows,
                    n_blocks=self.n_blocks,
                    **segments,
                    **self._params,
                ),
                **part.buffers,
                table=self.table,
                outliers=self.outliers,
                **activations,
                y=y.buffer,
            )

    @cached_property
    def _rows_by_number(self) -> Any:
        return self.kernels.device.upload(f"{self.name}.rows_by_number", self._by_number)

    def embed(self, state: Any, x: Any, *, tokens: int) -> Iterator[Dispatch]:
        """x[t] = row tokens[t] of the matrix."""
        name = "embed_float" if self.floats else "embed"
        kernel = self.kernels.get(name, **self._stream, **self._overrides)
        for part in self.parts:
            yield kernel.dispatch(
                [1, tokens],
                dict(
                    row_begin=part.row_begin,
                    rows=part.rows,
                    rows_padded=part.rows_padded,
                    cols=self.cols,
                    n_segments=self.n_segments,
                    segment_blocks=self.segment_blocks,
                    **self._params,
                ),
                state=state,
                **part.buffers | {"row_info": self._rows_by_number},
                table=self.table,
                outliers=self.outliers,
                x=x,
            )
