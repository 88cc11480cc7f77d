"""Speculation changes speed and nothing else: what becomes of texts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_model import random_source

from engine.device import Device, Readback
from engine.errors import EngineError
from engine.generate import Engine
from engine.sampler import Sampling
from engine.speculate import LOOKUP, MODEL, Draft, Lookup, Policy
from model.config import ModelConfig
from model.reference import Reference, sampling_scores
from weights.convert import CalibrationText, convert
from weights.store import WeightsFile

pytestmark = pytest.mark.gpu

EXACT = 5e-5  # as in small_engine.py
CONTEXT = 200
N_ANSWER = 50
SAMPLED = Sampling(temperature=0.4, seed=3)


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig
) -> dict[str, WeightsFile]:
    folder = tmp_path_factory.mktemp("models")
    config = dataclasses.replace(tiny_config, max_seq_len=256)
    small = dataclasses.replace(config, n_layers=1, hidden_dim=40)
    files = {}
    for seed, (name, size) in enumerate({"model": config, "other": small}.items()):
        path = folder / f"{name}.safetensors"
        source = random_source(size, seed)
        convert(source, path, 6, embed_bits=6, text=CalibrationText(0), progress=False)
        files[name] = WeightsFile.open(path)
    return files


def open_engine(files: dict[str, WeightsFile], adapter: str, draft: str | None = None) -> Engine:
    device = Device.open()
    device.software = adapter == "software"
    drafts = files[draft] if draft else None
    return Engine(files["model"], device, exact=True, context=CONTEXT, draft=drafts)


@pytest.fixture(scope="module", params=["software", "gpu"])
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(files: dict[str, WeightsFile], adapter: str) -> Engine:
    return open_engine(files, adapter)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    tokens: list[int] = np.random.default_rng(1).integers(3, 97, 29).tolist()
    return tokens


class Eager(Policy):
    """Checks whatever there is, as large as it may be; notes what was checked."""

    def __init__(self) -> None:
        super().__init__((4, 8))
        self.made: list[Draft] = []

    def choose(self, shares: dict[str, list[float]], most: int) -> Draft | None:
        for source in (MODEL, LOOKUP):
            sizes = [n for n in (4, 8) if n <= most and n <= len(shares.get(source, [])) + 1]
            if sizes:
                return Draft(source, sizes[-1])
        return None

    def checked(self, draft: Draft, n_tokens: int, seconds: float) -> None:
        self.made.append(draft)


class Told(Lookup):
    """Knows the text, and tells it with every seventh token wrong."""

    def __init__(self, text: list[int]) -> None:
        self.text = [*text, *[0] * 8]
        super().__init__()

    def begin(self, tokens: Sequence[int]) -> None:
        self.n = len(tokens)

    def add(self, token: int) -> None:
        self.n += 1

    def shares(self, n: int) -> list[float]:
        return [0.9] * n if self.n % 5 else []  # now and then it knows nothing

    def draft(self, n: int) -> list[int]:
        places = range(self.n, self.n + n)
        return [self.text[i] if i % 7 else (self.text[i] + 1) % 97 for i in places]


def told(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: list[int]) -> Eager:
    """From now on the engine checks drafts of `text`."""
    policy = Eager()
    monkeypatch.setattr(engine, "_policy", policy)
    monkeypatch.setattr(engine, "_lookup", Told(text))
    return policy


def assert_drawn(
    reference: Reference, prompt: list[int], answer: list[int], sampling: Sampling
) -> None:
    """Each token is what the oracle draws, or as good for all that EXACT can tell."""
    logits = reference.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    for i, token in enumerate(answer):
        scores = sampling_scores(logits[i], sampling, len(prompt) + i)
        assert scores[token] >= scores.max() - 3 * EXACT / (sampling.temperature or 1)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_that_of_single_steps(
    engine: Engine,
    files: dict[str, WeightsFile],
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
    sampling: Sampling,
) -> None:
    plain = list(engine.generate(prompt, N_ANSWER, sampling, stop_ids=(), speculate=False))
    policy = told(engine, monkeypatch, [*prompt, *plain])
    generation = engine.generate(prompt, N_ANSWER, sampling, stop_ids=())
    answer = list(generation)
    reference = Reference.from_weights(files["model"], cache_dtype=np.float32)
    assert_drawn(reference, prompt, answer, sampling)
    # Passes of several tokens add in the same order as single ones, but for the GPU's: a tie
    # within rounding is all that may differ, and this seed has none.
    assert answer == plain
    stats = generation.stats
    assert stats.checks == len(policy.made) > 5
    assert stats.drafted_tokens == sum(draft.n_tokens - 1 for draft in policy.made)
    assert stats.drafted_tokens > stats.accepted_tokens > stats.drafted_tokens / 2
    assert stats.generated_tokens == N_ANSWER and stats.finish_reason == "length"
    # The cache holds what was read and nothing else.
    following = engine.generate([*prompt, *answer, 5], 1, sampling, stop_ids=())
    assert_drawn(reference, [*prompt, *answer, 5], list(following), sampling)
    assert following.stats.reused_tokens == len(prompt) + N_ANSWER - 1


def test_where_nothing_matches_nothing_is_checked(engine: Engine) -> None:
    generation = engine.generate(list(range(3, 60)), 2, stop_ids=())
    assert len(list(generation)) == 2
    assert generation.stats.checks == generation.stats.drafted_tokens == 0


@pytest.mark.parametrize("room", [1, 2, 3, 7, 8, 9])
def test_checks_stay_within_the_context(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    long = (prompt * 9)[: CONTEXT + 1 - room]
    plain = list(engine.generate(long, 99, stop_ids=(), speculate=False))
    policy = told(engine, monkeypatch, [*long, *plain])
    generation = engine.generate(long, 99, stop_ids=())
    assert list(generation) == plain and len(plain) == room
    assert generation.stats.finish_reason == "context"
    assert policy.made or room < 9  # (a GPU has seven tokens under way before it knows the first)


def test_an_answer_ends_within_a_check(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a stop id among the accepted tokens, when closed or interrupted: the cache is right."""
    answer = list(engine.generate(prompt, N_ANSWER, stop_ids=(), speculate=False))
    told(engine, monkeypatch, [*prompt, *answer])
    stop = answer[-1]
    generation = engine.generate(prompt, N_ANSWER, stop_ids=[stop])
    assert list(generation) == answer[: answer.index(stop)]
    assert generation.stats.finish_reason == "stop"
    for n_read in (2, 7, 23):
        generation = engine.generate(prompt, N_ANSWER, stop_ids=())
        assert list(itertools.islice(generation, n_read)) == answer[:n_read]
        generation.close()
        again = engine.generate([*prompt, *answer[:n_read]], N_ANSWER - n_read, stop_ids=())
        assert list(again) == answer[n_read:]
        assert again.stats.reused_tokens == len(prompt) + n_read - 1

    read, n_reads = Readback.read, itertools.count()

    def interrupted(self: Readback) -> np.ndarray:
        if next(n_reads) == 8:
            raise KeyboardInterrupt
        return read(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Readback, "read", interrupted)
        list(engine.generate(prompt, N_ANSWER, stop_ids=()))
    assert list(engine.generate(prompt, N_ANSWER, stop_ids=())) == answer


