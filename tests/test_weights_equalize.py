"""Equalised models: the same logits from matrices whose whitening has an even diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from tiny_model import CONFIG, random_tensors

from codec.whiten import inverse_factor
from model.config import ModelConfig
from model.reference import Reference
from weights import layout
from weights.calibration import MatrixStatistics
from weights.equalize import Equalized

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]
Array = npt.NDArray[np.float64]

# Three heads share a key head; heads of an odd half.
GROUPED = dataclasses.replace(CONFIG, n_heads=6, n_kv_heads=2, head_dim=14, n_layers=3)
EPS32 = 2.0**-24


class MadeUp:
    """In the place of a calibration: inputs of sizes over three orders of magnitude."""

    def __init__(self, config: ModelConfig) -> None:
        rng = np.random.default_rng(2)
        self._found = {}
        for matrix in layout.matrices(config):
            x = rng.normal(size=(3 * matrix.cols, matrix.cols)) @ np.diag(
                10 ** rng.uniform(-1.5, 1.5, matrix.cols)
            )
            gradient = 10 ** rng.uniform(-3, 0, matrix.rows)
            self._found[matrix.name] = MatrixStatistics(x.T @ x / len(x), gradient)

    def matrix(self, name: str) -> MatrixStatistics:
        return self._found[name]


@dataclasses.dataclass(frozen=True)
class Case:
    config: ModelConfig
    tensors: dict[str, Array]  # under a weights file's names
    statistics: MadeUp
    equalized: Equalized


@pytest.fixture(
    scope="module",
    params=[
        CONFIG,
        dataclasses.replace(CONFIG, tie_embeddings=False),
        GROUPED,
        dataclasses.replace(GROUPED, tie_embeddings=False),
        dataclasses.replace(GROUPED, qkv_bias=True, qk_norm=True),
    ],
    ids=["tied", "untied", "grouped", "grouped untied", "biases and norms of heads"],
)
def case(request: pytest.FixtureRequest) -> Case:
    config = request.param
    # Rows of about length 1 and norms of about 1: activations neither vanish nor explode.
    source = {
        name: 20 * w / np.sqrt(w.shape[-1]) if w.ndim == 2 else 1 + 4 * w
        for name, w in random_tensors(config).items()
    }
    tensors = {
        name: np.concatenate([source[part] for part in layout.vector_parts(name)], dtype=np.float64)
        for name in layout.vectors(config)
    }
    for matrix in layout.matrices(config):
        parts = [source[name] for name, _ in matrix.parts]
        tensors[matrix.name] = np.concatenate(parts).astype(np.float64)
    statistics = MadeUp(config)
    equalized = Equalized(config, statistics)  # type: ignore[arg-type]
    return Case(config, tensors, statistics, equalized)


def moved(case: Case) -> dict[str, Array]:
    """The equalised model; float32 inside, from there on float64."""
    tensors = {}
    for matrix in layout.matrices(case.config):
        w = case.tensors[matrix.name].astype(np.float32)
        case.equalized.matrix(matrix, w)
        tensors[matrix.name] = w.astype(np.float64)
    for name in layout.vectors(case.config):
        vector = case.equalized.vector(name, case.tensors[name].astype(np.float32))
        tensors[name] = vector.astype(np.float64)
    return tensors


def test_equalized_model_computes_the_same(case: Case, assert_close: AssertClose) -> None:
    tokens = np.random.default_rng(3).integers(0, case.config.vocab_size, 19)
    logits = [
        Reference(case.config, tensors, cache_dtype=np.float64).logits(tokens)
        for tensors in (case.tensors, moved(case))
    ]
    # Each weight is rounded to float32 once, and once or twice with a scale of float32. Errors of
    # 4 * 2^-24 at random in every weight are as much in every product, of which a logit of about 1
    # sees 4 a layer, a few times larger by softmax and products of two.
    tolerance = 4 * EPS32 * 8 * np.sqrt(4 * case.config.n_layers)
    assert np.abs(logits[0]).max() > 1
    assert_close(logits[1], logits[0], tolerance)


def test_every_scale_is_moved(case: Case) -> None:
    """That logits stay says nothing if nothing is moved."""
    tensors = moved(case)
    for name, before in case.tensors.items():
        still = name in (layout.EMBEDDING, "model.norm.weight") and case.config.tie_embeddings
        still |= name == layout.EMBEDDING or name.endswith(("q_norm.weight", "k_norm.weight"))
        assert np.array_equal(tensors[name], before.astype(np.float32)) == still, name


def test_moved_scales_can_be_undone(case: Case, assert_close: AssertClose) -> None:
    for matrix in layout.matrices(case.config):
        w = case.tensors[matrix.name].astype(np.float32)
        case.equalized.matrix(matrix, w)
        case.equalized.undone(matrix, w)
        # Of two scales each, rounded to float32, there and back.
        before = case.tensors[matrix.name]
        assert_close(w, before, 10 * EPS32 * np.abs(before))


def diagonal(case: Case, matrix: layout.Matrix) -> Array:
    whitening = case.equalized.whitening(matrix)
    assert whitening is not None
    return np.diag(whitening.inverse_factor)


def test_whitening_is_even_where_columns_are_free(case: Case) -> None:
    # Scales are eighths of octaves: what is left is within a sixteenth of an octave of the mean,
    # which itself is rounded.
    for matrix in layout.matrices(case.config):
        uneven = np.log2(np.diag(inverse_factor(case.statistics.matrix(matrix.name).hessian)))
        assert np.ptp(uneven) > 3
        if matrix.name == layout.EMBEDDING or matrix.name.endswith("o_proj"):
            continue
        left = np.log2(diagonal(case, matrix))
        assert np.ptp(left) <= 1 / 8 + 1e-9, matrix.name


def test_heads_that_share_values_share_scales(case: Case) -> None:
    c = case.config
    for matrix in layout.matrices(c):
        if not matrix.name.endswith("o_proj"):
            continue
        before = np.log2(np.diag(inverse_factor(case.statistics.matrix(matrix.name).hessian)))
        scales = before - np.log2(diagonal(case, matrix))
        by_head = scales.reshape(c.n_kv_heads, -1, c.head_dim)
        assert np.abs(by_head - by_head[:, :1]).max() < 1e-9
        # For the mean of them columns are even.
        left = np.log2(diagonal(case, matrix)).reshape(by_head.shape).mean(axis=1)
        assert np.ptp(left) <= 1 / 8 + 1e-9


def test_whitening_is_of_the_equalized_matrix(case: Case, assert_close: AssertClose) -> None:
    """U and steps are those of W' = D W / t for inputs t x and gradients g / D."""
    tensors = moved(case)
    for matrix in layout.matrices(case.config):
        whitening = case.equalized.whitening(matrix)
        if whitening is None:
            assert matrix.name == layout.EMBEDDING and not case.config.tie_embeddings
            continue
        assert case.config.tie_embeddings or matrix.name != layout.EMBEDDING
        statistics = case.statistics.matrix(matrix.name)
        u = inverse_factor(statistics.hessian)
        t = np.diag(u) / np.diag(whitening.inverse_factor)
        assert_close(whitening.inverse_factor * t, u, 1e-12 * np.abs(u).max())
        factors = tensors[matrix.name] * t / case.tensors[matrix.name]
        assert_close(factors, factors[:, :1] + 0 * factors, 8 * EPS32 * factors[:, :1])
        if matrix.in_block:
            g = statistics.gradient / factors[:, 0]
            least = 0.03 * np.sqrt(np.mean(g**2))
            steps = np.exp(np.mean(np.log(np.diag(whitening.inverse_factor)))) / np.maximum(
                g, least
            )
            assert_close(whitening.unit_steps, steps, 8 * EPS32 * steps)


def test_rows_of_the_head_are_half_as_uneven(case: Case, assert_close: AssertClose) -> None:
    """A text does not tell how often each token is wanted in others."""
    head = layout.matrices(case.config)[0 if case.config.tie_embeddings else -1]
    whitening = case.equalized.whitening(head)
    assert whitening is not None
    g = case.statistics.matrix(head.name).gradient
    want = 1 / np.sqrt((g**2 + np.mean(g**2)) / 2)
    assert_close(
        whitening.unit_steps / whitening.unit_steps[0], want / want[0], 1e-9 * want / want[0]
    )
