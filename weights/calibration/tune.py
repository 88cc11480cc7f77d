"""Norms tuned to what quantization has left of a model: their weights are stored as floats anyway.

Adam (Kingma and Ba, arXiv:1412.6980) on KL(source || weights file), the mean over tokens of the
calibration's text. What is learnt are relative changes d of the weights of all norms on the
residual stream, which become w (1 + d). A step is a few windows forward and back through the file's
blocks. Of the source it needs the head alone: the last block's output is left from calibration.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from codec.matrix import CodedMatrix, dequantize
from engine.errors import EngineError
from model.reference import Floats, embed, rms_norm
from weights import layout
from weights.calibration.backward import rms_norm_backward, rms_norm_weight_backward
from weights.calibration.calibration import Calibration
from weights.calibration.layer import Activations, Layer, backward, output, recompute
from weights.container import replacing
from weights.parallel import in_order, memory_bytes
from weights.sources import Source
from weights.store import WeightsFile

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_TOKENS = 1024  # that a step sees
_PASSES = 2  # over the text, at most: more would learn it by heart
_RATE = 0.003  # of the first step; it falls to 0 in a straight line
_BETAS = 0.9, 0.95  # of Adam's averages of gradients and of their squares
_EPSILON = 1e-8

_ACTIVATIONS = 1 << 30  # bytes kept from the way forward; those of further blocks are made again
_LOGITS = 1 << 23  # looked at together


def tune_norms(
    source: Source,
    file: WeightsFile,
    calibration: Calibration,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """All vectors of a quantized `file` of `source`, norms changed; `progress(done, in all)`.

    There are fewer steps if the text is short. Their state is in a file of the calibration's folder
    after each one, so that a tuning that was stopped goes on; `forget_tuning` deletes it.
    EngineError: that state is damaged; WeightsError: it cannot be written.
    """
    n_windows, length = calibration.tokens.shape
    at_once = max(1, min(_TOKENS // length, n_windows))
    steps = min(steps, -(-_PASSES * n_windows // at_once))
    rng = np.random.default_rng(0)
    order = np.concatenate(
        [rng.permutation(n_windows) for _ in range(-(-steps * at_once // n_windows))]
    )

    model = _Model(source, file, calibration)
    path = _state_path(file, calibration)
    done, change, mean, square = _read_state(path, len(model.norm_names), file.config.dim)
    for step in range(done, steps):
        if progress is not None:
            progress(step, steps)
        windows = order[step * at_once : (step + 1) * at_once]
        gradient = model.gradient(windows.tolist(), change)[1]
        mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
        square = _BETAS[1] * square + (1 - _BETAS[1]) * np.square(gradient)
        expected, spread = (
            average / (1 - beta ** (step + 1))
            for average, beta in zip((mean, square), _BETAS, strict=True)
        )
        change = change - _RATE * (1 - step / steps) * expected / (np.sqrt(spread) + _EPSILON)
        with replacing(path) as state:
            np.savez(state, done=step + 1, change=change, mean=mean, square=square)
    if progress is not None:
        progress(steps, steps)
    tuned = dict(zip(model.norm_names, (1 + change).astype(np.float32), strict=True))
    return {
        name: file.tensor(name) * tuned.get(name, np.float32(1))
        for name in layout.vectors(file.config)
    }


def forget_tuning(file: WeightsFile, calibration: Calibration) -> None:
    """Delete the state of this file's tuning."""
    _state_path(file, calibration).unlink(missing_ok=True)


def _state_path(file: WeightsFile, calibration: Calibration) -> Path:
    return calibration.folder / f"tuning-{file.identity[:16]}.npz"


