"""The engine: a weights file on a device, token ids in, token ids or logits out."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np

from engine.batch import Batch
from engine.batch import Sequence as BatchSequence
from engine.device import Device, Readback
from engine.errors import DeviceLostError, EngineError, OutOfMemoryError
from engine.flags import CACHES
from engine.generation import Generation, Stats
from engine.interrupt import uninterrupted
from engine.kernel import Dispatch
from engine.memory import Memory, Wanted
from engine.plan import Plan, encode, gpu_seconds, run
from engine.sampler import RING, Sampler, Sampling
from engine.session import load_session, save_session
from engine.speculate import LOOKUP, Chance, Draft, Lookup, Policy
from engine.tokenizer import Tokenizer
from model.kv_cache import KVCache
from model.llama import CHECK_TOKENS, Llama
from model.rows import MOST_ROWS
from weights.bits import Bits
from weights.cache import resolve
from weights.store import WeightsFile

DEFAULT_CONTEXT = 4096
_STEP, _STEPS = 1, 0  # kinds of recorded passes, besides checks: a single step, a submit's worth


__all__ = ["Engine", "Generation", "Memory", "Stats"]


class Engine:
    """A model ready to run. One generation at a time; the cache is kept between generations."""

    def __init__(
        self,
        weights: WeightsFile,
        device: Device,
        *,
        exact: bool = False,
        context: int | None = None,
        cache: str = "f16",
        cache_positions: int | None = None,
        draft: WeightsFile | None = None,
        announce: Callable[[Engine, Memory], None] | None = None,
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
        positions = self.context if cache_positions is None else cache_positions
        if positions < self.context:
            raise EngineError(
                f"cache_positions is {positions}, expected at least the context, {self.context}"
            )
        if cache not in CACHES:
            raise EngineError(f"cache is {cache!r}, expected one of {', '.join(CACHES)}")
        if exact and cache != "f16":
            raise EngineError(f"exact activations keep their cache in f32, not in {cache}")
        if draft is not None:
            self._check_draft(draft)
            draft_context = min(self.context, draft.config.max_seq_len)
        wanted = Wanted(weights, device, self.context, exact, cache, positions)
        wanted.check_room()
        if announce is not None:
            plan = wanted.memory()
            if draft is not None:
                plan += Wanted(draft, device, draft_context, exact, cache).memory()
            announce(self, plan)
        before = device.allocated_bytes
        try:
            self._model = Llama(
                device,
                weights,
                self.context,
                exact=exact,
                cache=wanted.cache_kind,
                cache_positions=positions,
            )
        except OutOfMemoryError as error:
            room = device.allocated_bytes - before  # what it gave till then
            raise wanted.no_room(room) from error
        weights.release_pages()  # they are on the device now
        self._sampler = Sampler(
            self._model.kernels,
            self._model.state,
            self._model.logits.buffer,
            self.config.vocab_size,
            check=CHECK_TOKENS,
        )
        layers, heads = self._model.layers, self._model.heads
        self._step = layers[1], self._model.last_head[1], self._sampler.plan
        # A fast GPU is kept busy by several tokens a submit and one submit ahead; on a software
        # adapter a token takes so long that this would only delay it.
        self._tokens_per_submit = 1 if device.software else 8
        self._submits_ahead = 0 if device.software else 1
        # Tokens of a prompt that are queued at once: Ctrl-C is heard between such batches.
        self._tokens_ahead = 0 if device.software else 512
        self._readbacks = [Readback(device, f"readback.{i}", 4 * RING + 4) for i in range(2)]
        # To record a pass takes the host as long as a fast GPU takes to run it. So threads do it
        # beforehand, and a check is followed at once by whatever its outcome calls for. One holds
        # Python's lock, on and off, for the first half of its work: the other must not want it too.
        self._passes: dict[int, tuple[Plan, ...]] = {
            n: (layers[n], heads[n], self._sampler.check[n]) for n in CHECK_TOKENS
        }
        self._passes |= {_STEP: self._step, _STEPS: self._step * self._tokens_per_submit}
        self._recorders = None if device.software else ThreadPoolExecutor(2, "recorder")
        self._encoding = Lock()
        self._recorded: defaultdict[int, deque[Future[Any]]] = defaultdict(deque)
        self._allocated_bytes = device.allocated_bytes - before
        self._cached: list[int] = []  # the tokens at positions 0, 1, ... of the cache
        self._active: Generation | None = None
        self._batch: Batch | None = None  # the last one
        self._lookup = Lookup()
        self._policy = Policy(CHECK_TOKENS)
        self._draft: Engine | None = None
        self._draft_chance = Chance(1.2)
        if draft is not None:
            self._draft = Engine(draft, device, exact=exact, context=draft_context, cache=cache)
        self._model.kernels.wait()

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        exact: bool = False,
        context: int | None = None,
        cache: str = "f16",
        cache_positions: int | None = None,
        adapter: str | None = None,
        bits: Bits | None = None,
        draft: str | Path | None = None,
        announce: Callable[[Engine, Memory], None] | None = None,
    ) -> Self:
        """`model`: a weights file, or a source that is converted to `bits` on first use.

        `exact` computes with f32-like activations instead of int8 ones. `context` is the number of
        positions to make room for, `cache_positions` that for all sequences of a batch together, if
        it is to be more; `cache` is what it keeps of them: "f16", "int8", or "int4", values in 4
        bits and keys in 8. `adapter` picks one by number or part of its name. `draft` is a smaller
        model with the same tokenizer, whose guesses may make this one faster. `announce` is told
        about what the model will take once that is known to fit, before any of it is taken.
        """
        weights = WeightsFile.open(resolve(model, bits))
        drafts = None if draft is None else WeightsFile.open(resolve(draft))
        options: dict[str, Any] = dict(
            context=context, cache=cache, cache_positions=cache_positions
        )
        device = Device.open(adapter)
        with device.errors():
            return cls(weights, device, exact=exact, draft=drafts, announce=announce, **options)

    def close(self) -> None:
        """Give back the device's memory; the engine is of no use after this."""
        self._stop_active()
        # wgpu keeps what commands use until they are submitted. What a lost device does not take
        # stays until the program ends.
        with suppress(DeviceLostError), self.device.errors():
            recorded = [each.result() for stock in self._recorded.values() for each in stock]
            self._model.write_state(0, [0])  # raises, where to submit would end the process
            self.device.submit(*recorded)
        self._recorded.clear()
        if self._recorders is not None:
            self._recorders.shutdown()
        if self._draft is not None:
            self._draft.close()

    def memory(self) -> Memory:
        """Of the model and of the one that drafts for it."""
        used = self._model.weights_bytes, self._model.cache_bytes
        scratch = self._allocated_bytes - sum(used)
        own = Memory(*used, scratch + (self._batch.scratch_bytes if self._batch else 0))
        return own if self._draft is None else own + self._draft.memory()

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of coded weights, entry points and row descriptions that one step reads."""
        model = self._model
        matrices = [model.lm_head, *(m for layer in model.blocks for m in layer.matrices)]
        return sum(matrix.read_bytes for matrix in matrices)

    def step_dispatches(self) -> list[Dispatch]:
        """The launches of a step, for benchmarks: run out of their order they spoil the cache."""
        self._stop_active()
        self._cached = []
        self._model.write_state(0, [0])
        return [dispatch for plan in self._step for dispatch in plan.dispatches]

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
            with self.device.errors():
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
        speculate: bool = True,
        slide: bool = False,
    ) -> Generation:
        """Iterate over at most `max_tokens` ids that follow `token_ids`.

        A stop id (by default the model's end-of-sequence ids) ends the iteration and is not part of
        it. What the cache already holds of the prompt is not computed again. `speculate`: guess
        tokens and check several a pass, where that is faster; the text stays the same, but for
        ties within rounding. `slide`: where the context is full, go on without the middle of it.
        """
        self._check(token_ids)
        self._stop_active()
        stops = self.config.eos_token_ids if stop_ids is None else stop_ids
        self._active = Generation(
            self,
            list(token_ids),
            max_tokens,
            sampling or Sampling(),
            frozenset(stops),
            speculate,
            slide,
        )
        return self._active

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, int]]:
        """Go on after all prompts at once, with at most `max_tokens` ids each; every token comes
        with the number of its prompt. A `Batch` does more: sequences join and leave.
        """
        n, batch = min(MOST_ROWS, max(1, len(prompts))), self._batch
        if batch is None or batch.busy or batch.max_sequences < n:
            batch = Batch(self, n)
        sequences = [batch.add(ids, max_tokens=max_tokens, sampling=sampling) for ids in prompts]
        return _tokens(batch, sequences)

    @property
    def cached_tokens(self) -> list[int]:
        """What the cache holds, from position 0 on; a prompt that begins with it is read faster."""
        return list(self._cached)

    @property
    def cache(self) -> KVCache:
        return self._model.cache

    def save_session(self, path: str | Path, note: str = "") -> int:
        """Write the tokens read so far and the cache of them; returns how many there are.

        The file appears whole or not at all. `note` comes back from `load_session`.
        """
        self._stop_active()
        with self.device.errors():
            return save_session(self, Path(path), note)

    def load_session(self, path: str | Path) -> str:
        """Go on from where `save_session` was called, also with another context or adapter.

        Returns the note. EngineError, with nothing changed, when the file is damaged or of another
        model or mode, or longer than the context.
        """
        tokens, tensors, note = load_session(self, Path(path))
        self._stop_active()
        self._cached = []
        with self.device.errors():
            self.cache.write(self.device, tensors)
        self._cached = tokens
        return note

    def _check_draft(self, draft: WeightsFile) -> None:
        """EngineError unless the draft model means the same by every token."""
        theirs = Tokenizer(draft.tokenizer_json, None, draft.config)
        sizes = draft.config.vocab_size, self.config.vocab_size
        if theirs.vocab != self.tokenizer.vocab or sizes[0] > sizes[1]:
            raise EngineError(
                f"{draft.path}: cannot draft for {self.weights.path}, as its tokenizer is another "
                f"(vocabulary of {sizes[0]}, expected the same {sizes[1]} tokens); choose a model "
                "of the same family"
            )

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
        """Before anything that uses the cache."""
        if self._batch is not None:
            self._batch.forget()
        if self._active is not None:
            self._active.close()
            self._active = None

    def _claim_cache(self) -> None:
        """For the sequences of the batch."""
        if self._active is not None:
            self._active.close()
            self._active = None
        self._cached = []

    def _read_prompt(self, token_ids: list[int], sampling: Sampling, draw: bool = True) -> int:
        """Submit the passes of a prompt and of the token after it; returns the tokens reused.

        Without `draw` that token is not drawn, and all of the prompt may be in the cache already.
        """
        reused = 0
        for ours, theirs in zip(self._cached, token_ids[:-1] if draw else token_ids, strict=False):
            if ours != theirs:
                break
            reused += 1
        self._cached = token_ids[:reused]
        self._sampler.configure(sampling)
        if self._draft is not None:
            self._draft._sampler.configure(sampling)
        pos = heard = reused
        while pos < len(token_ids):
            chunk = token_ids[pos : pos + self._model.pass_tokens(len(token_ids) - pos)]
            last = pos + len(chunk) == len(token_ids)
            plans = self._model.read(pos, chunk, sampling.seed, head=last and draw)
            run(self.device, *plans, *([self._sampler.plan] if last and draw else []))
            pos += len(chunk)
            if not last and pos - heard > self._tokens_ahead:
                self._submit().read()
                heard = pos
        return reused

    @uninterrupted()
    def _submit(self, plans: Sequence[Plan] = ()) -> Readback:
        """Queue one pass over `plans`; then the ring of tokens, and how many went there, come back.

        Plans that draw leave the next one's input on the GPU.
        """
        encoder = self.device.wgpu.create_command_encoder()
        encode(encoder, plans)
        return self._finish(encoder.finish())

    def _finish(self, *commands: Any) -> Readback:
        """Queue `commands` and the ring's way back."""
        readback = self._readbacks[0]
        self._readbacks.reverse()
        encoder, target = self.device.wgpu.create_command_encoder(), readback.buffer
        encoder.copy_buffer_to_buffer(self._sampler.sampled, 0, target, 0, 4 * RING)
        encoder.copy_buffer_to_buffer(self._model.state, 8, target, 4 * RING, 4)  # n_sampled
        readback.submit(*commands, encoder.finish())
        return readback

    def _submit_steps(self, n_steps: int) -> Readback:
        if n_steps == self._tokens_per_submit:
            return self._submit_recorded(_STEPS)
        return self._submit_recorded(_STEP, n_steps, self._tokens_per_submit // 2)

    @uninterrupted()
    def _submit_recorded(self, kind: int, times: int = 1, stock: int = 1) -> Readback:
        """Queue a check of `kind` tokens in the state, or `times` single steps or _STEPS, and have
        `stock` of the same recorded for the next time.
        """
        if self._recorders is None:
            return self._finish(*(self._record(kind) for _ in range(times)))
        recorded = self._recorded[kind]
        self._have_recorded(kind, times)
        readback = self._finish(*(recorded.popleft().result() for _ in range(times)))
        self._have_recorded(kind, stock)
        return readback

    def _have_recorded(self, kind: int, count: int) -> None:
        assert self._recorders is not None
        for _ in range(len(self._recorded[kind]), count):
            self._recorded[kind].append(self._recorders.submit(self._record, kind))

    def _record(self, kind: int) -> Any:
        encoder = self.device.wgpu.create_command_encoder()
        with self._encoding:
            encode(encoder, self._passes[kind])
        return encoder.finish()

    def _submit_check(
        self, draft: Draft, token: int, sampling: Sampling, n_sampled: int
    ) -> Readback:
        """Queue a check of what is to follow `token`, the next input."""
        pos, n = len(self._cached), draft.n_tokens
        if draft.source == LOOKUP:
            tokens = [token, *self._lookup.draft(n - 1)]
            self._model.write_state(pos, tokens, sampling.seed, n_sampled)
            return self._submit_recorded(n)
        assert self._draft is not None
        if self._draft._cached != self._cached:
            self._draft._read_prompt(self._cached, sampling, draw=False)
            self._draft._cached = list(self._cached)
        drafter = self._draft._model
        # With the same seed it draws with the same noise: what both find likely, both draw. It
        # takes a step more than there are drafts, and so has read all of them, if all are right.
        drafter.write_state(pos, [token], sampling.seed)
        self._model.write_state(pos, [token] * n, sampling.seed, n_sampled)
        with uninterrupted():
            encoder = self.device.wgpu.create_command_encoder()
            encode(encoder, self._draft._step * n)
            encoder.copy_buffer_to_buffer(
                self._draft._sampler.sampled, 0, self._model.state, 4 * 5, 4 * (n - 1)
            )
            encode(encoder, self._passes[n])
            return self._finish(encoder.finish())


def _tokens(batch: Batch, sequences: list[BatchSequence]) -> Iterator[tuple[int, int]]:
    numbers = {id(sequence): i for i, sequence in enumerate(sequences)}
    try:
        while batch.busy:
            for sequence, token in batch.step():
                yield numbers[id(sequence)], token
    finally:
        for sequence in sequences:
            batch.remove(sequence)
