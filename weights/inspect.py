"""What a weights file holds and costs, matrix by matrix; every stream is decoded on the way."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from codec.lossless import AnyMatrix, LosslessMatrix, decode_lossless, exponent_fields
from codec.matrix import decode_matrix
from engine.errors import EngineError
from weights import layout
from weights.container import damaged
from weights.store import WeightsFile

_ROWS_AT_ONCE = 1 << 12  # bincount makes a copy of eight bytes per weight


@dataclass(frozen=True)
class MatrixReport:
    """The cost of one matrix, or (`total`) of several."""

    name: str
    n_weights: int
    shape: tuple[int, int] | None  # (rows, cols); None for a total
    # "P/g/b/n/k": log2 of the states, weights to a group, raw bits ("0+1": none in narrow classes,
    code: str  # one in others), symbols, classes; empty for a total
    stored_bits: float  # per weight, everything counted in
    raw_bits: float  # per weight, among these: not entropy-coded, but stored as they are
    # Bits per weight of the integers' own histogram, the best a coder can do; of weights without
    # loss that of the exponents, and the raw bits.
    entropy: float
    n_outliers: int

    @property
    def overhead(self) -> float:
        return self.stored_bits - self.entropy


def describe(name: str, matrix: AnyMatrix, decoded: npt.NDArray[Any]) -> MatrixReport:
    """`decoded` (rows, cols) is what `matrix` decodes to: integers, or floats without loss."""
    if isinstance(matrix, LosslessMatrix):
        coded, raw_bits = matrix.exponents, float(matrix.field_bits)
        entropy = raw_bits + _entropy(exponent_fields(decoded))
    else:
        coded, raw_bits = matrix, float(matrix.row_raw_bits.mean())
        entropy = _entropy(decoded)
    raw = f"{coded.narrow_raw_bits}+{coded.raw_bits}" if coded.n_narrow else f"{raw_bits:g}"
    return MatrixReport(
        name=name,
        n_weights=matrix.n_weights,
        shape=(matrix.rows, matrix.cols),
        code=f"{coded.log2_states}/{coded.group}/{raw}/{coded.n_symbols}/{coded.n_classes}",
        stored_bits=matrix.bits_per_weight,
        raw_bits=raw_bits,
        entropy=entropy,
        n_outliers=coded.outliers.size,
    )


def _entropy(q: npt.NDArray[Any]) -> float:
    """Bits of one of the integers q (rows, cols), by their histogram."""
    lowest = int(q.min())
    counts = np.zeros(int(q.max()) - lowest + 1, np.int64)
    for start in range(0, len(q), _ROWS_AT_ONCE):
        chunk = q[start : start + _ROWS_AT_ONCE] - lowest
        counts += np.bincount(chunk.ravel(), minlength=counts.size)
    share = counts[counts > 0] / q.size
    return float(-share @ np.log2(share))


def describe_file(file: WeightsFile) -> list[MatrixReport]:
    """Reports of all matrices; WeightsError when a stream does not decode to its end."""
    reports = []
    for name in file.matrix_names:
        matrix = file.matrix(name)
        try:
            reports.append(describe(name, matrix, _decode(matrix)))
        except ValueError as error:
            raise damaged(file.path, f"{name}: {error}") from None
    return reports


def _decode(matrix: AnyMatrix) -> npt.NDArray[Any]:
    return decode_lossless(matrix) if isinstance(matrix, LosslessMatrix) else decode_matrix(matrix)


def totals(reports: Iterable[MatrixReport]) -> list[MatrixReport]:
    """Sums over the blocks, over embedding and head, and over everything."""
    reports = list(reports)
    outer = [report for report in reports if report.name in (layout.EMBEDDING, layout.HEAD)]
    blocks = [report for report in reports if report not in outer]
    groups = {"all blocks": blocks, "embedding and head": outer, "all matrices": reports}
    return [_total(name, group) for name, group in groups.items()]


def _total(name: str, reports: list[MatrixReport]) -> MatrixReport:
    n_weights = sum(report.n_weights for report in reports)

    def mean(field: str) -> float:
        return float(sum(getattr(r, field) * r.n_weights for r in reports) / n_weights)

    return MatrixReport(
        name=name,
        n_weights=n_weights,
        shape=None,
        code="",
        stored_bits=mean("stored_bits"),
        raw_bits=mean("raw_bits"),
        entropy=mean("entropy"),
        n_outliers=sum(report.n_outliers for report in reports),
    )


def format_table(reports: list[MatrixReport]) -> str:
    """One line per matrix, then the totals; rates in bits per weight."""
    head = "rows x cols", "P/g/b/n/k", "stored", "raw", "entropy", "overhead", "outliers"
    lines = [
        f"{'matrix':40}{head[0]:>14}{head[1]:>15}" + "".join(f"{word:>10}" for word in head[2:])
    ]
    for report in [*reports, *totals(reports)]:
        size = " x ".join(map(str, report.shape)) if report.shape else f"{report.n_weights:,}"
        lines.append(
            f"{report.name:40}{size:>14}{report.code:>15}{report.stored_bits:10.3f}"
            f"{report.raw_bits:10.3f}{report.entropy:10.3f}{report.overhead:10.3f}{report.n_outliers:10}"
        )
    return "\n".join(lines)


def format_file(file: WeightsFile, reports: list[MatrixReport]) -> str:
    """The table between the model's sizes and the file's."""
    fields = json.loads(file.config.to_json())
    sizes = "  ".join(f"{key} {value}" for key, value in fields.items())
    n_params = file.config.n_params
    return (
        f"{file.path}: {file.source}\n{sizes}\n\n{format_table(reports)}\n\n"
        f"{file.size_bytes:,} bytes for {n_params:,} parameters: "
        f"{8 * file.size_bytes / n_params:.3f} bits each"
    )


def _as_json(file: WeightsFile, reports: list[MatrixReport]) -> dict[str, Any]:
    matrices = [
        {**dataclasses.asdict(report), "overhead": report.overhead}
        for report in [*reports, *totals(reports)]
    ]
    return {
        "path": str(file.path),
        "source": file.source,
        "config": json.loads(file.config.to_json()),
        "size_bytes": file.size_bytes,
        "n_params": file.config.n_params,
        "matrices": matrices[: len(reports)],
        "totals": matrices[len(reports) :],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="answer inspect",
        description="Show what a weights file holds, and check all of it.",
        epilog="P/g/b/n/k: k decode tables of 2^P states, of groups of g weights, b raw bits per "
        "weight, n symbols; narrow rows may have fewer raw bits, which then stand first: 0+2. "
        "Without loss, sign and mantissa are raw and symbols are exponents.",
    )
    parser.add_argument("file", help="weights file or name of a model")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(arguments)
    from weights.cache import resolve  # which imports the converter, and that imports this

    try:
        file = WeightsFile.open(resolve(options.file))
        reports = describe_file(file)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(_as_json(file, reports)) if options.json else format_file(file, reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