@pytest.fixture(scope="module")
def pairs(files: dict[str, WeightsFile], adapter: str) -> Callable[[str], Engine]:
    return functools.cache(lambda draft: open_engine(files, adapter, draft))


@pytest.mark.parametrize(
    ("draft", "sampling"),
    [("model", Sampling()), ("model", SAMPLED), ("other", SAMPLED)],
    ids=["same greedy", "same sampled", "other sampled"],
)
def test_a_draft_model_leaves_the_text_as_it_is(
    pairs: Callable[[str], Engine],
    engine: Engine,
    prompt: list[int],
    monkeypatch: pytest.MonkeyPatch,
    draft: str,
    sampling: Sampling,
) -> None:
    """The same model is always right, as both draw with the same noise; another one seldom is."""
    plain = list(engine.generate(prompt, N_ANSWER, sampling, stop_ids=(), speculate=False))
    pair = pairs(draft)
    assert pair.memory().total_bytes == pair.device.allocated_bytes
    policy = told(pair, monkeypatch, [])  # (from the model, as long as that has room)
    generation = pair.generate(prompt, N_ANSWER, sampling, stop_ids=())
    assert list(generation) == plain
    stats = generation.stats
    if draft == "model":
        assert stats.accepted_tokens == stats.drafted_tokens > 0
        assert [made.n_tokens for made in policy.made] == [8] * 6
    else:
        assert stats.accepted_tokens < stats.drafted_tokens / 2
    # A second turn: both caches go on from what they hold.
    turn = [*prompt, *plain, 7, 8, 9]
    other = dataclasses.replace(sampling, temperature=0.6, seed=9)
    plain = list(engine.generate(turn, 20, other, stop_ids=(), speculate=False))
    generation = pair.generate(turn, 20, other, stop_ids=())
    assert list(generation) == plain
    if draft == "model":
        assert generation.stats.accepted_tokens == generation.stats.drafted_tokens > 0


def test_a_draft_model_of_another_tokenizer_is_refused(
    files: dict[str, WeightsFile], tmp_path: Path
) -> None:
    changed = files["other"].tokenizer_json.replace(b'"#"', b'"\\u00e9"', 1)
    other = dataclasses.replace(files["other"], tokenizer_json=changed)
    with pytest.raises(EngineError, match=r"other.safetensors: cannot draft for .*model.safetens"):
        Engine(files["model"], Device.open(), draft=other)


# A full context


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_full_context_slides(
    engine: Engine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    """As if what is kept had been given as a prompt, over and over, with other noise each time."""
    monkeypatch.setattr(engine, "context", 40)
    text, want, seed = list(prompt), [], sampling.seed
    for _ in range(4):
        each = dataclasses.replace(sampling, seed=seed)
        answer = list(engine.generate(text, 99, each, stop_ids=(), speculate=False))
        assert len(text) + len(answer) == 41  # the last one needs no place
        want += answer
        text = [*text, *answer]
        text = [*text[:5], *text[-20:]]  # an eighth and a half
        seed = (seed + 0x9E3779B9) % 2**32
    told(engine, monkeypatch, [*prompt, *want])
    for n, slides in ((len(want), 3), (len(want) - 1, 3), (12, 0), (13, 1)):
        generation = engine.generate(prompt, n, sampling, stop_ids=(), slide=True)
        assert list(generation) == want[:n]
        assert generation.stats.slides == slides
        assert generation.stats.finish_reason == "length"
        assert generation.stats.prompt_tokens == len(prompt)


@pytest.mark.parametrize("context", [1, 2, 9])
def test_the_least_contexts_slide(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    monkeypatch.setattr(engine, "context", context)
    assert len(list(engine.generate([7], 30, stop_ids=(), slide=True))) == 30
