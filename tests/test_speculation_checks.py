"""What the GPU keeps of a check: the tokens that single steps draw, from the softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.device import Device
from engine.kernel import Kernels
from engine.plan import run
from engine.sampler import RING, Sampler, Sampling
from model.reference import sampling_scores

gpu = pytest.mark.gpu


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(Device.open())


def checked(
    sampler: Sampler, state: Any, sampling: Sampling, pos: int, tokens: list[int], rows: int
) -> tuple[list[int], list[int]]:
    """A check of `tokens` at `pos`: the tokens that came of it, and the state after it."""
    values = [pos, len(tokens), RING - 2, sampling.seed, *tokens]
    sampler.device.write(state, np.array(values + [0] * (12 - len(values)), np.uint32))
    run(sampler.device, sampler.check[rows])
    after = [int(n) for n in sampler.device.read(state, np.uint32, (5,))]
    ring = sampler.device.read(sampler.sampled, np.uint32, (RING,))
    return [int(ring[i % RING]) for i in range(RING - 2, after[2])], after


def check_sampler(kernels: Kernels, logits: np.ndarray) -> tuple[Sampler, Any]:
    device = kernels.device
    state = device.empty("state", 48)
    return Sampler(kernels, state, device.upload("logits", logits), logits.shape[1], (4, 8)), state


@gpu
@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.3, top_k=40, seed=5), Sampling(0.9, 0, 0.9, 0.05, 6)],
    ids=["greedy", "top_k", "top_p"],
)
def test_a_check_draws_as_single_steps_do(kernels: Kernels, sampling: Sampling, rows: int) -> None:
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(8, 301)) * 3).astype(np.float32)
    sampler, state = check_sampler(kernels, logits)
    sampler.configure(sampling)
    pos = 30
    text = [
        int(sampling_scores(row, sampling, pos + 1 + i).argmax()) for i, row in enumerate(logits)
    ]
    for n_tokens in range(1, rows + 1):
        for n_right in range(n_tokens):
            drafts = [7, *text[: n_tokens - 1]]
            for i in range(n_right + 1, n_tokens):  # wrong, and right again after it
                if i == n_right + 1:
                    drafts[i] = (drafts[i] + 1) % 301
            got, after = checked(sampler, state, sampling, pos, drafts, rows)
            assert got == text[: n_right + 1]
            n_sampled = RING - 2 + len(got)
            assert after == [pos + len(got), 1, n_sampled, sampling.seed, got[-1]]


N_VOCAB = 8
CHI_SQUARE = 24.3  # passed once in 1000 times, with 7 degrees of freedom


def random_checks(n_checks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (4, N_VOCAB), their softmax, and the tokens of checks (n_checks, 4).

    Most drafts are the likeliest token and often right, some are anything.
    """
    rng = np.random.default_rng(3)
    logits = rng.uniform(0, 1, (4, N_VOCAB)).astype(np.float32)
    logits[:, 3] = 2.6
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    anything = rng.random((n_checks, 4)) < 0.1
    return logits, p, np.where(anything, rng.integers(0, N_VOCAB, (n_checks, 4)), 3)


def assert_softmax(p: np.ndarray, drawn: np.ndarray, n_drawn: np.ndarray) -> None:
    """Pearson's chi-square for each place in a pass, over the checks that came so far."""
    for place in range(4):
        tokens = drawn[n_drawn > place, place]
        expected = tokens.size * p[place]
        assert expected.min() > 4
        counts = np.bincount(tokens, minlength=N_VOCAB)
        assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE


@gpu
def test_checks_draw_from_the_softmax(kernels: Kernels) -> None:
    n_checks = 1000
    logits, p, tokens = random_checks(n_checks)
    sampler, state = check_sampler(kernels, logits)
    sampler.configure(Sampling(temperature=1.0))
    states = np.zeros((n_checks, 12), np.uint32)
    states[:, :3] = 5, 4, 0
    states[:, 3] = np.arange(n_checks)  # the seeds
    states[:, 4:8] = tokens
    device = kernels.device
    given = device.upload("states", states)
    rings, counts = device.empty("rings", 16 * n_checks), device.empty("counts", 4 * n_checks)
    encoder = device.wgpu.create_command_encoder()
    for i in range(n_checks):
        encoder.copy_buffer_to_buffer(given, 48 * i, state, 0, 48)
        compute_pass = encoder.begin_compute_pass()
        sampler.check[4].replay(compute_pass)
        compute_pass.end()
        encoder.copy_buffer_to_buffer(sampler.sampled, 0, rings, 16 * i, 16)
        encoder.copy_buffer_to_buffer(state, 8, counts, 4 * i, 4)
    device.submit(encoder.finish())
    drawn = device.read(rings, np.uint32, (n_checks, 4))
    assert_softmax(p, drawn, device.read(counts, np.uint32, (n_checks,)))


def test_the_rule_draws_from_the_softmax() -> None:
    """The same over more draws of the oracle, which the kernel is held to above."""
    logits, p, tokens = random_checks(12_000)
    drawn = np.zeros(tokens.shape, np.int64)
    n_drawn = np.zeros(len(tokens), np.int64)
    for i, check in enumerate(tokens):
        sampling, right = Sampling(temperature=1.0, seed=i), True
        while right and n_drawn[i] < 4:
            place = n_drawn[i]
            token = drawn[i, place] = sampling_scores(logits[place], sampling, 6 + place).argmax()
            n_drawn[i] += 1
            right = place < 3 and check[place + 1] == token
    assert n_drawn.sum() > 20_000
    assert_softmax(p, drawn, n_drawn)
