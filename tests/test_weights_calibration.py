"""Calibration statistics against finite differences and against what the oracle's products read."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tiny_model import CONFIG, random_tensors

from engine.errors import EngineError, WeightsError
from model.config import ModelConfig
from model.reference import Reference
from weights import layout
from weights.calibration import Calibration, calibrate, statistics
from weights.calibration.sample import draw, softmax
from weights.sources import LazyTensor, Source

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]
Array = npt.NDArray[np.float64]

UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
N_WINDOWS, LENGTH, SEED = 3, 7, 5
EPS64 = 2.0**-53


def tiny_source(config: ModelConfig) -> Source:
    """In float64, with rows of length 1: activations neither vanish nor explode on the way."""
    tensors = {
        name: 20 * w.astype(np.float64) / w.shape[-1] ** 0.5 if w.ndim == 2 else 1 + 4.0 * w
        for name, w in random_tensors(config).items()
    }
    lazy = {name: LazyTensor(w.shape, partial(np.copy, w)) for name, w in tensors.items()}
    return Source("tiny", config, lazy, b"{}", None)


class Probe(Reference):
    """The oracle that remembers what its products read, and adds a little to what they give."""

    def __init__(self, source: Source) -> None:
        tensors = Reference.from_source(source).tensors
        super().__init__(source.config, tensors, cache_dtype=np.float64)
        self.inputs: dict[str, Array] = {}
        self.nudge: tuple[str, int, int, float] | None = None  # matrix, token, row, how much

    def _product(self, name: str, x: Array) -> Array:
        self.inputs[name] = x
        y = super()._product(name, x)
        if self.nudge is not None and self.nudge[0] == name:
            _, token, row, amount = self.nudge
            y[token, row] += amount
        return y


class Truth:
    """Loss, inputs and gradients of a calibration by the oracle, window after window."""

    def __init__(self, source: Source, tokens: npt.NDArray[np.int64]) -> None:
        self.tokens = tokens
        self.probe = Probe(source)
        self.p, self.inputs = [], []
        uniform = np.random.default_rng(SEED).random(tokens.T.shape)
        for window in tokens:
            self.p.append(softmax(self.probe.logits(window)))
            self.inputs.append(dict(self.probe.inputs))
        self.labels = [draw(p, uniform[:, i]) for i, p in enumerate(self.p)]

    def input_of(self, matrix: str) -> Array:
        return np.concatenate([inputs[matrix] for inputs in self.inputs])

    def gradient(self, matrix: str, rows: list[int]) -> Array:
        """dL/dy of these rows by central differences: (tokens, rows)."""
        step = 1e-5
        found = np.zeros((len(self.tokens), LENGTH, len(rows)))
        for i, window in enumerate(self.tokens):
            for t in range(LENGTH):
                for j, row in enumerate(rows):
                    losses = []
                    for amount in (step, -step):
                        self.probe.nudge = (matrix, t, row, amount)
                        p = softmax(self.probe.logits(window))
                        losses.append(-np.log(p[np.arange(LENGTH), self.labels[i]]).sum())
                    found[i, t, j] = (losses[0] - losses[1]) / (2 * step)
        self.probe.nudge = None
        return found.reshape(-1, len(rows))


# Central differences of a loss of about 30 with third derivatives of a few: 1e-10 of truncation
# and 30 * 2^-53 / 1e-5 = 3e-10 of rounding; a hundred times as much is allowed.
DIFFERENCES = 5e-8


@pytest.fixture(scope="module")
def tokens() -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (N_WINDOWS, LENGTH))


@pytest.fixture(scope="module", params=[CONFIG, UNTIED], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest) -> Source:
    return tiny_source(request.param)


@pytest.fixture(scope="module")
def truth(source: Source, tokens: npt.NDArray[np.int64]) -> Truth:
    return Truth(source, tokens)


@pytest.fixture(scope="module")
def calibration(
    source: Source, tokens: npt.NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> Calibration:
    folder = tmp_path_factory.mktemp("calibration")
    return calibrate(source, tokens, folder, seed=SEED)


def multiplying(config: ModelConfig) -> list[layout.Matrix]:
    """The matrices that multiply: all but an untied embedding."""
    return layout.matrices(config)[0 if config.tie_embeddings else 1 :]


def test_hessian_is_of_what_the_products_read(
    source: Source, truth: Truth, calibration: Calibration, assert_close: AssertClose
) -> None:
    for matrix in multiplying(source.config):
        x = truth.input_of(matrix.name)
        found = calibration.matrix(matrix.name)
        # Inputs of size 1 agree to 128 roundings (test_reference_model); their squares to twice.
        assert_close(found.hessian, x.T @ x / len(x), 512 * EPS64 * np.square(x).max())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("self_attn.qkv_proj", [3, 8, 33]),  # q: both halves of a head, the last head
        ("self_attn.qkv_proj", [40, 47, 55]),  # k, of both heads
        ("self_attn.qkv_proj", [60, 79]),  # v
        ("self_attn.o_proj", [0, 39]),
        ("mlp.gate_up_proj", [0, 69]),  # gate
        ("mlp.gate_up_proj", [70, 139]),  # up
        ("mlp.down_proj", [0, 39]),
    ],
)
def test_gradient_is_the_root_mean_square_of_finite_differences(
    truth: Truth,
    calibration: Calibration,
    assert_close: AssertClose,
    layer: int,
    name: str,
    rows: list[int],
) -> None:
    matrix = f"model.layers.{layer}.{name}"
    want = np.sqrt(np.square(truth.gradient(matrix, rows)).mean(axis=0))
    assert (want > 1e-3).all()  # a gradient of nothing would prove nothing
    assert_close(calibration.matrix(matrix).gradient[rows], want, DIFFERENCES)


def test_head_needs_no_labels(
    source: Source, truth: Truth, calibration: Calibration, assert_close: AssertClose
) -> None:
    name = multiplying(source.config)[0 if source.config.tie_embeddings else -1].name
    p = np.concatenate(truth.p)
    found = calibration.matrix(name)
    # Logits agree to 128 roundings; p (1 - p) is at most 1/4, its root moves by as much.
    assert_close(found.gradient, np.sqrt((p * (1 - p)).mean(axis=0)), 256 * EPS64)


def test_unknown_names_have_no_statistics(calibration: Calibration, source: Source) -> None:
    unknown = ["model.layers.2.mlp.down_proj", "model.layers.0.mlp.up_proj", "model.norm"]
    for name in [*unknown, layout.HEAD if source.config.tie_embeddings else layout.EMBEDDING]:
        with pytest.raises(KeyError):
            calibration.matrix(name)


def everything(calibration: Calibration, config: ModelConfig) -> dict[str, Array]:
    return {
        f"{matrix.name}.{field}": values
        for matrix in multiplying(config)
        for field, values in vars(calibration.matrix(matrix.name)).items()
    }


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_small_chunks_change_only_roundings(
    source: Source,
    tokens: npt.NDArray[np.int64],
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    assert_close: AssertClose,
) -> None:
    monkeypatch.setattr(statistics, "_TOKENS", 2 * LENGTH)  # two windows, then one
    monkeypatch.setattr(statistics, "_LOGITS", 5 * CONFIG.vocab_size)  # 5 tokens of 21
    monkeypatch.setattr("weights.calibration.layer._SCORES", 3 * 2 * LENGTH**2)  # 3 key heads of 4
    again = everything(calibrate(source, tokens, tmp_path, seed=SEED), source.config)
    for key, want in everything(calibration, source.config).items():
        scale = np.abs(want).max()
        assert_close(again[key], want, 512 * EPS64 * scale)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("n_files", range(9))
def test_stopped_calibration_goes_on_where_it_ended(
    source: Source,
    tokens: npt.NDArray[np.int64],
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_files: int,
) -> None:
    written = 0

    def replace(temporary: Path, path: Path) -> None:
        nonlocal written
        if written == n_files:
            raise Stop
        os.rename(temporary, path)
        written += 1

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", replace)
        calibrate(source, tokens, tmp_path, seed=SEED)

    seen: list[int] = []
    resumed = calibrate(
        source,
        tokens,
        tmp_path,
        seed=SEED,
        progress=lambda done, total: seen.append(done),
    )
    # Files come as input 0, 1, 2, then a gradient and a result for head, block 1 and block 0.
    begins_at = [0, 0, 1, 2, 2, 3, 3, 4, 4][n_files]
    assert seen == list(range(begins_at, 6))
    assert same(everything(resumed, source.config), everything(calibration, source.config))
    assert sorted(path.name for path in resumed.folder.iterdir()) == [
        "head.npz",
        "layer-0.npz",
        "layer-1.npz",
    ]


def test_memory_holds_the_weights_of_one_block(
    source: Source, tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    alive: list[tuple[str, weakref.ref[Array]]] = []

    def watched(name: str, tensor: LazyTensor) -> LazyTensor:
        block = ".".join(name.split(".")[:3])

        def read() -> Array:
            held = {of for of, array in alive if array() is not None}
            assert held <= {block, "model.norm.weight"}, f"{name} is read while {held} are held"
            values = tensor.read()
            alive.append((block, weakref.ref(values)))
            return values

        return LazyTensor(tensor.shape, read)

    tensors = {name: watched(name, tensor) for name, tensor in source.tensors.items()}
    calibrate(dataclasses.replace(source, tensors=tensors), tokens, tmp_path)
    # For the identity block 0's norms, the last block and the norm, then everything, and the blocks
    # once again; a tied embedding once more as the head.
    c, per_block = source.config, 9
    identity, embedding_and_head, norm = 2 + per_block + 1, 2, 1
    assert len(alive) == identity + embedding_and_head + norm + 2 * per_block * c.n_layers


def test_complete_calibration_computes_nothing(
    source: Source, tokens: npt.NDArray[np.int64], calibration: Calibration
) -> None:
    steps: list[tuple[int, int]] = []
    again = calibrate(
        source,
        tokens,
        calibration.folder.parent,
        seed=SEED,
        progress=lambda *step: steps.append(step),
    )
    assert steps == [(5, 5)]
    assert again.folder == calibration.folder


def test_results_hold_each_pair_of_inputs_once(source: Source, calibration: Calibration) -> None:
    c, pairs = source.config, lambda n: n * (n + 1) // 2
    with np.load(calibration.folder / "layer-1.npz") as file:
        stored = sum(file[name].size for name in file.files if name.endswith("hessian"))
    assert stored == 2 * pairs(c.dim) + pairs(c.q_dim) + pairs(c.hidden_dim)


def test_removed_calibration_leaves_nothing(
    source: Source, tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    calibration = calibrate(source, tokens, tmp_path)
    (tmp_path / "another").mkdir()
    calibration.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["another"]
    calibration.remove()  # somebody else may have been quicker
    with pytest.raises(EngineError, match="is gone, as at the end of another conversion"):
        calibration.matrix("model.layers.0.mlp.down_proj")


def test_another_calibration_has_another_folder(
    source: Source, tokens: npt.NDArray[np.int64], calibration: Calibration, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    moved = source.tensors[name].read()
    moved[3, 4] += 1e-3
    tensors = {**source.tensors, name: LazyTensor(moved.shape, lambda: moved)}
    found = {
        calibration.folder.name,
        calibrate(source, tokens[:2], tmp_path, seed=SEED).folder.name,
        calibrate(source, tokens, tmp_path, seed=SEED + 1).folder.name,
        calibrate(
            dataclasses.replace(source, tensors=tensors), tokens, tmp_path, seed=SEED
        ).folder.name,
    }
    assert len(found) == 4


def test_damaged_result_is_named(
    source: Source, tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    calibration = calibrate(source, tokens, tmp_path)
    path = calibration.folder / "layer-0.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EngineError, match=r"layer-0\.npz: cannot be read .*delete the folder"):
        calibration.matrix("model.layers.0.mlp.down_proj")


def test_folder_that_cannot_be_written_is_named(
    source: Source, tokens: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EngineError, match="the calibration cannot be kept there"):
        calibrate(source, tokens, tmp_path / "file")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.nan, r"model\.layers\.1\.self_attn\.v_proj\.weight\[2, 3\] is nan"),
        (1e308, "block 1 gives activations that are not finite"),
    ],
)
def test_model_that_is_not_finite_is_damaged(
    source: Source, tokens: npt.NDArray[np.int64], tmp_path: Path, weight: float, message: str
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    broken = source.tensors[name].read()
    broken[2, 3] = weight
    tensors = {**source.tensors, name: LazyTensor(broken.shape, lambda: broken)}
    with pytest.raises(WeightsError, match=f"tiny: {message}"):
        calibrate(dataclasses.replace(source, tensors=tensors), tokens, tmp_path)


@pytest.mark.parametrize("wrong", [-1, CONFIG.vocab_size])
def test_tokens_outside_the_vocabulary_are_a_mistake(
    source: Source, tmp_path: Path, wrong: int
) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        calibrate(source, np.array([[3, wrong]]), tmp_path)
