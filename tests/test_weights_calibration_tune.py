"""Norms tuned after quantization: against the oracle's differences, and stopped and carried on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tiny_model import CONFIG, random_tensors, tokenizer_json

from engine.errors import EngineError
from model.config import ModelConfig
from model.reference import Reference
from weights import convert as command
from weights import layout
from weights.calibration import Calibration, calibrate, tune
from weights.convert import CalibrationText, convert
from weights.sources import LazyTensor, Source
from weights.store import WeightsFile

Array = npt.NDArray[np.float64]

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
FAMILY = dataclasses.replace(
    CONFIG,
    qkv_bias=True,
    qk_norm=True,
    sliding_window=5,
    sliding_layers=(1,),
    unrotated_layers=(0,),
)
LENGTH, N_WINDOWS = 32, 8


def lively_source(config: ModelConfig) -> Source:
    """Rows of about length 1, norms of about 1: tokens are not all equally likely."""
    tensors = {
        name: 20 * w / np.float32(w.shape[-1] ** 0.5) if w.ndim == 2 else 1 + 4 * w
        for name, w in random_tensors(config).items()
    }
    names = layout.source_shapes(config)
    lazy = {name: LazyTensor(tensors[name].shape, tensors[name].copy) for name in names}
    return Source("lively", config, lazy, tokenizer_json(), None)


class Case:
    """A model, its file without calibration, and a text."""

    def __init__(self, config: ModelConfig, folder: Path, bits: float = 3) -> None:
        self.source = lively_source(config)
        convert(self.source, folder / "file", bits, text=CalibrationText(0))
        self.file = WeightsFile.open(folder / "file")
        tokens = np.random.default_rng(3).integers(0, config.vocab_size, (N_WINDOWS, LENGTH))
        self.calibration = calibrate(self.source, tokens, folder / "calibration")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(CONFIG, tmp_path)


def doubles(model: Reference) -> dict[str, Array]:
    return {name: w.astype(np.float64) for name, w in model.tensors.items()}


def divergence(truth: Reference, model: Reference, windows: npt.NDArray[np.int64]) -> float:
    """Mean KL(truth || model) over tokens."""
    found = []
    for window in windows:
        p, q = (m.logits(window.tolist()) for m in (truth, model))
        p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
        found.append(np.sum(np.exp(p) * (p - q), axis=-1))
    return float(np.mean(found))


@pytest.mark.parametrize("config", [CONFIG, UNTIED, FAMILY], ids=["tied", "untied", "family"])
def test_gradient_is_that_of_the_oracles_divergence(config: ModelConfig, tmp_path: Path) -> None:
    case = Case(config, tmp_path)
    model = tune._Model(case.source, case.file, case.calibration)
    rng = np.random.default_rng(4)
    change = rng.normal(0, 0.1, (len(model.norm_names), config.dim))
    windows = [5, 2]
    found, gradient = model.gradient(windows, change)

    exact = {"cache_dtype": np.float64}
    truth = Reference(config, doubles(Reference.from_source(case.source)), **exact)
    tensors = doubles(Reference.from_weights(case.file))

    def at(change: Array) -> float:
        changed = {
            name: tensors[name] * (1 + of_norm)
            for name, of_norm in zip(model.norm_names, change, strict=True)
        }
        twin = Reference(config, {**tensors, **changed}, **exact)
        return divergence(truth, twin, case.calibration.tokens[windows])

    # Sums of 1e4 float32 products of size 1, of which divergences of 0.01 to 1 are made.
    assert found == pytest.approx(at(change), rel=1e-4)
    for norm in range(len(model.norm_names)):
        i = rng.integers(config.dim)
        step = np.zeros_like(change)
        step[norm, i] = 1e-4
        want = (at(change + step) - at(change - step)) / 2e-4
        assert gradient[norm, i] == pytest.approx(want, rel=1e-3, abs=1e-3 * np.abs(gradient).max())


def test_what_is_not_kept_in_memory_changes_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = np.full((5, CONFIG.dim), 0.01)
    found = [tune._Model(case.source, case.file, case.calibration).gradient([0, 1], change)]
    monkeypatch.setattr(tune, "memory_bytes", lambda: 0)
    monkeypatch.setattr(tune, "_ACTIVATIONS", 0)
    model = tune._Model(case.source, case.file, case.calibration)
    found.append(model.gradient([0, 1], change))
    assert not model._dense
    assert found[0][0] == found[1][0] and np.array_equal(found[0][1], found[1][1])


def test_tuning_brings_the_file_nearer_to_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_TOKENS", LENGTH)
    case = Case(CONFIG, tmp_path, bits=2)
    tuned = tune.tune_norms(case.source, case.file, case.calibration, 16)
    assert tuned.keys() == layout.vectors(CONFIG).keys()
    truth = Reference.from_source(case.source, cache_dtype=np.float32)
    before = Reference.from_weights(case.file, cache_dtype=np.float32)
    after = Reference(CONFIG, {**before.tensors, **tuned}, cache_dtype=np.float32)
    others = np.random.default_rng(9).integers(0, CONFIG.vocab_size, (8, LENGTH))
    assert divergence(truth, after, others) < 0.99 * divergence(truth, before, others)


def test_short_text_is_not_learnt_by_heart(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_TOKENS", 3 * LENGTH)
    seen: list[tuple[int, int]] = []
    tune.tune_norms(case.source, case.file, case.calibration, 100, lambda *step: seen.append(step))
    assert seen == [(i, 6) for i in range(7)]  # 8 windows twice, three at a time


def test_stopped_tuning_goes_on_where_it_ended(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_TOKENS", 4 * LENGTH)
    arguments = case.source, case.file, case.calibration, 3
    whole = tune.tune_norms(*arguments)
    tune.forget_tuning(case.file, case.calibration)
    state = tune._state_path(case.file, case.calibration)

    class Stop(BaseException):
        pass

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        tune.tune_norms(*arguments, stop)
    seen: list[int] = []
    again = tune.tune_norms(*arguments, lambda done, total: seen.append(done))
    assert seen == [2, 3]
    assert all(np.array_equal(again[name], whole[name]) for name in whole)

    state.write_bytes(b"PK\3\4")
    with pytest.raises(EngineError, match="cannot be read"):
        tune.tune_norms(*arguments)
    tune.forget_tuning(case.file, case.calibration)
    assert not state.exists()


def test_conversion_tunes_norms_alone_and_goes_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "cache_folder", lambda: tmp_path / "cache")
    source, text = lively_source(CONFIG), CalibrationText(256, tuning_steps=2)
    reports = convert(source, tmp_path / "whole", 3, text=text)
    convert(source, tmp_path / "untuned", 3, text=CalibrationText(256), keep_calibration=True)
    whole, untuned = (WeightsFile.open(tmp_path / name) for name in ("whole", "untuned"))
    for name in whole.matrix_names:
        assert np.array_equal(whole.matrix(name).words, untuned.matrix(name).words)
    for name in layout.vectors(CONFIG):
        assert not np.array_equal(whole.tensor(name), untuned.tensor(name))

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "tune_norms", stopped)
        convert(source, tmp_path / "again", 3, text=text)
    assert not (tmp_path / "again").exists()
    with monkeypatch.context() as patch:
        patch.setattr(command, "measure", stopped)  # what is quantized is not quantized again
        again = convert(source, tmp_path / "again", 3, text=text, keep_calibration=True)
    assert again == reports
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    (folder,) = (path for path in (tmp_path / "cache" / "calibration").iterdir() if path.is_dir())
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["head.npz", "layer-0.npz", "layer-1.npz", "residual.npy"]
    assert Calibration(folder, np.empty((0, 0), np.int64)).residual.shape[-1] == CONFIG.dim
