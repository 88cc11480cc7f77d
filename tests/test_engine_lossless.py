"""The engine on models without loss against the oracle; what it shares with others is tested there.

All adapters, and sizes that are multiples of nothing: see test_engine.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from small_engine import ADAPTERS, CONTEXT, EXACT, open_device, rms
from tiny_model import random_source

from engine.generate import Engine
from model.activations import FLOAT
from model.config import ModelConfig
from model.reference import Reference
from weights.convert import convert
from weights.sources import LazyTensor, Source
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu


def in_bfloat16(source: Source) -> Source:
    def read(tensor: LazyTensor) -> np.ndarray:
        return (tensor.read().view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    tensors = {n: LazyTensor(t.shape, partial(read, t)) for n, t in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors)


@pytest.fixture(scope="module", params=["float32", "bfloat16 tied"])
def file(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: ModelConfig,
) -> WeightsFile:
    tied = request.param.endswith("tied")
    sizes = dict(dim=75, hidden_dim=109, n_heads=14, head_dim=10, vocab_size=301)
    config = dataclasses.replace(tiny_config, max_seq_len=640, tie_embeddings=tied, **sizes)
    source = random_source(config)
    path = tmp_path_factory.mktemp("lossless") / "model.safetensors"
    convert(in_bfloat16(source) if tied else source, path, bits="lossless", progress=False)
    return WeightsFile.open(path)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    ids: list[int] = np.random.default_rng(1).integers(0, 301, 23).tolist()
    return ids


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_exact_logits_without_loss(
    file: WeightsFile, tokens: list[int], adapter: str, assert_close: Callable[..., None]
) -> None:
    engine = Engine(file, open_device(adapter), exact=True, context=CONTEXT)
    reference = Reference.from_weights(file, cache_dtype=np.float32)
    for n in (1, 8, 23):
        assert_close(engine.logits(tokens[-n:]), reference.logits(tokens[-n:]), EXACT)
    answer = list(engine.generate(tokens, 12, stop_ids=()))
    logits = reference.logits([*tokens, *answer[:-1]])[len(tokens) - 1 :]
    chosen = np.take_along_axis(logits, np.array(answer)[:, None], axis=-1)[:, 0]
    assert (logits.max(axis=-1) - chosen).max() <= 2 * EXACT


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_activations_without_loss_are_never_int8(
    file: WeightsFile, tokens: list[int], adapter: str
) -> None:
    """Without `exact` only the cache is coarser. Where float32 differs, keys and values may round
    the other way in float16, in the worst case all of them, independently: sqrt(2) times the error
    of the oracle's own float16 cache. (int8 activations are off by twenty times as much.)
    """
    engine = Engine(file, open_device(adapter), context=CONTEXT)
    assert engine._model.digits == FLOAT
    exact = Reference.from_weights(file, cache_dtype=np.float32).logits(tokens)
    cached = Reference.from_weights(file).logits(tokens)
    assert rms(engine.logits(tokens) - cached) <= 2**0.5 * rms(cached - exact)
