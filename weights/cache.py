"""From what a user names to a weights file: other models are converted once and kept in a cache."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

from engine.errors import WeightsError
from weights.convert import DEFAULT_BITS, QUICK, RECIPE_VERSION, Bits, convert
from weights.folder import cache_folder
from weights.sources import PACKAGED, open_source

__all__ = ["DEFAULT_BITS", "DEFAULT_MODEL", "cache_folder", "is_weights_file", "resolve"]

DEFAULT_MODEL = "smollm2"


def resolve(model: str | Path, bits: Bits | None = None, progress: bool = True) -> Path:
    """The weights file for `model`: itself if it is one, else the source converted to `bits`.

    A source (a packaged model's name, a Hugging Face folder, a GGUF file) is converted on first
    use, which takes minutes for large models and is announced on stderr. WeightsError or
    ConfigError when that fails, and WeightsError when `bits` is given for a converted file.
    """
    path = Path(model)
    if is_weights_file(model):
        if bits is not None:
            raise WeightsError(
                f"{path}: its bits are fixed; choose bits only for a model to convert"
            )
        return path
    bits = DEFAULT_BITS if bits is None else bits
    rate = bits if bits == "lossless" else f"{bits:g}bit"
    cached = cache_folder() / f"{_name(model)}-{rate}-v{RECIPE_VERSION}.safetensors"
    if not cached.is_file():
        goal = "without loss" if bits == "lossless" else f"to {bits:g} bit/weight"
        print(f"converting {model} {goal}, once: {cached}", file=sys.stderr)
        convert(open_source(model), cached, bits, text=QUICK, progress=progress)
    return cached


def is_weights_file(model: str | Path) -> bool:
    """Not a model to convert; whether it really is a weights file, opening it will tell."""
    path = Path(model)
    return path.is_file() and path.suffix != ".gguf"


def _name(model: str | Path) -> str:
    """Name of a source in the cache: a path gets a mark that changes with its place and content."""
    path = Path(model)
    if not path.exists():
        if str(model) in PACKAGED:
            return str(model)
        open_source(model)  # raises: no such model
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    ]
    return f"{path.resolve().stem}-{zlib.crc32(repr(facts).encode()):08x}"
