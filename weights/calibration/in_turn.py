"""Blocks quantized in turn, so that each makes up for what those before it have changed.

Two models read the same text: the source, and what it is with all quantized that comes before. A
matrix W then sees x in the one and x' in the other, the residual streams are r and r'. Before it is
rounded, for inputs x' and not x, it is moved to

    W + share mean(d x'^T) (H' + damping)^-1,  H' = mean(x' x'^T),  d = W (x - x')

and d = W (x - x') + r - r' where its outputs are added to the residual: part of the way to the
least squares that bring outputs, and residuals, to those of the source. (GPTAQ, Li et al. 2025,
goes all the way, and knows no residual.) As H' is of the inputs that W will have, each move makes
what it is to make up for smaller, on this text, whatever the model is.

Of n tokens a fit with as many unknowns an output as there are columns takes noise for cols / n of
what it explains: `_share` goes down with that. Of endless text all of the way would still be too
far, as least squares take from outputs what of them is noise.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterator
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import EngineError, WeightsError
from model.config import ModelConfig
from model.reference import Floats, embed, rms_norm, swiglu
from weights import layout
from weights.calibration.calibration import completing
from weights.calibration.layer import Layer, attend
from weights.calibration.sample import Tokens
from weights.calibration.statistics import threads_for
from weights.parallel import in_order
from weights.sources import Source

_LARGEST_SHARE = 0.6
# How many tokens a column a fit must have to be as much truth as noise: neighbours are much alike.
_TOKENS_PER_COLUMN = 6

_TOKENS = 1024  # of a chunk, which a thread works on
_INTO_RESIDUAL = ("o_proj", "down_proj")

# A matrix, share * mean(d x'^T), (rows, cols), and H', to what it is when it is quantized.
Quantize = Callable[[layout.Matrix, Floats, Floats], Floats]


@dataclasses.dataclass(frozen=True)
class _Way:
    """A model's way through a chunk of windows: (tokens, dim), (tokens, cols)."""

    residual: Floats
    read: Floats  # what the last matrix has read


@dataclasses.dataclass(frozen=True)
class _Chunk:
    n_windows: int
    source: _Way
    turned: _Way


