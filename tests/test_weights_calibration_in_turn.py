"""Blocks quantized in turn: what they make up for by the oracle, and stopped and carried on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from divergence import kl
from tiny_model import CONFIG, random_tensors, tokenizer_json

from codec.scale import to_scale
from engine.errors import EngineError
from model.config import ModelConfig
from model.reference import Reference
from weights import convert as command
from weights import layout
from weights.calibration import calibrate, in_turn
from weights.calibration.in_turn import quantize_in_turn
from weights.convert import CalibrationText, convert
from weights.quantizers import InTurn, Whitened, read_fused
from weights.sources import LazyTensor, Source
from weights.store import WeightsFile

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]
Array = npt.NDArray[np.float64]

FAMILY = dataclasses.replace(
    CONFIG,
    qkv_bias=True,
    qk_norm=True,
    sliding_window=5,
    sliding_layers=(1,),
    unrotated_layers=(0,),
)
N_WINDOWS, LENGTH = 5, 7
EPS64 = 2.0**-53
NOTHING = CalibrationText(0)


def source_of(config: ModelConfig, dtype: type = np.float64) -> Source:
    """Rows of about length 1, norms of about 1: activations neither vanish nor explode."""
    tensors = {
        name: (20 * w / w.shape[-1] ** 0.5 if w.ndim == 2 else 1 + 4 * w).astype(dtype)
        for name, w in random_tensors(config).items()
    }
    names = layout.source_shapes(config)
    lazy = {
        name: LazyTensor(tensors[name].shape, partial(np.copy, tensors[name])) for name in names
    }
    return Source("tiny", config, lazy, tokenizer_json(), None)


class Probe(Reference):
    """The oracle that remembers what its products read."""

    def __init__(self, config: ModelConfig, tensors: dict[str, Array]) -> None:
        super().__init__(config, tensors, cache_dtype=np.float64)
        self.inputs: dict[str, Array] = {}

    def _product(self, name: str, x: Array) -> Array:
        self.inputs[name] = x
        return super()._product(name, x)

    def read(self, tokens: npt.NDArray[np.int64]) -> tuple[dict[str, Array], dict[str, Array]]:
        """What each matrix of the blocks reads (tokens, cols), and the residual that o_proj and
        down_proj add to (tokens, dim).
        """
        found: dict[str, list[Array]] = {}
        residuals: dict[str, list[Array]] = {}
        for window in tokens:
            self.logits(window)
            residual = self.tensors[layout.EMBEDDING][window]
            for matrix in layout.matrices(self.config):
                if matrix.in_block:
                    x = self.inputs[matrix.name]
                    found.setdefault(matrix.name, []).append(x)
                    if matrix.name.endswith(("o_proj", "down_proj")):
                        residuals.setdefault(matrix.name, []).append(residual)
                        residual = residual + x @ self.tensors[matrix.name].T
        return tuple(
            {name: np.concatenate(arrays) for name, arrays in each.items()}
            for each in (found, residuals)
        )  # type: ignore[return-value]


@pytest.fixture
def tokens() -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (N_WINDOWS, LENGTH))


@pytest.mark.parametrize("config", [CONFIG, FAMILY], ids=["plain", "family"])
def test_products_are_of_what_both_models_read(
    config: ModelConfig,
    tokens: npt.NDArray[np.int64],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: AssertClose,
) -> None:
    monkeypatch.setattr(in_turn, "_TOKENS", 2 * LENGTH)  # two windows, two, one
    source = source_of(config)
    rng = np.random.default_rng(5)
    found: dict[str, tuple[Array, Array]] = {}
    turned: dict[str, Array] = {}

    def quantize(matrix: layout.Matrix, products: Array, hessian: Array) -> Array:
        found[matrix.name] = products, hessian
        w = read_fused(source, matrix)
        turned[matrix.name] = w + rng.normal(0, 0.1 * np.sqrt(np.mean(w**2)), w.shape)
        return turned[matrix.name]

    seen: list[tuple[int, int]] = []
    quantize_in_turn(source, tokens, quantize, tmp_path, lambda *step: seen.append(step))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert list(found) == [m.name for m in layout.matrices(config) if m.in_block]

    tensors = Reference.from_source(source).tensors
    x, r = Probe(config, tensors).read(tokens)
    x_turned, r_turned = Probe(config, {**tensors, **turned}).read(tokens)
    for name, (products, hessian) in found.items():
        mine, w = x_turned[name], tensors[name]
        d = (x[name] - mine) @ w.T
        if name in r:
            d += r[name] - r_turned[name]
        share = 0.6 * tokens.size / (tokens.size + 6 * w.shape[1])
        # Inputs of size 1 agree to 128 roundings (test_reference_model), sums of a row's products
        # with weights of length 1 to as many.
        tolerance = 1024 * EPS64 * np.square(mine).max()
        assert_close(hessian, mine.T @ mine / len(mine), tolerance)
        assert_close(products, share * d.T @ mine / len(mine), tolerance)
        assert (np.abs(products).max() > 1e-3) == (name != "model.layers.0.self_attn.qkv_proj")


def test_exact_blocks_have_nothing_to_make_up_for(
    tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    source = source_of(CONFIG)

    def quantize(matrix: layout.Matrix, products: Array, hessian: Array) -> Array:
        assert not products.any()
        return read_fused(source, matrix)

    quantize_in_turn(source, tokens, quantize, tmp_path, lambda *step: None)


def test_stopped_quantization_goes_on_where_it_ended(
    tokens: npt.NDArray[np.int64], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_turn, "_TOKENS", 2 * LENGTH)
    source = source_of(CONFIG)
    calls: list[tuple[str, Array, Array]] = []

    def quantize(matrix: layout.Matrix, products: Array, hessian: Array) -> Array:
        calls.append((matrix.name, products, hessian))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return np.rint(8 * read_fused(source, matrix)) / 8

    stop_at = 0
    quantize_in_turn(source, tokens, quantize, tmp_path / "whole", lambda *step: None)
    whole, calls, stop_at = calls, [], 7  # in the second block
    arguments = source, tokens, quantize, tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantize_in_turn(*arguments, lambda *step: None)
    calls.clear()
    stop_at, seen = 0, []
    quantize_in_turn(*arguments, lambda done, total: seen.append(done))
    assert seen == [1, 2] and [call[0] for call in calls] == [call[0] for call in whole[4:]]
    for call, want in zip(calls, whole[4:], strict=True):
        assert all(np.array_equal(*pair) for pair in zip(call[1:], want[1:], strict=True))

    (tmp_path / "stopped" / "state.npz").write_bytes(b"PK\3\4")
    with pytest.raises(EngineError, match=r"state\.npz: cannot be read"):
        quantize_in_turn(*arguments, lambda *step: None)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EngineError, match="quantized blocks cannot be kept there"):
        quantize_in_turn(*arguments[:3], tmp_path / "file", lambda *step: None)


def test_moved_matrix_is_nearer_to_what_is_asked(tmp_path: Path, assert_close: AssertClose) -> None:
    """Without products it is `integers`; with them, its outputs are as much nearer as it says."""
    source = source_of(CONFIG, np.float32)
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (40, 32))
    calibration = calibrate(source, tokens, tmp_path)
    whitened = Whitened(source, calibration)
    rng = np.random.default_rng(2)
    for matrix in layout.matrices(CONFIG):
        if not matrix.in_block:
            continue
        hessian = calibration.matrix(matrix.name).hessian
        w, c = read_fused(source, matrix), 1e-5
        nothing = np.zeros(w.shape, np.float32)
        q, scale, dense = whitened.moved(matrix, c, nothing, hessian)
        assert np.array_equal(q, whitened.integers(matrix, c)[0])
        assert np.array_equal(scale, whitened.integers(matrix, c)[1])
        assert to_scale(scale).min() > 0
        # Steps this fine are nothing beside the weights, once columns' scales are undone.
        assert_close(dense, w, 0.001 * np.abs(w).max())
        change = rng.normal(0, np.sqrt(np.mean(w**2)), w.shape).astype(np.float32)
        _, _, moved = whitened.moved(matrix, c, change @ hessian, hessian)
        left = np.einsum("rc,cd,rd->", *(w + change - moved, hessian, w + change - moved))
        before = np.einsum("rc,cd,rd->", change, hessian, change)
        # Damping leaves (0.3 / 1.3)^2 of it, or less, where inputs are independent.
        assert left < 0.1 * before


def test_conversion_in_turn_is_nearer_to_its_source_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "cache_folder", lambda: tmp_path / "cache")
    source = source_of(dataclasses.replace(CONFIG, n_layers=6), np.float32)
    alone, text = CalibrationText(2048, window=64), CalibrationText(2048, window=64, in_turn=True)
    convert(source, tmp_path / "alone", 2.5, 6, text=alone, keep_calibration=True)
    convert(source, tmp_path / "whole", 2.5, 6, text=text, keep_calibration=True)
    assert kl(tmp_path / "whole", source) < 0.85 * kl(tmp_path / "alone", source)
    files = [WeightsFile.open(tmp_path / name) for name in ("alone", "whole")]
    rates = [file.bits_per_weight(block_only=True) for file in files]
    assert rates == pytest.approx([2.5, 2.5], abs=0.02)

    calls: list[str] = []
    quantize = InTurn.quantize

    def stopping(self: InTurn, matrix: layout.Matrix, *arrays: npt.NDArray[np.float32]) -> object:
        calls.append(matrix.name)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return quantize(self, matrix, *arrays)

    monkeypatch.setattr(InTurn, "quantize", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "again", 2.5, 6, text=text, keep_calibration=True)
    assert not (tmp_path / "again").exists()
    convert(source, tmp_path / "again", 2.5, 6, text=text, keep_calibration=True)
    assert len(calls) == 10 + 4 * 6 - 8
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    (folder,) = (path for path in (tmp_path / "cache" / "calibration").iterdir() if path.is_dir())
    assert not any(path.is_dir() for path in folder.iterdir())
