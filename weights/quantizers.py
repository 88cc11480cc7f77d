"""What is done to a source's matrix before it is coded: three ways to integers, one interface.

`Plain` needs nothing but the weights, `Whitened` the statistics of a calibration. Both read the
source matrix by matrix and keep nothing of its size. `InTurn` has blocks that were quantized one
after another, in files.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from codec.matrix import CodedMatrix, encode_matrix
from codec.quantize import Histogram, histogram, quantize, root_mean_squares, row_steps
from codec.scale import ScaleLog2, to_scale
from codec.whiten import Floats, inverse_factor, quantize_whitened
from engine.errors import WeightsError
from weights import layout
from weights.calibration.calibration import Calibration, completing
from weights.equalize import Equalized
from weights.parallel import in_processes
from weights.sources import Source

Array = npt.NDArray[np.float32]

# Weights of a matrix that is worth several cores, and rows of a part, whatever the number of cores:
# the integers are the same then. Shorter operations take longer a weight.
_LARGE, _PART = 1 << 22, 256
_FEW_CORES = 4


class Quantizer(Protocol):
    """Rows' steps are c times those of `histogram`'s units."""

    def weighs(self, matrix: layout.Matrix) -> bool:
        """Whether its units say what its errors cost, so that one c serves all such matrices."""
        ...

    def histogram(self, matrix: layout.Matrix) -> Histogram: ...

    def integers(
        self, matrix: layout.Matrix, c: float, every: int = 1
    ) -> tuple[npt.NDArray[np.int32], ScaleLog2]:
        """(rows, cols) integers and the rows' scales, of the rows 0, every, 2 every, ..."""
        ...

    def vector(self, name: str) -> Array: ...


class Plain:
    """Steps in proportion to a row's root mean square, weights rounded to the nearest."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def weighs(self, matrix: layout.Matrix) -> bool:
        return matrix.in_block

    def histogram(self, matrix: layout.Matrix) -> Histogram:
        w = read_fused(self._source, matrix)
        return histogram(w, root_mean_squares(w))

    def integers(
        self, matrix: layout.Matrix, c: float, every: int = 1
    ) -> tuple[npt.NDArray[np.int32], ScaleLog2]:
        w = read_fused(self._source, matrix)[::every]
        scale = row_steps(root_mean_squares(w), c)
        return quantize(w, scale), scale

    def vector(self, name: str) -> Array:
        return self._source.vector(name)


class Whitened:
    """Whitened steps on equalised matrices; a matrix without statistics is treated as by Plain."""

    def __init__(self, source: Source, calibration: Calibration, sparsity: float = 0.0) -> None:
        """`sparsity`: the share of the blocks' weights to be pruned."""
        self._source = source
        self._sparsity = sparsity
        self._tied = source.config.tie_embeddings
        self._plain = Plain(source)
        self._equalized = Equalized(source.config, calibration)

    def weighs(self, matrix: layout.Matrix) -> bool:
        return matrix.name != layout.EMBEDDING or self._tied

    def histogram(self, matrix: layout.Matrix) -> Histogram:
        whitening = self._equalized.whitening(matrix)
        if whitening is None:
            return self._plain.histogram(matrix)
        return histogram(self._read(matrix), whitening.unit_steps)

    def integers(
        self, matrix: layout.Matrix, c: float, every: int = 1
    ) -> tuple[npt.NDArray[np.int32], ScaleLog2]:
        whitening = self._equalized.whitening(matrix)
        if whitening is None:
            return self._plain.integers(matrix, c, every)
        scale = row_steps(whitening.unit_steps[::every], c)
        w = self._read(matrix)[::every]
        sparsity = self._sparsity if matrix.in_block else 0.0
        q = quantize_whitened(w, whitening.inverse_factor, to_scale(scale), sparsity)
        return q, scale

    def moved(
        self, matrix: layout.Matrix, c: float, products: Array, hessian: Array
    ) -> tuple[npt.NDArray[np.int32], ScaleLog2, Array]:
        """`integers` of a block's matrix for inputs of this Hessian (cols, cols) instead of the
        calibration's, moved before by products (rows, cols) times its damped inverse; and what they
        then make of the source's matrix.
        """
        whitening = self._equalized.whitening(matrix)
        assert whitening is not None
        u = inverse_factor(hessian)
        factor = u.astype(np.float32)
        w = read_fused(self._source, matrix)
        w += (products @ factor.T) @ factor
        self._equalized.matrix(matrix, w)
        scale = row_steps(whitening.unit_steps, c)
        q = _quantize_by_rows(w, u / whitening.columns, to_scale(scale), self._sparsity)
        np.multiply(q, to_scale(scale)[:, None], out=w)
        self._equalized.undone(matrix, w)
        return q, scale, w

    def vector(self, name: str) -> Array:
        return self._equalized.vector(name, self._source.vector(name))

    def _read(self, matrix: layout.Matrix) -> Array:
        w = read_fused(self._source, matrix)
        self._equalized.matrix(matrix, w)
        return w


