"""A user's own calibration text: a file to windows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.errors import EngineError
from weights.calibration.sample import Tokens


def read_windows(
    path: str | Path, encode: Callable[[str], list[int]], n_windows: int, length: int
) -> Tokens:
    """A text in UTF-8 to at most n_windows windows, (n, length), spread evenly over all of it.

    `encode` makes token ids of text. EngineError: missing, empty, no text, or too short for one
    window.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror})") from None
    if b"\0" in data:
        raise EngineError(f"{path}: expected a text in UTF-8, found a binary file (a NUL byte)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EngineError(
            f"{path}: expected a text in UTF-8, found byte 0x{data[error.start]:02x} "
            f"at {error.start}"
        ) from None
    if not text.strip():
        raise EngineError(f"{path}: is empty; calibration needs {length} tokens or more")
    ids = np.array(encode(text), np.int64)
    found = len(ids) // length
    if found == 0:
        raise EngineError(
            f"{path}: makes {len(ids)} tokens, calibration needs {length} or more; "
            f"give a longer text"
        )
    taken = np.linspace(0, found - 1, min(n_windows, found)).round().astype(np.int64)
    return ids[: found * length].reshape(found, length)[taken]
