"""Models in the formats of others, opened as a `Source` for the converter."""

from __future__ import annotations

from pathlib import Path

from engine.errors import WeightsError
from weights.sources.gguf import open_gguf
from weights.sources.hub import open_hub, parse_hub_name
from weights.sources.huggingface import open_folder
from weights.sources.packaged import PACKAGED, open_packaged
from weights.sources.source import LazyTensor, Source

__all__ = ["PACKAGED", "LazyTensor", "Source", "open_source"]


def open_source(spec: str | Path) -> Source:
    """A Hugging Face folder, a GGUF file, or a name: a packaged model's, or OWNER/NAME of the hub.

    A path wins over a name. Reads sizes, names and the tokenizer, but no weights yet.
    WeightsError: not found, damaged or incomplete; ConfigError: an architecture that does not work.
    """
    path = Path(spec)
    if path.is_dir():
        return open_folder(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return open_gguf(path)
        raise WeightsError(
            f"{path}: expected a folder with config.json and *.safetensors, or a .gguf file"
        )
    if str(spec) in PACKAGED:
        return open_packaged(str(spec))
    hub_name = parse_hub_name(str(spec))
    if hub_name is not None:
        return open_hub(hub_name)
    known = ", ".join(PACKAGED)
    raise WeightsError(
        f"{spec}: no such file or folder, and no model of that name (known: {known}, and "
        f"OWNER/NAME of the Hugging Face hub)"
    )
