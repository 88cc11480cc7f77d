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
from model.gpu_matrix import FLOAT, Activations, GpuMatrix, Output
from model.kv_cache import KVCache, half_padded
from model.prompt import Prompt
from weights.store import WeightsFile

MAX_TOKENS = 8  # that one pass may carry; shaders/shared/state.wgsl
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

    @property
    def matrices(self) -> tuple[GpuMatrix, ...]:
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj


class Llama:
    """The model on one device, with room for `max_pos` positions.

    `layers[tokens]` is the plan of all blocks for a pass of 1 or MAX_TOKENS tokens; `last_head`
    gives the logits of the pass's last token (in row 0), `all_heads` those of all MAX_TOKENS.
    """

    def __init__(
        self, device: Device, weights: WeightsFile, max_pos: int, *, exact: bool = False
    ) -> None:
        self.device = device
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
        self.norm = device.upload("model.norm", weights.tensor("model.norm.weight"))
        self.weights_bytes = device.allocated_bytes - before

        before = device.allocated_bytes
        # A pass of MAX_TOKENS at the very end writes nothing beyond max_pos: only positions of real
        # tokens are written.
        self.cache = KVCache.empty(device, c, max_pos, f32=exact)
        self.cache_bytes = device.allocated_bytes - before

        # On a software adapter every workgroup costs, and a few fill the cores; on a GPU splits
        # fill it.
        self._splits = 1 if device.software else 16
        self.lanes = 64 if device.software else 256
        # (lanes, positions a lane scores). A CPU goes through every lane's code, idle or not: few
        # lanes, and q loaded once for four positions. A GPU would rather have one load in each.
        value_lanes = -(-half_padded(c) // 4 // 8) * 8
        self._attention_shape = (max(16, value_lanes), 4) if device.software else (64, 1)
        n, d = MAX_TOKENS, self.digits
        first = self.blocks[0]
        self.state = device.empty("state", 4 * (4 + n))
        self.x = device.empty("x", 4 * n * c.dim)
        self.xn = Activations.empty(device, "xn", n, d, c.dim)
        self.qkv = first.qkv_proj.output("qkv", n)
        self.partial = device.empty(
            "attn.partial", 4 * n * c.n_heads * self._splits * (2 * half_padded(c) + 2)
        )
        self.attn = Activations.empty(device, "attn", n, d, c.q_dim)
        self.o = first.o_proj.output("o", n)
        self.gate_up = first.gate_up_proj.output("gate_up", n)
        self.h = Activations.empty(device, "h", n, d, c.hidden_dim)
        self.down = first.down_proj.output("down", n)
        self.logits = self.lm_head.output("logits", n)
        self.rope = device.upload("rope", rope_table(max_pos, c.head_dim, c.rope_theta))

        self.layers = {n: Plan(self._layers(n)) for n in (1, MAX_TOKENS)}
        self.last_head = Plan(self._head(MAX_TOKENS, 1)), Plan(self._head(1, 1))
        self.all_heads = Plan(self._head(MAX_TOKENS, MAX_TOKENS))
        self._head_product = Plan(
            self.lm_head.matvec(self.xn, self.logits, tokens=MAX_TOKENS, digits=self.digits)
        )
        self.prompt = Prompt(self) if self.digits == INT8_DIGITS and Prompt.fits(self) else None

    def write_state(self, pos: int, tokens: Sequence[int], seed: int = 0) -> None:
        """The next pass reads `tokens` (at most MAX_TOKENS) at positions pos, pos + 1, ..."""
        state = np.zeros(4 + MAX_TOKENS, np.uint32)
        state[:4] = pos, len(tokens), 0, seed
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
            run(self.device, self.layers[MAX_TOKENS], self.all_heads)
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

    def _layers(self, tokens: int) -> Iterator[Dispatch]:
        n = {"tokens": tokens, "digits": self.digits}
        previous: Output | None = None
        yield from self.embed_tokens.embed(self.state, self.x, tokens=tokens)
        for i, layer in enumerate(self.blocks):
            keys, values = self.cache.keys[i], self.cache.values[i]
            yield self._rms_norm(previous, layer.input_layernorm, tokens)
            yield from layer.qkv_proj.matvec(self.xn, self.qkv, **n)
            yield self._attention(keys, values, tokens)
            yield self._attention_combine(tokens)
            yield from layer.o_proj.matvec(self.attn, self.o, **n)

            yield self._rms_norm(self.o, layer.post_attention_layernorm, tokens)
            yield from layer.gate_up_proj.matvec(self.xn, self.gate_up, **n)
            yield self._swiglu(tokens)
            yield from layer.down_proj.matvec(self.h, self.down, **n)
            previous = self.down

    def _head(self, pass_tokens: int, tokens: int) -> Iterator[Dispatch]:
        yield self._rms_norm(self.down, self.norm, tokens, pass_tokens=pass_tokens)
        yield from self.lm_head.matvec(self.xn, self.logits, tokens=tokens, digits=self.digits)

    def _rms_norm(
        self, y: Output | None, weight: Any, tokens: int, pass_tokens: int | None = None
    ) -> Dispatch:
        """x += y, xn = norm(x); for the head of one token that token is the last of the pass."""
        pass_tokens = pass_tokens or tokens
        dim = self.config.dim
        kernel = self.kernels.get(
            "rms_norm", lanes=self.lanes, digits=self.digits, splits=y.splits if y else 0
        )
        return kernel.dispatch(
            [1, tokens],
            dict(
                dim=dim,
                n_blocks=-(-dim // 32),
                tokens=pass_tokens,
                last=int(tokens < pass_tokens),
                eps=self.config.norm_eps,
            ),
            state=self.state,
            y=y.buffer if y else self.down.buffer,
            weight=weight,
            x=self.x,
            x_digits=self.xn.digits,
            x_scale=self.xn.scale,
        )

    def _attention(self, keys: Any, values: Any, tokens: int) -> Dispatch:
        c = self.config
        lanes, per_lane = self._attention_shape
        kernel = self.kernels.get(
            "attention",
            cache_f32=self.cache.f32,
            splits=self.qkv.splits,
            lanes=lanes,
            per_lane=per_lane,
            n_splits=self._splits,
        )
        return kernel.dispatch(
            [self._splits, c.n_heads, tokens],
            dict(
                n_heads=c.n_heads,
                n_kv_heads=c.n_kv_heads,
                head_dim=c.head_dim,
                half_padded=half_padded(c),
                max_pos=self.cache.max_pos,
                tokens=tokens,
                scale=c.head_dim**-0.5,
            ),
            state=self.state,
            y=self.qkv.buffer,
            rope=self.rope,
            k_cache=keys,
            v_cache=values,
            partial=self.partial,
        )

    def _attention_combine(self, tokens: int) -> Dispatch:
        c = self.config
        n_blocks = -(-c.q_dim // 32)
        kernel = self.kernels.get(
            "attention_combine", lanes=self.lanes, digits=self.digits, n_splits=self._splits
        )
        return kernel.dispatch(
            [-(-n_blocks * 8 // self.lanes), tokens],
            dict(
                n_heads=c.n_heads,
                head_dim=c.head_dim,
                half_padded=half_padded(c),
                n_blocks=n_blocks,
            ),
            partial=self.partial,
            x_digits=self.attn.digits,
            x_scale=self.attn.scale,
        )

    def _swiglu(self, tokens: int) -> Dispatch:
        n_blocks = -(-self.config.hidden_dim // 32)
        kernel = self.kernels.get(
            "swiglu", lanes=self.lanes, digits=self.digits, splits=self.gate_up.splits
        )
        return kernel.dispatch(
            [-(-n_blocks * 8 // self.lanes), tokens],
            dict(
                hidden_dim=self.config.hidden_dim,
                n_blocks=n_blocks,
                tokens=tokens,
            ),
            y=self.gate_up.buffer,
            x_digits=self.h.digits,
            x_scale=self.h.scale,
        )


def rope_table(max_pos: int, head_dim: int, theta: float) -> np.ndarray:
    """cos and sin of position * theta^(-2i / head_dim): float32 (max_pos, head_dim / 2, 2).

    A table, because a GPU's own sine is only good near zero, and angles reach the last position.
    """
    half = head_dim // 2
    angles = np.arange(max_pos)[:, None] * theta ** (-np.arange(half) / half)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
