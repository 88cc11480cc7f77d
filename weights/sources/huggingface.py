"""A Hugging Face model folder as a `Source`: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import WeightsError
from weights.container import Container, Entry, read_container, release_pages
from weights.sources.families import read_family
from weights.sources.source import LazyTensor, Source, scaled

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def open_folder(folder: Path) -> Source:
    """Reads JSON and the shards' headers; WeightsError or ConfigError when they do not fit."""
    hf_config = _read_json(folder / "config.json")
    # For a chat model this file names more ends of an answer than config.json does.
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    if generation.get("eos_token_id") is not None:
        hf_config["eos_token_id"] = generation["eos_token_id"]
    family = read_family(hf_config)
    return Source(
        name=folder.resolve().name,
        config=family.config,
        tensors=scaled(_open_tensors(folder), family),
        tokenizer_json=_read_bytes(folder / "tokenizer.json"),
        chat_template=_chat_template(folder),
    )


def _open_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Tensors of model.safetensors, or of the shards that the index names."""
    if not (folder / _INDEX).is_file():
        if not (folder / _SINGLE).is_file():
            raise WeightsError(
                f"{folder}: neither {_SINGLE} nor {_INDEX}; pickled .bin files are not read"
            )
        return _shard_tensors(folder / _SINGLE)
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise WeightsError(f"{folder / _INDEX}: no weight_map from tensor names to file names")
    shards = {shard: _shard_tensors(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise WeightsError(
                f"{folder / shard}: {name} is missing, though {_INDEX} places it there"
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _shard_tensors(path: Path) -> dict[str, LazyTensor]:
    container = read_container(path)
    return {
        name: LazyTensor(entry.shape, partial(_read, container, name))
        for name, entry in container.entries.items()
    }


def _read(container: Container, name: str) -> npt.NDArray[np.float32]:
    values = _to_float32(container.path, name, container.entries[name])
    release_pages(container.mapped)  # or all of the file would come to lie in memory
    return values


def _to_float32(path: Path, name: str, entry: Entry) -> npt.NDArray[np.float32]:
    if entry.dtype == "BF16":  # the upper half of a float32
        bits = entry.values.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    if entry.dtype in ("F16", "F32", "F64"):
        return entry.values.astype(np.float32)
    raise WeightsError(f"{path}: {name} is of type {entry.dtype}, expected BF16, F16 or F32")


def _chat_template(folder: Path) -> str | None:
    """chat_template.jinja if there is one, else the (default) one in tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_bytes(path).decode(errors="replace")
    path = folder / "tokenizer_config.json"
    template = _read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):  # several by name: [{"name": ..., "template": ...}]
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise WeightsError(f"{path}: chat_template is {type(template).__name__}, expected a string")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_bytes(path))
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(
            f"{path.parent}: {path.name} is missing; expected a Hugging Face model folder"
        ) from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
