"""Drawing the next token on the GPU: settings, and the passes that follow the head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.device import Device
from engine.errors import EngineError
from engine.kernel import Dispatch, Kernels
from engine.plan import Plan

RING = 64  # sampled tokens that the GPU holds until the host has read them
STEPS = 16  # of a batch, likewise
_LANES = 128


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 filter nothing.

    Filters apply in this order, as in transformers: temperature, top_k, top_p (Holtzman et al.
    2020), min_p (Nguyen et al. 2024). The same seed and prompt give the same text on the same
    machine.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EngineError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if not 0 <= self.top_k < 1 << 32:
            raise EngineError(f"top_k is {self.top_k}, expected 0 (off) to {(1 << 32) - 1}")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p is {self.top_p}, expected above 0 and at most 1 (off)")
        if not 0 <= self.min_p <= 1:
            raise EngineError(f"min_p is {self.min_p}, expected 0 (off) to 1")
        if not 0 <= self.seed < 1 << 32:
            raise EngineError(f"seed is {self.seed}, expected 0 to {(1 << 32) - 1}")


class Sampler:
    """The passes that turn logits into the next pass's token, and the ring that tokens go to.

    `plan` draws one token from the logits of a pass's last one. `check[n]` draws one after each of
    a pass of n and keeps those up to the first that was guessed wrong.
    """

    def __init__(
        self, kernels: Kernels, state: Any, logits: Any, vocab_size: int, check: Sequence[int] = ()
    ) -> None:
        self.device: Device = kernels.device
        self.sampled = self.device.empty("sampled", 4 * RING)
        self.draws = _Draws(kernels, "sampling", state, logits, vocab_size, max([1, *check]))
        self.plan = self._plan(1)
        self.check = {rows: self._plan(rows) for rows in check}

    def _plan(self, rows: int) -> Plan:
        draws = self.draws
        token = draws.kernels.get("sample_token", lanes=_LANES, rows=rows).dispatch(
            [1],
            {"n_candidates": draws.n_candidates},
            candidates=draws.candidates,
            state=draws.state,
            sampled=self.sampled,
        )
        return Plan([*draws.dispatches(rows), token])

    def configure(self, sampling: Sampling) -> None:
        self.device.write(self.draws.settings, _packed([sampling]))


class BatchSampler:
    """The passes that draw a token after each row of a pass over several sequences, in its own way.

    Each is its row's next input then, on the GPU. `sampled` is a ring of STEPS such passes, tokens
    (STEPS, rows).
    """

    def __init__(
        self,
        kernels: Kernels,
        state: Any,
        pass_rows: Any,
        logits: Any,
        vocab_size: int,
        rows: int,
    ) -> None:
        self.rows = rows
        self.sampled = kernels.device.empty("batch.sampled", 4 * STEPS * rows)
        self._pass_rows = pass_rows
        self.draws = _Draws(kernels, "batch.sampling", state, logits, vocab_size, rows, pass_rows)
        self._plans: dict[int, Plan] = {}

    def configure(self, samplings: Sequence[Sampling]) -> None:
        self.draws.kernels.device.write(self.draws.settings, _packed(samplings))

    def plan(self, rows: int) -> Plan:
        if rows not in self._plans:
            self._plans[rows] = Plan(self._dispatches(rows))
        return self._plans[rows]

    def _dispatches(self, rows: int) -> Iterator[Dispatch]:
        draws = self.draws
        yield from draws.dispatches(rows)
        yield draws.kernels.get("sample_rows", lanes=_LANES, batched=True).dispatch(
            [rows],
            {"n_candidates": draws.n_candidates, "rows": self.rows},
            candidates=draws.candidates,
            state=draws.state,
            pass_rows=self._pass_rows,
            sampled=self.sampled,
        )


class _Draws:
    """The passes up to the best candidates of each row, and what they need. Rows are drawn alike,
    or where they are of a batch, by settings of their own.
    """

    def __init__(
        self,
        kernels: Kernels,
        label: str,
        state: Any,
        logits: Any,
        vocab_size: int,
        rows: int,
        pass_rows: Any = None,
    ) -> None:
        device = kernels.device
        self.kernels, self.state = kernels, state
        self._logits, self._vocab_size, self._pass_rows = logits, vocab_size, pass_rows
        self.settings = device.empty(label, 16 if pass_rows is None else 16 * rows)
        self.threshold = device.empty(f"{label}.threshold", 4 * rows)
        self.n_candidates = 32 if device.software else 128  # workgroups that share the vocabulary
        self.candidates = device.empty(f"{label}.candidates", 8 * self.n_candidates * rows)

    def dispatches(self, rows: int) -> Iterator[Dispatch]:
        get, batched = self.kernels.get, self._pass_rows is not None
        # One workgroup searches the whole vocabulary, with 68 bytes a lane: on a GPU as many lanes
        # as there is room for.
        device, searching = self.kernels.device, _LANES
        most = min(device.max_workgroup_lanes, device.workgroup_memory // 68)
        while not device.software and 2 * searching <= most:
            searching *= 2
        vocab = {"vocab_size": self._vocab_size}
        yield get("sample_threshold", lanes=searching).dispatch(
            [rows],
            vocab,
            sampling=self.settings,
            logits=self._logits,
            threshold=self.threshold,
        )
        yield get("sample_candidates", lanes=_LANES, rows=rows, batched=batched).dispatch(
            [self.n_candidates, rows],
            {"n_candidates": self.n_candidates, **vocab},
            state=self.state,
            pass_rows=self._pass_rows if batched else self.state,  # else it is not read
            sampling=self.settings,
            logits=self._logits,
            threshold=self.threshold,
            candidates=self.candidates,
        )


def _packed(samplings: Sequence[Sampling]) -> npt.NDArray[np.float32]:
    """As shaders/shared/sampling.wgsl has them, (n, 4)."""
    settings = np.zeros((len(samplings), 4), np.float32)
    for row, sampling in zip(settings, samplings, strict=True):
        # Below that, float32 has no room for logits / temperature: many would become equal.
        if sampling.temperature > 1e-30:
            row[0] = sampling.temperature
        row[2:] = sampling.top_p, sampling.min_p
        row.view(np.uint32)[1] = sampling.top_k
    return settings
