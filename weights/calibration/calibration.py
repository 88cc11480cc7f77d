"""A whole model's statistics, kept on disk: computed once, and carried on where they were stopped.

Forward through all blocks, keeping each block's input; then from the last block to the first the
same block again, and back through it (gradient checkpointing, Chen et al. 2016). Whatever is
complete is in a file, so the work goes on where it ended, whatever ended it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from engine.errors import EngineError, WeightsError
from model.reference import Floats, embed
from weights import layout
from weights.calibration.layer import Layer
from weights.calibration.openings import OPENINGS
from weights.calibration.sample import Tokens, sample_tokens
from weights.calibration.statistics import (
    MatrixStatistics,
    forward_layer,
    head_statistics,
    layer_statistics,
)
from weights.sources import Source

# To be raised whenever the same source and tokens give other statistics.
RECIPE_VERSION = 4

# numpy reads headers with Python's parser, which in Python 3.11 is not safe in threads: once in a
# while there is a SystemError about an "AST constructor recursion depth mismatch".
_READING = threading.Lock()

Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Calibration:
    """A finished calibration in its folder; statistics are read when they are asked for."""

    folder: Path
    tokens: Tokens  # (n_windows, length)

    def matrix(self, name: str) -> MatrixStatistics:
        """Of a matrix of weights/layout.py; an untied embedding multiplies nothing and has none.

        KeyError: there are none of that name; EngineError: their file is damaged or gone.
        """
        path = self.folder / _result_name(name)
        try:
            with _READING, np.load(path) as file:
                packed, gradient = file[f"{name}.hessian"], file[f"{name}.gradient"]
            return MatrixStatistics(_symmetric(packed), gradient)
        except FileNotFoundError:
            if not self.folder.exists():
                raise EngineError(
                    f"{self.folder}: is gone, as at the end of another conversion of the same "
                    f"model; start again"
                ) from None
            raise KeyError(name) from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise EngineError(
                f"{path}: cannot be read ({error}); delete the folder to calibrate again"
            ) from None

    def remove(self) -> None:
        """Delete the folder, as far as that can be done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def calibrate(
    source: Source,
    tokens: Tokens,
    work_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Statistics of every matrix over `tokens` (n_windows, length), windows that start at 0 each.

    They lie in a folder of `work_dir` whose name tells source, tokens and seed; if it is there
    already, only what it lacks is computed. `seed` draws the labels of the loss.
    Disk: one (tokens, dim) array per block on the way, half of each Hessian in the end.
    EngineError: the folder cannot be written, a file in it or the model is damaged.
    """
    n_windows, length = tokens.shape
    c = source.config
    if not 0 < length <= c.max_seq_len or n_windows < 1:
        raise ValueError(f"{n_windows} windows of {length} tokens; at most {c.max_seq_len} work")
    if tokens.min() < 0 or tokens.max() >= c.vocab_size:
        raise ValueError(f"a token is outside the vocabulary of {c.vocab_size}")
    folder = Path(work_dir) / _identity(source, tokens.shape, tokens.tobytes(), seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A thread works on its own windows: products that are threaded too would wait for cores.
        with threadpool_limits(1, "blas"):
            for done in _run(source, tokens, folder, seed):
                if progress is not None:
                    progress(done, 2 * c.n_layers + 1)
    except OSError as error:
        raise EngineError(
            f"{folder}: the calibration cannot be kept there ({error.strerror or error})"
        ) from None
    return Calibration(folder, tokens)


def own_text(
    source: Source,
    encode: Callable[[str], list[int]],
    n_windows: int,
    length: int,
    work_dir: str | Path,
    progress: Progress,
) -> Tokens:
    """`sample_tokens`, remembered in `work_dir`: the next rate, or the next try, has it at once,
    or the part that is done.

    `encode` makes token ids of openings.
    """
    path = Path(work_dir) / f"{_identity(source, n_windows, length)}.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            return np.asarray(_load_array(path))
        openings = [encode(opening) for opening in OPENINGS]
        parts = path.with_suffix("")
        parts.mkdir(exist_ok=True)
        tokens = sample_tokens(source, n_windows, length, openings, progress=progress, folder=parts)
        _save_array(path, tokens)
        shutil.rmtree(parts, ignore_errors=True)
    except OSError as error:
        raise EngineError(f"{path}: cannot be kept ({error.strerror or error})") from None
    return tokens


def _run(source: Source, tokens: Tokens, folder: Path, seed: int) -> Iterator[int]:
    """Does what is not done yet; after each step, how many are.

    State on disk: `input-i` is block i's input, and that of the head for i = n_layers; `gradient-i`
    is dL/d(input-i). A block's result is written after the gradient that the next block needs, and
    what led to it is deleted after the result.
    """
    c = source.config
    head_name = layout.EMBEDDING if c.tie_embeddings else layout.HEAD
    names = [m.name for m in layout.matrices(c) if m.in_block or m.name == head_name]
    results = {folder / _result_name(name) for name in names}
    inputs = [folder / f"input-{i}.npy" for i in range(c.n_layers + 1)]
    gradients = [folder / f"gradient-{i}.npy" for i in range(c.n_layers + 1)]
    n_results = sum(path.exists() for path in results)

    if n_results == 0:
        n_inputs = sum(path.exists() for path in inputs)
        if n_inputs == 0:
            table = source.read(f"{layout.EMBEDDING}.weight")
            _save_array(inputs[0], embed(table, tokens.T))  # (length, n_windows, dim)
            del table
            n_inputs = 1
        for i in range(n_inputs - 1, c.n_layers):
            yield i
            x = forward_layer(c, Layer.read(source, i), _load_array(inputs[i]))
            if not np.abs(x).max() < math.sqrt(np.finfo(x.dtype).max / c.dim):
                raise WeightsError(
                    f"{source.name}: block {i} gives activations that are not finite, or whose "
                    f"squares are not; the source model is damaged"
                )
            _save_array(inputs[i + 1], x)
            del x

        yield c.n_layers
        uniform = np.random.default_rng(seed).random(tokens.T.shape)
        norm = source.read("model.norm.weight")
        head = source.read(f"{head_name}.weight")
        x = _load_array(inputs[-1])
        found, dx = head_statistics(c, norm, head, x, uniform)
        _save_array(gradients[-1], dx)
        _save_result(folder / _result_name(head_name), {head_name: found})
        del norm, head, x, dx, found
        n_results = 1

    for i in reversed(range(c.n_layers + 1 - n_results)):
        yield 2 * c.n_layers - i
        layer = Layer.read(source, i)
        x, dy = _load_array(inputs[i]), _load_array(gradients[i + 1])
        by_matrix, dx = layer_statistics(c, layer, x, dy)
        _save_array(gradients[i], dx)
        path = folder / f"layer-{i}.npz"
        named = {
            name: by_matrix[name.split(".")[-1]]
            for name in names
            if folder / _result_name(name) == path
        }
        _save_result(path, named)
        del layer, x, dy, dx, by_matrix, named
        inputs[i + 1].unlink(missing_ok=True)
        gradients[i + 1].unlink(missing_ok=True)
    for path in (*inputs, *gradients):
        path.unlink(missing_ok=True)
    yield 2 * c.n_layers + 1


def _identity(source: Source, *facts: object) -> str:
    """16 hexadecimal digits that change with the facts and with the model.

    Of its weights, all norms and the last block's matrices are looked at: training moves them all.
    """
    c = source.config
    digest = hashlib.sha256(repr((RECIPE_VERSION, source.name, c.to_json(), facts)).encode())
    last = f"model.layers.{c.n_layers - 1}."
    vectors = {part for name in layout.vectors(c) for part in layout.vector_parts(name)}
    for name in sorted(vectors | {name for name in source.tensors if name.startswith(last)}):
        digest.update(np.ascontiguousarray(source.tensors[name].read()).data)
    return digest.hexdigest()[:16]


def _result_name(matrix: str) -> str:
    """The file that holds a matrix's statistics."""
    block = re.match(r"model\.layers\.(\d+)\.", matrix)
    return f"layer-{block[1]}.npz" if block else "head.npz"


def _save_result(path: Path, by_matrix: Mapping[str, MatrixStatistics]) -> None:
    arrays: dict[str, Any] = {}
    for name, found in by_matrix.items():
        arrays[f"{name}.hessian"] = found.hessian[_upper(len(found.hessian))]
        arrays[f"{name}.gradient"] = found.gradient
    with completing(path) as file:
        np.savez(file, **arrays)


def _symmetric(packed: Floats) -> Floats:
    """The matrix of which `packed` is the upper triangle, row by row."""
    n = (math.isqrt(8 * packed.size + 1) - 1) // 2
    matrix, upper = np.empty((n, n), packed.dtype), _upper(n)
    matrix[upper] = packed
    matrix.T[upper] = packed
    return matrix


def _upper(n: int) -> npt.NDArray[np.bool_]:
    """(n, n): true on the diagonal and above."""
    return ~np.tri(n, k=-1, dtype=bool)


def _save_array(path: Path, values: npt.NDArray[Any]) -> None:
    with completing(path) as file:
        np.save(file, values)


def _load_array(path: Path) -> Floats:
    """Mapped, not read: the blocks go through it a few windows at a time."""
    try:
        values: Floats = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise EngineError(
            f"{path}: is damaged ({error}); delete the folder to calibrate again"
        ) from None
    return values


@contextmanager
def completing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
    os.replace(temporary, path)
