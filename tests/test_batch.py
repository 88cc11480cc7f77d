"""Batches of sequences on small random models: each one's text is what it would be alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_families import golden
from tiny_model import random_source

from engine.batch import Batch, Choose, Sequence
from engine.device import Device, Readback
from engine.errors import EngineError
from engine.generate import Engine
from engine.sampler import Sampling
from model.config import ModelConfig
from model.kv_cache import BLOCK
from model.reference import Reference, sampling_scores
from weights.convert import CalibrationText, convert
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu

EXACT = 5e-5  # as in small_engine.py
CONTEXT = 96
SAMPLED = [
    Sampling(),
    Sampling(0.8, seed=3),
    Sampling(1.2, top_k=30, top_p=0.9, min_p=0.02, seed=4),
]
LENGTHS = (29, 1, 40, 12, 64, 5)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> WeightsFile:
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    source = random_source(dataclasses.replace(tiny_config, max_seq_len=256))
    convert(source, path, 6, embed_bits=6, text=CalibrationText(0), progress=False)
    return WeightsFile.open(path)


@pytest.fixture(scope="module")
def build(file: WeightsFile) -> Callable[..., Engine]:
    @functools.cache
    def opened(adapter: str, exact: bool = False, cache_positions: int = 512) -> Engine:
        device = Device.open()
        device.software = adapter == "software"
        return Engine(file, device, exact=exact, context=CONTEXT, cache_positions=cache_positions)

    return opened


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, 97, n).tolist() for n in LENGTHS]


def finish(batch: Batch) -> None:
    for _ in range(1000):
        if not batch.busy:
            return
        batch.step()
    raise AssertionError("it never ends")


def alone(engine: Engine, prompt: list[int], n: int, sampling: Sampling) -> list[int]:
    """In a batch of its own, where nothing is known of it."""
    batch = Batch(engine, 1)
    sequence = batch.add(prompt, max_tokens=n, sampling=sampling, stop_ids=())
    finish(batch)
    assert sequence.reused_tokens == 0
    return sequence.tokens


def assert_drawn(reference: Reference, sequence: Sequence) -> None:
    """Each token is what the oracle draws, or as good for all that EXACT can tell."""
    prompt, answer, sampling = sequence.ids, sequence.tokens, sequence.sampling
    logits = reference.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    for i, token in enumerate(answer):
        scores = sampling_scores(logits[i], sampling, len(prompt) + i)
        assert scores[token] >= scores.max() - 3 * EXACT / (sampling.temperature or 1)


@pytest.mark.parametrize("adapter", ["software", "gpu"])
def test_exact_sequences_are_the_oracles(
    build: Callable[..., Engine], file: WeightsFile, prompts: list[list[int]], adapter: str
) -> None:
    """Greedy and sampled ones side by side, in a smaller batch than there are sequences."""
    reference = Reference.from_weights(file, cache_dtype=np.float32)
    batch = Batch(build(adapter, exact=True), 4)
    sequences = [
        batch.add(prompt, max_tokens=15, sampling=SAMPLED[i % 3], stop_ids=())
        for i, prompt in enumerate(prompts)
    ]
    finish(batch)
    for sequence in sequences:
        assert len(sequence.tokens) == 15 and sequence.finished == "length"
        assert_drawn(reference, sequence)


@pytest.mark.parametrize(
    ("adapter", "pattern"),
    [("software", "at once"), ("gpu", "one by one"), ("gpu", "leaving"), ("software", "no room")],
)
def test_company_does_not_change_the_text(
    build: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]],
    adapter: str,
    pattern: str,
) -> None:
    """With int8 activations, where any difference in a sum may become one of a rounding."""
    if pattern == "leaving":  # several steps a submit, as if they were fast
        monkeypatch.setattr("engine.batch._SUBMIT_SECONDS", 1e3)
    engine = build(adapter, cache_positions=112 if pattern == "no room" else 512)
    samplings = [SAMPLED[i % 3] for i in range(len(prompts))]
    n = 24
    want = [
        alone(engine, *each) for each in zip(prompts, [n] * len(prompts), samplings, strict=True)
    ]
    batch = Batch(engine, 16 if pattern == "leaving" else 8)  # prompts fill up the rows
    sequences: list[Sequence] = []
    for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        wanted = n - 7 * (pattern == "leaving" and i % 2)  # so they leave at different times
        sequences.append(batch.add(prompt, max_tokens=wanted, sampling=sampling, stop_ids=()))
        if pattern == "one by one":
            for _ in range(1 + i % 3):
                batch.step()
        if pattern == "leaving" and i == 3:
            batch.step()
            batch.step()
            batch.remove(sequences[0])
            batch.remove(sequences[0])  # it has left
    finish(batch)
    for i, sequence in enumerate(sequences):
        if pattern == "leaving" and i == 0:
            assert sequence.finished is None and sequence.tokens == want[0][: len(sequence.tokens)]
        else:
            assert sequence.finished == "length"
            assert sequence.tokens == want[i][: sequence.max_tokens]
    assert batch._blocks.n_free == engine.cache.n_blocks


def test_many_rows_go_through_bytes(
    build: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a matvec takes: the products of prompts, whose sums are in another order, and
    here in three parts, as they would be of larger matrices.
    """
    monkeypatch.setattr("model.rows.few_splits", lambda _: 3)
    engine = build("gpu")
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 97, 3).tolist() for _ in range(18)]
    batch = Batch(engine, 18)
    logits: dict[int, np.ndarray] = {}

    def choose(i: int, row: np.ndarray) -> int:
        logits[i] = row.copy()
        return 5

    for i, prompt in enumerate(prompts):
        batch.add(prompt, max_tokens=1, stop_ids=(), choose=functools.partial(choose, i))
    finish(batch)
    got = np.array([logits[i] for i in range(18)])
    want = np.array([engine.logits(prompt)[-1] for prompt in prompts])
    # A few roundings of activations fall otherwise: what exact activations would change is more.
    assert np.sqrt(np.mean((got - want) ** 2)) <= 0.05 * want.std()


