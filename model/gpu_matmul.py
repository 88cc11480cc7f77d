"""Products of coded matrices with many tokens: weights are decoded once, and then multiplied.

As much of a matrix as a buffer has room for is decoded to int8 planes (shaders/shared/planes.wgsl),
a piece at a time, and multiplied with all tokens there. Outliers that do not fit a byte are left to
the product. int8 activations; matrices without loss have no such kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from codec.classes import TILE
from engine.kernel import Dispatch
from model.activations import UNIFORM_BLOCKS, Activations, Step, uniform_tokens
from model.gpu_layout import BLOCK
from model.gpu_matrix import ROWS_PER_LANE, SOFTWARE_LANES, GpuMatrix, Part

# Lanes of a workgroup of matmul, and those of them that share its rows, each with four tokens.
_LANES, _TOKEN_LANES, _FEW_TOKEN_LANES = 256, 16, 8
_BYTE_ROWS = 128  # so matmul needs no smaller tile at the end
_LARGE_PRODUCT_ROWS = 4096  # fewer leave multiprocessors idle with tiles so large
_GROUPS_WANTED, _MAX_FEW_SPLITS = 256, 8  # of a product of few tokens

_SOFTWARE_TOKENS = 8  # of a lane of matmul_rows


class _Piece(NamedTuple):
    """Rows first_row, first_row + 1, ... of a part, and of these the columns of some segments."""

    part: Part
    first_row: int
    rows: int
    segment_begin: int
    segment_end: int


def decoded_bytes(matrix: GpuMatrix) -> int:
    """Of all its weights as `matmul` reads them."""
    return _whole_tiles(matrix.rows) * _row_bytes(matrix)


def few_splits(matrix: GpuMatrix) -> int:
    """Of a product of few tokens, so that there are workgroups for a large GPU."""
    if matrix.whole_rows:
        return 1
    tiles = -(-matrix.rows // _BYTE_ROWS)
    return max(1, min(_MAX_FEW_SPLITS, _GROUPS_WANTED // tiles, matrix.n_blocks // 4))


def matmul(
    matrix: GpuMatrix, x: Activations, y: Any, bytes_: Any, *, splits: int = 1, few: bool = False
) -> Iterator[Step]:
    """y[split, t] = the split's share of W x[t], f32 (splits, whole tiles of tokens, rows), by way
    of `bytes_`. `few`: in tiles of 32 tokens, not of 64.
    """
    for piece in _pieces(matrix, bytes_.size):
        yield Step(_decode(matrix, piece, bytes_))
        inputs = dict(
            bytes=bytes_, row_info=piece.part.row_info, far_outliers=matrix.far_outliers, y=y
        )
        if matrix.whole_rows:
            yield from _multiply_rows(matrix, piece, x, inputs)
        else:
            yield _multiply_tiles(matrix, piece, x, inputs, splits, few)


def _whole_tiles(rows: int) -> int:
    return -(-rows // _BYTE_ROWS) * _BYTE_ROWS


def _row_bytes(matrix: GpuMatrix) -> int:
    return matrix.planes * matrix.n_blocks * BLOCK


def _pieces(matrix: GpuMatrix, room_bytes: int) -> Iterator[_Piece]:
    """Such that a product has rows enough, and all columns of them where that is possible."""
    rows = room_bytes // _row_bytes(matrix) // _BYTE_ROWS * _BYTE_ROWS
    segments = matrix.n_segments
    enough = min(_whole_tiles(matrix.rows), _LARGE_PRODUCT_ROWS)
    longest = matrix.planes * -(-matrix.n_blocks // matrix.n_segments) * BLOCK
    most = room_bytes // (enough * longest)
    if rows < enough and most and not matrix.whole_rows:
        rows = enough
        segments = -(-segments // -(-segments // most))  # of pieces alike
    for part in matrix.parts:
        for first_row in range(0, part.rows, rows):
            for begin in range(0, matrix.n_segments, segments):
                end = min(begin + segments, matrix.n_segments)
                yield _Piece(part, first_row, min(rows, part.rows - first_row), begin, end)


def _params(matrix: GpuMatrix, piece: _Piece) -> dict[str, int]:
    """Of all kernels here."""
    return dict(
        first_row=piece.first_row,
        n_blocks=matrix.n_blocks,
        n_segments=matrix.n_segments,
        byte_rows=_whole_tiles(piece.rows),
    )


def _decode(matrix: GpuMatrix, piece: _Piece, bytes_: Any) -> Dispatch:
    part, begin, end = piece.part, piece.segment_begin, piece.segment_end
    overrides = dict(planes=matrix.planes, **matrix.stream_overrides)
    buffers = dict(**part.buffers, table=matrix.table, outliers=matrix.outliers, bytes=bytes_)
    params = dict(**_params(matrix, piece), **matrix.symbols)
    params["block_begin"] = matrix.first_block(begin)
    if matrix.whole_rows:
        kernel = matrix.kernels.get("decode_rows", **overrides)
        return kernel.dispatch([-(-piece.rows // SOFTWARE_LANES)], params, **buffers)
    group = matrix.segments_per_group
    overrides |= dict(segments_per_group=group, lanes=matrix.workgroup.lanes)
    params |= dict(rows_padded=part.rows_padded, segment_begin=begin, segment_end=end)
    kernel = matrix.kernels.get("decode_tile", *matrix.workgroup.table_variants(), **overrides)
    return kernel.dispatch([-(-piece.rows // TILE), -(-(end - begin) // group)], params, **buffers)


def _multiply_tiles(
    matrix: GpuMatrix,
    piece: _Piece,
    x: Activations,
    buffers: dict[str, Any],
    splits: int,
    few: bool,
) -> Step:
    token_lanes = _FEW_TOKEN_LANES if few else _TOKEN_LANES
    row_groups = 2 if matrix.rows >= _LARGE_PRODUCT_ROWS and not few else 1
    tile = 4 * _LANES // token_lanes * row_groups
    kernel = matrix.kernels.get(
        "matmul",
        token_lanes=token_lanes,
        row_groups=row_groups,
        row_quads=4 * tile,
        planes=matrix.planes,
        **matrix.row_overrides,
    )
    dispatch = kernel.dispatch(
        [-(-piece.rows // tile), 1, splits],
        dict(
            **_params(matrix, piece),
            rows=piece.rows,
            y_rows=matrix.rows,
            block_begin=matrix.first_block(piece.segment_begin),
            block_end=matrix.first_block(piece.segment_end),
        ),
        x_digits=x.digits,
        x_scale=x.scale,
        **buffers,
    )
    return Step(dispatch, 4 * token_lanes)


def _multiply_rows(
    matrix: GpuMatrix, piece: _Piece, x: Activations, buffers: dict[str, Any]
) -> Iterator[Step]:
    kernel = matrix.kernels.get("matmul_rows", planes=matrix.planes, **matrix.row_overrides)
    window = uniform_tokens(matrix.n_blocks)
    params = dict(**_params(matrix, piece), rows=piece.rows, y_rows=matrix.rows)
    for first in range(0, x.tokens, window):
        at = first * matrix.n_blocks
        dispatch = kernel.dispatch(
            [-(-piece.rows // (SOFTWARE_LANES * ROWS_PER_LANE)), 1],
            params | dict(first_token=first),
            x_digits=(x.digits, at * BLOCK, UNIFORM_BLOCKS * BLOCK),
            x_scale=(x.scale, at * 8, UNIFORM_BLOCKS * 8),
            **buffers,
        )
        yield Step(dispatch, _SOFTWARE_TOKENS, first, window)
