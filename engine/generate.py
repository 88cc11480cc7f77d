"""The engine: a weights file on a device, token ids in, token ids or logits out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine.device import Device, Readback
from engine.errors import EngineError
from engine.plan import gpu_seconds, run
from engine.sampler import RING, Sampler, Sampling
from engine.tokenizer import Tokenizer
from model.llama import Llama
from weights.bits import Bits
from weights.cache import resolve
from weights.store import WeightsFile

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Memory:
    """Bytes on the device."""

    weights_bytes: int
    cache_bytes: int
    scratch_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.scratch_bytes


@dataclass
class Stats:
    """What one generation took. The first answer token counts as the prompt's time."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt: already in the cache
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generate_seconds: float = 0.0
    finish_reason: str | None = None  # "stop", "length", "context"; None: unfinished


class Engine:
    """A model ready to run. One generation at a time; the cache is kept between generations."""

    def __init__(
        self,
        weights: WeightsFile,
        device: Device,
        *,
        exact: bool = False,
        context: int | None = None,
    ) -> None:
        self.weights = weights
        self.config = weights.config
        self.device = device
        self.adapter_name = device.name
        self.exact = exact
        limit = self.config.max_seq_len
        self.context = min(DEFAULT_CONTEXT, limit) if context is None else context
        if not 1 <= self.context <= limit:
            raise EngineError(
                f"context is {self.context}, this model works with 1 to {limit} positions"
            )
        self.tokenizer = Tokenizer(weights.tokenizer_json, weights.chat_template, self.config)
        before = device.allocated_bytes
        self._model = Llama(device, weights, self.context, exact=exact)
        weights.release_pages()  # they are on the device now
        self._sampler = Sampler(
            self._model.kernels,
            self._model.state,
            self._model.logits.buffer,
            self.config.vocab_size,
        )
        step = (self._model.layers[1], self._model.last_head[1], self._sampler.plan)
        self._step = step
        # A fast GPU is kept busy by several tokens a submit and one submit ahead; on a software
        # adapter a token takes so long that this would only delay it.
        self._tokens_per_submit = 1 if device.software else 8
        self._submits_ahead = 0 if device.software else 1
        # Tokens of a prompt that are queued at once: Ctrl-C is heard between such batches.
        self._tokens_ahead = 0 if device.software else 512
        self._readbacks = [Readback(device, f"readback.{i}", 4 * RING) for i in range(2)]
        self._allocated_bytes = device.allocated_bytes - before
        self._cached: list[int] = []  # the tokens at positions 0, 1, ... of the cache
        self._active: Generation | None = None

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        exact: bool = False,
        context: int | None = None,
        adapter: str | None = None,
        bits: Bits | None = None,
    ) -> Self:
        """`model`: a weights file, or a source that is converted to `bits` on first use.

        `exact` computes with f32-like activations instead of int8 ones. `context` is the number of
        positions to make room for; `adapter` picks one by number or part of its name.
        """
        weights = WeightsFile.open(resolve(model, bits))
        return cls(weights, Device.open(adapter), exact=exact, context=context)

    def memory(self) -> Memory:
        used = self._model.weights_bytes, self._model.cache_bytes
        return Memory(*used, self._allocated_bytes - sum(used))

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of coded weights, entry points and row descriptions that one step reads."""
        model = self._model
        matrices = [model.lm_head, *(m for layer in model.blocks for m in layer.matrices)]
        return sum(matrix.read_bytes for matrix in matrices)

    def gpu_seconds(self, n_steps: int) -> float | None:
        """GPU time of `n_steps` tokens more after the last generation; None without timestamps.

        What a token takes beyond this is the host's. For benchmarks: the tokens are thrown away.
        """
        if len(self._cached) + 1 + n_steps > self.context:
            return None
        self._stop_active()
        self._model.write_state(len(self._cached), [0])
        return gpu_seconds(self.device, *(n_steps * self._step))

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 (n, vocab_size): row i scores what follows token_ids[: i + 1]."""
        self._check(token_ids)
        self._stop_active()
        self._cached = []
        rows = []
        pos = 0
        while pos < len(token_ids):
            chunk = token_ids[pos : pos + self._model.pass_tokens(len(token_ids) - pos)]
            rows.append(self._model.read_logits(pos, chunk))
            pos += len(chunk)
        self._cached = list(token_ids)
        return np.concatenate(rows)

    def generate(
        self,
        token_ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Iterate over at most `max_tokens` ids that follow `token_ids`.

        A stop id (by default the model's end-of-sequence ids) ends the iteration and is not part of
        it. What the cache already holds of the prompt is not computed again.
        """
        self._check(token_ids)
        self._stop_active()
        stops = self.config.eos_token_ids if stop_ids is None else stop_ids
        self._active = Generation(
            self, list(token_ids), max_tokens, sampling or Sampling(), frozenset(stops)
        )
        return self._active

    def _check(self, token_ids: Sequence[int]) -> None:
        if not 1 <= len(token_ids) <= self.context:
            raise EngineError(
                f"the prompt has {len(token_ids)} tokens, expected 1 to {self.context} (the "
                "context); shorten it or open the model with a larger --context"
            )
        vocab_size = self.config.vocab_size
        if not all(0 <= token < vocab_size for token in token_ids):
            raise EngineError(f"a token id is outside the vocabulary of {vocab_size}")

    def _stop_active(self) -> None:
        if self._active is not None:
            self._active.close()
            self._active = None

    def _read_prompt(self, token_ids: list[int], sampling: Sampling) -> int:
        """Submit the passes of a prompt and of the token after it; returns the tokens reused."""
        reused = 0
        for ours, theirs in zip(self._cached, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            reused += 1
        self._cached = token_ids[:reused]
        self._sampler.configure(sampling)
        pos = heard = reused
        while pos < len(token_ids):
            chunk = token_ids[pos : pos + self._model.pass_tokens(len(token_ids) - pos)]
            last = pos + len(chunk) == len(token_ids)
            plans = self._model.read(pos, chunk, sampling.seed, head=last)
            run(self.device, *plans, *([self._sampler.plan] if last else []))
            pos += len(chunk)
            if not last and pos - heard > self._tokens_ahead:
                self._submit(0).read()
                heard = pos
        return reused

    def _submit(self, n_steps: int) -> Readback:
        """Queue `n_steps` tokens, each the next one's input; the ring of tokens is read back."""
        readback = self._readbacks[0]
        self._readbacks.reverse()
        target = readback.claim()
        encoder = self.device.wgpu.create_command_encoder()
        if n_steps:
            compute_pass = encoder.begin_compute_pass()
            for _ in range(n_steps):
                for plan in self._step:
                    plan.replay(compute_pass)
            compute_pass.end()
        encoder.copy_buffer_to_buffer(self._sampler.sampled, 0, target, 0, 4 * RING)
        self.device.queue.submit([encoder.finish()])
        return readback


class Generation:
    """An iterator of token ids. `stats` is up to date at every token; `close` ends it at once."""

    def __init__(
        self,
        engine: Engine,
        token_ids: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
    ) -> None:
        self.stats = Stats(prompt_tokens=len(token_ids))
        self._tokens = self._run(engine, token_ids, max_tokens, sampling, stop_ids)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return next(self._tokens)

    def close(self) -> None:
        self._tokens.close()

    def _run(
        self,
        engine: Engine,
        token_ids: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
    ) -> Any:
        # The prompt's own last pass samples the first token; each further token takes one step,
        # whose input must still have a position.
        room = engine.context - len(token_ids) + 1
        wanted = min(max_tokens, room)
        if wanted < 1:
            self.stats.finish_reason = "length"
            return
        start = time.perf_counter()
        self.stats.reused_tokens = engine._read_prompt(token_ids, sampling)
        engine._cached = list(token_ids)
        pending: list[tuple[Readback, int]] = []  # with its number of new tokens, oldest first
        submitted = read = previous = 0
        while read < wanted:
            while submitted < wanted and len(pending) <= engine._submits_ahead:
                if submitted == 0:  # the prompt's own: nothing left to compute, to be shown at once
                    pending.append((engine._submit(0), 1))
                else:
                    n = min(engine._tokens_per_submit, wanted - submitted)
                    pending.append((engine._submit(n), n))
                submitted += pending[-1][1]
            readback, n = pending.pop(0)
            ring = readback.read()
            for _ in range(n):
                token = int(ring[read % RING])
                read += 1
                now = time.perf_counter()
                if read == 1:
                    self.stats.prompt_seconds = now - start
                    start = now
                else:
                    engine._cached.append(previous)  # it was this step's input
                    self.stats.generate_seconds = now - start
                if token in stop_ids:
                    self.stats.finish_reason = "stop"
                    return
                self.stats.generated_tokens += 1
                previous = token
                yield token
        self.stats.finish_reason = "length" if wanted == max_tokens else "context"
