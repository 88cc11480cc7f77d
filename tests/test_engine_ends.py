"""How a generation ends: closed, interrupted, at a stop id, with the context full; and what the
cache holds then.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_engine import ADAPTERS, EXACT, AssertClose, assert_greedy, open_device
from small_engine import assert_continues as assert_continues
from small_engine import exact as exact
from small_engine import files as files
from small_engine import open_engine as open_engine
from small_engine import references as references
from small_engine import tokens as tokens
from wgpu.backends.wgpu_native import _api
from wgpu.backends.wgpu_native._api import libf

from engine.device import Device, Readback, _outcomes
from engine.generate import Engine, Generation
from model.reference import Reference
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
@pytest.mark.parametrize("n_read", [0, 1, 5])
def test_closed_generation(
    exact: Callable[..., Engine],
    tokens: list[int],
    assert_continues: Callable[..., Generation],
    n_read: int,
    adapter: str,
) -> None:
    engine, prompt = exact(adapter), tokens[:10]
    engine.logits(tokens[-1:])
    generation = engine.generate(prompt, 40, stop_ids=())
    answer = list(itertools.islice(generation, n_read))
    generation.close()
    assert list(generation) == []
    assert generation.stats.finish_reason is None
    assert generation.stats.generated_tokens == n_read
    following = assert_continues(engine, [*prompt, *answer, 5, 6])
    # Nothing is read before the first token is asked for; the last one was never an input.
    assert following.stats.reused_tokens == (len(prompt) + n_read - 1 if n_read else 0)


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
def test_new_generation_ends_the_one_before(
    exact: Callable[..., Engine],
    references: dict[str, Reference],
    tokens: list[int],
    adapter: str,
) -> None:
    engine = exact(adapter)
    before = engine.generate(tokens[:10], 40, stop_ids=())
    next(before)
    after = engine.generate(tokens[5:17], 20, stop_ids=())
    assert_greedy(references["plain"], tokens[5:17], list(after))
    assert list(before) == []

    before = engine.generate(tokens[:10], 40, stop_ids=())
    next(before)
    engine.logits(tokens[5:17])
    assert list(before) == []


@pytest.mark.parametrize(
    ("adapter", "nth"),
    # Reads of a prompt of 140 tokens and its answer: on a software adapter one for every 8 of the
    # prompt and for every token, on a GPU one for 128 of the prompt, one token, and 8 tokens each.
    [("software", nth) for nth in (0, 17, 20)] + [("gpu", nth) for nth in (0, 1, 3)],
)
@pytest.mark.parametrize(
    "where",
    [
        (Readback, "read"),
        (Device, "wait"),
        (libf, "wgpuBufferMapAsync"),
        (_api, "from_c_string_view"),
        (libf, "wgpuBufferGetConstMappedRange"),
    ],
    ids=["before", "waiting", "mapping", "calling back", "mapped"],
)
def test_interrupted_generation(
    exact: Callable[..., Engine],
    tokens: list[int],
    assert_continues: Callable[..., Generation],
    monkeypatch: pytest.MonkeyPatch,
    adapter: str,
    nth: int,
    where: tuple[Any, str],
) -> None:
    """Ctrl-C before the host waits for the GPU, as it begins to, while it waits, and after."""
    engine = exact(adapter)
    engine.logits(tokens[-1:])
    original, n_calls = getattr(*where), itertools.count()

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(n_calls) == nth:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(*where, interrupted)
    generation = engine.generate(tokens[:140], 30, stop_ids=())
    answer: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        answer.extend(generation)
    assert generation.stats.finish_reason is None
    monkeypatch.undo()
    assert_continues(engine, [*tokens[:140], *answer, 5, 6])
    assert_continues(engine, tokens[3:20])
    assert not engine.device.wgpu._poller._token_ids  # or wgpu would poll, a core's worth, for ever
    assert not _outcomes


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
def test_interrupted_prompt_has_overwritten_what_was_cached(
    exact: Callable[..., Engine],
    tokens: list[int],
    assert_continues: Callable[..., Generation],
    monkeypatch: pytest.MonkeyPatch,
    adapter: str,
) -> None:
    def interrupted(self: Readback) -> np.ndarray:
        raise KeyboardInterrupt

    engine = exact(adapter)
    engine.logits(tokens[200:210])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Readback, "read", interrupted)
        next(engine.generate([*tokens[200:203], *tokens[:140]], 1))
    assert assert_continues(engine, tokens[200:215]).stats.reused_tokens == 3


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
def test_stop_ids(
    files: dict[str, WeightsFile],
    exact: Callable[..., Engine],
    tokens: list[int],
    assert_continues: Callable[..., Generation],
    adapter: str,
) -> None:
    engine, prompt = exact(adapter), tokens[:10]
    answer = list(engine.generate(prompt, 20, stop_ids=()))
    for at in (0, 3, 12):
        n_before = answer.index(answer[at])
        generation = engine.generate(prompt, 20, stop_ids=[96, answer[at]] if at else answer[:1])
        assert list(generation) == answer[:n_before]
        assert generation.stats.finish_reason == "stop"
        assert generation.stats.generated_tokens == n_before
        assert_continues(engine, [*prompt, *answer[: n_before + 1], 5])

    # By default they are the model's own.
    config = dataclasses.replace(engine.config, eos_token_ids=(96, answer[4]))
    weights = dataclasses.replace(files["plain"], config=config)
    stopped = Engine(weights, open_device(adapter), exact=True, context=40)
    assert list(stopped.generate(prompt, 20)) == answer[: answer.index(answer[4])]


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
def test_context_is_used_to_its_last_position(
    open_engine: Callable[..., Engine],
    references: dict[str, Reference],
    tokens: list[int],
    assert_close: AssertClose,
    assert_continues: Callable[..., Generation],
    adapter: str,
) -> None:
    engine, reference = open_engine(adapter, context=21), references["plain"]
    for n_prompt in (21, 20, 13, 3):
        prompt, room = tokens[:n_prompt], 21 - n_prompt + 1
        for asked, reason in ((room, "length"), (room + 1, "context"), (1000, "context")):
            generation = engine.generate(prompt, asked, stop_ids=())
            answer = list(generation)
            assert len(answer) == room
            assert generation.stats.finish_reason == reason
            assert_greedy(reference, prompt, answer)
    # A key written beyond the last position of one head would be at position 0 of the next.
    assert assert_continues(engine, [*prompt, *answer[:17]]).stats.reused_tokens == 19
    assert_close(engine.logits(tokens[:21]), reference.logits(tokens[:21]), EXACT)
    assert_continues(engine, tokens[:21])


def test_context_of_one_position(
    open_engine: Callable[..., Engine], assert_continues: Callable[..., Generation]
) -> None:
    engine = open_engine("gpu", context=1)
    assert_continues(engine, [7])
    generation = engine.generate([7], 5, stop_ids=())
    assert len(list(generation)) == 1 and generation.stats.finish_reason == "context"


def test_no_tokens_wanted(exact: Callable[..., Engine], tokens: list[int]) -> None:
    generation = exact("software").generate(tokens[:9], 0)
    assert list(generation) == []
    assert generation.stats.finish_reason == "length"
    assert generation.stats.generated_tokens == 0
