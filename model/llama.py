"""A Llama as compute passes: one dispatch per line, in the order of the paper.

Everything is made at load: weights, activations, cache, and the recorded plans that a step replays.
The same plan serves every position: what changes from step to step is in the `state` buffer, on the
GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.device import Device
from engine.kernel import Dispatch, Kernels
from engine.plan import Plan, run
from model.activations import FLOAT, Activations, Output, Residual, Then
from model.gpu_matrix import GpuMatrix, agree
from model.kv_cache import KVCache, half_padded
from model.operations import AttentionCut, Operations
from model.prompt import Prompt
from weights.store import WeightsFile

MAX_TOKENS = 8  # that one pass may carry; shaders/shared/state.wgsl
CHECK_TOKENS = 4, MAX_TOKENS  # of passes that check guesses
INT8_DIGITS, EXACT_DIGITS = 1, 3  # shaders/shared/dot.wgsl


class Layer:
    """The weights of one block."""

    def __init__(self, kernels: Kernels, weights: WeightsFile, index: int) -> None:
        name = f"model.layers.{index}"

        def matrix(suffix: str) -> GpuMatrix:
            return GpuMatrix(kernels, f"{name}.{suffix}", weights.matrix(f"{name}.{suffix}"))

        def vector(suffix: str) -> Any:
            return kernels.device.upload(
                f"{name}.{suffix}", weights.tensor(f"{name}.{suffix}.weight")
            )

        self.input_layernorm = vector("input_layernorm")
        self.qkv_proj = matrix("self_attn.qkv_proj")
        self.o_proj = matrix("self_attn.o_proj")
        self.post_attention_layernorm = vector("post_attention_layernorm")
        self.gate_up_proj = matrix("mlp.gate_up_proj")
        self.down_proj = matrix("mlp.down_proj")
        c = weights.config
        added = ["qkv_proj.bias"] * c.qkv_bias + ["q_norm.weight", "k_norm.weight"] * c.qk_norm
        self.qkv_added = None  # what shaders/qkv_heads.wgsl does to q, k and v, if anything
        if added:
            vectors = [weights.tensor(f"{name}.self_attn.{suffix}") for suffix in added]
            self.qkv_added = kernels.device.upload(f"{name}.qkv_added", np.concatenate(vectors))

    @property
    def matrices(self) -> tuple[GpuMatrix, ...]:
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj


class Llama:
    """The model on one device, with room for `max_pos` positions, and in the cache for
    `cache_positions` of several sequences together.

    `layers[tokens]` is the plan of all blocks for a pass of 1, 4 or MAX_TOKENS tokens; `last_head`
    gives the logits of the pass's last token (in row 0), `heads[tokens]` those of all of them.
    """

    def __init__(
        self,
        device: Device,
        weights: WeightsFile,
        max_pos: int,
        *,
        exact: bool = False,
        cache: str = "f16",
        cache_positions: int = 0,
    ) -> None:
        self.device = device
        self.max_pos = max_pos
        self.config = c = weights.config
        self.kernels = Kernels(device)
        self.digits = EXACT_DIGITS if exact else INT8_DIGITS
        if weights.lossless:
            self.digits = FLOAT  # coarser activations would spoil what the weights have kept

        before = device.allocated_bytes
        tied = weights.matrix("model.embed_tokens")
        self.embed_tokens = GpuMatrix(self.kernels, "model.embed_tokens", tied, one_split=True)
        self.lm_head = self.embed_tokens
        if not c.tie_embeddings:
            self.lm_head = GpuMatrix(
                self.kernels, "lm_head", weights.matrix("lm_head"), one_split=True
            )
        self.blocks = [Layer(self.kernels, weights, i) for i in range(c.n_layers)]
        for alike in zip(*(layer.matrices for layer in self.blocks), strict=True):
            agree(alike)
        self.norm = device.upload("model.norm", weights.tensor("model.norm.weight"))
        self.weights_bytes = device.allocated_bytes - before

        before = device.allocated_bytes
        # A pass of MAX_TOKENS at the very end writes nothing beyond max_pos: only positions of real
        # tokens are written.
        self.cache = KVCache.empty(device, c, max(max_pos, cache_positions), cache)
        self.cache_bytes = device.allocated_bytes - before

        # A vector's worth on a CPU: of workgroups of 64 that wait for each other in a loop llvmpipe
        # (Mesa 22.3) lost 0.4 MB a launch.
        self.lanes = 8 if device.software else 512 if c.dim >= 2048 else 256
        self.attention_cut = cut = AttentionCut.of(c, device)
        # Attention may finish a head by itself; and on a CPU a matvec of one token do what comes
        # after it. On a GPU that takes workgroup memory and registers, and saves nothing.
        self.finishes_heads = c.head_dim % 32 == 0 and (device.fences or cut.n_splits == 1)
        self.finishes_heads &= cut.overrides["lanes"] >= c.head_dim // 4
        self._fused = device.software and device.fences and self.digits != FLOAT
        # Small matrices make their inputs themselves, on GPUs alone.
        first = self.blocks[0]
        self._makes_norms = all(
            matrix.makes_input(self.digits, all_columns=True)
            for matrix in (first.qkv_proj, first.gate_up_proj)
        )
        self._makes_h = first.down_proj.makes_input(self.digits)
        # Norms that are launches leave their factor to the matvec, of one token on GPUs.
        self._shares_norms = not device.software and self.digits != FLOAT and c.dim % 4 == 0
        self.operations = Operations(self)
        n, d = MAX_TOKENS, self.digits
        self.state = device.empty("state", 4 * (4 + n))
        self.x = device.empty("x", 4 * n * c.dim)
        self.x_out = device.empty("x_out", 4 * c.dim)
        self.xn = Activations.empty(device, "xn", n, d, c.dim)
        self.qkv = first.qkv_proj.output("qkv", n)
        self.partial = device.empty(
            "attn.partial", 4 * n * c.n_heads * cut.n_splits * (2 * half_padded(c) + 2)
        )
        most = max(n * c.n_heads, -(-c.dim // 32), -(-c.hidden_dim // 32))
        self.arrived = device.empty("arrived", 4 * most)  # counts of heads, or of blocks
        self.attn = Activations.empty(device, "attn", n, d, c.q_dim)
        self.o = first.o_proj.output("o", n)
        self.gate_up = first.gate_up_proj.output("gate_up", n)
        self.h = Activations.empty(device, "h", n, d, c.hidden_dim)
        self.down = first.down_proj.output("down", n)
        # What the first layer's norm adds, as others add `down`: nothing, but by the same kernel.
        self.nothing = first.down_proj.output("nothing", 1)
        self.logits = self.lm_head.output("logits", n)
        self.qkv_heads: Output | None = None
        if c.qkv_bias or c.qk_norm:
            self.qkv_heads = Output(device.empty("qkv_heads", 4 * n * (c.q_dim + 2 * c.kv_dim)), 1)
        turns = rope_table(max_pos, c.head_dim, c.rope_theta, c.rope_divisors)
        self.rope = device.upload("rope", turns)
        self.no_rope = None  # layers without RoPE turn by nothing
        if c.unrotated_layers:
            self.no_rope = device.upload(
                "no_rope", np.ones_like(turns) * np.array([1, 0], np.float32)
            )

        self.layers = {n: Plan(self._layers(n)) for n in (1, *CHECK_TOKENS)}
        self.last_head = Plan(self._head(MAX_TOKENS, 1)), Plan(self._head(1, 1))
        self.heads = {n: Plan(self._head(n, n)) for n in CHECK_TOKENS}
        self._head_product = Plan(
            self.lm_head.matvec(self.xn, self.logits, tokens=MAX_TOKENS, digits=self.digits)
        )
        self.prompt = Prompt(self) if self.digits == INT8_DIGITS and Prompt.fits(self) else None

    def write_state(
        self, pos: int, tokens: Sequence[int], seed: int = 0, n_sampled: int = 0
    ) -> None:
        """The next pass reads `tokens` (at most MAX_TOKENS) at positions pos, pos + 1, ...

        What is drawn from then on goes to places `n_sampled`, ... of the sampler's ring.
        """
        state = np.zeros(4 + MAX_TOKENS, np.uint32)
        state[:4] = pos, len(tokens), n_sampled, seed
        state[4 : 4 + len(tokens)] = tokens
        self.device.write(self.state, state)

    def pass_tokens(self, tokens: int) -> int:
        """How many of a text's next `tokens` one pass reads."""
        if self.prompt and tokens >= self.prompt.min_tokens:
            return min(tokens, self.prompt.max_tokens)
        return min(tokens, MAX_TOKENS)

    def read(self, pos: int, tokens: Sequence[int], seed: int = 0, *, head: bool) -> list[Plan]:
        """Begin a pass that reads `tokens`, as many as `pass_tokens` says, at `pos`, with `head`
        also the last one's logits. Returns the plans of it that are still to be submitted.
        """
        if self.prompt and len(tokens) > MAX_TOKENS:
            rest = self._begin(self.prompt, pos, tokens)
            self.write_state(pos + len(tokens) - 1, tokens[-1:], seed)  # for the sampler
            return [rest, self.prompt.last_head] if head else [rest]
        self.write_state(pos, tokens, seed)
        few = len(tokens) == 1
        plans = [self.layers[1 if few else MAX_TOKENS]]
        return [*plans, self.last_head[1 if few else 0]] if head else plans

    def read_logits(self, pos: int, tokens: Sequence[int]) -> np.ndarray:
        """Such a pass, now: float32 (len(tokens), vocab_size)."""
        if not self.prompt or len(tokens) <= MAX_TOKENS:
            self.write_state(pos, tokens)
            run(self.device, self.layers[MAX_TOKENS], self.heads[MAX_TOKENS])
            return self._logits(len(tokens))
        run(self.device, self._begin(self.prompt, pos, tokens), self.prompt.norms(len(tokens)))
        rows = []
        for first in range(0, len(tokens), MAX_TOKENS):
            self.prompt.copy_normed(first, MAX_TOKENS)
            run(self.device, self._head_product)
            rows.append(self._logits(min(MAX_TOKENS, len(tokens) - first)))
        return np.concatenate(rows)

    def _begin(self, prompt: Prompt, pos: int, tokens: Sequence[int]) -> Plan:
        prompt.write_state(pos, tokens)
        *parts, last = prompt.layers(len(tokens))
        for part in parts:
            run(self.device, part)
        return last

    def _logits(self, tokens: int) -> np.ndarray:
        return self.device.read(self.logits.buffer, np.float32, (tokens, self.config.vocab_size))

    def turns(self, layer: int) -> Any:
        """The table by which a layer's q and k are rotated."""
        return self.rope if self.config.is_rotated(layer) else self.no_rope

    def _layers(self, tokens: int) -> Iterator[Dispatch]:
        n: dict[str, Any] = {"tokens": tokens, "digits": self.digits}
        do = self.operations
        made = self._makes_norms and tokens == 1
        fused = self._fused and tokens == 1
        eps = self._eps(tokens)
        norms = [layer.input_layernorm for layer in self.blocks] + [self.norm]
        before = self.nothing if tokens == 1 else Output(self.down.buffer, 0)
        yield from self.embed_tokens.embed(self.state, self.x, tokens=tokens)
        for i, layer in enumerate(self.blocks):
            xn: Activations | Residual = self.xn
            if made:
                xn = Residual(self.x, before, norms[i], self.x_out)
            elif i == 0 or not fused:
                yield self._norm(tokens, before, norms[i])
            before = self.down
            has_factor = i == 0 and fused
            yield from layer.qkv_proj.matvec(xn, self.qkv, **n, eps=None if has_factor else eps)
            qkv = self.qkv
            if self.qkv_heads is not None:
                qkv = self.qkv_heads
                yield do.qkv_heads(tokens, self.qkv, layer.qkv_added, out=qkv.buffer)
            yield do.attention(
                tokens, i, qkv, state=self.state, arrived=self.arrived, **self._attended
            )
            if not self.finishes_heads:
                yield do.attention_combine(tokens, **self._attended)
            norm = layer.post_attention_layernorm
            then = self._then_norm(norm) if fused else None
            yield from layer.o_proj.matvec(self.attn, self.o, **n, then=then)

            if made:
                xn = Residual(self.x_out, self.o, norm, self.x)
            elif not fused:
                yield self._norm(tokens, self.o, norm)
            then = self._then_swiglu() if fused else None
            yield from layer.gate_up_proj.matvec(xn, self.gate_up, **n, eps=eps, then=then)
            h: Activations | Output = self.h
            if tokens == 1 and self._makes_h:
                h = self.gate_up
            elif then is None:
                yield do.swiglu(tokens, self.gate_up, out=self.h)
            then = self._then_norm(norms[i + 1]) if fused else None
            yield from layer.down_proj.matvec(h, self.down, **n, then=then)

    @property
    def _normed(self) -> dict[str, Any]:
        """Where norms find and leave what they work on."""
        return dict(state=self.state, x=self.x, out=self.xn)

    @property
    def _attended(self) -> dict[str, Any]:
        """Likewise attention."""
        return dict(partial=self.partial, out=self.attn, n_splits=self.attention_cut.n_splits)

    def _norm(
        self, pass_tokens: int, y: Output, weight: Any, tokens: int | None = None
    ) -> Dispatch:
        """A launch of its own, of all of a pass's tokens or the last one."""
        if pass_tokens == 1 and self._shares_norms:
            return self.operations.norm_shares(y, weight, x=self.x, out=self.xn)
        tokens = tokens or pass_tokens
        last = tokens < pass_tokens
        return self.operations.rms_norm(
            tokens, y, weight, room=pass_tokens, last=last, **self._normed
        )

    def _eps(self, pass_tokens: int) -> float | None:
        """Of norms, where these leave their factor to the matvec that follows."""
        left = pass_tokens == 1 and (self._fused or self._shares_norms)
        return self.config.norm_eps if left else None

    def _head(self, pass_tokens: int, tokens: int) -> Iterator[Dispatch]:
        if not self._fused or pass_tokens > 1:
            yield self._norm(pass_tokens, self.down, self.norm, tokens)
        yield from self.lm_head.matvec(
            self.xn,
            self.logits,
            tokens=tokens,
            digits=self.digits,
            eps=self._eps(pass_tokens),
        )

    def _then_norm(self, weight: Any) -> Then:
        c = self.config
        return Then(False, c.dim, self.x, weight, self.xn, self.arrived)

    def _then_swiglu(self) -> Then:
        # x and the weight have no meaning
        return Then(True, self.config.hidden_dim, self.x, self.norm, self.h, self.arrived)


def rope_table(
    max_pos: int, head_dim: int, theta: float, divisors: Sequence[float] = ()
) -> np.ndarray:
    """cos and sin of position * theta^(-2i / head_dim) / divisors[i], 1 if there are none.

    float32 (max_pos, head_dim / 2, 2).

    A table, because a GPU's own sine is only good near zero, and angles reach the last position.
    """
    half = head_dim // 2
    frequencies = theta ** (-np.arange(half) / half) / (np.array(divisors) if divisors else 1)
    angles = np.arange(max_pos)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
