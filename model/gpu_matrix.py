"""Coded matrices in GPU memory: from the file's layout to the one that an adapter reads fastest.

The streams of rows that are decoded side by side, a lane each, are interleaved. On a GPU a row is
shared by as many lanes as fill it, each with a segment of columns; where they may enter the stream
is found at load, by one pass over the matrix. On a software adapter a lane takes whole rows. All
this is the adapter's business and not the format's. Rows lie sorted by class, so that a tile, which
a workgroup decodes, needs one table; their results go to where they belong.

Matrices without loss have kernels of their own (`*_float`), as their symbols stand for exponents
and their activations are f32; streams, entry points and lanes are the same.

Here is what multiplies weights where it decodes them, for few tokens; gpu_layout.py has how words
lie in memory, gpu_workgroup.py what workgroups have room for, gpu_matmul.py products with many
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

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
from model.activations import Activations, Output, Residual, Then
from model.gpu_layout import (
    BLOCK,
    far_outliers,
    guard_bytes,
    interleaved_streams,
    ordered_outliers,
    padded_rows,
    row_chunks,
    row_info,
    row_ranges,
    tiled_fields,
    wanted_segments,
)
from model.gpu_workgroup import MAX_LANES, Workgroup, table_fits

_MAX_NORM_COLUMNS = 1024  # that every workgroup of a matvec may go through for a norm
_FULL_LANES = 1 << 16  # of a launch, from which on a large GPU does not wait, but computes

SOFTWARE_LANES = 8  # of a workgroup of matvec_rows, decode_rows and matmul_rows
ROWS_PER_LANE = 4  # of matvec_rows and matmul_rows


@dataclass(frozen=True)
class Part:
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
        # Overrides of shaders/shared/matrix.wgsl, and of all that decode streams.
        raw_bits = dict(raw_bits=m.raw_bits, narrow_raw_bits=m.narrow_raw_bits)
        self.row_overrides = dict(n_states=self.n_states, **raw_bits)
        self.stream_overrides = dict(group_size=m.group, **self.row_overrides)
        # What a decoded symbol means: overrides and params of the kernels that use it.
        self._overrides: dict[str, int] = {}
        self._params = dict(offset=m.min_symbol << m.raw_bits)
        self.symbols = dict(min_symbol=m.min_symbol, max_symbol=m.min_symbol + m.n_symbols - 1)
        # Of bytes: shaders/shared/planes.wgsl.
        self.planes = 1 if m.raw_bits <= FAST_RAW_BITS else 2
        self._far = far_outliers(m)
        tables = decode_tables(m.marginals, m.log2_states, m.group)
        if floats:
            self._overrides |= dict(field_bits=floats.field_bits)
            self._params = dict(row_chunks=row_chunks(floats))
            tables = exponent_tables(floats)

        self.whole_rows = device.software or not table_fits(device.workgroup_memory)
        max_segments = min(MAX_LANES, device.max_workgroup_lanes) // TILE
        self.splits = 1
        self.segments_per_group = 1
        if not self.whole_rows:
            most = min(self.n_blocks, max_segments) if one_split else self.n_blocks
            wanted = n_segments or wanted_segments(m.rows, self.n_blocks, max_segments)
            wanted = min(wanted, most)
            self.splits = -(-wanted // max_segments)
            self.segments_per_group = wanted // self.splits
        self.n_segments = self.splits * self.segments_per_group
        lanes = TILE * self.segments_per_group
        self.workgroup = Workgroup(device.workgroup_memory, self.n_states, lanes)

        if self.whole_rows:  # as much as matvec_rows declares
            tables = np.append(tables, np.zeros(classes.MAX_STATES - tables.size, np.uint32))
        self.table = device.upload(f"{name}.table", tables, STORAGE | UNIFORM)
        self._order = classes.device_order(m.classes)
        outliers, self._first_outlier = ordered_outliers(m, self._order)
        self.outliers = device.upload(f"{name}.outliers", outliers)
        self.shared_outliers = 0  # of a tile: shaders/shared/outliers_shared.wgsl
        if not self.whole_rows and not floats and m.outliers.size:
            counts = m.outlier_counts[self._order]
            heaviest = int(np.add.reduceat(counts, np.arange(0, m.rows, TILE)).max())
            # Where lanes do not fill a GPU they wait for what comes from far away, elsewhere for
            # each other's instructions.
            if padded_rows(m.rows) * self.n_segments < _FULL_LANES:
                room = self._split_blocks * (3 * BLOCK + 8)
                self.shared_outliers = self.workgroup.shared_outliers(heaviest, room)
        self._by_number = np.empty((m.rows, 4), np.uint32)  # struct Row, in the matrix's order
        ranges = row_ranges(m, floats, device.max_binding_bytes)
        self.parts = [self._upload(m, floats, *ends) for ends in ranges]

    def _upload(self, m: CodedMatrix, floats: LosslessMatrix | None, begin: int, end: int) -> Part:
        device, rows, padded = self.kernels.device, end - begin, padded_rows(end - begin)
        numbers = self._order[begin:end]
        first = self._first_outlier[begin:end]
        words, bits = interleaved_streams(m, numbers)
        self._by_number[numbers] = row_info(m, numbers, bits, np.arange(begin, end), first)
        info = np.zeros((padded, 4), np.uint32)
        info[:rows] = row_info(m, numbers, bits, numbers, first)
        entries = np.zeros((self.n_segments, padded), np.uint32)
        entries[0, :rows] = m.states[numbers]
        label = f"{self.name}[{begin}:{end}]"
        part = Part(
            begin,
            rows,
            device.upload_chunks(f"{label}.words", words, guard_bytes(m)),
            device.upload(f"{label}.row_info", info),
            device.upload(f"{label}.entries", entries),
            device.upload(f"{label}.mantissas", tiled_fields(floats, numbers)) if floats else None,
        )
        if self.n_segments > 1:
            kernel = self.kernels.get("entry_points", **self.stream_overrides)
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

    def _segment_overrides(self, tokens: int) -> dict[str, int]:
        """Overrides of shaders/shared/segments.wgsl."""
        at_once = min(self.segments_per_group, self.workgroup.sums_at_once(tokens))
        partials = at_once * self.workgroup.lanes
        return dict(segments_per_group=self.segments_per_group, at_once=at_once, partials=partials)

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
        lanes, split = self.workgroup.lanes, self._split_blocks
        if self.whole_rows or self.floats or self.cols % 4:
            return False
        if BLOCK * (self.n_blocks if all_columns else split) > 4 * lanes:
            return False
        if all_columns and self.cols > _MAX_NORM_COLUMNS:
            return False
        return self.workgroup.fits_input(split * (BLOCK * digits + 8))

    def first_block(self, segment: int) -> int:
        """As shaders/shared/matrix.wgsl has it."""
        return segment * self.n_blocks // self.n_segments

    @property
    def _split_blocks(self) -> int:
        """Most blocks of a split."""
        ends = [self.first_block(i * self.segments_per_group) for i in range(self.splits + 1)]
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
        overrides = dict(tokens=tokens, **self.stream_overrides, **self._overrides)
        variants: list[str] = []
        tile, lanes = TILE, self.workgroup.lanes
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
            if eps is not None and not self.whole_rows:
                variants = ["squares"]
                activations["squares"] = x.squares
        if not self.floats:
            overrides["digits"] = digits
        made_bytes = 0
        if not isinstance(x, Activations):
            overrides |= dict(split_blocks=self._split_blocks, lanes=lanes)
            # Three arrays of a word a lane, and the input.
            made_bytes = 12 * lanes + self._split_blocks * (BLOCK * digits + 8)
        if self.whole_rows:
            name, tile, lanes = f"{name}_rows", SOFTWARE_LANES * ROWS_PER_LANE, SOFTWARE_LANES
        else:
            overrides |= self._segment_overrides(tokens)
            words = overrides["partials"]
            if tokens == 1 and self.shared_outliers:
                variants.append("shared")
                overrides["shared_outliers"] = self.shared_outliers
                words += self.shared_outliers
            variants += self.workgroup.table_variants(4 * words + made_bytes)
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
            if isinstance(x, Output):
                params["cols"] = self.cols
            elif not self.floats:
                params |= dict(norm_dim=0 if eps is None else self.cols, norm_eps=eps or 0.0)
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

    @cached_property
    def far_outliers(self) -> Any:
        return self.kernels.device.upload(f"{self.name}.far_outliers", self._far)

    @cached_property
    def _rows_by_number(self) -> Any:
        return self.kernels.device.upload(f"{self.name}.rows_by_number", self._by_number)

    def embed(self, state: Any, x: Any, *, tokens: int) -> Iterator[Dispatch]:
        """x[t] = row tokens[t] of the matrix."""
        name = "embed_float" if self.floats else "embed"
        room = {}
        if not self.floats:
            groups = self.n_blocks * BLOCK // 16
            room = dict(high_groups=groups, low_groups=groups if self.planes > 1 else 1)
            room["lanes"] = 32 if self.whole_rows else 256
        kernel = self.kernels.get(name, **self.stream_overrides, **self._overrides, **room)
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


def agree(matrices: Sequence[GpuMatrix]) -> None:
    """Let matrices of one shape share as many outliers of a tile each, so that they have fewer
    kernels: a GPU is slowed down by more than some sixteen that take turns.
    """
    most: dict[Workgroup, int] = {}
    for matrix in matrices:
        others = most.get(matrix.workgroup, 0)
        most[matrix.workgroup] = max(others, matrix.shared_outliers)
    for matrix in matrices:
        matrix.shared_outliers = most[matrix.workgroup]
