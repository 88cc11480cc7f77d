"""Drawing the next token on the GPU: settings, and the passes that follow the head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.device import Device
from engine.errors import EngineError
from engine.kernel import Kernels
from engine.plan import Plan

RING = 64  # sampled tokens that the GPU holds until the host has read them
_N_CANDIDATES = 32  # workgroups that share the vocabulary


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
        self._kernels, self._vocab_size = kernels, vocab_size
        self._state, self._logits = state, logits
        most = max([1, *check])
        self.settings = self.device.empty("sampling", 16)
        self.threshold = self.device.empty("sampling.threshold", 4 * most)
        self.candidates = self.device.empty("sampling.candidates", 8 * _N_CANDIDATES * most)
        self.sampled = self.device.empty("sampled", 4 * RING)
        self.plan = self._plan(1)
        self.check = {rows: self._plan(rows) for rows in check}

    def _plan(self, rows: int) -> Plan:
        get, lanes = self._kernels.get, 128
        # One workgroup searches the whole vocabulary, with 68 bytes a lane: on a GPU as many lanes
        # as there is room for.
        device, searching = self.device, lanes
        most = min(device.max_workgroup_lanes, device.workgroup_memory // 68)
        while not device.software and 2 * searching <= most:
            searching *= 2
        vocab = {"vocab_size": self._vocab_size}
        return Plan(
            [
                get("sample_threshold", lanes=searching).dispatch(
                    [rows],
                    vocab,
                    sampling=self.settings,
                    logits=self._logits,
                    threshold=self.threshold,
                ),
                get("sample_candidates", lanes=lanes, rows=rows).dispatch(
                    [_N_CANDIDATES, rows],
                    {"n_candidates": _N_CANDIDATES, **vocab},
                    state=self._state,
                    sampling=self.settings,
                    logits=self._logits,
                    threshold=self.threshold,
                    candidates=self.candidates,
                ),
                get("sample_token", lanes=lanes, rows=rows).dispatch(
                    [1],
                    {"n_candidates": _N_CANDIDATES},
                    candidates=self.candidates,
                    state=self._state,
                    sampled=self.sampled,
                ),
            ]
        )

    def configure(self, sampling: Sampling) -> None:
        settings = np.zeros(4, np.float32)
        # Below that, float32 has no room for logits / temperature: many would become equal.
        if sampling.temperature > 1e-30:
            settings[0] = sampling.temperature
        settings[2], settings[3] = sampling.top_p, sampling.min_p
        settings.view(np.uint32)[1] = sampling.top_k
        self.device.write(self.settings, settings)
