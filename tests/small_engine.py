"""What tests of the engine share: small random models, the oracle for each, and how far off exact
engines may be. Fixtures are imported by name.

The adapter plays three: a software adapter, a GPU, and a GPU whose workgroups are so small that
matrix products are left in parts. The first and the second differ in their kernels, and in how many
tokens they submit at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tiny_model import random_source

from engine.device import Device
from engine.generate import Engine, Generation
from model.config import ModelConfig
from model.reference import Reference
from weights.convert import CalibrationText, convert
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]

# Three int8 digits leave of an activation what float32 leaves of its block's largest, so an exact
# engine and a float32 oracle are two float32 runs that add in different orders. Such runs of these
# models, with logits of size 1 to 4, were seen to differ by 1.2e-5; four times as much is allowed.
EXACT = 5e-5
CONTEXT = 320
MODELS = ("plain", "awkward", "awkward tied", "sparse")
ADAPTERS = ("software", "gpu", "small gpu")


def open_device(kind: str) -> Device:
    device = Device.open()
    device.software = kind == "software"
    if kind == "small gpu":
        device.max_workgroup_lanes = 64  # two segments: 64 columns
        device.fences = False  # every launch does one thing
    return device


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig
) -> dict[str, WeightsFile]:
    plain = dataclasses.replace(tiny_config, max_seq_len=640)
    # Sizes that are no multiples of blocks of 32, loads of 4, pairs; heads that need padding.
    awkward = dataclasses.replace(
        plain, dim=75, hidden_dim=109, n_heads=14, head_dim=10, vocab_size=301, rope_theta=500.0
    )
    tied = dataclasses.replace(awkward, tie_embeddings=True)
    configs = plain, awkward, tied, tied
    folder = tmp_path_factory.mktemp("models")
    files = {}
    for name, config in zip(MODELS, configs, strict=True):
        path = folder / f"{name}.safetensors"
        # Rows of 75 weights have a third of a bit for each beside their streams.
        bits = 0.9 if name == "sparse" else 6
        text = CalibrationText(0)
        convert(random_source(config), path, bits, embed_bits=bits, text=text, progress=False)
        files[name] = WeightsFile.open(path)
    return files


@pytest.fixture(scope="module")
def references(files: dict[str, WeightsFile]) -> dict[str, Reference]:
    """What exact engines compute."""
    return {
        name: Reference.from_weights(file, cache_dtype=np.float32) for name, file in files.items()
    }


@pytest.fixture(scope="module")
def open_engine(files: dict[str, WeightsFile]) -> Callable[..., Engine]:
    def build(adapter: str, model: str = "plain", **options: Any) -> Engine:
        options = {"exact": True, "context": CONTEXT, **options}
        return Engine(files[model], open_device(adapter), **options)

    return build


@pytest.fixture(scope="module")
def exact(open_engine: Callable[..., Engine]) -> Callable[..., Engine]:
    """exact(adapter, model): an engine that many tests use, one after the other."""
    return functools.cache(open_engine)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    ids: list[int] = np.random.default_rng(1).integers(0, 97, CONTEXT).tolist()
    return ids


@pytest.fixture
def assert_continues(references: dict[str, Reference], assert_close: AssertClose) -> Callable:
    """assert_continues(engine, prompt): what the cache holds of `prompt` is what it should be."""

    def check(engine: Engine, prompt: list[int], model: str = "plain") -> Generation:
        generation = engine.generate(prompt, 1, stop_ids=())
        (token,) = generation
        got = last_logits(engine)
        assert token == got.argmax()
        assert_close(got, references[model].logits(prompt)[-1], EXACT)
        return generation

    return check


def last_logits(engine: Engine) -> np.ndarray:
    """What the last pass of a generation drew its token from."""
    buffer = engine._model.logits.buffer
    return engine.device.read(buffer, np.float32, (engine.config.vocab_size,))


def assert_greedy(reference: Reference, prompt: list[int], answer: list[int]) -> None:
    """Each token is the best after all before it, or as good for all that EXACT can tell."""
    logits = reference.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    chosen = np.take_along_axis(logits, np.array(answer)[:, None], axis=-1)[:, 0]
    assert (logits.max(axis=-1) - chosen).max() <= 2 * EXACT


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
