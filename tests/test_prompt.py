"""Passes of many tokens inside the engine: small random models, on a software adapter and on a GPU,
against the oracle and against what short passes give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_engine import ADAPTERS, last_logits, open_device, rms
from small_engine import files as files
from small_engine import tokens as tokens
from test_families import golden

from engine.generate import Engine
from model.llama import MAX_TOKENS
from model.prompt import Prompt, attention_bytes
from model.reference import Reference
from weights.convert import CalibrationText, convert
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu

CONTEXT = 200


@pytest.fixture(scope="module")
def engine_on(files: dict[str, WeightsFile]) -> Callable[..., Engine]:
    @functools.cache
    def build(adapter: str, model: str) -> Engine:
        engine = Engine(files[model], open_device(adapter), context=CONTEXT)
        prompt = engine._model.prompt
        assert prompt is not None and prompt.max_tokens == (64 if adapter == "software" else 256)
        prompt.min_tokens = MAX_TOKENS + 1  # on both
        return engine

    return build


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", ["plain", "awkward tied"])
def test_prompt_passes_against_the_oracle(
    files: dict[str, WeightsFile],
    engine_on: Callable[..., Engine],
    tokens: list[int],
    model: str,
    adapter: str,
) -> None:
    """As test_int8_logits: wherever f32 sums differ, some values round the other way, so the two
    are at most independent roundings of the exact model, sqrt(2) times as far apart as the oracle
    is from it.
    """
    prompt = tokens[:150]
    want = Reference.from_weights(files[model], int8=True).logits(prompt)
    rounding = rms(
        want - Reference.from_weights(files[model], cache_dtype=np.float32).logits(prompt)
    )
    engine = engine_on(adapter, model)
    got = engine.logits(prompt)
    assert rms(got - want) <= 2**0.5 * rounding

    # What the cache holds, read by a short pass and by one of many tokens that begins there.
    (_,) = engine.generate(prompt[:120], 1, stop_ids=())
    for begin, end in ((120, 123), (123, 150)):
        generation = engine.generate(prompt[:end], 1, stop_ids=())
        (token,) = generation
        assert generation.stats.reused_tokens == begin
        logits = last_logits(engine)
        assert token == logits.argmax()
        assert rms(logits - want[end - 1]) <= 3 * rounding  # of one row


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
def test_last_logits_are_those_of_all(
    engine_on: Callable[..., Engine], tokens: list[int], adapter: str
) -> None:
    """Whatever the number of tokens in the last pass: one head or all of them, the same bits."""
    engine = engine_on(adapter, "plain")
    for n in (9, 63, 64, 66, 73, 128, 131):  # a last token alone has a plan of its own
        prompt = [*tokens[n : n + 1], *tokens[1:n]]  # nothing to reuse
        whole = engine.logits(prompt)
        assert whole.shape == (n, engine.config.vocab_size)
        engine.logits(tokens[-1:])  # forgets them
        generation = engine.generate(prompt, 1, stop_ids=())
        assert list(generation) == [whole[-1].argmax()]
        assert (last_logits(engine) == whole[-1]).all()


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
def test_generation_goes_on_after_a_prompt_pass(
    engine_on: Callable[..., Engine], tokens: list[int], adapter: str
) -> None:
    """Positions, the sampler's state and the cache are those that single tokens go on from."""
    engine, prompt = engine_on(adapter, "plain"), tokens[30:110]
    answer = list(engine.generate(prompt, 12, stop_ids=()))
    whole = engine.logits([*prompt, *answer])
    chosen = np.take_along_axis(whole[len(prompt) - 1 : -1], np.array(answer)[:, None], axis=1)[
        :, 0
    ]
    # Single tokens round a few activations otherwise: far less than what tells tokens apart.
    slack = 0.2 * whole.std()
    assert (whole[len(prompt) - 1 : -1].max(axis=1) - chosen).max() <= slack


