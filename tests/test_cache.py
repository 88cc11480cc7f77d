"""A cache in 8 and 4 bits inside the engine: small random models against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from small_engine import rms
from test_batch import CONTEXT, finish
from test_batch import file as file

from engine.batch import Batch
from engine.device import Device
from engine.errors import EngineError
from engine.generate import Engine
from model.kv_cache import KINDS
from model.reference import Reference, cached
from weights.store import WeightsFile


def test_integers_are_the_nearest() -> None:
    """The twin's own arithmetic, on a case small enough to see."""
    heads = np.array([[[127.0, -1.4, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    assert (cached(heads, 8) == [[[127, -1, 1, 0], [0, 0, 0, 0]]]).all()
    assert (cached(heads[..., [0, 1, 2, 2]] / 127 * 7, 4)[0, 0, :2] == [7, 0]).all()
    assert (cached(heads, 4)[0, 0, 2:] == [0.6, 0]).all()  # halves by themselves
    assert cached(heads, 16) is heads


@pytest.mark.gpu
@pytest.mark.parametrize(("adapter", "cache"), [("software", "int4"), ("gpu", "int8")])
def test_logits_against_the_oracle(file: WeightsFile, adapter: str, cache: str) -> None:
    """As test_prompt has it: passes of many tokens, short ones and a batch's rows; what int8
    activations and the cache round is the measure.
    """
    device = Device.open()
    device.software = adapter == "software"
    engine = Engine(file, device, context=CONTEXT, cache=cache)
    assert engine._model.prompt is not None
    engine._model.prompt.min_tokens = 9
    plain = Engine(file, device, context=CONTEXT)
    sizes = engine.memory().cache_bytes, plain.memory().cache_bytes
    # Words of a key and a value of 16 elements: 8 and 8; or 4 and 4, the least, and their scales.
    assert sizes[0] / sizes[1] == (10 if cache == "int8" else 11) / 16

    text = np.random.default_rng(5).integers(3, 97, 70).tolist()
    options = {"cache_dtype": np.float32, "cache_bits": KINDS[cache]}
    want = Reference.from_weights(file, int8=True, **options).logits(text)
    exact = Reference.from_weights(file, cache_dtype=np.float32).logits(text)
    rounding = rms(want - exact)
    assert rms(engine.logits(text) - want) <= 2**0.5 * rounding
    assert rms(plain.logits(text) - exact) < rounding
    got: list[np.ndarray] = []

    def choose(logits: np.ndarray) -> int:
        got.append(logits.copy())
        return text[60 + len(got)]

    batch = Batch(engine, 2)
    batch.add(text[30:50], max_tokens=9, stop_ids=())
    batch.add(text[:61], max_tokens=9, stop_ids=(), choose=choose)
    finish(batch)
    assert rms(np.array(got) - want[60:69]) <= 2 * rounding


@pytest.mark.gpu
def test_wrong_kinds_are_refused(file: WeightsFile) -> None:
    device = Device.open()
    with pytest.raises(EngineError, match="cache is 'f8', expected one of f16, int8, int4"):
        Engine(file, device, cache="f8")
    with pytest.raises(EngineError, match="exact activations keep their cache in f32, not in int8"):
        Engine(file, device, exact=True, cache="int8")
