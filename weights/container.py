"""The safetensors container: a JSON header and raw little-endian bytes. Knows nothing of models.

Written here rather than with the safetensors library because reading must give views into the
mapped file, bfloat16 included, and writing must not hold the whole model in memory. The layout is
the library's (github.com/huggingface/safetensors, README, "Format"), and it reads these files.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from engine.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_LENGTH_BYTES = 8  # u64: bytes of the header that follows

# bfloat16 has no numpy type and is handed out as its bits.
_NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is; the values are a view into the mapped file."""

    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    values: npt.NDArray[Any]


@dataclass(frozen=True)
class Container:
    path: Path
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]
    size_bytes: int
    mapped: mmap.mmap


def release_pages(mapped: mmap.mmap) -> None:
    """Give back the memory of what has been read; whoever needs it again reads it again."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


def damaged(path: Path, problem: str) -> WeightsError:
    return WeightsError(
        f"{path}: {problem}; the file is damaged or incomplete: "
        "delete it, then convert or download it again"
    )


def read_container(path: Path) -> Container:
    """Map a file and check all of its header; its tensors fill the data without hole or overlap.

    WeightsError: missing, unreadable, or not exactly a safetensors file.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes < _LENGTH_BYTES:
                raise damaged(path, f"{size_bytes} bytes are too few for a safetensors file")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None

    header_bytes = int.from_bytes(mapped[:_LENGTH_BYTES], "little")
    data_start = _LENGTH_BYTES + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_start > size_bytes:
        raise damaged(path, f"a header of {header_bytes} bytes does not fit a file of {size_bytes}")
    try:
        header = json.loads(mapped[_LENGTH_BYTES:data_start].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"the header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise damaged(path, "the header is not a JSON object")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise damaged(path, "the metadata are not strings")
    spans = []
    for name, fields in header.items():
        dtype, shape, begin, end = _tensor_fields(path, name, fields)
        spans.append((begin, end, name, dtype, shape))
    spans.sort()
    data = np.frombuffer(mapped, np.uint8)[data_start:]
    entries = {}
    expected = 0
    for begin, end, name, dtype, shape in spans:
        if begin != expected:
            raise damaged(path, f"{name} starts at byte {begin} of the data, expected {expected}")
        expected = end
        if end > data.size:
            raise damaged(path, f"{name} ends at byte {end} of the data, which has {data.size}")
        values = data[begin:end].view(_NUMPY_TYPES[dtype])
        try:
            entries[name] = Entry(dtype, shape, values.reshape(shape))
        except (ValueError, OverflowError) as error:  # an empty tensor with absurd dimensions
            raise damaged(path, f"{name} has the shape {shape} ({error})") from None
    if expected != data.size:
        raise damaged(
            path, f"the tensors end at byte {expected} of the data, which has {data.size}"
        )
    return Container(path, metadata, entries, size_bytes, mapped)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor_fields(path: Path, name: str, fields: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of one header entry, checked against each other."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _NUMPY_TYPES:
        raise damaged(path, f"{name} has the unknown type {dtype!r}")
    for numbers in (shape, offsets):
        # type(), since True is an int as well
        if not isinstance(numbers, list) or any(
            type(number) is not int or number < 0 for number in numbers
        ):
            raise damaged(
                path,
                f"{name} has the shape {shape!r} at {offsets!r}, expected lists of whole numbers",
            )
    size_bytes = math.prod(shape) * np.dtype(_NUMPY_TYPES[dtype]).itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != size_bytes:
        raise damaged(
            path,
            f"{name}, {dtype} of shape {shape}, lies at {offsets}, expected {size_bytes} bytes",
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


class ContainerWriter:
    """Writes tensors as they come; the header in front of them is filled in by `finish`.

    They are written in the order given, which must keep them aligned: larger element types first.
    """

    def __init__(self, file: BinaryIO, reserved_bytes: int) -> None:
        """`reserved_bytes` must hold the header to come; spaces fill what it does not need."""
        self._file = file
        self._header_bytes = -(-reserved_bytes // 8) * 8  # the data start 8-byte aligned
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0
        file.seek(_LENGTH_BYTES + self._header_bytes)

    def add(self, name: str, dtype: str, values: npt.NDArray[Any]) -> bytes:
        """Append a tensor of type `dtype`; returns the bytes written."""
        data = np.ascontiguousarray(values, dtype=_NUMPY_TYPES[dtype]).tobytes()
        self._file.write(data)
        begin, self._end = self._end, self._end + len(data)
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [begin, self._end],
        }
        return data

    def finish(self, metadata: Mapping[str, str]) -> None:
        header = json.dumps(
            {"__metadata__": dict(metadata), **self._entries}, separators=(",", ":")
        ).encode()
        if len(header) > self._header_bytes:
            raise ValueError(
                f"a header of {len(header)} bytes, but only {self._header_bytes} were reserved"
            )
        self._file.seek(0)
        self._file.write(
            self._header_bytes.to_bytes(_LENGTH_BYTES, "little") + header.ljust(self._header_bytes)
        )


def check_place(path: Path) -> None:
    """Now rather than after hours of work: WeightsError where `replacing` would fail."""
    try:
        with tempfile.TemporaryFile(dir=next(p for p in path.absolute().parents if p.exists())):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(
        f"{path}: cannot be written ({error.strerror}); free some space or choose another place"
    )


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, or vanishes when it fails.

    What a process that was killed left of such a file is removed by the next one. WeightsError: the
    folder cannot be written to or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            with suppress(OSError), open(left, "rb") as file:
                _lock(file)
                left.unlink()
        try:
            with open(temporary, "wb") as file:
                with suppress(OSError):  # a file system without locks
                    _lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:  # also after Ctrl-C; nothing is left to remove once the file is in place
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def _lock(file: BinaryIO) -> None:
    """Held for as long as the file is open; OSError where another process holds it."""
    if sys.platform != "win32":  # which lets nobody remove a file that is open
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