class InTurn:
    """Integers of a `folder`, where `quantize` has put them; of other matrices as by `whitened`."""

    def __init__(self, whitened: Whitened, constants: Mapping[str, float], folder: Path) -> None:
        self._whitened = whitened
        self._constants = constants
        self._folder = folder
        self.weighs = whitened.weighs
        self.histogram = whitened.histogram
        self.vector = whitened.vector

    def quantize(self, matrix: layout.Matrix, products: Array, hessian: Array) -> Array:
        """See weights/calibration/in_turn.py. OSError: the folder cannot be written."""
        # Nothing else is done meanwhile; but more than a few cores would wait for each other where
        # a matrix is small.
        cores = os.cpu_count() or 1
        if matrix.rows * matrix.cols < _LARGE:
            cores = min(cores, _FEW_CORES)
        with threadpool_limits(cores, "blas"):
            q, scale, w = self._whitened.moved(
                matrix, self._constants[matrix.name], products, hessian
            )
        with completing(self._path(matrix)) as file:
            np.savez(file, q=q, scale=scale)
        return w

    def integers(
        self, matrix: layout.Matrix, c: float, every: int = 1
    ) -> tuple[npt.NDArray[np.int32], ScaleLog2]:
        if not matrix.in_block:
            return self._whitened.integers(matrix, c, every)
        path = self._path(matrix)
        try:
            with np.load(path) as file:
                return file["q"][::every], file["scale"][::every]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise WeightsError(f"{path}: cannot be read ({error}); delete its folder") from None

    def remove(self) -> None:
        """Delete the folder, as far as that can be done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, matrix: layout.Matrix) -> Path:
        return self._folder / f"{matrix.name}.npz"


def _quantize_by_rows(w: Array, u: Floats, steps: Array, sparsity: float) -> npt.NDArray[np.int32]:
    """`quantize_whitened` of one matrix by all cores, where it is large."""
    n_parts = max(1, len(w) // _PART) if w.size >= _LARGE else 1

    def size(rows: slice) -> int:
        return 16 * w[rows].size

    return quantize_whitened(w, u, steps, sparsity, n_parts, partial(in_processes, size=size))


def measure(quantizer: Quantizer, matrix: layout.Matrix) -> Histogram:
    try:
        return quantizer.histogram(matrix)
    except ValueError as error:
        raise WeightsError(f"{matrix.name}: {error}") from None


def code(
    quantizer: Quantizer, matrix: layout.Matrix, c: float, log2_states: int, every: int = 1
) -> tuple[npt.NDArray[np.int32], CodedMatrix]:
    """The integers of the rows 0, every, 2 every, ... and their code."""
    try:
        q, scale = quantizer.integers(matrix, c, every)
        return q, encode_matrix(q, scale, log2_states)
    except ValueError as error:
        raise WeightsError(f"{matrix.name}: {error}") from None


def read_fused(source: Source, matrix: layout.Matrix) -> Array:
    """The source's tensors stacked to (rows, cols)."""
    parts = [source.read(name) for name, _ in matrix.parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
