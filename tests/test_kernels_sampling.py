"""The kernels that draw tokens, against their numpy twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_checks import F32
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from engine.kernel import Kernels
from engine.plan import run
from engine.sampler import Sampler, Sampling
from model import reference

pytestmark = pytest.mark.gpu


def sampler_for(kernels: Kernels, logits: np.ndarray) -> tuple[Sampler, Any]:
    state = kernels.device.empty("state", 48)
    return Sampler(kernels, state, kernels.device.upload("logits", logits), logits.size), state


def draw(sampler: Sampler, state: Any, sampling: Sampling, pos: int, count: int = 1) -> list[int]:
    """`count` tokens after position `pos`, as many as fit the ring, from the same logits."""
    sampler.configure(sampling)
    sampler.device.write(state, np.array([pos, 1, 0, sampling.seed] + [0] * 8, np.uint32))
    run(sampler.device, *[sampler.plan] * count)
    return [int(token) for token in sampler.device.read(sampler.sampled, np.uint32, (count,))]


@pytest.mark.parametrize("vocab_size", [97, 5003])
def test_sampling_greedy_takes_the_lower_of_equal_logits(
    kernels: Kernels, rng: np.random.Generator, vocab_size: int
) -> None:
    logits = rng.normal(size=vocab_size).astype(np.float32)
    logits[[11, vocab_size - 3]] = 9.5
    sampler, state = sampler_for(kernels, logits)
    assert draw(sampler, state, Sampling(), pos=4, count=3) == [11] * 3
    assert list(sampler.device.read(state, np.uint32, (5,))) == [7, 1, 3, 0, 11]


FILTERS = [
    dict(temperature=1.0),
    dict(temperature=0.7, top_k=1),
    dict(temperature=1.3, top_k=40),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=1.1, top_k=50, top_p=0.8, min_p=0.02),
    dict(temperature=0.5, top_k=100_000, top_p=0.999),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_sampling_threshold_keeps_what_the_filters_keep(
    kernels: Kernels, rng: np.random.Generator, filters: dict[str, Any]
) -> None:
    logits = (rng.normal(size=5003) * 3).astype(np.float32)
    sampler, state = sampler_for(kernels, logits)
    sampling = Sampling(**filters)
    draw(sampler, state, sampling, pos=0)
    threshold = sampler.device.read(sampler.draws.threshold, np.float32, (1,))[0]
    assert set(np.flatnonzero(logits >= threshold)) == set(
        reference.sampling_support(logits, sampling)
    )


@pytest.mark.parametrize("filters", FILTERS)
def test_sampling_draws_what_its_twin_draws(
    kernels: Kernels, rng: np.random.Generator, filters: dict[str, Any]
) -> None:
    """The noise is a hash, so numpy draws the same tokens; a tie within f32 rounding is all that
    may differ.
    """
    logits = (rng.normal(size=5003) * 3).astype(np.float32)
    sampler, state = sampler_for(kernels, logits)
    sampling = Sampling(seed=20, **filters)
    for i, token in enumerate(draw(sampler, state, sampling, pos=30, count=32)):
        scores = reference.sampling_scores(logits, sampling, pos=31 + i)
        # logit / temperature and two logs, each good to 3 ulp of numbers below 64.
        assert scores[token] >= scores.max() - 16 * 64 * F32


def test_sampling_frequencies_are_the_softmax(kernels: Kernels) -> None:
    """Pearson's chi-square over 64 * 64 draws; with 15 degrees of freedom 37.7 is passed once in
    1000 times.
    """
    logits = np.linspace(0, 3, 16).astype(np.float32)
    sampler, state = sampler_for(kernels, logits)
    draws = [
        draw(sampler, state, Sampling(temperature=1.5, seed=seed), 0, 64) for seed in range(64)
    ]
    counts = np.bincount(np.ravel(draws), minlength=16)
    p = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    expected = counts.sum() * p
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


def test_sampling_repeats_with_its_seed_and_position(
    kernels: Kernels, rng: np.random.Generator
) -> None:
    sampler, state = sampler_for(kernels, rng.normal(size=1000).astype(np.float32))
    first = draw(sampler, state, Sampling(temperature=1.0, seed=1), 5, 32)
    assert draw(sampler, state, Sampling(temperature=1.0, seed=1), 5, 32) == first
    assert draw(sampler, state, Sampling(temperature=1.0, seed=2), 5, 32) != first
    assert draw(sampler, state, Sampling(temperature=1.0, seed=1), 6, 31) == first[1:]
