"""The engine on the default model: against the oracle, and against what transformers computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Golden

from engine.device import Device
from engine.evaluate import log_softmax
from engine.generate import Engine
from model.reference import Reference
from weights.convert import DEFAULT_BITS, convert
from weights.sources import Source
from weights.store import WeightsFile

pytestmark = [pytest.mark.gpu, pytest.mark.real_weights, pytest.mark.slow]

PROMPTS = [
    "one_token",
    "story",
    "code_py",
    "numbers",
    "multi_utf8",
    "chat_capital",
    "chat_multiturn",
    "long_raw",
]
N_ANSWER = 16  # tokens that are looked at after each prompt
CONTEXT = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def default_file(folder: Path, default_model: Source) -> WeightsFile:
    """At the bits that a user gets."""
    convert(default_model, folder / "default.safetensors", DEFAULT_BITS, progress=False)
    return WeightsFile.open(folder / "default.safetensors")


@pytest.fixture(scope="module")
def file_8bit(folder: Path, default_model: Source) -> WeightsFile:
    convert(default_model, folder / "8bit.safetensors", 8, progress=False)
    return WeightsFile.open(folder / "8bit.safetensors")


@pytest.fixture(scope="module")
def exact_engine(default_file: WeightsFile) -> Engine:
    return Engine.open(default_file.path, exact=True, context=CONTEXT)


@pytest.fixture(scope="module")
def exact_reference(default_file: WeightsFile) -> Reference:
    return Reference.from_weights(default_file, cache_dtype=np.float32)


def by_name(goldens: list[Golden], name: str) -> Golden:
    (golden,) = (golden for golden in goldens if golden.name == name)
    return golden


def test_prompts_are_all_goldens(goldens: list[Golden]) -> None:
    assert [golden.name for golden in goldens] == PROMPTS


@pytest.mark.parametrize("name", PROMPTS)
def test_exact_engine_computes_what_the_reference_does(
    goldens: list[Golden],
    exact_engine: Engine,
    exact_reference: Reference,
    assert_close: Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None],
    name: str,
) -> None:
    prompt = by_name(goldens, name).prompt_ids
    want = exact_reference.logits(prompt)
    # Both are float32 runs that add in different orders. Seen: 1.1e-4.
    assert_close(exact_engine.logits(prompt), want, 1e-3)
    answer = list(exact_engine.generate(prompt, N_ANSWER, stop_ids=()))
    assert len(answer) == N_ANSWER
    # Where the reference prefers its best token by more than 0.01, no other one is this close.
    for token, logits in zip(answer, follow(exact_reference, want[-1], answer), strict=True):
        assert logits.max() - logits[token] <= 0.01


def follow(
    reference: Reference, logits: npt.NDArray[np.float32], answer: list[int]
) -> Iterator[npt.NDArray[np.float32]]:
    """What the reference thinks of each token of the answer, given those before it."""
    yield logits
    for token in answer[:-1]:
        yield reference.step(token)


@pytest.fixture(scope="module")
def int8_run(
    goldens: list[Golden], file_8bit: WeightsFile
) -> dict[str, tuple[npt.NDArray[np.float32], ...]]:
    """At 8 bit, after each prompt and along its golden answer: engine, int8 and exact oracle."""
    engine = Engine.open(file_8bit.path, context=CONTEXT)
    exact = Reference.from_weights(file_8bit, cache_dtype=np.float32)
    int8 = Reference(exact.config, exact.tensors, int8=True)
    run = {}
    for golden in goldens:
        ids = golden.prompt_ids + golden.gen_ids[: N_ANSWER - 1]
        run[golden.name] = engine.logits(ids), int8.logits(ids), exact.logits(ids)
    return run


@pytest.mark.parametrize("name", PROMPTS)
def test_int8_engine_is_as_close_to_its_reference_as_roundings_allow(
    int8_run: dict[str, tuple[npt.NDArray[np.float32], ...]], name: str
) -> None:
    """Two runs that round independently are sqrt(2) times as far apart as each is from exact."""
    engine, int8, exact = int8_run[name]
    assert rms(engine - int8) <= 2**0.5 * rms(int8 - exact)


def rms(x: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def test_8bit_int8_engine_follows_transformers(
    goldens: list[Golden], int8_run: dict[str, tuple[npt.NDArray[np.float32], ...]]
) -> None:
    """Mean KL(golden || engine) of at most 0.01, in nats."""
    at_the_prompt, on_the_way = [], []
    for golden in goldens:
        q = log_softmax(int8_run[golden.name][0][-N_ANSWER:])  # (N_ANSWER, vocab_size)
        p = log_softmax(golden.last_logits)
        at_the_prompt.append((np.exp(p) * (p - q[0])).sum())

        # Of each generated token the golden has the 20 best. All others are one outcome here,
        # which makes this a lower bound of the KL (data processing inequality).
        p_top = golden.top20_logprobs[:N_ANSWER].astype(np.float64)
        q_top = np.take_along_axis(q, golden.top20_ids[:N_ANSWER].astype(np.int64), axis=-1)
        p_rest, q_rest = (1 - np.exp(top).sum(axis=-1) for top in (p_top, q_top))
        kl = (np.exp(p_top) * (p_top - q_top)).sum(axis=-1) + p_rest * np.log(p_rest / q_rest)
        on_the_way.append(kl)
        # The tables are the logits' own: at the prompt's end the two KLs are one distribution's.
        assert kl[0] <= at_the_prompt[-1] + 1e-5
    assert np.mean(at_the_prompt) <= 0.01
    assert np.mean(on_the_way) <= 0.01


@pytest.mark.parametrize("software", [True, False])
def test_answers_a_question_within_its_memory(
    goldens: list[Golden],
    default_file: WeightsFile,
    file_8bit: WeightsFile,
    software: bool,
) -> None:
    """As chat does it, by the kernels for software adapters and by those for GPUs."""
    golden = by_name(goldens, "chat_capital")
    expected = golden.gen_ids[: golden.gen_ids.index(2)]
    for weights in (file_8bit, default_file):
        device = Device.open()
        device.software = software
        engine = Engine(weights, device, context=CONTEXT)
        memory = engine.memory()
        assert memory.total_bytes <= weights.size_bytes + memory.cache_bytes + (64 << 20)

        question = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = engine.tokenizer.encode(engine.tokenizer.chat_prompt(question))
        generation = engine.generate(prompt, 20)
        answer = list(generation)
        assert "Paris" in engine.tokenizer.decode(answer)
        if weights is file_8bit:
            assert prompt == golden.prompt_ids
            assert answer == expected
            assert generation.stats.finish_reason == "stop"
