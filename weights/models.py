"""The models in the cache: `answer list` tells of them, `answer rm` removes one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import EngineError, WeightsError
from model.config import ModelConfig
from weights.cache import cache_folder, name_in_cache
from weights.container import read_container
from weights.convert import RECIPE_VERSION

# What weights/cache.py calls a file.
_FILE = re.compile(r"(?P<name>.+)-(?P<rate>lossless|[0-9.e+-]+bit)-v(?P<version>\d+)\.safetensors")


@dataclass(frozen=True)
class CachedModel:
    """One file of the cache."""

    name: str  # that `answer chat` knows it by, or that of its source and a mark
    bits: str  # stored per weight, as they were asked for, or "lossless"
    size_bytes: int
    source: str  # what the file says that it was converted from
    n_params: int | None  # None: the file cannot be read
    current: bool  # whether this version of the program uses it
    path: str

    @property
    def bits_per_parameter(self) -> float | None:
        return self.n_params and 8 * self.size_bytes / self.n_params


def cached_models() -> list[CachedModel]:
    """By name and bits. A damaged file is among them, for it takes space as well."""
    found = []
    for path in sorted(cache_folder().glob("*.safetensors")):
        parts = _FILE.fullmatch(path.name)
        if parts is None or not path.is_file():
            continue
        source, n_params = "cannot be read", None
        try:
            metadata = read_container(path).metadata
            n_params = ModelConfig.from_json(metadata["config"]).n_params
            source = metadata["source"]
        except (EngineError, KeyError):
            pass
        found.append(
            CachedModel(
                name=parts["name"].replace("--", "/"),
                bits=parts["rate"].removesuffix("bit"),
                size_bytes=path.stat().st_size,
                source=source,
                n_params=n_params,
                current=int(parts["version"]) == RECIPE_VERSION,
                path=str(path),
            )
        )
    return found


def remove(name: str, bits: str | None = None) -> list[CachedModel]:
    """Delete the files of one model, at `bits` if there are several; returns what is gone.

    `name` is that of the list, a file's name or its path, or that of a source. WeightsError: there
    is none, it is not clear which one, or it cannot be deleted.
    """
    models = cached_models()
    names = {name.replace("--", "/")}
    if Path(name).exists():
        names.add(name_in_cache(name))
    named = [
        model
        for model in models
        if model.name in names
        or Path(name).name == Path(model.path).name
        or name == Path(model.path).stem
    ]
    if not named:
        known = ", ".join(sorted({model.name for model in models})) or "nothing"
        raise WeightsError(f"{name}: no such model in the cache, which holds {known}")
    rates = sorted({model.bits for model in named})
    chosen = [model for model in named if bits is None or model.bits == bits]
    if not chosen or len({model.bits for model in chosen}) > 1:
        raise WeightsError(
            f"{name}: is there with {', '.join(rates)} bits; say which with --bits {rates[0]}"
        )
    for model in chosen:
        try:
            Path(model.path).unlink()
        except OSError as error:
            raise WeightsError(f"{model.path}: cannot be deleted ({error.strerror})") from None
    return chosen


def format_table(models: Sequence[CachedModel]) -> str:
    """A line for each, below a head."""
    rows = [("model", "bits", "MB", "bit/parameter", "parameters", "converted from")]
    for model in models:
        rate, n_params = model.bits_per_parameter, model.n_params
        rows.append(
            (
                model.name,
                model.bits,
                f"{model.size_bytes / 1e6:,.1f}",
                "" if rate is None else f"{rate:.2f}",
                "" if n_params is None else f"{n_params / 1e6:,.1f} M",
                model.source + ("" if model.current else " (by another version: not used)"),
            )
        )
    name, *numbers, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for first, *middle, last in rows:
        cells = [text.rjust(width) for text, width in zip(middle, numbers, strict=True)]
        lines.append("  ".join([first.ljust(name), *cells, last]))
    return "\n".join(lines)


def list_main(arguments: Sequence[str] | None = None) -> int:
    """The command `answer list`."""
    parser = argparse.ArgumentParser(
        prog="answer list", description="Show the models that are converted and kept in the cache."
    )
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    options = parser.parse_args(arguments)
    models = cached_models()
    if options.json:
        facts = [
            {**dataclasses.asdict(model), "bits_per_parameter": model.bits_per_parameter}
            for model in models
        ]
        print(json.dumps(facts))
    elif not models:
        print(f"{cache_folder()}: no converted models yet; a chat makes the first", file=sys.stderr)
    else:
        print(format_table(models))
    return 0


def rm_main(arguments: Sequence[str] | None = None) -> int:
    """The command `answer rm`."""
    parser = argparse.ArgumentParser(
        prog="answer rm",
        description="Delete a converted model from the cache; its source stays where it is.",
        epilog="example: answer rm smollm2 --bits 5",
    )
    parser.add_argument("model", help="its name as `answer list` has it, or its file")
    parser.add_argument("--bits", help="which one, where it is there with several")
    options = parser.parse_args(arguments)
    try:
        removed = remove(options.model, options.bits)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for model in removed:
        print(f"{model.path}: removed, {model.size_bytes / 1e6:,.1f} MB", file=sys.stderr)
    return 0
