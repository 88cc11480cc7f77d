"""From what a user names to a weights file: other models are converted once and kept in a cache."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from engine.errors import WeightsError
from weights.bits import Bits
from weights.convert import DEFAULT_BITS, QUICK, RECIPE_VERSION, convert
from weights.folder import cache_folder
from weights.sources import PACKAGED, open_source
from weights.sources.hub import parse_hub_name

__all__ = [
    "DEFAULT_BITS",
    "DEFAULT_MODEL",
    "cache_folder",
    "is_weights_file",
    "name_in_cache",
    "resolve",
    "resolve_each",
]

DEFAULT_MODEL = "smollm2"


def resolve(model: str | Path, bits: Bits | None = None, progress: bool = True) -> Path:
    """The weights file for `model`: itself if it is one, else the source converted to `bits`.

    A source (weights/sources) is converted on first use, which takes minutes for large models and
    is announced on stderr; one of the hub is then found again without the hub. WeightsError or
    ConfigError when that fails, and WeightsError when `bits` is given for a converted file.
    """
    return resolve_each(model, [bits], progress)[0]


def resolve_each(
    model: str | Path, rates: Sequence[Bits | None], progress: bool = True
) -> list[Path]:
    """`resolve` of one model for several bits; what is to be converted is calibrated once."""
    if is_weights_file(model):
        if any(bits is not None for bits in rates):
            raise WeightsError(
                f"{model}: its bits are fixed; choose bits only for a model to convert"
            )
        return [Path(model) for _ in rates]
    name = name_in_cache(model)
    wanted = [DEFAULT_BITS if bits is None else bits for bits in rates]
    cached = {bits: cache_folder() / _file_name(name, bits) for bits in wanted}
    missing = [bits for bits, path in cached.items() if not path.is_file()]
    for bits in missing:
        path = cached[bits]
        goal = "without loss" if bits == "lossless" else f"to {bits:g} bit/weight"
        source = open_source(model)
        print(f"converting {model} {goal}, once: {path}", file=sys.stderr)
        keep = bits != missing[-1]
        convert(source, path, bits, text=QUICK, progress=progress, keep_calibration=keep)
    return [cached[bits] for bits in wanted]


def _file_name(name: str, bits: Bits) -> str:
    rate = bits if bits == "lossless" else f"{bits:g}bit"
    return f"{name}-{rate}-v{RECIPE_VERSION}.safetensors"


def is_weights_file(model: str | Path) -> bool:
    """Not a model to convert; whether it really is a weights file, opening it will tell."""
    path = Path(model)
    return path.is_file() and path.suffix != ".gguf"


def name_in_cache(model: str | Path) -> str:
    """Name of a source in the cache: a path gets a mark that changes with its place and content."""
    path = Path(model)
    if not path.exists():
        if str(model) in PACKAGED:
            return str(model)
        hub_name = parse_hub_name(str(model))
        if hub_name is not None:
            return hub_name.file_name
        open_source(model)  # raises: no such model
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file()
    ]
    return f"{path.resolve().stem}-{zlib.crc32(repr(facts).encode()):08x}"
