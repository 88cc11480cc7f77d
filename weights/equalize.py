"""Columns brought to one step: their scales go to what produces the inputs, which changes nothing.

Whitened steps (codec/whiten.py) have a part for each column. y = W x is also (W / t) (t x), and t x
is had for nothing: t multiplies the norm's weight before q, k, v, gate, up and an untied head, the
up rows before down, and the v rows before o, where the heads that share a v share their t. A tied
head is the embedding too and keeps its columns. Inputs as int8 gain as well: their blocks of 32
become even (SmoothQuant, Xiao et al. 2023, moves scales the same way).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codec.whiten import inverse_factor, unit_steps
from model.config import ModelConfig
from weights import layout
from weights.calibration.calibration import Calibration

Floats = npt.NDArray[np.float64]

_STEPS_PER_OCTAVE = 8  # of the scales that rows have in the file; products of two are such again


@dataclass(frozen=True)
class Whitening:
    """What the quantizer must know of one matrix, equalised."""

    inverse_factor: Floats  # U (cols, cols)
    unit_steps: Floats  # (rows,): the rows' steps for c = 1


class Equalized:
    """A model's matrices and vectors with column scales moved, and their statistics likewise."""

    def __init__(self, config: ModelConfig, calibration: Calibration) -> None:
        self._config = config
        self._calibration = calibration
        self._columns: dict[str, Floats] = {}  # by matrix, once `find_columns` was there

    def find_columns(self, matrix: layout.Matrix) -> None:
        """Find the matrix's column scales; to be called for all before anything else is."""
        if matrix.name == layout.EMBEDDING:
            return
        c = self._config
        u = inverse_factor(self._calibration.matrix(matrix.name).hessian)
        log_t = np.log2(np.diag(u))
        if matrix.name.endswith("o_proj"):
            by_head = log_t.reshape(c.n_kv_heads, -1, c.head_dim)
            log_t = np.broadcast_to(by_head.mean(axis=1, keepdims=True), by_head.shape).ravel()
        eighths = np.rint((log_t - log_t.mean()) * _STEPS_PER_OCTAVE)
        self._columns[matrix.name] = 2.0 ** (eighths / _STEPS_PER_OCTAVE)

    def whitening(self, matrix: layout.Matrix) -> Whitening | None:
        """None for an embedding that is no head too: it multiplies nothing."""
        if matrix.name == layout.EMBEDDING and not self._config.tie_embeddings:
            return None
        found = self._calibration.matrix(matrix.name)
        t = self._columns[matrix.name] if matrix.name in self._columns else np.ones(matrix.cols)
        u = inverse_factor(found.hessian) / t
        gradient = found.gradient.astype(np.float64)
        if not matrix.in_block:
            # A token's row is worth what the token is frequent, and that goes with the text.
            gradient = np.sqrt((gradient**2 + np.mean(gradient**2)) / 2)
        return Whitening(u, unit_steps(u, gradient / self._row_factors(matrix)))

    def matrix(self, matrix: layout.Matrix, w: npt.NDArray[np.float32]) -> None:
        """w (rows, cols) as it is in the source, changed in place."""
        if matrix.name in self._columns:
            w /= self._columns[matrix.name].astype(np.float32)
        w *= self._row_factors(matrix).astype(np.float32)[:, None]

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
        columns = self._columns.get(matrix)
        return values if columns is None else (values * columns).astype(np.float32)

    def _row_factors(self, matrix: layout.Matrix) -> Floats:
        """(rows,): the scales of the columns that read this matrix's outputs."""
        c, factors = self._config, np.ones(matrix.rows)
        prefix, _, kind = matrix.name.rpartition(".")
        if kind == "qkv_proj":
            columns = self._columns[f"{prefix}.o_proj"].reshape(c.n_kv_heads, -1, c.head_dim)
            factors[-c.kv_dim :] = columns[:, 0].ravel()
        elif kind == "gate_up_proj":
            factors[c.hidden_dim :] = self._columns[f"{prefix}.down_proj"]
        return factors
