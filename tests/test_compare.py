"""The arithmetic of a comparison, on numbers worked out by hand and against plain loops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from engine.compare import Comparison, Logits, Model, compare, log_softmax, standard_error


def log(*probabilities: float) -> npt.NDArray[np.float32]:
    """Logits of a distribution, shifted: only differences count."""
    return np.log(np.array(probabilities, np.float32)) + np.float32(3)


def judged(model: Logits, reference: Logits, ids: Sequence[int], window: int) -> Comparison:
    """One model without a twin."""
    (verdict,) = compare([Model(model)], reference, ids, window)
    assert verdict.int8_against_exact is None
    return verdict.against_reference


def test_compare_on_numbers_worked_out_by_hand() -> None:
    half, other, last = log(1 / 2, 1 / 4, 1 / 4), log(1 / 8, 3 / 4, 1 / 8), log(1 / 8, 1 / 8, 3 / 4)

    def model(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.array([half, other, last])[: len(ids)]

    def reference(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.array([half, half, last])[: len(ids)]

    # Windows 0 2 1 and 1 0: the models differ at the second position of each.
    result = judged(model, reference, [0, 2, 1, 1, 0], window=3)
    kl = math.log(4) / 2 + math.log(1 / 3) / 4 + math.log(2) / 4  # KL(half || other)
    want = Comparison(
        tokens=5,
        perplexity=(4 * 4 / 3 * 2) ** (1 / 3),  # 2 after 0, 1 after 2; 0 after 1
        reference_perplexity=(4 * 4 * 2) ** (1 / 3),
        kl_mean=2 * kl / 5,
        # A window's sum of kl, where 3 and 2 tokens of that mean would make 6/5 kl and 4/5 kl.
        kl_standard_error=math.sqrt(2 * (kl / 5) ** 2 * 2) / 5,
        kl_p99=kl,
        top1_agreement=3 / 5,
    )
    # Logits are float32: half an ulp of numbers below 4.
    assert dataclasses.astuple(result) == pytest.approx(dataclasses.astuple(want), rel=1e-6)


@pytest.mark.parametrize(
    ("n_tokens", "window", "windows"),
    # What a window's last token predicts is never seen; a window of one token predicts nothing.
    [(2, 9, [2]), (9, 4, [4, 4]), (10, 4, [4, 4, 2]), (65, 64, [64]), (200, 150, [150, 50])],
)
def test_compare_looks_at_every_token_of_every_window(
    n_tokens: int, window: int, windows: list[int]
) -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 5, n_tokens).tolist()
    tables = rng.normal(size=(2, n_tokens, 5)).astype(np.float32)
    sizes: list[int] = []

    def model(ids: Sequence[int]) -> npt.NDArray[np.float32]:
        sizes.append(len(ids))
        return tables[0, : len(ids)]

    result = judged(model, lambda ids: tables[1, : len(ids)], ids, window)
    assert sizes == windows
    assert result.tokens == sum(windows)
    nll, kl = [], []
    for begin, size in zip(np.cumsum([0, *windows]), windows, strict=False):
        for i in range(size):
            q, p = (np.exp(table[i]) / np.exp(table[i]).sum() for table in tables.astype(float))
            kl.append(sum(p * np.log(p / q)))
            if i + 1 < size:
                nll.append(-np.log(q[ids[begin + i + 1]]))
    assert result.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-12)
    assert result.kl_mean == pytest.approx(np.mean(kl), rel=1e-12)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-12)


def test_compare_of_equals_finds_nothing() -> None:
    # Where a softmax that is not shifted overflows.
    table = np.random.default_rng(3).normal(1000, 5, (70, 11)).astype(np.float32)
    ids = [3] * 70
    result = judged(lambda ids: table, lambda ids: table, ids, window=70)
    assert result.kl_mean == result.kl_p99 == 0
    assert result.top1_agreement == 1
    assert result.perplexity == result.reference_perplexity
    assert result.kl_standard_error is None  # of one window


def test_compare_runs_the_reference_once_for_all_models_and_window_by_window() -> None:
    rng = np.random.default_rng(3)
    tables = rng.normal(size=(4, 7, 5)).astype(np.float32)
    ids = rng.integers(0, 5, 17).tolist()
    calls: list[str] = []
    heard: list[list[float]] = []

    def run(name: str, table: npt.NDArray[np.float32]) -> Logits:
        def logits(ids: Sequence[int]) -> npt.NDArray[np.float32]:
            calls.append(name)
            return table[: len(ids)] + np.float32(len(ids))

        return logits

    def fresh() -> tuple[Logits, list[Logits]]:
        return run("reference", tables[0]), [run("abc"[i], tables[1 + i]) for i in range(3)]

    reference, (a, b, c) = fresh()
    # b is judged by its int8 side, and a's twin says that its own is the exact one.
    together = compare(
        [Model(a, exact=True, twin=b), Model(b, twin=a), Model(c)],
        reference,
        ids,
        7,
        lambda kl: heard.append(list(kl)),
    )
    assert calls == ["reference", "a", "b", "b", "a", "c"] * 3
    for verdict, model in zip(together, (a, b, c), strict=True):
        assert verdict.against_reference == judged(model, reference, ids, 7)
    by_hand = judged(b, a, ids, 7)  # KL(exact || int8): a is exact in both
    assert [verdict.int8_against_exact for verdict in together] == [by_hand, by_hand, None]
    assert len(heard) == 3
    assert heard[-1] == [verdict.against_reference.kl_mean for verdict in together]
    assert heard[0] == [judged(m, reference, ids[:7], 7).kl_mean for m in (a, b, c)]


def test_small_divergences_are_exact() -> None:
    # KL of logits l and l + e d is e^2 Var_p(d) / 2 + O(e^3): float64 must not lose it in rounding.
    rng = np.random.default_rng(3)
    logits, change = rng.normal(size=(2, 1, 5000))
    p = np.exp(logits) / np.exp(logits).sum()
    variance = (p * change**2).sum() - (p * change).sum() ** 2
    e = 1e-5
    table = np.concatenate([logits, logits])
    result = judged(lambda ids: table + e * change, lambda ids: table, [0, 0], window=2)
    # The third order is e of the second; rounding is 2^-52 * e beside e^2 / 2, and a sum's.
    assert result.kl_mean == pytest.approx(e**2 * variance / 2, rel=10 * e)


def test_standard_error_takes_stretches_of_a_window_for_observations() -> None:
    rng = np.random.default_rng(3)
    tables = rng.normal(size=(2, 300, 5))
    p, q = log_softmax(tables)
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    ids = [0] * 500  # the second window has 200 tokens
    result = judged(lambda ids: tables[1, : len(ids)], lambda ids: tables[0, : len(ids)], ids, 300)
    parts = [kl[:128], kl[128:256], kl[256:], kl[:128], kl[128:200]]
    assert result.kl_standard_error == pytest.approx(standard_error(parts))


def test_standard_error() -> None:
    rng = np.random.default_rng(3)
    # Of clusters of one element: s / sqrt(n).
    x = rng.normal(size=19)
    assert standard_error(list(x[:, None])) == pytest.approx(x.std(ddof=1) / math.sqrt(19))
    # Of equal clusters: that of their means, whatever goes on inside.
    x = rng.normal(size=(6, 11)) + rng.normal(size=(6, 1))
    want = x.mean(axis=1).std(ddof=1) / math.sqrt(6)
    assert standard_error(list(x)) == pytest.approx(want)
    # A last window that is shorter weighs less, and one whose mean is everyone's adds nothing.
    clusters = [np.array([1.0, 3.0, 5.0]), np.array([2.0, 2.0, 2.0]), np.array([2.5])]
    # Mean 2.5: sums off by 1.5, -1.5 and 0.
    assert standard_error(clusters) == pytest.approx(math.sqrt(3 / 2 * 2 * 1.5**2) / 7)
    assert standard_error(clusters[:1]) is None
