"""Coded matrices in GPU memory: from the file's layout to the one that an adapter reads fastest.

Streams stay as they are in the file. What is added at load is where lanes may enter them: every
`segment_blocks` * 32 columns of every row, found by one pass over the matrix on the GPU. How many
entry points, and which of the two matvec kernels, is the adapter's business and not the format's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from codec.matrix import CodedMatrix
from codec.table import decode_table
from engine.device import STORAGE, UNIFORM, Device
from engine.kernel import Dispatch, Kernels
from engine.plan import Plan, run

BLOCK = 32  # columns that share an activation scale
TILE = 32  # rows of a workgroup
MAX_STATES = 4096  # what matvec_rows declares its table to hold

# Lanes that fill a large GPU (an H100 holds 270k, and half of them hide its latency), and the longest segment: longer
# ones no longer leave all of a subgroup's streams in the L1 cache.
_LANES_WANTED = 1 << 16
_MAX_SEGMENT_BLOCKS = 4
_MAX_GROUP_LANES = 512  # so that the tables of 2^11 states, one a workgroup, leave an SM its full share of lanes


@dataclass(frozen=True)
class Activations:
    """What a matvec reads: `tokens` vectors of 32 * n_blocks columns as int8 digits, and their scales."""

    digits: Any  # int8 (tokens, n_digits, 32 * n_blocks)
    scale: Any  # f32 (tokens, n_blocks, 2): scale, sum of the block

    @classmethod
    def empty(cls, device: Device, label: str, tokens: int, n_digits: int, cols: int) -> Activations:
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
    """Rows [row_begin, row_begin + rows) of a matrix: as many as one binding may hold."""

    row_begin: int
    rows: int
    words: Any
    row_info: Any  # (rows_padded,) of struct Row
    entries: Any  # u32 (n_segments, rows_padded)

    @property
    def rows_padded(self) -> int:
        return _padded(self.rows)


class GpuMatrix:
    """One coded matrix on one device."""

    def __init__(self, kernels: Kernels, name: str, m: CodedMatrix, *, one_split: bool = False) -> None:
        """`one_split`: the matvec's output must not be left in parts."""
        device = kernels.device
        self.kernels = kernels
        self.name = name
        self.rows, self.cols = m.rows, m.cols
        self.n_blocks = -(-m.cols // BLOCK)
        self.raw_bits, self.min_symbol = m.raw_bits, m.min_symbol
        self.n_states = 1 << m.log2_states
        self.offset = m.min_symbol << m.raw_bits

        # For either number of states, so that all of a model's matrices agree.
        table_bytes = 4 * MAX_STATES + 4 * _MAX_GROUP_LANES
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

        table = np.zeros(MAX_STATES, np.uint32)
        table[: self.n_states] = decode_table(m.marginal, m.log2_states)
        self.table = device.upload(f"{name}.table", table, STORAGE | UNIFORM)
        self.outliers = device.upload(f"{name}.outliers", m.outliers)
        self.parts = [self._upload(m, begin, end) for begin, end in _row_ranges(m, device.max_binding_bytes)]

    def _upload(self, m: CodedMatrix, begin: int, end: int) -> _Part:
        device, rows, padded = self.kernels.device, end - begin, _padded(end - begin)
        first_word = int(m.row_offsets[begin]) // 32
        words = m.words[first_word : -(-int(m.row_offsets[end]) // 32)]
        info = np.zeros((padded, 4), np.uint32)  # struct Row
        info[:rows, 0] = m.row_offsets[begin:end] - 32 * first_word
        info[:rows, 1] = m.scale[begin:end].astype(np.float32).view(np.uint32)
        info[:rows, 2] = m.outlier_offsets[begin:end]
        info[:rows, 3] = np.diff(m.outlier_offsets[begin : end + 1])
        entries = np.zeros((self.n_segments, padded), np.uint32)
        entries[0, :rows] = m.states[begin:end]
        label = f"{self.name}[{begin}:{end}]"
        part = _Part(
            begin,
            rows,
            device.upload(f"{label}.words", words, padding_bytes=_guard_bytes(m)),
            device.upload(f"{label}.row_info", info),
            device.upload(f"{label}.entries", entries),
        )
        if self.n_segments > 1:
            kernel = self.kernels.get("entry_points", n_states=self.n_states, raw_bits=self.raw_bits)
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
    def read_bytes(self) -> int:
        """Bytes that one matvec reads of the matrix."""
        buffers = [b for part in self.parts for b in (part.words, part.row_info, part.entries)]
        return sum(buffer.size for buffer in [*buffers, self.table, self.outliers])

    def output(self, label: str, tokens: int) -> Output:
        size = 4 * self.splits * tokens * self.rows
        return Output(self.kernels.device.empty(label, size), self.splits)

    def matvec(self, x: Activations, y: Output, *, tokens: int, digits: int) -> Iterator[Dispatch]:
        """y[split, t] = the split's share of W x[t]."""
        code = dict(n_states=self.n_states, raw_bits=self.raw_bits, tokens=tokens, digits=digits)
        if self.whole_rows:
            # Loading activations is most of a software adapter's work on many tokens: share it among rows.
            rows_per_lane = 1 if tokens == 1 else 4
            kernel = self.kernels.get("matvec_rows", rows_per_lane=rows_per_lane, **code)
            tile, segments = 8 * rows_per_lane, {}
        else:
            group = self.segments_per_group
            kernel = self.kernels.get(
                "matvec", rows_per_lane=1, segments_per_group=group, partials=TILE * group, **code
            )
            tile = TILE
            segments = dict(n_segments=self.n_segments, segment_blocks=self.segment_blocks)
        for part in self.parts:
            if not self.whole_rows:
                segments["rows_padded"] = part.rows_padded
            yield kernel.dispatch(
                [-(-part.rows // tile), self.splits],
                dict(
                    row_begin=part.row_begin,
                    rows=part.rows,
                    y_rows=self.rows,
                    n_blocks=self.n_blocks,
                    offset=self.offset,
                    **segments,
                ),
                words=part.words,
                row_info=part.row_info,
                entries=part.entries,
                table=self.table,
                outliers=self.outliers,
                x_digits=x.digits,
                x_scale=x.scale,
                y=y.buffer,
            )

    def embed(self, state: Any, x: Any, *, tokens: int) -> Iterator[Dispatch]:
        """x[t] = row tokens[t] of the matrix."""
        kernel = self.kernels.get("embed", n_states=self.n_states, raw_bits=self.raw_bits)
        for part in self.parts:
            yield kernel.dispatch(
                [-(-self.n_segments // 32), tokens],
                dict(
                    row_begin=part.row_begin,
                    rows=part.rows,
                    rows_padded=part.rows_padded,
                    cols=self.cols,
                    n_segments=self.n_segments,
                    segment_blocks=self.segment_blocks,
                    min_symbol=self.min_symbol,
                ),
                state=state,
                words=part.words,
                row_info=part.row_info,
                entries=part.entries,
                table=self.table,
                outliers=self.outliers,
                x=x,
            )


def _padded(rows: int) -> int:
    return -(-rows // TILE) * TILE


def _guard_bytes(m: CodedMatrix) -> int:
    """Zeros after the last row: a damaged or padded row reads no further, whatever its bits say.

    The kernels decode whole blocks of 32 columns, at most log2_states / 2 + raw_bits bits each, and
    fetch up to 32 bytes ahead.
    """
    cols = -(-m.cols // BLOCK) * BLOCK
    return (m.log2_states + 2 * m.raw_bits) * cols // 16 + 64


def _row_ranges(m: CodedMatrix, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Row ranges, in whole tiles, whose words fit one binding."""
    room_bits = 8 * (max_bytes - _guard_bytes(m) - 64)
    begin = 0
    while begin < m.rows:
        end = int(np.searchsorted(m.row_offsets, m.row_offsets[begin] + room_bits, side="right")) - 1
        if end < m.rows:
            end = begin + max(TILE, (end - begin) // TILE * TILE)
        end = min(end, m.rows)
        yield begin, end
        begin = end
