"""Columns brought to one step: their scales go to what produces the inputs, which changes nothing.

Whitened steps (codec/whiten.py) have a part for each column. y = W x is also (W / t) (t x), and t x
is had for nothing: t multiplies the norm's weight before q, k, v, gate, up and an untied head, the
up rows before down, and the v rows before o, where the heads that share a v share their t. A tied
head is the embedding too and keeps its columns. Inputs as int8 gain as well: their blocks of 32
become even (SmoothQuant, Xiao et al. 2023, moves scales the same way).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codec.whiten import inverse_factor, inverse_factor_diagonal, unit_steps
from model.config import ModelConfig
from weights import layout
from weights.calibration.calibration import Calibration
from weights.parallel import in_processes, matrix_bytes

Floats = npt.NDArray[np.float64]

_STEPS_PER_OCTAVE = 8  # of the scales that rows have in the file; products of two are such again


@dataclass(frozen=True)
class Whitening:
    """What the quantizer must know of one matrix, equalised."""

    unit_steps: Floats  # (rows,): the rows' steps for c = 1
    columns: Floats  # (cols,): their scales
    _hessian: Callable[[], npt.NDArray[np.floating]]  # as it was before

    @property
    def inverse_factor(self) -> Floats:
        """U (cols, cols), read from disk and computed each time: that of a whole model is large."""
        return inverse_factor(self._hessian()) / self.columns


@dataclass(frozen=True)
class _Found:
    """What is kept in memory of a matrix's statistics."""

    columns: Floats  # (cols,): their scales
    diagonal: Floats  # (cols,): of U, as it was before
    gradient: Floats  # (rows,)


class Equalized:
    """A model's matrices and vectors with column scales moved, and their statistics likewise."""

    def __init__(self, config: ModelConfig, calibration: Calibration) -> None:
        self._config = config
        self._calibration = calibration
        # An embedding that is no head too multiplies nothing.
        no_head = None if config.tie_embeddings else layout.EMBEDDING
        read = [m for m in layout.matrices(config) if m.name != no_head]
        found = in_processes(self._find, read, size=lambda m: matrix_bytes(0, m.cols))
        self._found = {m.name: of_matrix for m, of_matrix in zip(read, found, strict=True)}

    def _find(self, matrix: layout.Matrix) -> _Found:
        c = self._config
        statistics = self._calibration.matrix(matrix.name)
        diagonal = inverse_factor_diagonal(statistics.hessian)
        gradient = statistics.gradient.astype(np.float64)
        if matrix.name == layout.EMBEDDING:
            return _Found(np.ones(matrix.cols), diagonal, gradient)
        log_t = np.log2(diagonal)
        if matrix.name.endswith("o_proj"):
            by_head = log_t.reshape(c.n_kv_heads, -1, c.head_dim)
            log_t = np.broadcast_to(by_head.mean(axis=1, keepdims=True), by_head.shape).ravel()
        eighths = np.rint((log_t - log_t.mean()) * _STEPS_PER_OCTAVE)
        columns = 2.0 ** (eighths / _STEPS_PER_OCTAVE)
        return _Found(columns, diagonal, gradient)

    def whitening(self, matrix: layout.Matrix) -> Whitening | None:
        """None for an embedding that is no head too: it multiplies nothing."""
        if matrix.name not in self._found:
            return None
        found = self._found[matrix.name]
        gradient = found.gradient
        if not matrix.in_block:
            # A token's row is worth what the token is frequent, and that goes with the text.
            gradient = np.sqrt((gradient**2 + np.mean(gradient**2)) / 2)
        return Whitening(
            unit_steps(found.diagonal / found.columns, gradient / self._row_factors(matrix)),
            found.columns,
            lambda: self._calibration.matrix(matrix.name).hessian,
        )

    def matrix(self, matrix: layout.Matrix, w: npt.NDArray[np.float32]) -> None:
        """w (rows, cols) as it is in the source, changed in place."""
        if matrix.name in self._found:
            w /= self._found[matrix.name].columns.astype(np.float32)
        w *= self._row_factors(matrix).astype(np.float32)[:, None]

    def undone(self, matrix: layout.Matrix, w: npt.NDArray[np.float32]) -> None:
        """The inverse of `matrix`."""
        if matrix.name in self._found:
            w *= self._found[matrix.name].columns.astype(np.float32)
        w /= self._row_factors(matrix).astype(np.float32)[:, None]

    def vector(self, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A norm's weight, or the bias of q, k and v, which grows with its rows."""
        head = layout.HEAD
        reader = {
            "input_layernorm": "self_attn.qkv_proj",
            "post_attention_layernorm": "mlp.gate_up_proj",
        }
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            return values
        if name.endswith(".bias"):
            (biased,) = (m for m in layout.matrices(self._config) if name == f"{m.name}.bias")
            return (values * self._row_factors(biased)).astype(np.float32)
        prefix, _, norm = name.removesuffix(".weight").rpartition(".")
        matrix = f"{prefix}.{reader[norm]}" if norm in reader else head
        found = self._found.get(matrix)
        return values if found is None else (values * found.columns).astype(np.float32)

    def _row_factors(self, matrix: layout.Matrix) -> Floats:
        """(rows,): the scales of the columns that read this matrix's outputs."""
        c, factors = self._config, np.ones(matrix.rows)
        prefix, _, kind = matrix.name.rpartition(".")
        if kind == "qkv_proj":
            columns = self._found[f"{prefix}.o_proj"].columns.reshape(c.n_kv_heads, -1, c.head_dim)
            factors[-c.kv_dim :] = columns[:, 0].ravel()
        elif kind == "gate_up_proj":
            factors[c.hidden_dim :] = self._found[f"{prefix}.down_proj"].columns
        return factors
