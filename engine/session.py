"""A session on disk: the tokens that an engine has read, and its cache of them.

A safetensors file: `tokens` u32 (n_tokens,), and for every layer `layers.{i}.keys` and `.values`,
u32, in the cache's own layout with n_tokens positions, and of integers also `.keys_scale` and
`.values_scale`. Metadata: `format`, `format_version`, `model` (its identity), `source` (its name),
`activations`, `cache` (its kind), `note`, a text that whoever saves may add, and `crc32` of every
tensor and of the note (JSON). Half of a reading is of no use to another model, nor to the same one
in another mode, so a file says what it belongs to.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from engine.errors import EngineError
from weights.container import replacing

if TYPE_CHECKING:
    from engine.generate import Engine

FORMAT, FORMAT_VERSION = "answer-session", "2"


def save_session(engine: Engine, path: Path, note: str) -> int:
    """Write what the engine's cache holds, whole or not at all; returns the number of tokens."""
    tokens = engine.cached_tokens
    tensors = dict(engine.cache.read(engine.device, len(tokens)))
    tensors["tokens"] = np.array(tokens, np.uint32)
    tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": engine.weights.source,
        **_belongs_to(engine),
        "crc32": json.dumps(_crc32(tensors, note)),
        "note": note,
    }
    with replacing(path) as file:
        file.write(save(tensors, metadata))
    return len(tokens)


def load_session(
    engine: Engine, path: Path
) -> tuple[list[int], dict[str, npt.NDArray[np.uint32]], str]:
    """Tokens, cache and note of a file that fits `engine`; EngineError for any other."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise EngineError(f"{path}: not a session; expected a file that /save wrote")
            if metadata.get("format_version") != FORMAT_VERSION:
                raise EngineError(
                    f"{path}: a session of version {metadata.get('format_version')}, expected "
                    f"{FORMAT_VERSION}; save it again"
                )
            for key, ours in _belongs_to(engine).items():
                if metadata.get(key) != ours:
                    theirs = metadata.get("source" if key == "model" else key)
                    raise EngineError(
                        f"{path}: a session of another {key} ({theirs}); open it with the one that "
                        "it was saved with"
                    )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise EngineError(f"{path}: cannot be read as a session ({error})") from None
    _check(engine, path, metadata, tensors)
    tokens: list[int] = tensors.pop("tokens").tolist()
    return tokens, tensors, metadata.get("note", "")


def _crc32(tensors: dict[str, npt.NDArray[np.uint32]], note: str) -> dict[str, int]:
    of_tensors = {name: zlib.crc32(np.ascontiguousarray(v).data) for name, v in tensors.items()}
    return {**of_tensors, "note": zlib.crc32(note.encode())}


def _belongs_to(engine: Engine) -> dict[str, str]:
    activations = "exact" if engine.exact else "fast"
    return {
        "model": engine.weights.identity,
        "activations": activations,
        "cache": engine.cache.kind,
    }


def _check(
    engine: Engine,
    path: Path,
    metadata: dict[str, str],
    tensors: dict[str, npt.NDArray[np.uint32]],
) -> None:
    damaged = f"{path}: the session is damaged"
    try:
        crc32 = json.loads(metadata.get("crc32", ""))
    except ValueError:
        raise EngineError(f"{damaged} (no checksums); delete it") from None
    if crc32 != _crc32(tensors, metadata.get("note", "")):
        raise EngineError(f"{damaged} (its bytes do not match their CRC-32); delete it")
    tokens = tensors.get("tokens", np.zeros(0))
    shapes = {"tokens": tokens.shape, **engine.cache.shapes(len(tokens))}
    if {name: values.shape for name, values in tensors.items()} != shapes or any(
        values.dtype != np.uint32 for values in tensors.values()
    ):
        raise EngineError(f"{damaged} (its cache has another shape); delete it")
    if tokens.size and tokens.max() >= engine.config.vocab_size:
        raise EngineError(f"{damaged} (it has tokens beyond the vocabulary); delete it")
    if len(tokens) > engine.context:
        raise EngineError(
            f"{path}: holds {len(tokens)} tokens, the context {engine.context}; open the model "
            "with a larger --context"
        )