def test_gpu_with_little_workgroup_memory(
    files: dict[str, WeightsFile], engine_on: Callable[..., Engine], tokens: list[int]
) -> None:
    """Attention by rows in place of tiles; the products' kernels stay."""
    device = open_device("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.prompt.attention_bytes", lambda _, tiled: (1 << 30) * tiled)
        engine = Engine(files["plain"], device, context=CONTEXT)
    model = engine._model
    kernels = {d.kernel.name for plan in model.prompt.layers(70) for d in plan.dispatches}
    assert {"attention_rows", "matmul", "decode_tile"} <= kernels
    want = engine_on("gpu", "plain").logits(tokens[:70])
    # The same positions' sums in another order: see test_prompt_passes_against_the_oracle.
    assert rms(engine.logits(tokens[:70]) - want) <= 0.05 * rms(want)


def test_gate_up_in_turns_is_as_whole(
    files: dict[str, WeightsFile], engine_on: Callable[..., Engine], tokens: list[int]
) -> None:
    """Where y is too large for all tokens of a pass: the same bits, whether the second turn has
    all its tokens, some or none.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.prompt._GATE_UP_BYTES", 1)
        engine = Engine(files["awkward tied"], open_device("gpu"), context=CONTEXT)
    prompt, whole = engine._model.prompt, engine_on("gpu", "awkward tied")
    assert prompt is not None and prompt.y.size < whole._model.prompt.y.size
    counts = [sum(len(plan.dispatches) for plan in prompt.layers(n)) for n in (128, 129)]
    assert counts[1] - counts[0] == 3 * engine.config.n_layers
    for n in (60, 128, 150, 200):
        got, want = engine.logits(tokens[:n]), whole.logits(tokens[:n])
        assert (got == want).all()


def test_interrupts_are_heard_between_passes(
    engine_on: Callable[..., Engine], tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_on("software", "plain")
    engine.logits(tokens[-1:])
    waits: list[Any] = []
    submit = engine._submit

    def counted(*plans: Any) -> Any:
        waits.append(plans)
        return submit(*plans)

    monkeypatch.setattr(engine, "_submit", counted)
    (_,) = engine.generate(tokens[:180], 1, stop_ids=())
    assert len(waits) == 3  # 64, 64 and 52 tokens: two waits, and the answer's


def test_where_there_is_no_prompt_path(
    files: dict[str, WeightsFile],
    engine_on: Callable[..., Engine],
    tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then short passes read the prompt: for exact activations, and where memory is too small."""
    exact = Engine(files["plain"], open_device("software"), exact=True, context=CONTEXT)
    assert exact._model.prompt is None and exact._model.pass_tokens(50) == MAX_TOKENS
    for adapter in ADAPTERS[:2]:
        model = engine_on(adapter, "plain")._model
        assert Prompt.fits(model)
        with monkeypatch.context() as patch:
            patch.setattr(model.device, "workgroup_memory", 2048)
            assert not Prompt.fits(model)
    # Graphics cards have 32 KiB, most of them 48.
    assert attention_bytes(128, tiled=False) == 32 * 1024
    assert attention_bytes(128, tiled=True) == 38 * 1024


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3", "granite", "mistral"])
def test_what_families_add(tmp_path: Path, tokens: list[int], family: str, adapter: str) -> None:
    """Biases, norms of heads, layers without RoPE, scales, windows: against the oracle that rounds
    the same, as above.
    """
    source, _, _ = golden(family, tmp_path)
    path = tmp_path / "model.safetensors"
    convert(source, path, 6, embed_bits=6, text=CalibrationText(0), progress=False)
    file = WeightsFile.open(path)
    ids = [token % file.config.vocab_size for token in tokens[:40]]
    engine = Engine(file, open_device(adapter), context=48)
    assert engine._model.prompt is not None
    want = Reference.from_weights(file, int8=True).logits(ids)
    rounding = rms(want - Reference.from_weights(file, cache_dtype=np.float32).logits(ids))
    assert rms(engine.logits(ids) - want) <= 2**0.5 * rounding