def quantize_in_turn(
    source: Source,
    tokens: Tokens,
    quantize: Quantize,
    folder: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Calls `quantize` for every matrix of the blocks, in the order of the file, over `tokens`
    (n_windows, length), windows that start at 0 each; `progress(blocks done, blocks in all)`.

    How far it is, is in a file of `folder` after each block, and it goes on from there. Memory
    holds one block's weights, and of either model a text's residuals and what one matrix reads.
    EngineError: the folder cannot be written, or what is in it is damaged; WeightsError: a number
    has become too large.
    """
    c = source.config
    matrices = [m for m in layout.matrices(c) if m.in_block]
    windows, state = list(_windows(tokens)), folder / "state.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done, chunks = _read_state(state, windows) or (0, _begin(source, tokens, windows))
        for i in range(done, c.n_layers):
            progress(i, c.n_layers)
            of_block = matrices[4 * i : 4 * i + 4]
            chunks = _block(source, i, of_block, chunks, tokens.size, quantize)
            _write_state(state, i + 1, chunks)
    except OSError as error:
        raise EngineError(
            f"{folder}: quantized blocks cannot be kept there ({error.strerror or error})"
        ) from None
    progress(c.n_layers, c.n_layers)


def _block(
    source: Source,
    index: int,
    matrices: list[layout.Matrix],
    chunks: list[_Chunk],
    n_tokens: int,
    quantize: Quantize,
) -> list[_Chunk]:
    c = source.config
    layer = turned = Layer.read(source, index)
    for matrix in matrices:
        field = matrix.name.rpartition(".")[2]
        w = getattr(layer, field)
        chunks = list(in_order(partial(_read, c, field, layer, turned), chunks))
        sums = in_order(partial(_products, field, w), chunks, threads_for(matrix.cols))
        products, hessian = (of_text / n_tokens for of_text in reduce(_added, sums))
        if field not in _INTO_RESIDUAL:
            products = w @ products
        products *= _share(n_tokens, matrix.cols)
        if not (np.isfinite(products).all() and np.isfinite(hessian).all()):
            raise WeightsError(
                f"{matrix.name}: with all quantized before it, numbers are not finite, or their "
                f"squares are not"
            )
        changed: dict[str, Any] = {field: quantize(matrix, products, hessian)}
        turned = dataclasses.replace(turned, **changed)
    return list(in_order(partial(_leave, layer, turned), chunks))


def _added(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    for mine, of_other in zip(one, other, strict=True):
        mine += of_other
    return one


def _share(n_tokens: int, cols: int) -> float:
    return _LARGEST_SHARE * n_tokens / (n_tokens + _TOKENS_PER_COLUMN * cols)


def _windows(tokens: Tokens) -> Iterator[slice]:
    step = max(1, _TOKENS // tokens.shape[1])
    for begin in range(0, len(tokens), step):
        yield slice(begin, min(begin + step, len(tokens)))


def _begin(source: Source, tokens: Tokens, windows: list[slice]) -> list[_Chunk]:
    table = source.read(f"{layout.EMBEDDING}.weight")
    chunks = []
    for part in windows:
        x = embed(table, tokens[part].T.ravel())  # by position first
        chunks.append(_Chunk(part.stop - part.start, _Way(x, x[:, :0]), _Way(x, x[:, :0])))
    return chunks


def _read(c: ModelConfig, field: str, layer: Layer, turned: Layer, chunk: _Chunk) -> _Chunk:
    """Both on to what that matrix reads."""
    return _Chunk(
        chunk.n_windows,
        *(
            _advance(c, field, of_model, way, chunk.n_windows)
            for of_model, way in ((layer, chunk.source), (turned, chunk.turned))
        ),
    )


def _advance(c: ModelConfig, field: str, layer: Layer, way: _Way, n_windows: int) -> _Way:
    residual = way.residual
    if field == "qkv_proj":
        read = rms_norm(residual, layer.input_norm, c.norm_eps)
    elif field == "o_proj":
        read = attend(c, layer, way.read, n_windows)
    elif field == "gate_up_proj":
        residual = residual + way.read @ layer.o_proj.T
        read = rms_norm(residual, layer.post_norm, c.norm_eps)
    else:
        read = swiglu(way.read @ layer.gate_up_proj.T)
    return _Way(residual, read)


def _leave(layer: Layer, turned: Layer, chunk: _Chunk) -> _Chunk:
    """Both to the end of the block."""
    source, other = (
        _Way(way.residual + way.read @ of_model.down_proj.T, way.read[:, :0])
        for of_model, way in ((layer, chunk.source), (turned, chunk.turned))
    )
    return _Chunk(chunk.n_windows, source, other)


def _products(field: str, w: Floats, chunk: _Chunk) -> tuple[Floats, Floats]:
    """Sums over tokens: of d x'^T, or of (x - x') x'^T, of which W makes that; and of x' x'^T."""
    d = chunk.source.read - chunk.turned.read
    if field in _INTO_RESIDUAL:
        d = d @ w.T
        d += chunk.source.residual
        d -= chunk.turned.residual
    return d.T @ chunk.turned.read, chunk.turned.read.T @ chunk.turned.read


def _read_state(path: Path, windows: list[slice]) -> tuple[int, list[_Chunk]] | None:
    """Blocks done, and both models' ways behind these."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as state:
            done, residuals = int(state["done"]), (state["source"], state["turned"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EngineError(f"{path}: cannot be read ({error}); delete its folder") from None
    counts = [part.stop - part.start for part in windows]
    ends = np.cumsum(counts) * (len(residuals[0]) // sum(counts))
    parts = zip(*(np.split(residual, ends[:-1]) for residual in residuals), strict=True)
    return done, [
        _Chunk(n, *(_Way(x, x[:, :0]) for x in of_chunk))
        for n, of_chunk in zip(counts, parts, strict=True)
    ]


def _write_state(path: Path, done: int, chunks: list[_Chunk]) -> None:
    with completing(path) as file:
        np.savez(
            file,
            done=done,
            source=np.concatenate([chunk.source.residual for chunk in chunks]),
            turned=np.concatenate([chunk.turned.residual for chunk in chunks]),
        )
