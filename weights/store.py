"""The weights file: opened, checked and handed out; written whole or not at all. See FORMAT.md.

Opening checks every fact on which a decoder relies, so that the shaders need no guards.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from codec.lossless import AnyMatrix, LosslessMatrix
from engine.errors import ConfigError, WeightsError
from model.config import ModelConfig
from weights import layout, parts
from weights.container import (
    Container,
    ContainerWriter,
    Entry,
    damaged,
    read_container,
    release_pages,
    replacing,
)

FORMAT = "answer"
FORMAT_VERSION = "5"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """An open weights file; its arrays are views into the mapped file, read when they are used."""

    path: Path
    config: ModelConfig
    source: str  # name of the model that was converted
    chat_template: str | None
    tokenizer_json: bytes
    size_bytes: int
    identity: str  # of the model as it is here: hex, the same for files with the same contents
    _entries: Mapping[str, Entry]
    _matrices: Mapping[str, AnyMatrix]
    _mapped: mmap.mmap

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map and check a file; WeightsError: missing, of another kind or version, or damaged."""
        path = Path(path)
        container = read_container(path)
        metadata = _checked_metadata(container)
        try:
            config = ModelConfig.from_json(metadata["config"])
            matrix_fields, crc32 = json.loads(metadata["matrices"]), json.loads(metadata["crc32"])
        except (ConfigError, ValueError) as error:
            raise damaged(path, f"the metadata are wrong ({error})") from None
        _check_tensors(container, config, matrix_fields, crc32)
        try:
            tokenizer_json = zlib.decompress(container.entries[TOKENIZER].values.tobytes())
        except zlib.error as error:
            raise damaged(path, f"{TOKENIZER} is not zlib-compressed ({error})") from None
        for name in layout.vectors(config):
            if not np.isfinite(container.entries[name].values).all():
                raise damaged(path, f"{name} holds values that are not finite")
        matrices = {
            matrix.name: _matrix(container, matrix, matrix_fields[matrix.name])
            for matrix in layout.matrices(config)
        }
        if len({type(matrix) for matrix in matrices.values()}) > 1:
            raise damaged(path, "some matrices are quantized and some are not")
        return cls(
            path=path,
            config=config,
            source=metadata["source"],
            chat_template=metadata.get("chat_template"),
            tokenizer_json=tokenizer_json,
            size_bytes=container.size_bytes,
            identity=_identity(metadata),
            _entries=container.entries,
            _matrices=matrices,
            _mapped=container.mapped,
        )

    def release_pages(self) -> None:
        """Give back the memory of what has been read; whoever needs it again reads it again."""
        release_pages(self._mapped)

    @property
    def matrix_names(self) -> list[str]:
        """Every matrix, in the order in which a token meets them."""
        return list(self._matrices)

    @property
    def lossless(self) -> bool:
        """Whether all matrices are `LosslessMatrix`; otherwise none is."""
        return isinstance(self._matrices[layout.EMBEDDING], LosslessMatrix)

    def matrix(self, name: str) -> AnyMatrix:
        return self._matrices[name]

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A vector of weights/layout.py."""
        return self._entries[name].values

    def stored_bits(self, name: str) -> int:
        """Bits that the file holds for the matrix `name`: all of its tensors."""
        kind = parts.LOSSLESS if self.lossless else parts.QUANTIZED
        return 8 * sum(self._entries[f"{name}.{part}"].values.nbytes for part in kind.parts)

    def bits_per_weight(self, block_only: bool) -> float:
        """Stored bits per weight over the matrices of the blocks, or over all of them."""
        names = [
            matrix.name
            for matrix in layout.matrices(self.config)
            if matrix.in_block or not block_only
        ]
        n_weights = sum(self._matrices[name].n_weights for name in names)
        return sum(map(self.stored_bits, names)) / n_weights


def write_weights(
    path: str | Path,
    *,
    config: ModelConfig,
    matrices: Iterable[tuple[str, AnyMatrix]],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    tokenizer_json: bytes,
    chat_template: str | None,
    source: str,
) -> None:
    """Write a weights file; it appears at `path` whole, or not at all.

    `matrices` gives every matrix under its name and is consumed one by one: the model need not fit
    into memory. WeightsError when `path` cannot be written to or the disk is full.
    """
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_json(),
        "source": source,
    }
    if chat_template is not None:
        metadata["chat_template"] = chat_template
    crc32 = {}
    fields = {}
    later: list[tuple[str, str, npt.NDArray[Any]]] = []  # name, type, values
    later += [(name, "F32", vector) for name, vector in vectors.items()]
    with replacing(Path(path)) as file:
        writer = ContainerWriter(file, _header_bound(config, metadata))
        for name, matrix in matrices:
            kind, fields[name], values = parts.split(matrix)
            for part, dtype in kind.large.items():
                data = writer.add(f"{name}.{part}", dtype, values[part])
                crc32[f"{name}.{part}"] = zlib.crc32(data)
            for part, dtype in kind.small.items():
                later.append((f"{name}.{part}", dtype, values[part]))
        later.append((TOKENIZER, "U8", np.frombuffer(zlib.compress(tokenizer_json, 9), np.uint8)))
        for name, dtype, array in later:
            crc32[name] = zlib.crc32(writer.add(name, dtype, array))
        metadata |= {"matrices": json.dumps(fields), "crc32": json.dumps(crc32)}
        writer.finish({**metadata, "metadata_crc32": str(_metadata_crc32(metadata))})


def _header_bound(config: ModelConfig, metadata: Mapping[str, str]) -> int:
    """No fewer bytes than the finished header has.

    A tensor's name stands in it twice, in a third place with its matrix; 150 bytes hold the rest of
    its entry, its CRC-32 and its share of the matrix's numbers.
    """
    names = [*layout.vectors(config), TOKENIZER]
    of_matrices = set().union(*(kind.parts for kind in parts.KINDS))
    names += [f"{matrix.name}.{part}" for matrix in layout.matrices(config) for part in of_matrices]
    return len(json.dumps(metadata)) + sum(3 * len(name) + 150 for name in names)


def _identity(metadata: Mapping[str, str]) -> str:
    """SHA-256 of the sizes and of every tensor's checksum."""
    contents = [metadata["config"], metadata["matrices"], metadata["crc32"]]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _metadata_crc32(metadata: Mapping[str, str]) -> int:
    """CRC-32 of the metadata's canonical JSON, without `metadata_crc32` itself."""
    others = {key: text for key, text in metadata.items() if key != "metadata_crc32"}
    return zlib.crc32(json.dumps(others, sort_keys=True, separators=(",", ":")).encode())