def _read_state(path: Path, n_norms: int, dim: int) -> tuple[int, Doubles, Doubles, Doubles]:
    """Steps done, and (n_norms, dim) each: changes, averages of gradients and of their squares."""
    if not path.is_file():
        return 0, *np.zeros((3, n_norms, dim))
    try:
        with np.load(path) as state:
            return int(state["done"]), state["change"], state["mean"], state["square"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EngineError(f"{path}: cannot be read ({error}); delete it to tune again") from None


class _Model:
    """A weights file whose norms change, beside its source.

    In memory: embedding and head, the source's too, and of the blocks as many as fit a quarter of
    the machine's memory; others are decoded whenever they are used.
    """

    def __init__(self, source: Source, file: WeightsFile, calibration: Calibration) -> None:
        c = self._config = file.config
        self._file = file
        self._calibration = calibration
        head = layout.EMBEDDING if c.tie_embeddings else layout.HEAD
        self._embedding = _dense(file, layout.EMBEDDING)
        self._head = self._embedding if c.tie_embeddings else _dense(file, head)
        self._source_head = source.read(f"{head}.weight")
        self._source_norm = source.vector(_LAST_NORM)
        self.norm_names = [
            f"model.layers.{i}.{name}.weight"
            for i in range(c.n_layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        ] + [_LAST_NORM]
        in_block = [m for m in layout.matrices(c) if m.in_block]
        block_bytes = 4 * sum(m.rows * m.cols for m in in_block) // c.n_layers
        self._n_dense = memory_bytes() // 4 // block_bytes
        self._dense: dict[int, Layer] = {}

    def gradient(self, windows: Sequence[int], change: Doubles) -> tuple[float, Doubles]:
        """Mean KL over these windows of the text, its gradient by `change`: (n_norms, dim) both.

        A thread works on its own window; sums go in the windows' order, so that a result does not
        depend on how many there are.
        """
        c = self._config
        factors = (1 + change).astype(np.float32)
        xs = [embed(self._embedding, self._calibration.tokens[window]) for window in windows]
        n_kept = self._kept_blocks(sum(map(len, xs)))
        ways: list[list[Activations | Floats]] = []  # of each block: its way, or its input alone
        for i in range(c.n_layers):
            layer = self._layer(i, factors)
            found = list(in_order(partial(self._forward, layer, i < n_kept), xs))
            ways.append([way for way, _ in found])
            xs = [y for _, y in found]

        gradient = np.zeros(change.shape)
        norm = self._file.tensor(_LAST_NORM) * factors[-1]
        ends = list(in_order(partial(self._end, norm), list(zip(windows, xs, strict=True))))
        n_tokens = sum(map(len, xs))
        divergence = sum(kl for kl, _, _ in ends) / n_tokens
        dys = [dx / np.float32(n_tokens) for _, dx, _ in ends]
        gradient[-1] = sum(of_norm for _, _, of_norm in ends) / n_tokens
        for i in reversed(range(c.n_layers)):
            layer = self._layer(i, factors)
            found_back = in_order(
                partial(self._back, layer), list(zip(ways.pop(), dys, strict=True))
            )
            dys = []
            for dx, of_input_norm, of_post_norm in found_back:
                dys.append(dx)
                gradient[2 * i] += of_input_norm
                gradient[2 * i + 1] += of_post_norm
        return divergence, gradient / (1 + change)  # from changes of what is changed already

    def _kept_blocks(self, n_tokens: int) -> int:
        c = self._config
        a_token = 4 * c.dim + 2 * c.q_dim + 3 * c.kv_dim + 2 * c.hidden_dim
        return _ACTIVATIONS // (4 * a_token * n_tokens)

    def _layer(self, index: int, factors: Array) -> Layer:
        layer = self._dense.get(index) or _read_layer(self._file, index)
        if index < self._n_dense:
            self._dense[index] = layer
        return dataclasses.replace(
            layer,
            input_norm=layer.input_norm * factors[2 * index],
            post_norm=layer.post_norm * factors[2 * index + 1],
        )

    def _forward(self, layer: Layer, keep: bool, x: Floats) -> tuple[Activations | Floats, Floats]:
        way = recompute(self._config, layer, x, 1)
        y = output(layer, way)
        if not keep:
            return x, y
        nothing = x[:0]  # in place of what `backward` does not look at
        return dataclasses.replace(way, attn=nothing, hidden=nothing), y

    def _back(
        self, layer: Layer, of_window: tuple[Activations | Floats, Floats]
    ) -> tuple[Floats, Floats, Floats]:
        """dL/d of the block's input and of its norms' changes."""
        way, dy = of_window
        if not isinstance(way, Activations):
            way = recompute(self._config, layer, way, 1)
        found = backward(self._config, layer, way, dy)
        return found.x, found.input_norm, found.post_norm

    def _end(self, norm: Array, of_window: tuple[int, Floats]) -> tuple[float, Floats, Floats]:
        """A window and its last residual (length, dim) -> the sum over tokens of KL, its gradient
        by the residual and by the norm's change.
        """
        c = self._config
        window, x = of_window
        xn = rms_norm(x, norm, c.norm_eps)
        target = rms_norm(self._calibration.residual[:, window], self._source_norm, c.norm_eps)
        dxn = np.empty_like(xn)
        divergence = 0.0
        step = max(1, _LOGITS // c.vocab_size)
        buffers = np.empty((3, step, c.vocab_size), x.dtype)  # new ones would be cleared each time
        for begin in range(0, len(x), step):
            part = slice(begin, begin + step)
            a, b, p = (buffer[: len(x[part])] for buffer in buffers)
            # With logits a, b and their softmax p, q: KL = sum p (a - b) - log sum e^a
            # + log sum e^b, and its gradient by b is q - p.
            np.matmul(target[part], self._source_head.T, out=a)
            np.matmul(xn[part], self._head.T, out=b)
            for logits in (a, b):
                logits -= np.max(logits, axis=-1, keepdims=True)
            np.exp(a, out=p)
            a -= b
            q = np.exp(b, out=b)
            sums = [np.sum(each, axis=-1, keepdims=True) for each in (p, q)]
            p /= sums[0]
            q /= sums[1]
            divergence += float(np.einsum("tv,tv->", p, a) + np.log(sums[1] / sums[0]).sum())
            q -= p
            np.matmul(q, self._head, out=dxn[part])
        dx = rms_norm_backward(x, norm, c.norm_eps, dxn)
        return divergence, dx, rms_norm_weight_backward(xn, dxn)


_LAST_NORM = "model.norm.weight"


def _read_layer(file: WeightsFile, index: int) -> Layer:
    """A block as it is in a weights file, its matrices decoded."""
    c, prefix = file.config, f"model.layers.{index}."
    qkv_proj, o_proj, gate_up_proj, down_proj = in_order(
        partial(_dense, file),
        [
            f"{prefix}{name}"
            for name in (
                "self_attn.qkv_proj",
                "self_attn.o_proj",
                "mlp.gate_up_proj",
                "mlp.down_proj",
            )
        ],
    )

    def vector(name: str, there: bool) -> Floats | None:
        return file.tensor(f"{prefix}self_attn.{name}") if there else None

    return Layer(
        input_norm=file.tensor(f"{prefix}input_layernorm.weight"),
        qkv_proj=qkv_proj,
        o_proj=o_proj,
        post_norm=file.tensor(f"{prefix}post_attention_layernorm.weight"),
        gate_up_proj=gate_up_proj,
        down_proj=down_proj,
        is_rotated=c.is_rotated(index),
        window=c.window(index),
        qkv_bias=vector("qkv_proj.bias", c.qkv_bias),
        q_norm=vector("q_norm.weight", c.qk_norm),
        k_norm=vector("k_norm.weight", c.qk_norm),
    )


def _dense(file: WeightsFile, name: str) -> Array:
    matrix = file.matrix(name)
    assert isinstance(matrix, CodedMatrix)
    return dequantize(matrix)
