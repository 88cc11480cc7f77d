"""How one matrix lies in a weights file: its tensors and its numbers, and the matrix they make.

Two kinds: quantized matrices, and matrices without loss. See FORMAT.md, "Tensors" and "Metadata".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from codec import side
from codec.classes import MAX_STATES
from codec.lossless import AnyMatrix, LosslessMatrix, check_lossless
from codec.matrix import LOG2_STATES, CodedMatrix, check, pack_side
from weights import layout


@dataclass(frozen=True)
class Kind:
    """What is stored of a matrix."""

    fields: tuple[str, ...]  # whole numbers, in the metadata
    # Tensors and their types. The large ones are written as soon as they exist; the small ones have
    # smaller elements and follow when all of these are written, so that every tensor is aligned.
    large: Mapping[str, str]
    small: Mapping[str, str]

    @property
    def parts(self) -> dict[str, str]:
        return {**self.large, **self.small}


QUANTIZED = Kind(
    fields=(
        "rows",
        "cols",
        "log2_states",
        "n_classes",
        "group",
        "raw_bits",
        "n_narrow",
        "narrow_raw_bits",
        "min_symbol",
    ),
    large={"words": "U32", "side": "U32", "outliers": "U32"},
    small={"marginals": "U16"},
)
LOSSLESS = Kind(
    fields=("rows", "cols", "log2_states", "n_classes", "min_symbol", "anchor", "mantissa_bits"),
    large={"words": "U32", "mantissas": "U32", "side": "U32", "outliers": "U32"},
    small={"marginals": "U16"},
)
KINDS = (QUANTIZED, LOSSLESS)


def kind_of(fields: Any) -> Kind:
    """The kind that the numbers in a file speak of; if they make no sense, `join` will say so."""
    lossless = isinstance(fields, dict) and fields.keys() == set(LOSSLESS.fields)
    return LOSSLESS if lossless else QUANTIZED


def split(matrix: AnyMatrix) -> tuple[Kind, dict[str, int], dict[str, npt.NDArray[Any]]]:
    """The kind, the numbers and the tensors of a matrix."""
    kind, coded = QUANTIZED, matrix
    if isinstance(matrix, LosslessMatrix):
        kind, coded = LOSSLESS, matrix.exponents
    assert isinstance(coded, CodedMatrix)
    values = {**vars(coded), **vars(matrix), "side": pack_side(coded)}
    values |= {"n_classes": coded.n_classes, "marginals": coded.marginals.ravel()}
    values["outliers"] = side.pack_outliers(coded.outliers, coded.cols)
    return kind, {f: values[f] for f in kind.fields}, {part: values[part] for part in kind.parts}


def join(matrix: layout.Matrix, fields: Any, parts: Mapping[str, npt.NDArray[Any]]) -> AnyMatrix:
    """The matrix, every part of it checked but for the bits of the streams themselves.

    `parts` has the tensors of `kind_of(fields)`. ValueError if something is wrong.
    """
    kind = kind_of(fields)
    if not isinstance(fields, dict) or fields.keys() != set(kind.fields):
        raise ValueError(f"described by {fields}, expected {', '.join(kind.fields)}")
    if any(type(value) is not int for value in fields.values()):
        raise ValueError(f"described by {fields}, expected whole numbers")
    if (fields["rows"], fields["cols"]) != (matrix.rows, matrix.cols):
        raise ValueError(f"described by {fields}, expected {matrix.rows} x {matrix.cols}")
    if fields["log2_states"] not in LOG2_STATES:
        raise ValueError(f"described by {fields}, expected log2_states in {LOG2_STATES}")
    n_classes, marginals = fields["n_classes"], parts["marginals"]
    most = MAX_STATES >> fields["log2_states"]
    if not 1 <= n_classes <= most or marginals.size % n_classes:
        raise ValueError(
            f"{n_classes} classes with marginals of {marginals.size}, expected 1 to {most} classes"
        )
    rows = side.unpack(parts["side"], matrix.rows, n_classes, fields["log2_states"])
    if (most := rows.outlier_counts.max()) > matrix.cols:
        raise ValueError(f"{most} outliers in a row, expected {matrix.cols} at most")
    n_outliers = int(rows.outlier_counts.sum())
    lossless = kind is LOSSLESS
    coded = CodedMatrix(
        rows=matrix.rows,
        cols=matrix.cols,
        log2_states=fields["log2_states"],
        group=2 if lossless else fields["group"],
        raw_bits=0 if lossless else fields["raw_bits"],
        n_narrow=0 if lossless else fields["n_narrow"],
        narrow_raw_bits=0 if lossless else fields["narrow_raw_bits"],
        min_symbol=fields["min_symbol"],
        marginals=marginals.reshape(n_classes, -1),
        classes=rows.classes,
        words=parts["words"],
        row_offsets=np.concatenate([[0], np.cumsum(rows.lengths)]),
        states=rows.states,
        scale_log2=rows.scale_log2,
        outliers=side.unpack_outliers(parts["outliers"], n_outliers, matrix.cols),
        outlier_offsets=np.concatenate([[0], np.cumsum(rows.outlier_counts)]).astype(np.uint32),
    )
    if lossless:
        floats = LosslessMatrix(
            coded, fields["anchor"], fields["mantissa_bits"], parts["mantissas"]
        )
        check_lossless(floats)
        return floats
    check(coded)
    return coded
