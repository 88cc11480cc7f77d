"""Coded matrices in GPU memory: from the file's layout to the one that an adapter reads fastest.

The streams of rows that are decoded side by side, a lane each, are interleaved. On a GPU a row is
shared by as many lanes as fill it, each with a segment of columns; where they may enter the stream
is found at load, by one pass over the matrix. On a software adapter a lane takes whole rows. All
this is the adapter's business and not the format's. Rows lie sorted by class, so that a tile, which
a workgroup decodes, needs one table; their results go to where they belong.

Matrices without loss have kernels of their own (`*_float`), as their symbols stand for exponents
and their activations are f32; streams, entry points and lanes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from codec import classes
from codec.choice import FAST_RAW_BITS
from codec.classes import TILE
from codec.lossless import AnyMatrix, LosslessMatrix, exponent_tables
from codec.matrix import CodedMatrix
from codec.table import decode_tables
from engine.device import STORAGE, UNIFORM, size_bytes
from engine.kernel import Dispatch, Kernels
from engine.plan import Plan, run
from model.activations import (
    UNIFORM_BLOCKS,
    Activations,
    Output,
    Residual,
    Step,
    Then,
    uniform_tokens,
)
from model.gpu_layout import (
    BLOCK,
    CHUNK_BITS,
    far_outliers,
    interleaved_streams,
    padded_rows,
    row_chunks,
    row_info,
    tiled_fields,
)

_MAX_TABLE = 4096  # states of one table

# Lanes that fill a large GPU (an H100 holds 200k of this kernel), and the longest segment, unless
# there are more than a workgroup's.
_LANES_WANTED = 1 << 17
_MAX_SEGMENT_BLOCKS = 8
_MIN_GROUP_SEGMENTS = 8  # fewer lanes are long about the table
_MAX_GROUP_LANES = 512  # so that tables, one a workgroup, leave a multiprocessor all its lanes

# Lanes of a workgroup of matmul, and those of them that share its rows, each with four tokens.
_PRODUCT_LANES, _TOKEN_LANES, _FEW_TOKEN_LANES = 256, 16, 8
_BYTE_ROWS = 128  # so matmul needs no smaller tile at the end
_LARGE_PRODUCT_ROWS = 4096  # fewer leave multiprocessors idle with tiles so large
_GROUPS_WANTED, _MAX_FEW_SPLITS = 256, 8  # of a product of few tokens

_MAX_NORM_COLUMNS = 1024  # that every workgroup of a matvec may go through for a norm

_SUMS_AT_ONCE = 8  # most tokens whose sums a workgroup keeps
_OTHER_BYTES = 1024  # of workgroup memory that it needs besides

# Workgroup memory that a multiprocessor has for all of its workgroups, of which each costs some
# more, and lanes that must have room there: an H100's, as its driver has it.
_RESIDENT_BYTES, _GROUP_BYTES, _RESIDENT_LANES = 48 << 10, 1024, 1024

_SOFTWARE_LANES = 8  # of a workgroup of matvec_rows
_ROWS_PER_LANE = 4  # of matvec_rows and matmul_rows
_SOFTWARE_TOKENS = 8  # of a lane of matmul_rows


def _whole_tiles(rows: int) -> int:
    return -(-rows // _BYTE_ROWS) * _BYTE_ROWS


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


class _Piece(NamedTuple):
    """Rows first_row, first_row + 1, ... of a part, and of these the columns of some segments."""

    part: _Part
    first_row: int
    rows: int
    segment_begin: int
    segment_end: int


class GpuMatrix:
    """One coded matrix on one device."""

    def __init__(
        self,
        kernels: Kernels,
        name: str,
        matrix: AnyMatrix,
        *,
        one_split: bool = False,
        n_segments: int | None = None,
    ) -> None:
        """`one_split`: the matvec's output must not be left in parts. `n_segments`: of each row, in
        place of what suits the shape.
        """
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
        self._raw_bits = dict(raw_bits=m.raw_bits, narrow_raw_bits=m.narrow_raw_bits)
        # What a decoded symbol means: overrides and params of the kernels that use it.
        self._overrides: dict[str, int] = {}
        self._params = dict(offset=m.min_symbol << m.raw_bits)
        self._symbols = dict(min_symbol=m.min_symbol, max_symbol=m.min_symbol + m.n_symbols - 1)
        # Of bytes: shaders/shared/planes.wgsl.
        self._planes = 1 if m.raw_bits <= FAST_RAW_BITS else 2
        self._far = far_outliers(m)
        tables = decode_tables(m.marginals, m.log2_states, m.group)
        if floats:
            self._overrides |= dict(field_bits=floats.field_bits)
            self._params = dict(row_chunks=row_chunks(floats))
            tables = exponent_tables(floats)

        # For either number of states, so that all of a model's matrices agree.
        table_bytes = 4 * _MAX_TABLE + 4 * _MAX_GROUP_LANES
        self.whole_rows = device.software or table_bytes > device.workgroup_memory
        max_segments = min(_MAX_GROUP_LANES, device.max_workgroup_lanes) // TILE
        self.splits = 1
        self.segments_per_group = 1
        if not self.whole_rows:
            most = min(self.n_blocks, max_segments) if one_split else self.n_blocks
            wanted = n_segments or self._wanted_segments(padded_rows(m.rows), max_segments)
            wanted = min(wanted, most)
            self.splits = -(-wanted // max_segments)
            self.segments_per_group = wanted // self.splits
        self.n_segments = self.splits * self.segments_per_group

        if self.whole_rows:  # as much as matvec_rows declares
            tables = np.append(tables, np.zeros(classes.MAX_STATES - tables.size, np.uint32))
        self.table = device.upload(f"{name}.table", tables, STORAGE | UNIFORM)
        self.outliers = device.upload(f"{name}.outliers", m.outliers)
        self._order = classes.device_order(m.classes)
        self._by_number = np.empty((m.rows, 4), np.uint32)  # struct Row, in the matrix's order
        self.parts = [self._upload(m, floats, *ends) for ends in self._row_ranges(m, floats)]

    def _wanted_segments(self, rows: int, max_segments: int) -> int:
        """Of a row; a workgroup takes up to `max_segments`."""
        long = -(-self.n_blocks // _MAX_SEGMENT_BLOCKS)
        least = _MIN_GROUP_SEGMENTS
        while self.n_blocks % least and least < max_segments:
            least += 1
        wanted = max(-(-_LANES_WANTED // rows), min(max(least, long), max_segments))
        # Full workgroups are worth more segments, if these are alike.
        full = -(-wanted // max_segments) * max_segments
        return full if 2 * full <= 3 * wanted and self.n_blocks % full == 0 else wanted

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
        each, and fetch up to 48 bytes ahead.
        """
        cols = -(-m.cols // BLOCK) * BLOCK
        bits = (m.log2_states + m.group * m.raw_bits) * cols // m.group
        return TILE * (bits // 8 + 64)

    def _upload(self, m: CodedMatrix, floats: LosslessMatrix | None, begin: int, end: int) -> _Part:
        device, rows, padded = self.kernels.device, end - begin, padded_rows(end - begin)
        numbers = self._order[begin:end]
        words, bits = interleaved_streams(m, numbers)
        self._by_number[numbers] = row_info(m, numbers, bits, np.arange(begin, end))
        info = np.zeros((padded, 4), np.uint32)
        info[:rows] = row_info(m, numbers, bits, numbers)
        entries = np.zeros((self.n_segments, padded), np.uint32)
        entries[0, :rows] = m.states[numbers]
        label = f"{self.name}[{begin}:{end}]"
        part = _Part(
            begin,
            rows,
            device.upload_chunks(f"{label}.words", words, self._guard_bytes(m)),
            device.upload(f"{label}.row_info", info),
            device.upload(f"{label}.entries", entries),
            device.upload(f"{label}.mantissas", tiled_fields(floats, numbers)) if floats else None,
        )
        if self.n_segments > 1:
            kernel = self.kernels.get("entry_points", **self._stream)
            dispatch = kernel.dispatch(
                [-(-rows // TILE)],
                dict(
                    rows=rows,
                    rows_padded=padded,
                    n_segments=self.n_segments,
                    n_blocks=self.n_blocks,
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
            **self._raw_bits,
        )

    def _table(self, lanes: int, other_bytes: int = 0) -> dict[str, int]:
        """Overrides of shaders/shared/table.wgsl, for workgroups that need so much other memory:
        two copies unless they leave room for too few of them.
        """
        group_bytes = 8 * self.n_states + other_bytes + _OTHER_BYTES
        resident = _RESIDENT_BYTES // (group_bytes + _GROUP_BYTES) * lanes
        fits = group_bytes <= self.kernels.device.workgroup_memory
        copies = 2 if fits and resident >= _RESIDENT_LANES else 1
        return dict(copies=copies, table_pairs=copies * self.n_states // 2)

    def _segments(self, tokens: int) -> dict[str, int]:
        """Overrides of shaders/shared/segments.wgsl."""
        lanes = TILE * self.segments_per_group
        room = self.kernels.device.workgroup_memory - 4 * self.n_states - _OTHER_BYTES
        # Of all tokens at once compilers make slow loops (H100: 152 instead of 92 us for 8).
        most = max(1, min(_SUMS_AT_ONCE, tokens // 2, room // (4 * lanes)))
        at_once = min(self.segments_per_group, most)
        return dict(
            segments_per_group=self.segments_per_group, at_once=at_once, partials=at_once * lanes
        )

    @property
    def read_bytes(self) -> int:
        """Bytes that one matvec reads of the matrix."""
        buffers = [buffer for part in self.parts for buffer in part.buffers.values()]
        return sum(map(size_bytes, [*buffers, self.table, self.outliers]))

    def destroy(self) -> None:
        """Give the memory back; the matrix is of no use afterwards."""
        buffers = [buffer for part in self.parts for buffer in part.buffers.values()]
        for buffer in (*buffers, self.table, self.outliers):
            self.kernels.device.destroy(buffer)

    def output(self, label: str, tokens: int) -> Output:
        size = 4 * self.splits * tokens * self.rows
        return Output(self.kernels.device.empty(label, size), self.splits)

    def makes_input(self, digits: int, *, all_columns: bool = False) -> bool:
        """Whether a matvec of one token had better make its input itself of what launches before
        have left: every tile's workgroups do it again, of the columns of a split, in less time than
        a launch takes if these are a quad a lane at most. `all_columns`: they need to see the
        others too, as for a norm.
        """
        lanes, split = TILE * self.segments_per_group, self._split_blocks
        if self.whole_rows or self.floats or self.cols % 4:
            return False
        if BLOCK * (self.n_blocks if all_columns else split) > 4 * lanes:
            return False
        if all_columns and self.cols > _MAX_NORM_COLUMNS:
            return False
        # Beside the table four arrays of a word a lane, and the input.
        room = 4 * _MAX_TABLE + 16 * lanes + split * (BLOCK * digits + 8) + _OTHER_BYTES
        return bool(room <= self.kernels.device.workgroup_memory)

    @property
    def _split_blocks(self) -> int:
        """Most blocks of a split."""
        ends = [self._first_block(i * self.segments_per_group) for i in range(self.splits + 1)]
        return max(end - begin for begin, end in pairwise(ends))

    def matvec(
        self,
        x: Activations | Output | Residual,
        y: Output,
        *,
        tokens: int,
        digits: int,
        eps: float | None = None,
        then: Then | None = None,
    ) -> Iterator[Dispatch]:
        """y[split, t] = the split's share of W x[t]; and, of one token on a software adapter, what
        comes `then`.

        `eps`: of the norm that x comes from, which has left its factor to this matvec. A matrix
        that `makes_input` also takes a residual, of which x is the norm, or gate | up, of which x =
        silu(gate) * up.
        """
        overrides = dict(tokens=tokens, **self._stream, **self._overrides)
        variants = []
        tile, lanes = TILE, TILE * self.segments_per_group
        activations: dict[str, Any]
        if isinstance(x, Residual):
            name, activations = "norm_matvec", dict(x=x.x, added=x.added.buffer)
            activations |= dict(weight=x.weight, x_out=x.out)
            overrides |= dict(added_splits=x.added.splits)
        elif isinstance(x, Output):
            name, activations = "swiglu_matvec", dict(gate_up=x.buffer)
            overrides |= dict(gate_splits=x.splits)
        elif self.floats:
            name, activations = "matvec_float", dict(x=x.digits)
        else:
            if self.whole_rows and (few := x.uniform(tokens * digits * self.n_blocks)):
                variants, x = ["uniform"], few
            name, activations = "matvec", dict(in_digits=x.digits, in_scale=x.scale)
        if not self.floats:
            overrides["digits"] = digits
        made_bytes = 0
        if not isinstance(x, Activations):
            overrides |= dict(split_blocks=self._split_blocks, lanes=lanes)
            # Three arrays of a word a lane, and the input.
            made_bytes = 12 * lanes + self._split_blocks * (BLOCK * digits + 8)
        if self.whole_rows:
            name, tile, lanes = f"{name}_rows", _SOFTWARE_LANES * _ROWS_PER_LANE, _SOFTWARE_LANES
        else:
            overrides |= self._segments(tokens)
            overrides |= self._table(lanes, 4 * overrides["partials"] + made_bytes)
        for part in self.parts:
            groups = -(-part.rows // tile), self.splits
            params: dict[str, float] = dict(
                rows=part.rows, y_rows=self.rows, n_blocks=self.n_blocks, n_segments=self.n_segments
            )
            after: dict[str, Any] = {}
            if not self.whole_rows:
                params["rows_padded"] = part.rows_padded
            elif isinstance(x, Activations) and not self.floats:
                after["squares"] = x.squares or x.scale
            if isinstance(x, Residual) or after:
                params |= dict(norm_dim=0 if eps is None else self.cols, norm_eps=eps or 0.0)
            if isinstance(x, Output):
                params["cols"] = self.cols
            if not then:
                kernel = self.kernels.get(name, *variants, **overrides)
            else:
                kernel = self.kernels.get(
                    f"{name}_then",
                    *variants,
                    gated=then.gated,
                    splits=y.splits,
                    lanes=lanes,
                    **overrides,
                )
                params["dim"] = then.dim
                after |= dict(arrived=then.arrived, x=then.x, weight=then.weight)
                after |= dict(x_digits=then.out.digits, x_scale=then.out.scale)
                if eps is None:
                    after["squares"] = then.out.squares
            # Of several tokens the compiler makes slow loops if it knows too much.
            constants, params = (params, {}) if tokens == 1 else ({}, params)
            yield kernel.dispatch(
                groups,
                params | self._params,
                constants,
                **part.buffers,
                table=self.table,
                outliers=self.outliers,
                **activations,
                y=y.buffer,
                **after,
            )

    @property
    def n_bytes(self) -> int:
        """Of all weights as matmul reads them."""
        return _whole_tiles(self.rows) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self._planes * self.n_blocks * BLOCK

    def few_splits(self) -> int:
        """Of a product of few tokens, so that there are workgroups for a large GPU."""
        if self.whole_rows:
            return 1
        tiles = -(-self.rows // _BYTE_ROWS)
        return max(1, min(_MAX_FEW_SPLITS, _GROUPS_WANTED // tiles, self.n_blocks // 4))

    def matmul(
        self, x: Activations, y: Any, bytes_: Any, *, splits: int = 1, few: bool = False
    ) -> Iterator[Step]:
        """y[split, t] = the split's share of W x[t], f32 (splits, whole tiles of tokens, rows), for
        many tokens: int8 activations, no floats. `few`: in tiles of 32 tokens, not of 64.

        As much at a time is decoded to `bytes_` as it holds, and then multiplied.
        """
        for piece in self._pieces(bytes_.size):
            yield Step(self._decode(piece, bytes_))
            inputs = dict(
                bytes=bytes_, row_info=piece.part.row_info, far_outliers=self._far_outliers, y=y
            )
            if self.whole_rows:
                yield from self._multiply_rows(piece, x, inputs)
            else:
                yield self._multiply_tiles(piece, x, inputs, splits, few)

    def _pieces(self, room_bytes: int) -> Iterator[_Piece]:
        """Such that a product has rows enough, and all columns of them where that is possible."""
        rows = room_bytes // self._row_bytes // _BYTE_ROWS * _BYTE_ROWS
        segments = self.n_segments
        enough = min(_whole_tiles(self.rows), _LARGE_PRODUCT_ROWS)
        longest = self._planes * -(-self.n_blocks // self.n_segments) * BLOCK
        most = room_bytes // (enough * longest)
        if rows < enough and most and not self.whole_rows:
            rows = enough
            segments = -(-segments // -(-segments // most))  # of pieces alike
        for part in self.parts:
            for first_row in range(0, part.rows, rows):
                for begin in range(0, self.n_segments, segments):
                    end = min(begin + segments, self.n_segments)
                    yield _Piece(part, first_row, min(rows, part.rows - first_row), begin, end)

    def _params_of(self, piece: _Piece) -> dict[str, int]:
        return dict(
            first_row=piece.first_row,
            n_blocks=self.n_blocks,
            n_segments=self.n_segments,
            byte_rows=_whole_tiles(piece.rows),
        )

    def _first_block(self, segment: int) -> int:
        """As shaders/shared/matrix.wgsl has it."""
        return segment * self.n_blocks // self.n_segments

    def _decode(self, piece: _Piece, bytes_: Any) -> Dispatch:
        part, begin, end = piece.part, piece.segment_begin, piece.segment_end
        overrides = dict(planes=self._planes, **self._stream, **self._overrides)
        buffers = dict(**part.buffers, table=self.table, outliers=self.outliers, bytes=bytes_)
        params = dict(**self._params_of(piece), **self._symbols)
        params["block_begin"] = self._first_block(begin)
        if self.whole_rows:
            kernel = self.kernels.get("decode_rows", **overrides)
            return kernel.dispatch([-(-piece.rows // _SOFTWARE_LANES)], params, **buffers)
        group = self.segments_per_group
        overrides |= self._table(TILE * group)
        overrides |= dict(segments_per_group=group, lanes=TILE * group)
        params |= dict(rows_padded=part.rows_padded, segment_begin=begin, segment_end=end)
        kernel = self.kernels.get("decode_tile", **overrides)
        return kernel.dispatch(
            [-(-piece.rows // TILE), -(-(end - begin) // group)], params, **buffers
        )

    def _multiply_tiles(
        self, piece: _Piece, x: Activations, buffers: dict[str, Any], splits: int, few: bool
    ) -> Step:
        token_lanes = _FEW_TOKEN_LANES if few else _TOKEN_LANES
        row_groups = 2 if self.rows >= _LARGE_PRODUCT_ROWS and not few else 1
        tile = 4 * _PRODUCT_LANES // token_lanes * row_groups
        kernel = self.kernels.get(
            "matmul",
            token_lanes=token_lanes,
            row_groups=row_groups,
            row_quads=4 * tile,
            planes=self._planes,
            n_states=self.n_states,
            **self._raw_bits,
        )
        dispatch = kernel.dispatch(
            [-(-piece.rows // tile), 1, splits],
            dict(
                **self._params_of(piece),
                rows=piece.rows,
                y_rows=self.rows,
                block_begin=self._first_block(piece.segment_begin),
                block_end=self._first_block(piece.segment_end),
            ),
            x_digits=x.digits,
            x_scale=x.scale,
            **buffers,
        )
        return Step(dispatch, 4 * token_lanes)

    def _multiply_rows(
        self, piece: _Piece, x: Activations, buffers: dict[str, Any]
    ) -> Iterator[Step]:
        kernel = self.kernels.get(
            "matmul_rows", planes=self._planes, n_states=self.n_states, **self._raw_bits
        )
        window = uniform_tokens(self.n_blocks)
        params = dict(**self._params_of(piece), rows=piece.rows, y_rows=self.rows)
        for first in range(0, x.tokens, window):
            at = first * self.n_blocks
            dispatch = kernel.dispatch(
                [-(-piece.rows // (_SOFTWARE_LANES * _ROWS_PER_LANE)), 1],
                params | dict(first_token=first),
                x_digits=(x.digits, at * BLOCK, UNIFORM_BLOCKS * BLOCK),
                x_scale=(x.scale, at * 8, UNIFORM_BLOCKS * 8),
                **buffers,
            )
            yield Step(dispatch, _SOFTWARE_TOKENS, first, window)

    @cached_property
    def _far_outliers(self) -> Any:
        return self.kernels.device.upload(f"{self.name}.far_outliers", self._far)

    @cached_property
    def _rows_by_number(self) -> Any:
        return self.kernels.device.upload(f"{self.name}.rows_by_number", self._by_number)

    def embed(self, state: Any, x: Any, *, tokens: int) -> Iterator[Dispatch]:
        """x[t] = row tokens[t] of the matrix."""
        name = "embed_float" if self.floats else "embed"
        lanes = 32 if self.whole_rows else 256
        only = {} if self.floats else dict(lanes=lanes, **self._table(lanes))
        kernel = self.kernels.get(name, **self._stream, **self._overrides, **only)
        for part in self.parts:
            yield kernel.dispatch(
                [1, tokens],
                constants=dict(
                    row_begin=part.row_begin,
                    rows=part.rows,
                    rows_padded=part.rows_padded,
                    cols=self.cols,
                    n_segments=self.n_segments,
                    n_blocks=self.n_blocks,
                    **self._params,
                ),
                state=state,
                **part.buffers | {"row_info": self._rows_by_number},
                table=self.table,
                outliers=self.outliers,
                x=x,
            )
