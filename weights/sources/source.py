"""What every source is turned into: sizes, tensors read one at a time, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError, WeightsError
from model.config import ModelConfig
from weights.layout import source_shapes, vector_parts
from weights.sources.families import Family

# Tensors that some exporters add though they follow from the sizes.
_REDUNDANT = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a source; `read` gives it as a new float32 array of `shape`."""

    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Source:
    """A model to convert. Creating one checks that its tensors are those that `config` asks for."""

    name: str  # short, fit for a file name
    config: ModelConfig
    tensors: Mapping[str, LazyTensor]  # Hugging Face name -> tensor
    tokenizer_json: bytes
    chat_template: str | None

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor; WeightsError if it has a number that is none."""
        values = self.tensors[name].read()
        if not np.isfinite(values).all():
            bad = np.unravel_index(np.argmin(np.isfinite(values)), values.shape)
            at = ", ".join(map(str, bad))
            raise WeightsError(
                f"{self.name}: {name}[{at}] is {values[bad]}; the source model is damaged"
            )
        return values

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """A vector of a weights file, put together from its parts."""
        return np.concatenate([self.read(part) for part in vector_parts(name)])

    def __post_init__(self) -> None:
        expected = source_shapes(self.config)
        # First what is too much: another architecture also explains what is missing.
        surplus = sorted(
            name
            for name in self.tensors.keys() - expected.keys()
            if not name.endswith(_REDUNDANT)
            and not (name == "lm_head.weight" and self.config.tie_embeddings)
        )
        if surplus:
            raise ConfigError(
                f"{self.name}: {_listed(surplus)} not part of the architecture that its sizes "
                f"speak of"
            )
        missing = sorted(expected.keys() - self.tensors.keys())
        if missing:
            raise WeightsError(f"{self.name}: {_listed(missing)} missing from the source model")
        for name, shape in expected.items():
            found = self.tensors[name].shape
            if found != shape:
                raise WeightsError(
                    f"{self.name}: {name} has shape {found}, expected {shape} by the model's sizes"
                )


def scaled(tensors: Mapping[str, LazyTensor], family: Family) -> dict[str, LazyTensor]:
    """The tensors, multiplied by the factors that their family says."""

    def read(tensor: LazyTensor, factor: float) -> npt.NDArray[np.float32]:
        values = tensor.read()
        values *= np.float32(factor)
        return values

    return {
        name: tensor
        if family.factor(name) == 1
        else LazyTensor(tensor.shape, partial(read, tensor, family.factor(name)))
        for name, tensor in tensors.items()
    }


def _listed(names: list[str], at_most: int = 3) -> str:
    """`a, b, c and 12 more tensors are`: the subject of an error's sentence."""
    more = len(names) - at_most
    text = ", ".join(names[:at_most]) + (f" and {more} more tensors" if more > 0 else "")
    return f"{text} {'are' if len(names) > 1 else 'is'}"