def test_newcomers_share_what_begins_alike(
    build: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    engine, shared = build("software"), prompts[4][: 2 * BLOCK + 5]
    want = [alone(engine, [*shared, *tail], 9, Sampling()) for tail in ([7, 8], [9])]
    batch = Batch(engine, 4)
    first = batch.add([*shared, 7, 8], max_tokens=9, stop_ids=())
    while not first.tokens:
        batch.step()
    free = batch._blocks.n_free
    second = batch.add([*shared, 9], max_tokens=9, stop_ids=())
    batch.step()
    assert second.reused_tokens == 2 * BLOCK
    assert batch._blocks.n_free >= free - 2  # of three and a bit
    finish(batch)
    # After they have left it is known still; the last token is always read again.
    third = batch.add(shared[: 2 * BLOCK], max_tokens=1, stop_ids=())
    finish(batch)
    assert third.reused_tokens == BLOCK
    assert [first.tokens, second.tokens] == want


def test_a_conversation_goes_on_where_it_was(build: Callable[..., Engine]) -> None:
    engine = build("software")
    batch = Batch(engine)
    first = batch.add(list(range(3, 23)), max_tokens=30, stop_ids=())
    finish(batch)
    text = [*first.ids, *first.tokens, 4, 5, 6]
    second = batch.add(text, max_tokens=3, stop_ids=())
    finish(batch)
    assert second.reused_tokens == 49 // BLOCK * BLOCK  # the last token was never read
    assert second.tokens == alone(engine, text, 3, Sampling())


def test_ends(build: Callable[..., Engine], prompts: list[list[int]]) -> None:
    engine = build("gpu")  # several steps a submit: some are drawn in vain
    answer = alone(engine, prompts[0], 20, Sampling())
    stop = answer[6]
    batch = Batch(engine, 3)
    stopped = batch.add(prompts[0], max_tokens=20, stop_ids=(stop,))
    short = batch.add(prompts[1], max_tokens=3, stop_ids=())
    nothing = batch.add(prompts[1], max_tokens=0)
    full = batch.add([*prompts[4], *prompts[2][:25]], max_tokens=50, stop_ids=())
    finish(batch)
    assert (stopped.finished, stopped.tokens) == ("stop", answer[: answer.index(stop)])
    assert (short.finished, len(short.tokens)) == ("length", 3)
    assert (nothing.finished, nothing.tokens) == ("length", [])
    # The last position's token needs none for itself.
    assert (full.finished, len(full.tokens)) == ("length", CONTEXT - 89 + 1)
    assert batch.step() == []


def test_steps_hand_out_every_token_once(
    build: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    engine = build("gpu")
    batch = Batch(engine, 2)
    sequences = [batch.add(prompt, max_tokens=11, stop_ids=()) for prompt in prompts[:3]]
    got: dict[int, list[int]] = {id(sequence): [] for sequence in sequences}
    while batch.busy:
        for sequence, token in batch.step():
            got[id(sequence)].append(token)
    assert [got[id(sequence)] for sequence in sequences] == [s.tokens for s in sequences]
    by_number: list[list[int]] = [[], [], []]
    for number, token in engine.generate_batch(prompts[:3], 4):
        by_number[number].append(token)
    stops = engine.config.eos_token_ids
    for tokens, sequence in zip(by_number, sequences, strict=True):
        assert tokens == sequence.tokens[: len(tokens)]
        assert len(tokens) == 4 or sequence.tokens[len(tokens)] in stops


def test_a_failing_sequence_fails_alone(
    build: Callable[..., Engine], prompts: list[list[int]]
) -> None:
    engine = build("software")
    want = alone(engine, prompts[0], 12, SAMPLED[1])
    second_best = []

    def choose_second(logits: np.ndarray) -> int:
        assert logits.shape == (97,) and logits.dtype == np.float32
        second_best.append(int(np.argsort(logits)[-2]))
        return second_best[-1]

    def choose_thrice(logits: np.ndarray) -> int:
        if len(failing.tokens) == 3:
            raise ValueError("no rule allows a token here")
        return 50

    batch = Batch(engine, 4)
    usual = batch.add(prompts[0], max_tokens=12, sampling=SAMPLED[1], stop_ids=())
    failing = batch.add(prompts[1], max_tokens=12, stop_ids=(), choose=choose_thrice)
    choosing = batch.add(prompts[2], max_tokens=5, stop_ids=(), choose=choose_second)
    outside = batch.add(prompts[3], max_tokens=12, choose=lambda _: 97)
    finish(batch)
    assert usual.tokens == want and usual.error is None
    assert (failing.finished, failing.tokens) == ("error", [50] * 3)
    assert failing.error == "no rule allows a token here"
    assert outside.finished == "error" and "outside the vocabulary of 97" in (outside.error or "")
    assert choosing.tokens == second_best
    logits = engine.logits([*choosing.ids, *choosing.tokens])
    order = np.argsort(logits, axis=1)[len(choosing.ids) - 1 : -1]
    ranks = [list(row).index(t) for row, t in zip(order, choosing.tokens, strict=True)]
    assert min(ranks) >= 97 - 4  # of two logits next to each other either may be the second


def likeliest(logits: np.ndarray) -> int:
    return int(logits.argmax())


@pytest.mark.parametrize("choose", [None, likeliest], ids=["drawn", "chosen here"])
def test_an_interrupted_step_is_done_again(
    build: Callable[..., Engine],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    choose: Choose | None,
) -> None:
    """Also the first one, which has read a prompt, and where the host has to choose the token."""
    engine = build("gpu")
    want = [alone(engine, prompt, 20, Sampling()) for prompt in prompts[:2]]
    batch = Batch(engine, 2)
    sequences = [
        batch.add(prompt, max_tokens=20, stop_ids=(), choose=choose) for prompt in prompts[:2]
    ]
    read, calls = Readback.read, 0

    def interrupted(readback: Readback) -> Any:
        nonlocal calls
        calls += 1
        if calls in (1, 4):
            raise KeyboardInterrupt
        return read(readback)

    monkeypatch.setattr(Readback, "read", interrupted)
    n_interrupts = 0
    for _ in range(100):
        try:
            batch.step()
        except KeyboardInterrupt:
            n_interrupts += 1
    assert not batch.busy
    assert n_interrupts == 2 and [s.tokens for s in sequences] == want


def test_one_cache_for_one_purpose(
    build: Callable[..., Engine], prompts: list[list[int]], tmp_path: Path
) -> None:
    engine = build("software")
    before = list(engine.generate(prompts[0], 8, stop_ids=()))
    batch = Batch(engine, 2)
    sequence = batch.add(prompts[0][:20], max_tokens=6, stop_ids=())
    batch.step()
    for use in (
        lambda: engine.generate([1], 1),
        lambda: engine.logits([1]),
        lambda: engine.save_session(tmp_path / "x"),
        lambda: Batch(engine),
    ):
        with pytest.raises(EngineError, match="a batch of sequences has the engine"):
            use()
    finish(batch)
    assert engine.cached_tokens == []  # others are there
    generation = engine.generate(prompts[0], 8, stop_ids=())
    assert list(generation) == before and generation.stats.reused_tokens == 0
    again = batch.add(prompts[0][:20], max_tokens=6, stop_ids=())
    finish(batch)
    assert again.reused_tokens == 0 and again.tokens == sequence.tokens


def test_what_is_refused(build: Callable[..., Engine], file: WeightsFile) -> None:
    engine = build("software")
    batch = Batch(engine, 2)
    for ids, options, message in (
        ([], {}, "the prompt has 0 tokens, expected 1 to 96"),
        ([5] * (CONTEXT + 1), {}, "the prompt has 97 tokens"),
        ([97], {}, "outside the vocabulary of 97"),
        ([5], {"max_tokens": -1}, "max_tokens is -1, expected 0 or more"),
    ):
        with pytest.raises(EngineError, match=message):
            batch.add(ids, **{"max_tokens": 1, **options})
    assert not batch.busy
    for n in (0, 65):
        with pytest.raises(EngineError, match=f"max_sequences is {n}, expected 1 to 64"):
            Batch(engine, n)
    with pytest.raises(
        EngineError, match="cache_positions is 95, expected at least the context, 96"
    ):
        Engine(file, engine.device, context=96, cache_positions=95)


def test_weights_without_loss(
    tmp_path: Path, tiny_config: ModelConfig, prompts: list[list[int]]
) -> None:
    """Their kernels have f32 activations, and there are no passes for prompts."""
    path = tmp_path / "model.safetensors"
    convert(random_source(tiny_config), path, "lossless", progress=False)
    device = Device.open()
    device.software = True
    engine = Engine(WeightsFile.open(path), device, context=64)
    want = [alone(engine, prompt, 6, SAMPLED[1]) for prompt in prompts[:3]]
    batch = Batch(engine, 20)
    assert batch.max_sequences == 16
    sequences = [
        batch.add(prompt, max_tokens=6, sampling=SAMPLED[1], stop_ids=()) for prompt in prompts[:3]
    ]
    finish(batch)
    assert [sequence.tokens for sequence in sequences] == want


@pytest.mark.parametrize("family", ["qwen3", "qwen2_sliding", "smollm3"])
def test_what_families_add(tmp_path: Path, family: str) -> None:
    """Biases, norms of heads, windows, layers without RoPE: as the engine alone has them."""
    source, _, _ = golden(family, tmp_path)
    path = tmp_path / "model.safetensors"
    convert(source, path, 6, embed_bits=6, text=CalibrationText(0), progress=False)
    file = WeightsFile.open(path)
    device = Device.open()
    device.software = True
    engine = Engine(file, device, exact=True, context=48)
    reference = Reference.from_weights(file, cache_dtype=np.float32)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, file.config.vocab_size, n).tolist() for n in (20, 7)]
    batch = Batch(engine, 2)
    sequences = [batch.add(prompt, max_tokens=8, stop_ids=()) for prompt in prompts]
    finish(batch)
    for sequence in sequences:
        assert len(sequence.tokens) == 8
        assert_drawn(reference, sequence)