def _checked_metadata(container: Container) -> Mapping[str, str]:
    metadata, path = container.metadata, container.path
    if metadata.get("format") != FORMAT:
        raise WeightsError(
            f"{path}: a safetensors file, but not of this engine; "
            "convert the model's folder with `answer convert FOLDER OUT`"
        )
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise WeightsError(
            f"{path}: format version {version}, expected {FORMAT_VERSION}; convert the model again"
        )
    if metadata.get("metadata_crc32") != str(_metadata_crc32(metadata)):
        raise damaged(path, "the metadata do not match their CRC-32")
    missing = {"config", "source", "matrices", "crc32"} - metadata.keys()
    if missing:
        raise damaged(path, f"the metadata lack {', '.join(sorted(missing))}")
    return metadata


def _check_tensors(container: Container, config: ModelConfig, matrices: Any, crc32: Any) -> None:
    """The set of tensors, their types and bytes, and their shapes as far as `config` fixes them."""
    path, entries = container.path, container.entries
    names = [matrix.name for matrix in layout.matrices(config)]
    types: dict[str, str] = {}
    for name in names:
        kind = parts.kind_of(matrices.get(name) if isinstance(matrices, dict) else None)
        types |= {f"{name}.{part}": dtype for part, dtype in kind.parts.items()}
    types |= {name: "F32" for name in layout.vectors(config)}
    types[TOKENIZER] = "U8"
    if entries.keys() != types.keys():
        missing, surplus = sorted(types.keys() - entries), sorted(entries.keys() - types)
        raise damaged(path, f"tensors missing: {missing[:3]}, not expected: {surplus[:3]}")
    if not isinstance(crc32, dict) or crc32.keys() != types.keys():
        raise damaged(path, "the list of CRC-32 does not name exactly the tensors")
    if not isinstance(matrices, dict) or matrices.keys() != set(names):
        raise damaged(path, "the list of matrices does not fit the model's sizes")
    for name, dtype in types.items():
        entry = entries[name]
        if entry.dtype != dtype or len(entry.shape) != 1:
            found = f"{entry.dtype} of shape {entry.shape}"
            raise damaged(path, f"{name} is {found}, expected {dtype} of one dimension")
        if zlib.crc32(entry.values.data) != crc32[name]:
            raise damaged(path, f"the bytes of {name} do not match their CRC-32")
    for name, size in layout.vectors(config).items():
        if entries[name].shape != (size,):
            raise damaged(path, f"{name} has shape {entries[name].shape}, expected ({size},)")


def _matrix(container: Container, matrix: layout.Matrix, fields: Any) -> AnyMatrix:
    """A matrix whose every part was checked, but for the bits of the streams themselves."""
    tensors = {
        part: container.entries[f"{matrix.name}.{part}"].values
        for part in parts.kind_of(fields).parts
    }
    try:
        return parts.join(matrix, fields, tensors)
    except ValueError as error:
        raise damaged(container.path, f"{matrix.name}: {error}") from None
